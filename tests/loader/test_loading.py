"""From a path to a mapped library: the descriptor, replaced and changed files, verification, this machine's checks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.architectures import FEATURES
from ingot.runtime import loader
from ingot.runtime.loader import IngotError, LoadError, Model, check, load, read_metadata
from loader.artifacts import HOST, RUNTIME, altered, library, metadata_of, packaged, weights_at, write


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def scaled_weights(data: bytes, first: float) -> bytes:
    """The same model with another first weight: another content, and another result at [0, 0]."""
    return data[: (at := weights_at(data))] + struct.pack("<f", first) + data[at + 4 :]


def first_result(model: Model) -> float:
    """tanh(weights[0]) + 1."""
    return float(model(np.ones((97, 33), np.float32), np.zeros(3, np.int64))[0][0, 0])


# ------------------------------------------------------------------------------------------------------ descriptors


def test_loading_a_file_again_costs_no_descriptor(demo_so: Path, tmp_path: Path) -> None:
    load(demo_so)
    before = descriptors()
    link = tmp_path / "link.so"
    link.symlink_to(demo_so)
    for path in (demo_so, str(demo_so), os.fsencode(demo_so), link, Path(os.path.relpath(demo_so))):
        load(path).close()
    assert descriptors() == before


def test_refused_files_leave_no_descriptor(tmp_path: Path) -> None:
    data = library()
    paths = [
        write(tmp_path / "truncated.so", data[:5000]),
        write(tmp_path / "abi.so", altered(data, abi=2)),
        write(tmp_path / "text.so", b"text"),
        tmp_path,
    ]
    before = descriptors()
    for path in paths:
        for function in (load, read_metadata):
            with (
                pytest.raises(LoadError) if (function, path) != (read_metadata, paths[1]) else contextlib.nullcontext()
            ):
                function(path)
        check(path)
        with pytest.raises(LoadError):
            load(path, verify=True)
    assert descriptors() == before


def test_a_file_replaced_by_rename_is_a_new_model(demo_so: Path, tmp_path: Path) -> None:
    first = load(demo_so, threads=1)
    old = first_result(first)
    write(tmp_path / "new.so", scaled_weights(library(), 0.25)).replace(demo_so)
    second = load(demo_so, threads=1)
    assert first_result(second) == pytest.approx(1 + np.tanh(0.25), rel=1e-5)
    assert first_result(first) == old


def test_a_file_changed_in_place_is_refused(demo_so: Path) -> None:
    load(demo_so)
    with demo_so.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
    with pytest.raises(LoadError, match="changed in place") as caught:
        load(demo_so)
    assert "rename" in str(caught.value)


def test_a_program_that_closes_all_descriptors_gets_the_right_model(demo_so: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.so", scaled_weights(library(), 0.25))
    code = f"""
import os, sys
sys.path[:0] = {[str(RUNTIME), str(Path(__file__).parent.parent)]!r}
import loader, numpy as np
x, k = np.ones((97, 33), np.float32), np.zeros(3, np.int64)
first = loader.load({str(demo_so)!r}, threads=1)
a = first(x, k)[0][0, 0]
os.closerange(3, 256)
second = loader.load({str(other)!r}, threads=1)
b = second(x, k)[0][0, 0]
print(a, b, first(x, k)[0][0, 0] == a)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    a, b, same = done.stdout.split()
    assert float(a) == pytest.approx(1 + np.tanh(-2.0), rel=1e-4)
    assert float(b) == pytest.approx(1 + np.tanh(0.25), rel=1e-4)
    assert same == "True"


