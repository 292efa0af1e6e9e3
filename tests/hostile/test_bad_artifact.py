"""Files that must not be loaded, given to both loaders: one clear sentence each, no crash, no hang, no code run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ingot.runtime.loader import IngotError, LoadError, check, load, read_metadata
from loader.artifacts import (
    ABI,
    CPU,
    HOST,
    LOAD,
    RUNTIME,
    altered,
    compile_c,
    library,
    metadata_of,
    note_row,
    open_all,
    refuse,
    section_table,
    weights_at,
    write,
)

# ------------------------------------------------------------------------------------------------ what is not a file


def test_a_missing_file(tmp_path: Path) -> None:
    error = refuse(tmp_path / "absent.so", "cannot open")
    assert "No such file" in str(error)
    assert open_all(tmp_path / "absent.so") == [(LOAD, "cannot be opened: No such file or directory")]
    for name in ("a\0b.so", "", None, 7, b"\xff\xfe", "\udc80"):
        with pytest.raises(LoadError, match="cannot open"):
            load(name)  # type: ignore[arg-type]


def test_a_directory_a_device_and_a_socket(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero"), Path("/dev/null")):
        refuse(path, "not a regular file")
        assert open_all(path) == [(LOAD, "this is not a regular file")]


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    fifo = tmp_path / "model.so"
    os.mkfifo(fifo)
    code = f"""
import sys
sys.path.insert(0, {str(RUNTIME)!r})
import loader
try: loader.load({str(fifo)!r})
except loader.LoadError as error: print(error.what)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "the artifact is not a regular file\n"
    assert open_all(fifo) == [(LOAD, "this is not a regular file")]


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "model.so", library())
    path.chmod(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:  # root may read every file: become somebody else
                os.seteuid(65534)
            load(path)
        except LoadError as error:
            status = 0 if error.what == "cannot open the artifact" and "Permission" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_symlink_is_allowed_and_a_dangling_one_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "model.so", library())
    link, dangling, loop = tmp_path / "link.so", tmp_path / "dangling.so", tmp_path / "loop.so"
    link.symlink_to(path)
    dangling.symlink_to(tmp_path / "absent")
    loop.symlink_to(loop)
    assert load(link, threads=1).selftest() < 1e-3
    assert open_all(link) == [("0", "")]
    for bad in (dangling, loop):
        refuse(bad, "cannot open")
        assert open_all(bad)[0][0] == LOAD


# ----------------------------------------------------------------------------------------------------- what is not ours


@pytest.mark.parametrize(
    ("content", "python", "c"),
    [
        (b"", "not a shared library", "not a shared library"),
        (b"\x7fELF", "damaged", "damaged"),
        (b"\x7fELF" + bytes(2000), "damaged", "built for"),
        (b"#!/bin/sh\necho no\n", "not a shared library", "not a shared library"),
        (b"\x08\x07\x12\x04onnx" * 20, "not a shared library", "not a shared library"),
        (b"\xff" * 4096, "not a shared library", "not a shared library"),
    ],
    ids=["empty", "magic", "zeros", "script", "onnx", "ones"],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes, python: str, c: str) -> None:
    path = write(tmp_path / "model.so", content)
    refuse(path, python)
    [(status, message)] = open_all(path)
    assert status == LOAD
    assert c in message


def foreign(tmp_path: Path, source: str, *flags: str) -> Path:
    (tmp_path / "foreign.c").write_text(source)
    return compile_c([tmp_path / "foreign.c"], tmp_path / "foreign.so", *flags)


def test_a_strangers_library_is_refused_before_its_constructor_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = f"""
#include <stdio.h>
__attribute__((constructor)) static void start(void) {{
    FILE *file = fopen("{mark}", "w");
    if (file) fclose(file);
}}
const void *ingot_foreign_api(void);
const void *ingot_foreign_api(void) {{ return 0; }}
"""
    path = foreign(tmp_path, source, "-shared", "-fPIC")
    error = refuse(path, "not a model compiled by ingot")
    assert "ingot compile" in str(error)
    [(status, message)] = open_all(path)
    assert status == LOAD
    assert "not a model compiled by ingot" in message
    assert not mark.exists()
    import ctypes

    ctypes.CDLL(str(path))
    assert mark.exists(), "the constructor does nothing, so this test proved nothing"


