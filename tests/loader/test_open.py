"""The small C loader: strict builds, sanitizers, one process's promises, other architectures."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.packager.link import zig_path
from ingot.target import load_target
from loader.artifacts import HERE, RUNTIME, altered, compile_c, library, write

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
LINUX = [
    *("x86_64-linux-gnu.2.28", "aarch64-linux-gnu.2.27", "arm-linux-gnueabihf.2.28", "riscv64-linux-gnu"),
    *("x86_64-linux-musl", "aarch64-linux-musl"),
]


def test_it_stays_small() -> None:
    assert len((RUNTIME / "open.c").read_text().splitlines()) < 400


@pytest.mark.parametrize("triple", LINUX)
def test_it_builds_without_a_warning_everywhere(tmp_path: Path, triple: str) -> None:
    command = [str(zig_path()), "cc", "-target", triple, "-c"]
    compile_c(
        [RUNTIME / "open.c"], tmp_path / "open.o", "-Wconversion", "-Wno-unused-command-line-argument", compiler=command
    )


def test_the_header_is_plain_c_and_cpp(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    for language, standard in (("c", "c11"), ("c++", "c++11")):
        source = write(tmp_path / "only", b'#include "ingot_open.h"\nint main(void) { return INGOT_OK; }\n')
        strict = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{RUNTIME}", "-x", language]
        subprocess.run(
            ["g++" if language == "c++" else "gcc", *strict, "-c", source, "-o", tmp_path / "only.o"], check=True
        )


@pytest.mark.parametrize("flags", [SANITIZE, ("-O2", "-fsanitize=thread")], ids=["address", "thread"])
def test_one_process(tmp_path: Path, flags: tuple[str, ...]) -> None:
    program = compile_c([HERE / "open_twice.c", RUNTIME / "open.c"], tmp_path / "open_twice", *flags)
    a, b = write(tmp_path / "a.so", library()), write(tmp_path / "b.so", library(name="other"))
    done = subprocess.run([program, a, b, tmp_path / "link.so"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("target", "other", "lacking"),
    [
        ("raspberry-pi-4", "raspberry-pi-4-32bit", "sve"),
        ("raspberry-pi-4-32bit", "raspberry-pi-4", "sve"),
        ("visionfive-2", "raspberry-pi-4", "v"),
    ],
)
def test_other_architectures(
    tmp_path: Path, qemu: Callable[[str], list[str]], target: str, other: str, lacking: str
) -> None:
    board = load_target(target)
    run = qemu(board.arch)
    compiler = [str(zig_path()), "cc", "-target", board.zig_triple, "-fno-sanitize=undefined"]
    sources = [HERE / "open_many.c", RUNTIME / "open.c"]
    program = compile_c(sources, tmp_path / "open_many", compiler=compiler)
    data = library(target)
    paths = [write(tmp_path / "good.so", data), write(tmp_path / "other.so", library(other))]
    if board.arch != "arm":  # the helper that edits metadata reads 64-bit files
        paths.append(write(tmp_path / "cpu.so", altered(data, target__features=[lacking])))
    model = {"aarch64": ["-cpu", "cortex-a72"], "riscv64": ["-cpu", "rv64,v=false"]}.get(board.arch, [])
    command = [*run, *model, str(program), *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "0 "
    assert lines[1].startswith(f"14 {paths[1]}: built for {load_target(other).arch}")
    if board.arch != "arm":
        expected = f"8 {paths[2]}: built for {board.arch} {lacking} ({target}); this CPU has no {lacking}"
        assert lines[2] == expected
