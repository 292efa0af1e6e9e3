"""Takes an ONNX file apart at the protobuf wire level, so that weights are views of the file and never copied.

`split_weights` walks the outermost fields only: model -> graph -> initializers. The raw data of every larger
initializer is cut out and described by a `RawTensor`; what remains is a small, ordinary ModelProto. Every length is
checked against the bytes that are really there before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ingot.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_NAME, _TENSOR_RAW = 7, 5, 8, 9
_MODEL_FIELDS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26))

# Smaller raw data stays inside the proto, where shape inference can see it.
RAW_KEEP_BYTES = 1024


@dataclass(frozen=True)
class RawTensor:
    """Where the raw little-endian bytes of one initializer lie in the file."""

    offset: int
    bytes: int


@dataclass(frozen=True)
class _Field:
    number: int
    kind: int
    start: int  # of the tag
    body: int  # of the payload
    end: int


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ModelError("the ONNX file is truncated", found=f"it ends inside a number at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ModelError("the file is not an ONNX model", found=f"a number of more than 10 bytes at byte {at}")


def _fields(data: memoryview, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        body = at
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            length, body = _varint(data, at, end)
            at = body + length
        else:
            raise ModelError("the file is not an ONNX model", found=f"protobuf wire type {kind} at byte {start}")
        if number == 0:
            raise ModelError("the file is not an ONNX model", found=f"protobuf field 0 at byte {start}")
        if at > end:
            raise ModelError(
                "the ONNX file is truncated or damaged",
                where=f"byte {start}",
                found=f"a field of {at - body} bytes where {max(end - body, 0)} are left",
                hint="fetch or export the file again",
            )
        yield _Field(number, kind, start, body, at)


def _encode(number: int, parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    def varint(value: int) -> bytes:
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        return bytes(out)

    return [varint(number << 3 | _BYTES), varint(sum(len(part) for part in parts)), *parts]


def split_weights(data: bytes) -> tuple[bytes, dict[str, RawTensor]]:
    """Split `data` into a ModelProto without large raw data, and the places of that raw data by initializer name.

    Raises ModelError if the bytes are no protobuf message of ONNX's outer shape.
    """
    view = memoryview(data)
    pieces: list[bytes | memoryview] = []
    raw: dict[str, RawTensor] = {}
    graphs = 0
    for field in _fields(view, 0, len(view)):
        if field.number not in _MODEL_FIELDS:
            raise ModelError(
                "the file is not an ONNX model",
                found=f"unknown outer field {field.number} at byte {field.start}",
                allowed="an ONNX ModelProto",
                hint="the file is damaged, or is another format under this name",
            )
        if field.number == _MODEL_GRAPH and field.kind == _BYTES:
            graphs += 1
            if graphs > 1:
                raise ModelError("the ONNX file holds more than one main graph", found=f"at byte {field.start}")
            pieces += _encode(_MODEL_GRAPH, _split_graph(view, field, raw))
        else:
            pieces.append(view[field.start : field.end])
    if graphs == 0:
        raise ModelError("the ONNX file holds no graph", hint="the file is damaged, or is another format")
    return b"".join(pieces), raw


def _split_graph(view: memoryview, graph: _Field, raw: dict[str, RawTensor]) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    for field in _fields(view, graph.body, graph.end):
        # Every small field, and everything that is not a weight, passes through as it is.
        if field.number != _GRAPH_INITIALIZER or field.kind != _BYTES or field.end - field.body < RAW_KEEP_BYTES:
            pieces.append(view[field.start : field.end])
            continue
        kept: list[bytes | memoryview] = []
        name, found = "", None
        for part in _fields(view, field.body, field.end):
            if part.number == _TENSOR_RAW and part.kind == _BYTES and part.end - part.body >= RAW_KEEP_BYTES:
                if found is not None:
                    raise ModelError("an initializer holds raw data twice", where=f"byte {part.start}")
                found = RawTensor(part.body, part.end - part.body)
                continue
            if part.number == _TENSOR_NAME and part.kind == _BYTES:
                try:
                    name = bytes(view[part.body : part.end]).decode()
                except UnicodeDecodeError:
                    raise ModelError("an initializer's name is not UTF-8", where=f"byte {part.start}") from None
            kept.append(view[part.start : part.end])
        if found is not None:
            if not name or name in raw:
                what = "two initializers have the same name" if name else "an initializer has no name"
                raise ModelError(what, where=f"byte {field.start}", found=repr(name))
            raw[name] = found
        pieces += _encode(_GRAPH_INITIALIZER, kept)
    return pieces