@pytest.mark.parametrize("how", ["overwritten", "truncated", "replaced"])
def test_a_file_that_changes_between_check_and_load(
    demo_so: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def meddle(file: Any, meta: Any) -> str:
        if how == "replaced":  # by something that must not run
            write(tmp_path / "evil.so", b"not a library").replace(demo_so)
        elif how == "truncated":
            os.truncate(demo_so, 100)
        else:
            os.utime(demo_so, ns=(1, 1))
            with demo_so.open("r+b") as out:
                out.write(b"\x7fELF")
        return ""

    monkeypatch.setattr(loader, "_CHECKS", (*loader._CHECKS, ("meddle", meddle)))
    if how == "replaced":
        assert first_result(load(demo_so, threads=1)) > 0  # the descriptor still holds what was checked
    else:
        with pytest.raises(LoadError, match="cannot be loaded") as caught:
            load(demo_so)
        assert "changed while it was being checked" in str(caught.value)


def test_without_proc_the_path_is_loaded_if_it_still_means_the_same_file(
    demo_so: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc") and exists(path))
    assert first_result(load(demo_so, threads=1)) > 0
    write(tmp_path / "new.so", scaled_weights(library(), 0.25)).replace(demo_so)
    with pytest.raises(LoadError, match="cannot be loaded"):  # dlopen would find the first one by its name
        load(demo_so)
    replaced = write(tmp_path / "replaced.so", library())

    def meddle(file: Any, meta: Any) -> str:
        write(tmp_path / "evil.so", b"not a library").replace(replaced)
        return ""

    monkeypatch.setattr(loader, "_CHECKS", (*loader._CHECKS, ("meddle", meddle)))
    with pytest.raises(LoadError, match="cannot be loaded"):
        load(replaced)


def test_loading_in_many_threads_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.so", scaled_weights(library(), i / 8)) for i in range(6)]
    found: dict[int, list[float]] = {}

    def work(i: int) -> None:
        found[i] = [first_result(load(paths[j % 6], threads=1)) for j in range(i, i + 6)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(6):
        assert found[i] == pytest.approx([1 + np.tanh((j % 6) / 8) for j in range(i, i + 6)], rel=1e-5)


# ----------------------------------------------------------------------------------------------------- verification


def test_verify_checks_the_weights_or_the_whole_file(demo_so: Path, tmp_path: Path) -> None:
    data = library()
    assert load(demo_so, verify=True).selftest() < 1e-3
    digest = hashlib.sha256(data).hexdigest()
    assert load(demo_so, verify=f" {digest.upper()}\n").selftest() < 1e-3
    changed = write(tmp_path / "changed.so", scaled_weights(data, 0.25))
    load(changed)
    with pytest.raises(LoadError, match="SHA-256 of the weights"):
        load(changed, verify=True)
    for wrong in (digest, "0", "not hex at all"):
        with pytest.raises(LoadError, match="SHA-256 of the file"):
            load(changed, verify=wrong)


def test_a_verified_model_cannot_be_changed_afterwards(demo_so: Path) -> None:
    model = load(demo_so, threads=1, verify=True)
    before = first_result(model)
    with demo_so.open("r+b") as file:
        file.write(b"\0" * len(library()))
    assert first_result(model) == before
    kept = [file.fd for file, _ in loader._LOADED.values() if file.path == str(demo_so)]
    with pytest.raises(PermissionError):
        os.write(kept[0], b"x")
    with pytest.raises(PermissionError):
        os.truncate(kept[0], 0)


# ----------------------------------------------------------------------------------------------------- this machine

CPUINFO = {
    "x86_64": "processor\t: 0\nmodel name\t: x\nflags\t\t: fpu pni ssse3 sse4_1 sse4_2 popcnt cx16 abm\nbugs\t\t:\n",
    "aarch64": "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\nCPU part\t: 0xd08\n",
    "arm": "processor\t: 0\nFeatures\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32\n",
    "riscv64": "processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdc_zicntr_zicsr_zba_zbb\nmmu\t\t: sv39\n",
}
HAS = {
    "x86_64": {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "lzcnt"},
    "aarch64": {"neon", "aes", "sha2", "crc"},
    "arm": {"neon", "vfp3", "vfp4", "thumb2", "hwdiv"},
    "riscv64": {"m", "a", "f", "d", "c", "zba", "zbb"},
}


def features_here(monkeypatch: pytest.MonkeyPatch, arch: str, cpuinfo: str | None) -> set[str]:
    """The features of an architecture that the loader finds on a machine with this /proc/cpuinfo."""

    def fake_open(path: str, *args: Any, **kwargs: Any) -> io.StringIO:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return io.StringIO(cpuinfo)

    monkeypatch.setattr(loader, "open", fake_open, raising=False)
    monkeypatch.setattr(loader, "_process_machine", lambda: (arch, 0))
    found = set()
    for feature in FEATURES[arch]:
        file = loader._File.__new__(loader._File)
        file.path, file.arch, file.fd = "model.so", arch, -1
        try:
            loader._check_cpu(file, {"target": {"features": [feature], "name": "a-board"}})
            found.add(feature)
        except LoadError as error:
            assert f"{feature} (a-board); this CPU has no {feature}" in error.what
    return found


@pytest.mark.parametrize("arch", FEATURES)
def test_cpu_features_from_cpuinfo(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    assert features_here(monkeypatch, arch, CPUINFO[arch]) == HAS[arch]


@pytest.mark.parametrize("arch", FEATURES)
@pytest.mark.parametrize("cpuinfo", [None, "", "processor : 0\n", "isa\n", "vendor_id\t: x\n"])
def test_a_cpuinfo_that_says_nothing_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, arch: str, cpuinfo: str | None
) -> None:
    assert features_here(monkeypatch, arch, cpuinfo) == set(FEATURES[arch])


def test_a_32_bit_program_on_a_64_bit_arm_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert features_here(monkeypatch, "arm", CPUINFO["aarch64"]) == set(FEATURES["arm"])


def test_an_arm_without_neon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert features_here(monkeypatch, "arm", "Features\t: half thumb fastmult vfp edsp java tls\n") == set()
    assert features_here(monkeypatch, "arm", "Features\t: thumb vfpv3d16 idiva\n") == {"vfp3", "thumb2"}


def test_an_old_riscv_kernel_does_not_tell_of_z_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    every = set(FEATURES["riscv64"])
    assert features_here(monkeypatch, "riscv64", "isa\t: rv64imafdc\n") == every - {"v"}
    assert features_here(monkeypatch, "riscv64", "isa\t: rv64gcv_zicsr\n") == set("mafdcv")


def test_the_message_names_the_level_and_the_board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "_cpu_flags", lambda arch: {"asimd", "fp", "atomics"})
    monkeypatch.setattr(loader, "_process_machine", lambda: ("aarch64", 0))
    rows = {r[0]: r[1:] for r in check(write(tmp_path / "pi.so", library("raspberry-pi-5")))}
    ok, detail = rows["CPU"]
    assert not ok
    assert re.fullmatch(
        r"built for armv8\.2 .*\bdotprod\b.* \(raspberry-pi-5\); this CPU has no .*\bdotprod\b.*", detail
    )
    assert "lse" not in detail  # which it has


def test_all_lists_of_features_agree() -> None:
    table = {arch: [item.split("=")[0] for item in text.split()] for arch, text in loader._FLAGS.items()}
    assert {a: set(names) for a, names in table.items()} == {a: set(names) for a, names in FEATURES.items()}
    header = (RUNTIME / "ingot_features.h").read_text()
    in_c = re.findall(r'\{"([a-z0-9.-]+)"', header)
    assert sorted(in_c) == sorted(name for names in FEATURES.values() for name in names)


def exe_header(machine: int, bits: int, flags: int = 0) -> bytes:
    head = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + struct.pack("<HH", 2, machine)
    return head.ljust(48 if bits == 2 else 36, b"\0") + struct.pack("<I", flags) + bytes(16)


@pytest.mark.parametrize(
    ("machine", "bits", "flags", "expected"),
    [
        (62, 2, 0, ("x86_64", 0)),
        (183, 2, 0, ("aarch64", 0)),
        (40, 1, 0x5000400, ("arm", 0x400)),
        (40, 1, 0x5000200, ("arm", 0x200)),
        (243, 2, 0x5, ("riscv64", 0x4)),
        (3, 1, 0, ("i386", 0)),
        (62, 1, 0, ("another machine", 0)),
    ],
)
def test_the_machine_is_that_of_the_running_program(
    monkeypatch: pytest.MonkeyPatch, machine: int, bits: int, flags: int, expected: tuple[str, int]
) -> None:
    monkeypatch.setattr(loader, "open", lambda *a: io.BytesIO(exe_header(machine, bits, flags)), raising=False)
    assert loader._process_machine() == expected


@pytest.mark.parametrize(
    ("pointer", "kernel", "expected"),
    [
        (8, "x86_64", "x86_64"), (8, "aarch64", "aarch64"), (8, "arm64", "aarch64"), (8, "riscv64", "riscv64"),
        (4, "aarch64", "arm"), (4, "armv7l", "arm"), (4, "x86_64", "i386"), (4, "i686", "i386"),
    ],
)  # fmt: skip
def test_without_proc_the_kernel_and_the_pointer_size_tell(
    monkeypatch: pytest.MonkeyPatch, pointer: int, kernel: str, expected: str
) -> None:
    def no_proc(*args: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(loader, "open", no_proc, raising=False)
    monkeypatch.setattr(loader.struct, "calcsize", lambda _: pointer)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "6", "1", kernel)))
    assert loader._process_machine() == (expected, 0)


