"""Opening a model file: what it is, decided by its content, before any importer sees it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ingot.errors import ModelError

# Both formats use signed 32-bit lengths or offsets, so no valid file is larger.
MAX_FILE_BYTES = 2**31 - 1

_NOT_MODELS = (
    (b"\x7fELF", "an ELF program or shared library", "give the model it was compiled from, not the compiled artifact"),
    (b"PK\x03\x04", "a ZIP archive (PyTorch, Keras v3 or similar)", "export the model to ONNX or TFLite first"),
    (b"\x89HDF", "an HDF5 file (Keras)", "export the model to ONNX or TFLite first"),
    (b"GGUF", "a GGUF file", "export the model to ONNX or TFLite first"),
    (b"\x80\x02", "a Python pickle", "export the model to ONNX or TFLite first"),
    (b"\x80\x04", "a Python pickle", "export the model to ONNX or TFLite first"),
    (b"\x93NUMPY", "a numpy array", "give the model, not its data"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"version https://git-lfs", "a git-lfs pointer, not the model itself", "run `git lfs pull`"),
    (b"<", "a text (HTML or XML) file", "check that the download gave the model itself"),
    (b"{", "a JSON file", "give the model file itself"),
)


@dataclass(frozen=True)
class Source:
    """One model file, read once: its path as given, bytes, SHA-256 (hex) and format ("onnx" or "tflite")."""

    path: Path
    data: bytes
    sha256: str
    format: str


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read the file at `path` and decide its format by content.

    Raises ModelError for anything that is not a regular, readable, non-empty file of at most 2 GiB - 1 bytes in one
    of the two formats.
    """
    file = Path(os.fsdecode(path))
    data = _read_regular_file(file)
    return Source(file, data, hashlib.sha256(data).hexdigest(), _format_of(file, data))


def _read_regular_file(file: Path) -> bytes:
    where = str(file)
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to must not hang.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelError("the model file does not exist", where=where, hint="check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError("the model file cannot be opened", where=where, found=reason) from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise ModelError("the model path is not a file", where=where, found=kind, allowed="one .onnx or .tflite file")
    with os.fdopen(descriptor, "rb") as stream:
        if info.st_size == 0:
            raise ModelError("the model file is empty", where=where, found="0 bytes")
        if info.st_size > MAX_FILE_BYTES:
            raise ModelError(
                "the model file is too large",
                where=where,
                found=f"{info.st_size} bytes",
                allowed=f"at most {MAX_FILE_BYTES} bytes",
                hint="store the weights of an ONNX model as external data",
            )
        try:
            return stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ModelError("the model file cannot be read", where=where, found=error.strerror or "error") from None


def _format_of(file: Path, data: bytes) -> str:
    if data[4:8] == b"TFL3":
        return "tflite"
    for magic, kind, hint in _NOT_MODELS:
        if data.startswith(magic):
            allowed = "an ONNX or TFLite model"
            raise ModelError("the file is not a model", where=str(file), found=kind, allowed=allowed, hint=hint)
    if file.suffix.lower() == ".tflite":
        raise ModelError(
            "the file is not a TFLite model",
            where=str(file),
            found=f"identifier {data[4:8]!r} at byte 4",
            allowed="b'TFL3'",
            hint="the file is damaged, or is another format under this name",
        )
    return "onnx"


def c_name(file: Path) -> str:
    """The file's stem as a C identifier part: [a-z0-9_]+, not starting with a digit, at most 64 characters."""
    name = re.sub(r"[^a-z0-9]+", "_", file.stem.lower()).strip("_")[:64].rstrip("_")
    if not name:
        return "model"
    return f"m_{name}" if name[0].isdigit() else name