def test_programs_and_objects(tmp_path: Path) -> None:
    main = "int main(void) { return 0; }"
    for flags, message in ((["-no-pie"], "not a shared library"), (["-pie", "-fPIE"], "not a model compiled by ingot")):
        path = foreign(tmp_path, main, *flags)
        with pytest.raises(LoadError):
            load(path)
        [(status, text)] = open_all(path)
        assert status == LOAD
        assert message in text or "damaged" in text
    shutil.copy(sys.executable, tmp_path / "python.so")
    assert open_all(tmp_path / "python.so")[0][0] == LOAD
    with pytest.raises(LoadError):
        load(tmp_path / "python.so")


def test_libraries_of_this_system() -> None:
    import _ctypes

    import numpy._core._multiarray_umath as umath

    for path in map(Path, (_ctypes.__file__, umath.__file__)):
        refuse(path, "not a model compiled by ingot")
        assert open_all(path)[0][0] == LOAD


# --------------------------------------------------------------------------------------------- made for something else


@pytest.mark.parametrize(
    ("target", "arch"), [("raspberry-pi-4", "aarch64"), ("raspberry-pi-4-32bit", "arm"), ("visionfive-2", "riscv64")]
)
def test_another_architecture(tmp_path: Path, target: str, arch: str) -> None:
    if arch == metadata_of(library())["target"]["arch"]:
        pytest.skip(f"{arch} is this machine's own architecture")
    path = write(tmp_path / "model.so", library(target))
    error = refuse(path, f"built for {arch} ({target}); this machine is")
    assert error.found == arch
    assert error.hint
    [(status, message)] = open_all(path)
    assert status == LOAD
    assert message.startswith(f"built for {arch} ")


def test_another_class_byte_order_or_machine(tmp_path: Path) -> None:
    data = library()
    for offset, value in ((4, 1), (4, 3), (5, 2), (6, 9), (16, 2), (16, 1), (18, 8), (18, 3)):
        changed = bytearray(data)
        changed[offset] = value
        path = write(tmp_path / "model.so", bytes(changed))
        refuse(path, "")
        assert open_all(path)[0][0] == LOAD


@pytest.mark.parametrize(("field", "value"), [("abi", 0), ("abi", 2), ("abi", 99), ("format", 1), ("format", 99)])
def test_another_abi_or_format(tmp_path: Path, field: str, value: int) -> None:
    path = write(tmp_path / "model.so", altered(library(), **{field: value}))
    error = refuse(path, f"{'ABI' if field == 'abi' else 'format'} {value}; this loader")
    assert error.hint
    [(status, message)] = open_all(path)
    assert status == ABI
    assert f" {value}; this loader" in message


@pytest.mark.parametrize("feature", ["sve9", "neon" if HOST.startswith("x86") else "avx2", "avx2 ", ""])
def test_a_feature_this_cpu_cannot_have(tmp_path: Path, feature: str) -> None:
    path = write(tmp_path / "model.so", altered(library(), target__features=[feature]))
    refuse(path, f"{feature} ({HOST}); this CPU has no {feature}")
    [(status, message)] = open_all(path)
    if feature:
        assert status == CPU
        assert message.endswith(f"{feature} ({HOST}); this CPU has no {feature}")
    else:
        assert status == LOAD


def test_more_features_than_a_message_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "model.so", altered(library(), target__features=[f"f{i}" for i in range(60_000)]))
    refuse(path, "this CPU has no f0")
    assert open_all(path)[0][0] == CPU


def test_a_libc_that_is_newer(tmp_path: Path) -> None:
    path = write(tmp_path / "model.so", altered(library(), target__libc_version="99.1"))
    refuse(path, "built for glibc 99.1 or later; this system has glibc")


# ------------------------------------------------------------------------------------------------------------ damaged