def test_a_32_bit_userland_on_a_64_bit_kernel_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "_process_machine", lambda: ("arm", 0x400))
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "pi", "6.1", "1", "aarch64")))
    with pytest.raises(LoadError, match="this Python is a arm program on a aarch64 kernel"):
        load(write(tmp_path / "pi.so", library("raspberry-pi-4")))


def test_soft_float_and_hard_float_arm_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "pi.so", library("raspberry-pi-4-32bit"))
    rows = []
    for float_abi in (0x200, 0x400, 0):
        monkeypatch.setattr(loader, "_process_machine", lambda float_abi=float_abi: ("arm", float_abi))
        rows.append({r[0]: r[1] for r in check(path)}["machine"])
    assert rows == [False, True, True]


@pytest.mark.parametrize(
    ("libc", "version", "here", "fits"),
    [
        ("gnu", "2.28", "glibc 2.36", True),
        ("gnu", "2.36", "glibc 2.36", True),
        ("gnu", "2.36.1", "glibc 2.36", False),
        ("gnu", "2.37", "glibc 2.36", False),
        ("gnu", "2.4", "glibc 2.36", True),
        ("gnu", "3.0", "glibc 2.36", False),
        ("gnu", "2.28", None, False),
        ("musl", "1.2.5", None, True),
        ("musl", "1.2.5", "glibc 2.36", False),
    ],
)
def test_libc(
    monkeypatch: pytest.MonkeyPatch, demo_so: Path, libc: str, version: str, here: str | None, fits: bool
) -> None:
    def confstr(name: str) -> str:
        if here is None:
            raise ValueError("unrecognized configuration name")
        return here

    monkeypatch.setattr(os, "confstr", confstr)
    path = write(demo_so, altered(library(), target__libc=libc, target__libc_version=version))
    row = next(r for r in check(path) if r[0] == "libc")
    assert row[1] is fits
    assert "system has" in row[2] or "here" in row[2]


