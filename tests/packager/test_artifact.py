"""Saving: whole or not at all. Emitting: every form. Metadata: what the loader reads is what was written."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from handmade import handmade
from ingot.errors import OptionError, OutputError, UnsupportedError
from ingot.frontend.interface import Quantization, TensorSpec
from ingot.packager.artifact import KINDS, Artifact, package, write_file
from ingot.packager.metadata import encode_metadata
from ingot.runtime.loader import read_metadata


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    program, imported, target, selftest = handmade()
    return package(program, imported, target, precision="fp32", selftest=selftest)


def test_save_and_read_back(artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "model.so")
    assert path.read_bytes() == artifact.library
    assert read_metadata(path) == artifact.metadata
    assert json.loads(encode_metadata(artifact.metadata)) == artifact.metadata
    assert [p.name for p in tmp_path.iterdir()] == ["model.so"]


def test_metadata_fields(artifact: Artifact) -> None:
    program, imported, target, _ = handmade()
    meta = artifact.metadata
    assert meta["format"] == 2
    assert meta["abi"] == 1
    assert meta["target"]["features"] == list(target.features)
    assert meta["arena_bytes"] == program.arena_bytes
    assert meta["memory_bytes"] % 64 == 0
    assert meta["memory_bytes"] >= program.arena_bytes + 8192
    assert (meta["kernels"], meta["steps"], meta["macs"]) == (3, 4, program.macs)
    assert meta["selftest"] is True
    assert meta["source"] == {"format": "onnx", "sha256": "ab" * 32, "peak_bytes": imported.source_peak_bytes}


def test_metadata_with_odd_names() -> None:
    meta = {"b": "\ud800 lone surrogate", "a": "ü\n"}
    assert json.loads(encode_metadata(meta)) == meta
    assert encode_metadata({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()


def test_quantisation_travels(tmp_path: Path) -> None:
    program, imported, target, _ = handmade()
    quantization = Quantization((0.5, 0.25, 1e-9), (0, -3, 127), 0)
    inputs = (imported.inputs[0], TensorSpec("k", "int64", (3,), quantization))
    artifact = package(program, replace(imported, inputs=inputs), target, precision="fp32", selftest=None)
    meta = read_metadata(artifact.save(tmp_path / "m.so"))
    expected = {"scales": [0.5, 0.25, 1e-9], "zero_points": [0, -3, 127], "axis": 0}
    assert meta["inputs"][1]["quantization"] == expected
    assert meta["selftest"] is False


def test_umask_is_respected(artifact: Artifact, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        artifact.save(tmp_path / "model.so")
        artifact.save(tmp_path / "model.h", "c-header")
    finally:
        os.umask(before)
    assert (tmp_path / "model.so").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "model.h").stat().st_mode & 0o777 == 0o640


def test_saving_replaces_the_old_file_at_once(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"old")
    with path.open("rb") as held:
        artifact.save(path)
        assert held.read() == b"old"  # a program that has the old one mapped keeps it
    assert path.read_bytes() == artifact.library


def test_a_long_name(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 252 + ".so")
    assert artifact.save(path) == path


@pytest.mark.parametrize(
    ("name", "found", "hint"),
    [
        ("missing/model.so", "No such file", "create the folder"),
        ("file/model.so", "Not a directory", "create the folder"),
        ("folder", "it is a folder", "name a file"),
        ("x" * 300, "name too long", ""),
        ("nul\0l", "null", ""),
    ],
)
def test_where_saving_is_refused(name: str, found: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write the output") as error:
        write_file(tmp_path / name, b"data")
    assert found in (error.value.found or "")
    assert hint in (error.value.hint or "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_read_only_file_system() -> None:
    with pytest.raises(OutputError, match="cannot write the output"):
        write_file("/proc/model.so", b"data")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path, small_files: None) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name in ("new", "old"):
        with pytest.raises(OutputError):
            write_file(tmp_path / name, bytes(100_000))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old", b"old")]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as error:
        write_file(tmp_path / "model.so", b"data")
    assert error.value.hint == "free some space, or choose another disk"
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "model.so", b"data")
    assert not list(tmp_path.iterdir())


def test_emit_every_kind(artifact: Artifact) -> None:
    forms = {kind: artifact.emit(kind) for kind in KINDS}
    assert forms["so"] == artifact.library
    assert isinstance(forms["a"], bytes)
    assert forms["a"].startswith(b"!<arch>\n")
    assert "const ingot_api *ingot_demo_api(void);" in str(forms["c-header"])
    assert "#define INGOT_DEMO_MEMORY_BYTES " + str(artifact.metadata["memory_bytes"]) in str(forms["c-header"])
    assert "rt_forward" in str(forms["c"])
    assert (forms["llvm"], forms["relax"]) == ("; none\n", "# none\n")


def test_unknown_kind(artifact: Artifact) -> None:
    with pytest.raises(OptionError, match="unknown kind") as error:
        artifact.emit("exe")
    assert "so, a, c-header" in str(error.value)


def test_too_large_for_32_bits() -> None:
    program, imported, target, _ = handmade("raspberry-pi-3-32bit")
    with pytest.raises(UnsupportedError, match="32-bit address space"):
        package(replace(program, arena_bytes=4 << 30), imported, target, precision="fp32", selftest=None)


def test_an_arena_that_no_machine_has(tmp_path: Path) -> None:
    import ingot

    program, imported, target, _ = handmade()
    artifact = package(replace(program, arena_bytes=1 << 60), imported, target, precision="fp32", selftest=None)
    with pytest.raises(ingot.IngotError, match="bytes could not be allocated"):
        ingot.load(artifact.save(tmp_path / "m.so"))