def interesting_lengths(data: bytes) -> list[int]:
    """Around every boundary of the file: headers, tables, sections, note."""
    table, rows = section_table(data)
    marks = {0, 4, 5, 16, 18, 20, 52, 64, 64 + 56, 64 + 8 * 56, 4096, 65536, table, len(data)}
    for i, row in enumerate(rows):
        marks |= {row[4], row[4] + row[5], table + 64 * i}
    note = rows[note_row(data)]
    marks |= {note[4] + 4, note[4] + 12, note[4] + 18, note[4] + 20}
    return sorted(n for m in marks for n in (m - 1, m, m + 1) if 0 <= n < len(data))


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = library()
    rng = random.Random(1)
    lengths = interesting_lengths(data) + [rng.randrange(len(data)) for _ in range(100)]
    assert len(lengths) > 150
    paths = []
    for length in lengths:
        paths.append(write(tmp_path / f"{length}.so", data[:length]))
        error = refuse(paths[-1], "")
        assert "damaged" in error.what or length < 16
        with pytest.raises(LoadError):
            read_metadata(paths[-1])
    for status, message in open_all(*paths):
        assert status == LOAD
        assert "damaged" in message or "not a shared library" in message or "built for" in message


def outcome(path: Path, x: np.ndarray, k: np.ndarray) -> str:
    """What the Python loader does with a file, in a process of its own: "runs", "refused", or what should not be."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            model = load(path, threads=1)
            model(x, k)
            model.close()
            status = 0
        except IngotError as error:
            status = 1 if str(error).encode() and len(str(error).splitlines()) <= 5 else 2
        except BaseException as error:  # a traceback is what must not be
            sys.stderr.write(f"{error!r}\n")
            status = 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    done = 0
    while not done:
        done, how = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0 if done else 0.0005)
    if os.WIFSIGNALED(how):
        return f"signal {os.WTERMSIG(how)}"
    return {0: "runs", 1: "refused"}.get(os.WEXITSTATUS(how), "traceback")


def flipped(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One or two changed bytes in the headers or the metadata."""
    table, rows = section_table(data)
    note = rows[note_row(data)]
    regions = ((0, 64), (64, 64 + 8 * 56), (table, len(data)), (note[4], note[4] + note[5]))
    result, changes = bytearray(data), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        offset = rng.randrange(*rng.choice(regions))
        value = result[offset] ^ (1 << rng.randrange(8)) if rng.random() < 0.6 else rng.randrange(256)
        changes.append(f"{offset}: {result[offset]} -> {value}")
        result[offset] = value
    return bytes(result), ", ".join(changes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_random_damage_is_survived(tmp_path: Path, fuzz: Callable[[int, int], tuple[int, int]]) -> None:
    rounds, seed = fuzz(250, 20)
    data, rng = library(), random.Random(seed)
    x, k = np.ones((97, 33), np.float32), np.zeros(3, np.int64)
    paths, seen = [], {}
    for i in range(rounds):
        content, what = flipped(data, rng)
        paths.append(write(tmp_path / f"{i}.so", content))
        found = outcome(paths[-1], x, k)
        assert found in ("runs", "refused"), what
        seen[found] = seen.get(found, 0) + 1
    assert seen["refused"] > rounds * 0.4
    assert seen["runs"] > rounds * 0.04  # some bytes mean nothing: the loader is not simply refusing all
    for status, message in open_all(*paths):
        assert status in ("0", LOAD, ABI, CPU), message


@pytest.mark.parametrize("target", ["raspberry-pi-4-32bit", "raspberry-pi-4", "visionfive-2"])
def test_random_damage_of_files_for_other_machines(
    tmp_path: Path, target: str, fuzz: Callable[[int, int], tuple[int, int]]
) -> None:
    rounds, seed = fuzz(300, 3)
    data, rng = library(target), random.Random(seed)
    refused = 0
    for i in range(rounds):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 4, 40))):
            changed[rng.choice((rng.randrange(400), rng.randrange(len(data) - 3000, len(data))))] = rng.randrange(256)
        path = write(tmp_path / "model.so", bytes(changed[: len(data) - rng.choice((0, 0, i))]))
        try:
            read_metadata(path)
        except LoadError as error:
            assert len(str(error).splitlines()) <= 5
            refused += 1
        check(path)
    assert refused > rounds / 3


