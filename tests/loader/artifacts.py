"""Artifacts for tests of the loaders: real ones from the packager, and variants of them made by editing bytes."""

from __future__ import annotations

import copy
import functools
import json
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from handmade import handmade
from ingot.packager.artifact import Artifact, package
from ingot.runtime.loader import LoadError, check, load

RUNTIME = Path(__file__).resolve().parents[2] / "compiler" / "ingot" / "runtime"
HERE = Path(__file__).resolve().parent
#: Statuses of the C loader, as open_many.c prints them.
LOAD, ABI, CPU = "14", "11", "8"
#: A target that every host of the tests can run.
HOST = {"x86_64": "x86-64-v2", "aarch64": "armv8.0-a"}[platform.machine()]
_SECTION = "<IIQQQQIIQQ"  # name type flags addr offset size ...


@functools.cache
def packaged(target: str = HOST, name: str = "demo", selftest: bool = True) -> Artifact:
    """The hand-made model: inputs x [97,33] float32 and k [3] int64; outputs y, index, same."""
    program, imported, board, stored = handmade(target, name, with_selftest=selftest)
    return package(program, imported, board, precision="fp32", selftest=stored)


def library(target: str = HOST, name: str = "demo") -> bytes:
    """The bytes of its model.so."""
    return packaged(target, name).library


def section_table(data: bytes) -> tuple[int, list[tuple[int, ...]]]:
    """Where the section table of a 64-bit library lies, and its rows."""
    offset = struct.unpack_from("<Q", data, 40)[0]
    count = struct.unpack_from("<H", data, 60)[0]
    return offset, [struct.unpack_from(_SECTION, data, offset + 64 * i) for i in range(count)]


def note_row(data: bytes) -> int:
    """The index of the section with the metadata."""
    rows = section_table(data)[1]
    return next(i for i, r in enumerate(rows) if r[1] == 7 and data[r[4] + 12 : r[4] + 18] == b"ingot\0")


def metadata_of(data: bytes) -> dict[str, Any]:
    """The metadata, by a reader that shares nothing with the loaders."""
    offset = section_table(data)[1][note_row(data)][4]
    count = struct.unpack_from("<I", data, offset + 4)[0]
    found: dict[str, Any] = json.loads(data[offset + 20 : offset + 20 + count])
    return found


def with_note(data: bytes, text: bytes, *, head: bytes | None = None) -> bytes:
    """The same library with other metadata: a new note behind its end. `head` replaces the note's first 20 bytes."""
    table, _ = section_table(data)
    row = table + 64 * note_row(data)
    result = bytearray(data) + b"\0" * (-len(data) % 16)
    start = len(result)
    result += (head or struct.pack("<III8s", 6, len(text), 1, b"ingot")) + text
    struct.pack_into("<QQ", result, row + 24, start, len(result) - start)
    return bytes(result)


def encode(meta: object) -> bytes:
    """As the packager writes it."""
    return json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()


def altered(data: bytes, **changes: Any) -> bytes:
    """The same library with other values in its metadata; `target__arch` means target.arch, None as a value counts."""
    meta = copy.deepcopy(metadata_of(data))
    for key, value in changes.items():
        *path, last = key.split("__")
        place = meta
        for part in path:
            place = place[part]
        place[last] = value
    return with_note(data, encode(meta))


def weights_at(data: bytes) -> int:
    """Where the weights lie in the file."""
    _, rows = section_table(data)
    names = rows[struct.unpack_from("<H", data, 62)[0]]
    table = data[names[4] : names[4] + names[5]]
    return next(r[4] for r in rows if table[r[0] :].startswith(b".ingot.weights\0"))


def write(path: Path, data: bytes) -> Path:
    """Write a file, as a new one: never into one that some process has loaded."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def compile_c(sources: Sequence[Path], output: Path, *flags: str, compiler: Sequence[str] = ("gcc",)) -> Path:
    """Build a C program with the warnings the product promises to be free of."""
    if compiler == ("gcc",) and shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine")
    strict = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{RUNTIME}"]
    subprocess.run([*compiler, *strict, *flags, *map(str, sources), "-o", str(output), "-ldl", "-lpthread"], check=True)
    return output


@functools.cache
def _c_loader() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    folder = tempfile.TemporaryDirectory()
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return folder, compile_c([HERE / "open_many.c", RUNTIME / "open.c"], Path(folder.name, "open_many"), *flags)


def open_all(*paths: Path) -> list[tuple[str, str]]:
    """What the C loader, built with sanitizers, does with each file: (status or "CRASH", message)."""
    done = subprocess.run([_c_loader()[1], *paths], capture_output=True, timeout=120, check=True)
    assert done.stderr == b"", done.stderr[:2000]
    lines = done.stdout.decode(errors="replace").splitlines()
    assert len(lines) == len(paths)
    pairs = [line.split(" ", 1) for line in lines]
    return [(status, text.removeprefix(f"{p}: ")) for (status, text), p in zip(pairs, paths, strict=True)]


def refuse(path: Path, message: str) -> LoadError:
    """Every way into the Python loader refuses the file, with this in the first line."""
    with pytest.raises(LoadError) as caught:
        load(path, threads=1)
    error = caught.value
    assert message in error.what, str(error)
    lines = str(error).splitlines()
    assert len(lines) <= 5
    assert max(map(len, lines)) < 400
    assert error.exit_code == 2
    assert not all(ok for _, ok, _ in check(path))
    return error
