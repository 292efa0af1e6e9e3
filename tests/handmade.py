"""A model made by hand: a Program whose kernels are C functions, for tests that need no importer and no TVM."""

from __future__ import annotations

import functools
import platform
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from ingot.frontend.interface import Imported, TensorSpec
from ingot.packager.link import zig_path
from ingot.packager.selftest import SelfTest, random_inputs, store
from ingot.program import BufferRef, CopyStep, Kernel, Param, Program, Step
from ingot.target import Target, load_target

#: The least demanding target that runs on this machine.
HOST = {"x86_64": "x86-64-v2", "aarch64": "armv8.0-a"}[platform.machine()]
ROWS, COLUMNS = 97, 33
SEED = 0x1234_5678_9ABC_DEF0
F32, I64 = "float32", "int64"

KERNELS_C = """
#include <math.h>
#include <stdint.h>
#define COLUMNS %(columns)d

void ingot_%(name)s_scale(const float *x, const float *w, float *y, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++)
        for (int32_t j = 0; j < COLUMNS; j++) y[i * COLUMNS + j] = x[i * COLUMNS + j] * w[j];
}

void ingot_%(name)s_tanh(const float *x, float *y, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++)
        for (int32_t j = 0; j < COLUMNS; j++) y[i * COLUMNS + j] = tanhf(x[i * COLUMNS + j]) + 1.0f;
}

/* Waits while k[0] is -77, so that a test can look at an instance that is busy. */
void ingot_%(name)s_add_index(const int64_t *k, int64_t *y, int32_t begin, int32_t end) {
    while (__atomic_load_n(&k[0], __ATOMIC_ACQUIRE) == -77) continue;
    for (int32_t i = begin; i < end; i++) y[i] = k[i] + i;
}
"""


@functools.cache
def compile_c(source: str, zig_triple: str, baseline: str) -> bytes:
    """A relocatable object; kernels may use libm and the memory functions."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.c").write_text(source)
        subprocess.run(
            [
                *(zig_path(), "cc", "-target", zig_triple, f"-mcpu={baseline}", "-O2", "-g0", "-fPIC"),
                *("-fno-sanitize=undefined", "-c", "kernels.c", "-o", "kernels.o"),
            ],
            cwd=folder,
            check=True,
        )
        return (Path(folder) / "kernels.o").read_bytes()


WEIGHTS = np.linspace(-2, 2, COLUMNS, dtype=np.float32)


def expected(x: np.ndarray, k: np.ndarray) -> list[np.ndarray]:
    """What the model computes."""
    y = np.tanh(x.astype(np.float64) * WEIGHTS) + 1
    return [y.astype(np.float32), k + np.arange(3), x.copy()]


def handmade(
    target: Target | str = HOST,
    name: str = "demo",
    *,
    names: tuple[str, str, str, str, str] = ("x", "k", "y", "index", "same"),
    with_selftest: bool = True,
) -> tuple[Program, Imported, Target, SelfTest | None]:
    """Inputs x [97,33] float32 and k [3] int64; outputs tanh(x * w) + 1, k + [0, 1, 2], and x itself."""
    target = load_target(target) if isinstance(target, str) else target
    size = ROWS * COLUMNS * 4
    inputs = (TensorSpec(names[0], F32, (ROWS, COLUMNS)), TensorSpec(names[1], I64, (3,)))
    outputs = (
        TensorSpec(names[2], F32, (ROWS, COLUMNS)),
        TensorSpec(names[3], I64, (3,)),
        TensorSpec(names[4], F32, (ROWS, COLUMNS)),
    )
    prefix = f"ingot_{name}_"
    read, write = Param(F32, readonly=True), Param(F32, readonly=False)
    scale = Kernel(prefix + "scale", (read, read, write), ROWS, 4)
    tanh = Kernel(prefix + "tanh", (read, write), ROWS, 4)
    index = Kernel(prefix + "add_index", (Param(I64, readonly=True), Param(I64, readonly=False)), 3)
    x, arena = BufferRef("input", 0, 0, size), BufferRef("arena", 0, 64, size)
    program = Program(
        steps=(
            Step(scale, (x, BufferRef("weight", 0, 0, COLUMNS * 4), arena), "Mul"),
            Step(tanh, (arena, BufferRef("output", 0, 0, size)), "Tanh, Add"),
            Step(index, (BufferRef("input", 1, 0, 24), BufferRef("output", 1, 0, 24)), "Add"),
            CopyStep(x, BufferRef("output", 2, 0, size), size, "Identity"),
        ),
        objects=(compile_c(KERNELS_C % {"name": name, "columns": COLUMNS}, target.zig_triple, target.baseline()),),
        weights=WEIGHTS.tobytes(),
        arena_bytes=64 + size,
        macs=ROWS * COLUMNS,
        llvm_ir="; none\n",
        relax="# none\n",
    )
    imported = Imported(
        module=None,  # type: ignore[arg-type]
        weights={},
        inputs=inputs,
        outputs=outputs,
        name=name,
        source_format="onnx",
        source_sha256="ab" * 32,
        source_peak_bytes=size,
        notices=(),
    )
    selftest = None
    if with_selftest:
        arrays = expected(*random_inputs(inputs, SEED).values())
        tolerances = (1e-3, 1e-2, 1e-3)
        stored = (store(a, s, t) for a, s, t in zip(arrays, outputs, tolerances, strict=True))
        selftest = SelfTest(SEED, tuple(stored))
    return program, imported, target, selftest