def test_a_kernel_with_larger_pages(monkeypatch: pytest.MonkeyPatch, demo_so: Path) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 65536 * 4)
    with pytest.raises(LoadError, match="pages"):
        load(demo_so)


@pytest.mark.parametrize("target", [HOST, "raspberry-pi-4", "raspberry-pi-4-32bit", "visionfive-2"])
def test_metadata_of_any_machine_is_readable(tmp_path: Path, target: str) -> None:
    assert read_metadata(write(tmp_path / "m.so", library(target))) == packaged(target).metadata


def test_check_reports_each_question(demo_so: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = check(demo_so)
    assert [r[0] for r in rows] == ["file", "machine", "ABI", "CPU", "libc", "memory"]
    assert all(ok for _, ok, _ in rows)
    huge = altered(library(), memory_bytes=1 << 60, abi=7)
    rows = check(write(tmp_path / "huge.so", huge))
    assert [r[0] for r in rows if not r[1]] == ["ABI", "memory"]
    rows = check(tmp_path / "absent.so")
    assert [(r[0], r[1]) for r in rows] == [("file", False)]


def test_the_code_must_agree_with_its_metadata(tmp_path: Path) -> None:
    data = library()
    meta = metadata_of(data)
    other_shape = [{**meta["inputs"][0], "shape": [97, 34]}, meta["inputs"][1]]
    other_dtype = [meta["inputs"][0], {**meta["inputs"][1], "dtype": "uint64"}]
    for changes in (
        {"memory_bytes": meta["memory_bytes"] + 64},
        {"inputs": meta["inputs"][:1]},
        {"outputs": meta["outputs"] + [{**meta["outputs"][0], "name": "z"}]},
        {"inputs": other_shape},
        {"inputs": other_dtype},
        {"inputs": meta["inputs"][::-1]},
    ):
        with pytest.raises(LoadError, match="do not belong together"):
            load(write(tmp_path / "mixed.so", altered(data, **changes)))
    with pytest.raises(LoadError, match="does not export ingot_other_api"):
        load(write(tmp_path / "mixed.so", altered(data, name="other")))


# -------------------------------------------------------------------------------------------------- the file itself


def test_the_loader_alone_is_enough(demo_so: Path, tmp_path: Path) -> None:
    """Copied next to the artifact, it imports nothing beyond numpy and the standard library, and little of that."""
    write(tmp_path / "loader.py", (RUNTIME / "loader.py").read_bytes())
    code = f"""
import sys
import ctypes, numpy
before = set(sys.modules)
sys.path.insert(0, {str(tmp_path)!r})
import loader
imported = set(sys.modules) - before
model = loader.load({str(demo_so)!r})
model(numpy.zeros((97, 33), numpy.float32), numpy.zeros(3, numpy.int64))
print(sorted(imported), sorted(set(sys.modules) - before - imported), loader.IngotError.__module__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    allowed = {"json", "json.decoder", "json.encoder", "json.scanner", "_json"}
    at_import, at_load, module = re.fullmatch(r"(\[.*?\]) (\[.*?\]) (\w+)\n", done.stdout).groups()  # type: ignore[union-attr]
    assert set(re.findall(r"'(.*?)'", at_import)) <= {"loader", "__future__"}
    assert set(re.findall(r"'(.*?)'", at_load)) <= allowed
    assert module == "loader"


def test_errors_are_short_lines_that_survive_pickling() -> None:
    error = LoadError("what", where="a\nb\x1b[31m\udc80", found="1", hint="this")
    assert str(error) == "what\n  where:   a\\nb\\x1b[31m\\udc80\n  found:   1\n  do:      this"
    assert str(error).encode("utf-8")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - written one call before
    assert (type(back), str(back), back.hint) == (LoadError, str(error), "this")
    assert str(IngotError("only what")) == "only what"
    assert IngotError("x", allowed="1 to 4").exit_code == 2