def segment(data: bytes, kind: int) -> int:
    """Where the row of the first segment of a kind lies."""
    count = struct.unpack_from("<H", data, 56)[0]
    return next(64 + 56 * i for i in range(count) if struct.unpack_from("<I", data, 64 + 56 * i)[0] == kind)


HUGE = (1 << 64) - 1
SEGMENTS: dict[str, Callable[[bytearray], None]] = {
    "offset beyond the file": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 8, len(d)),
    "offset that wraps": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 8, HUGE - 4095),
    "size that wraps": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 32, HUGE),
    "memory smaller than file": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 40, 16),
    "memory without end": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 40, 1 << 40),
    "no alignment": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 48, 0),
    "crooked alignment": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 48, 4097),
    "not readable": lambda d: struct.pack_into("<I", d, segment(d, 1) + 4, 0),
    "elsewhere in memory": lambda d: struct.pack_into("<Q", d, segment(d, 1) + 16, 1 << 20),
    "dynamic table elsewhere": lambda d: struct.pack_into("<Q", d, segment(d, 2) + 16, 64),
    "dynamic table shorter": lambda d: struct.pack_into("<QQ", d, segment(d, 2) + 32, 16, 16),
    "no dynamic table": lambda d: struct.pack_into("<I", d, segment(d, 2), 0),
    "protected range outside": lambda d: struct.pack_into("<Q", d, segment(d, 0x6474E552) + 40, 1 << 30),
    "an interpreter": lambda d: struct.pack_into("<I", d, segment(d, 0x6474E550), 3),
    "no segments": lambda d: struct.pack_into("<H", d, 56, 0),
    "too many segments": lambda d: struct.pack_into("<H", d, 56, 65535),
    "too many sections": lambda d: struct.pack_into("<H", d, 60, 65535),
    "section names nowhere": lambda d: struct.pack_into("<H", d, 62, 65535),
    "section table that wraps": lambda d: struct.pack_into("<Q", d, 40, HUGE - 63),
    "segment table that wraps": lambda d: struct.pack_into("<Q", d, 32, HUGE - 55),
    "row size": lambda d: struct.pack_into("<H", d, 54, 55),
}


@pytest.mark.parametrize("damage", SEGMENTS.values(), ids=SEGMENTS)
def test_headers_that_lie(tmp_path: Path, damage: Callable[[bytearray], None]) -> None:
    data = bytearray(library())
    damage(data)
    path = write(tmp_path / "model.so", bytes(data))
    refuse(path, "damaged")
    if damage is not SEGMENTS["section names nowhere"]:  # the C loader needs no names
        [(status, message)] = open_all(path)
        assert status == LOAD
        assert "damaged" in message


def test_a_sparse_file_of_a_terabyte(tmp_path: Path) -> None:
    path = write(tmp_path / "model.so", library())
    try:
        os.truncate(path, 1 << 40)
    except OSError:
        pytest.skip("this file system has no sparse files")
    assert load(path, threads=1).selftest() < 1e-3
    assert open_all(path) == [("0", "")]
    head = bytearray(library()[:64])
    struct.pack_into("<Q", head, 40, (1 << 40) - 64)  # the section table in the zeros at the end
    with path.open("r+b") as file:
        file.write(head)
    os.utime(path, ns=(1, 1))
    refuse(path, "")
    assert open_all(path)[0][0] == LOAD


def test_weights_with_a_flipped_bit_are_found_on_request(tmp_path: Path) -> None:
    data = bytearray(library())
    data[weights_at(data)] ^= 1
    path = write(tmp_path / "model.so", bytes(data))
    load(path, threads=1)
    with pytest.raises(LoadError, match="SHA-256"):
        load(path, verify=True)
