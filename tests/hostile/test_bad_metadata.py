"""Metadata that lies, given to both loaders: it is read before anything is believed, so it must be survived."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from ingot.runtime.loader import IngotError, LoadError, load, read_metadata
from loader.artifacts import (
    ABI,
    LOAD,
    altered,
    encode,
    library,
    metadata_of,
    note_row,
    open_all,
    refuse,
    section_table,
    with_note,
    write,
)


def note(meta: dict[str, Any], **changes: Any) -> bytes:
    return encode({**meta, **changes})


def notes() -> dict[str, bytes]:
    """Metadata that is not what it should be."""
    meta = metadata_of(library())
    good = encode(meta)
    tensor = meta["inputs"][0]
    output, shapes = meta["outputs"][0], [t["shape"] for t in meta["outputs"]]
    bound = {"name": "k", "dtype": "int64", "shape": [1], "position": 0, "values": [1], "sha256": ""}
    state = {"input": "h", "output": "i", "dtype": "int8", "shape": [1], "initial": 0}
    state |= {"input_position": 0, "output_position": 0}
    q = {"scales": [1.0], "zero_points": [0], "axis": 0}
    return {
        "empty": b"",
        "null": b"null",
        "list": b"[]",
        "number": b"7",
        "string": b'"abi"',
        "not closed": good[:-1],
        "more behind": good + b"{}",
        "binary": bytes(range(256)),
        "not utf-8": good.replace(b'"demo"', b'"d\xff\xfe"'),
        "zero byte": good.replace(b'"demo"', b'"de\0mo"'),
        "twice": good.replace(b'"abi":1', b'"abi":1,"abi":1'),
        "nan": good.replace(b'"macs":', b'"macs":NaN,"x":'),
        "infinity": good.replace(b'"macs":', b'"macs":-Infinity,"x":'),
        "deep": b"[" * 200_000,
        "deep and closed": good[:-1] + b',"z":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "large number": good.replace(b'"abi":1', b'"abi":' + b"9" * 5000),
        "exponent": good.replace(b'"abi":1', b'"abi":1e0'),
        "negative": good.replace(b'"abi":1', b'"abi":-1'),
        "truth as number": good.replace(b'"abi":1', b'"abi":true'),
        "text as number": good.replace(b'"abi":1', b'"abi":"1"'),
        "name with a path": note(meta, name="../../tmp/x"),
        "name with a zero": note(meta, name="demo\0x"),
        "name in capitals": note(meta, name="Demo"),
        "name in another script": note(meta, name="\uff44\uff45\uff4d\uff4f"),
        "no name": note(meta, name=""),
        "long name": note(meta, name="a" * 5000),
        "another machine's": note(meta, target={**meta["target"], "arch": "mips"}),
        "a long feature": note(meta, target={**meta["target"], "features": ["a" * 300]}),
        "a long target": note(meta, target={**meta["target"], "name": "a" * 300}),
        "a shape without end": note(meta, inputs=[{**tensor, "shape": [1 << 40] * 4}]),
        "a negative shape": note(meta, inputs=[{**tensor, "shape": [-1]}]),
        "nine dimensions": note(meta, inputs=[{**tensor, "shape": [1] * 9}]),
        "another dtype": note(meta, inputs=[{**tensor, "dtype": "object"}]),
        "unhashable dtype": note(meta, inputs=[{**tensor, "dtype": ["float32"]}]),
        "no bound inputs": encode({key: value for key, value in meta.items() if key != "bound"}),
        "a bound value as text": note(meta, bound=[{**bound, "values": ["1"]}]),
        "a bound value without a place": note(meta, bound=[{k: v for k, v in bound.items() if k != "position"}]),
        "a count along no axis": note(meta, outputs=[{**output, "counted": len(output["shape"])}]),
        "an output without a count": note(meta, outputs=[{k: v for k, v in output.items() if k != "counted"}]),
        "a bucket of fewer inputs": note(meta, shapes=[{"inputs": [[1, 2]], "outputs": shapes}]),
        "a bucket of another rank": note(meta, shapes=[{"inputs": [[1], [3]], "outputs": shapes}]),
        "a bucket without end": note(meta, shapes=[{"inputs": [[1 << 40, 1 << 40], [3]], "outputs": shapes}]),
        "no states": encode({key: value for key, value in meta.items() if key != "states"}),
        "a state before the weights": note(meta, states=[{**state, "initial": -1}]),
        "a state without a shape": note(meta, states=[{k: v for k, v in state.items() if k != "shape"}]),
        "same names": note(meta, inputs=[tensor, tensor]),
        "quantization text": note(meta, inputs=[{**tensor, "quantization": "no"}]),
        "scales of one, zero points of none": note(meta, inputs=[{**tensor, "quantization": {**q, "zero_points": []}}]),
        "no scales": note(meta, inputs=[{**tensor, "quantization": {**q, "scales": [], "zero_points": []}}]),
        "axis beyond": note(
            meta, inputs=[{**tensor, "quantization": {"scales": [1.0] * 9, "zero_points": [0] * 9, "axis": 9}}]
        ),
        "scale without end": note(meta, inputs=[{**tensor, "quantization": {**q, "scales": [3e300]}}]),
        "zero point without end": note(meta, inputs=[{**tensor, "quantization": {**q, "zero_points": [1 << 40]}}]),
    }


NOTES = notes()
#: What the C loader, which reads fewer fields, is right to accept; `describe` gives it shapes and dtypes.
ONLY_PYTHON = (
    *("not utf-8", "twice", "nan", "infinity", "deep and closed", "a shape without end", "a negative shape"),
    *("nine dimensions", "another dtype", "unhashable dtype", "same names", "quantization text", "axis beyond"),
    *("scales of one, zero points of none", "no scales", "scale without end", "zero point without end"),
    *("no bound inputs", "a bound value as text", "a bound value without a place"),
    *("a count along no axis", "an output without a count"),
    *("a bucket of fewer inputs", "a bucket of another rank", "a bucket without end"),
    *("no states", "a state before the weights", "a state without a shape"),
)


@pytest.mark.parametrize("case", NOTES)
def test_metadata_that_is_not_valid(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "model.so", with_note(library(), NOTES[case]))
    refuse(path, "its metadata is not valid")
    with pytest.raises(LoadError):
        read_metadata(path)
    [(status, message)] = open_all(path)
    if case not in ONLY_PYTHON:
        assert status in (LOAD, ABI)
        assert "metadata" in message
    else:
        assert status in ("0", LOAD)


def fields(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field in the metadata."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += fields(inner, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found += fields(value[0], (*path, 0))
    return found


def test_every_field_is_needed_and_checked(tmp_path: Path) -> None:
    meta = metadata_of(library())
    paths = fields(meta)
    assert len(paths) > 30
    for path in paths:
        for value in ("absent", {"an": "object"}, [[]], 1.5, -1, None, True):
            changed = json.loads(json.dumps(meta))
            place = changed
            for step in path[:-1]:
                place = place[step]
            if value == "absent":
                if isinstance(place, list):
                    continue
                del place[path[-1]]
            elif (value is None and path[-1] in ("quantization", "counted", "cut", "batch")) or (
                value is True and path == ("selftest",)
            ):
                continue
            else:
                place[path[-1]] = value
            file = write(tmp_path / "model.so", with_note(library(), encode(changed)))
            with pytest.raises(LoadError, match="metadata is not valid"):
                load(file)


def test_fields_of_the_future_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "model.so", altered(library(), aaa={"deep": [[{"x": '}]\\"'}]]}, zzz=None))
    assert load(path, threads=1).selftest() < 1e-3
    assert open_all(path) == [("0", "")]


def test_names_in_any_script_are_fine(tmp_path: Path) -> None:
    meta = metadata_of(library())
    named = [{**meta["inputs"][0], "name": '图像/\\"\u202e\udc80\n:0'}, meta["inputs"][1]]
    path = write(tmp_path / "model.so", altered(library(), inputs=named))
    model = load(path, threads=1)
    with pytest.raises(IngotError) as caught:
        model()
    assert "\\u202e" in str(caught.value)
    assert str(caught.value).encode("utf-8")
    assert open_all(path) == [("0", "")]


def test_notes_that_lie_about_themselves(tmp_path: Path) -> None:
    data = library()
    text = encode(metadata_of(data))
    size = len(text)
    for head, message in (
        (struct.pack("<III8s", 6, size + 1, 1, b"ingot"), "damaged"),
        (struct.pack("<III8s", 6, 0xFFFFFFFF, 1, b"ingot"), "damaged"),
        (struct.pack("<III8s", 6, size, 2, b"ingot"), "not a model compiled by ingot"),
        (struct.pack("<III8s", 5, size, 1, b"ingot"), "not a model compiled by ingot"),
        (struct.pack("<III8s", 6, size, 1, b"INGOT"), "not a model compiled by ingot"),
        (struct.pack("<III8s", 0xFFFFFFFF, size, 1, b"ingot"), "not a model compiled by ingot"),
    ):
        path = write(tmp_path / "model.so", with_note(data, text, head=head))
        refuse(path, message)
        [(status, found)] = open_all(path)
        assert status == LOAD
        assert message in found


def test_a_note_that_is_too_large(tmp_path: Path) -> None:
    text = encode({**metadata_of(library()), "zzz": "x" * (17 << 20)})
    path = write(tmp_path / "model.so", with_note(library(), text))
    refuse(path, "impossible metadata note")
    assert open_all(path)[0][0] == LOAD


def test_two_notes(tmp_path: Path) -> None:
    data = bytearray(library())
    table, rows = section_table(data)
    other = next(i for i, r in enumerate(rows) if r[1] == 1 and not r[2] & 2)  # .comment: not loaded
    data[table + 64 * other : table + 64 * other + 64] = data[(at := table + 64 * note_row(data)) : at + 64]
    path = write(tmp_path / "model.so", bytes(data))
    refuse(path, "not a model compiled by ingot")
    assert open_all(path)[0][0] == LOAD
