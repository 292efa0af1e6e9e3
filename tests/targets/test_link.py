"""The triples are right: the pinned linker makes a shared library for every target, and the emulators run its code."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ingot.target import Target, list_targets
from targets import isa, kernels

TARGETS = list_targets()
SOURCE = """
#include <math.h>
#include <pthread.h>
#include <string.h>
int main(void) { char b[64]; memset(b, 1, sizeof b); return pthread_self() && b[63] && fmaf(2, 3, 4) == 10 ? 42 : 1; }
"""


def zig(target: Target, output: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig_triple, f"-mcpu={target.baseline()}"]
    done = subprocess.run([*command, "-O2", "-o", str(output), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_kernels_link_into_a_library(target: Target, tmp_path: Path) -> None:
    objects, library = tmp_path / "k.o", tmp_path / "model.so"
    objects.write_bytes(kernels.object_for(target))
    source = tmp_path / "runtime.c"
    source.write_text(
        "int runtime(float *x, int n) { for (int i = 0; i < n; i++) x[i] = x[i] * x[i] / n; return n / 3; }"
    )
    zig(target, library, "-shared", "-fPIC", "-Wl,-z,defs", str(objects), str(source), "-lm", "-lpthread")
    elf = library.read_bytes()
    assert (struct.unpack_from("<H", elf, 18)[0], elf[4]) == (target.elf_machine, target.elf_class)
    if not isa.missing_tools(target.arch):
        assert isa.foreign_instructions(elf, target) == []


# One target for each (emulator CPU, libc): the rest would run the same again.
EMULATED = {(t.qemu.binary, t.qemu.cpu, t.libc): t for t in reversed(TARGETS) if t.qemu and t.arch != "x86_64"}


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize("target", EMULATED.values(), ids=lambda t: t.name)
def test_the_emulator_runs_baseline_code(target: Target, tmp_path: Path) -> None:
    assert target.qemu
    if not shutil.which(target.qemu.binary):
        pytest.skip("no emulator: apt-get install qemu-user")
    source, program = tmp_path / "main.c", tmp_path / "main"
    source.write_text(SOURCE)
    static = ["-static"] if target.libc == "musl" else []
    if not static and not Path(target.qemu.sysroot).is_dir():
        pytest.skip(f"no C library: {target.qemu.sysroot} comes with a libc6-*-cross package")
    zig(target, program, *static, str(source), "-lm", "-lpthread")
    done = subprocess.run([*target.qemu.command(), str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 42, done.stderr
