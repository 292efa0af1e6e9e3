"""The C and C++ examples, built for a board by their Makefile with a cross compiler, and run on a drawn three."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = ("c_opened", "c_linked", "cpp_opened", "cpp_linked")
# C++ for one board only: zig builds a C++ library for each target first, which takes most of a minute.
BOARDS = {
    "raspberry-pi-4": ("aarch64", "aarch64-linux-gnu.2.28", PROGRAMS),
    "beaglebone-black": ("arm", "arm-linux-gnueabihf.2.28", PROGRAMS[:2]),
}


def make(folder: Path, shell: dict[str, str], *arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=shell, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"make {shlex.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def examples(repo: Path, digits_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "examples"
    shutil.copytree(repo / "examples", folder, ignore=shutil.ignore_patterns("build"))
    shutil.copy(digits_model, folder)
    return folder


def run(folder: Path, program: str, prefix: list[str]) -> str:
    command = [*prefix, f"build/{program}"]
    if program.endswith("opened"):
        command.append("build/digits.so")
    if program == "c_opened":
        command.append("three.txt")
    with (folder / "three.txt").open() as three:
        done = subprocess.run(
            command, cwd=folder, stdin=three, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("board", BOARDS)
def test_the_examples_built_for_a_board_run_there(
    board: str, examples: Path, repo: Path, shell: dict[str, str], qemu: Callable[[str], list[str]]
) -> None:
    arch, triple, programs = BOARDS[board]
    prefix = qemu(arch)
    zig = f"{shlex.quote(sys.executable)} -m ziglang"
    make(
        examples,
        shell,
        f"RUNTIME={repo / 'compiler' / 'ingot' / 'runtime'}",
        f"TARGET={board}",
        f"CC={zig} cc -target {triple}",
        f"CXX={zig} c++ -target {triple}",
        *(f"build/{program}" for program in programs),
    )
    for program in programs:
        assert run(examples, program, prefix).split()[:2] == ["class", "3"], program
