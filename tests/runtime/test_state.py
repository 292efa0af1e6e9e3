"""State that runs leave to the next one, in a model made by hand: from C with sanitizers, from Python, and refused."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from handmade import HOST, compile_c
from ingot import load
from ingot.errors import CompilerError, InputError
from ingot.frontend.interface import Counted, Imported, StateTensor, TensorSpec
from ingot.packager.artifact import Artifact, package
from ingot.packager.selftest import SelfTest, random_inputs, store
from ingot.program import Bucket, BufferRef, Kernel, Param, Program, Step
from ingot.target import load_target

HERE = Path(__file__).resolve().parent
RUNTIME = HERE.parent.parent / "compiler" / "ingot" / "runtime"
KERNELS_C = """
#include <stdint.h>
void ingot_sum_add(const float *s, const float *x, float *y, float *t, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++) t[i] = y[i] = s[i] + x[i];
}
void ingot_sum_add_two(const float *s, const float *x, float *y, float *t, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++) t[i] = y[i] = s[i] + x[i];
}
void ingot_sum_pick(const float *x, float *z, int64_t *count, int32_t begin, int32_t end) {
    (void)begin, (void)end;
    count[0] = 0;
    for (int32_t i = 0; i < 3; i++) z[i] = 0;
    for (int32_t i = 0; i < 3; i++)
        if (x[i] > 1) z[count[0]++] = x[i];
}
void ingot_sum_pick_two(const float *x, float *z, int64_t *count, int32_t begin, int32_t end) {
    (void)begin, (void)end;
    count[0] = z[0] = z[1] = 0;
    for (int32_t i = 0; i < 2; i++)
        if (x[i] > 1) z[count[0]++] = x[i];
}
"""
SEED = 77
FIRST = np.array([10, 20, 30], np.float32)


def parts(initial: np.ndarray = FIRST) -> tuple[Program, Imported, SelfTest]:
    spec = TensorSpec("x", "float32", (3,))
    read, write = Param("float32", readonly=True), Param("float32", readonly=False)
    kernel = Kernel("ingot_sum_add", (read, read, write, write), 3)
    refs = (BufferRef("state", 0, 0, 12), BufferRef("input", 0, 0, 12))
    refs += (BufferRef("output", 0, 0, 12), BufferRef("state", 1, 0, 12))
    pick = Kernel("ingot_sum_pick", (read, write, Param("int64", readonly=False)), 1)
    picked = (BufferRef("input", 0, 0, 12), BufferRef("output", 1, 0, 12), BufferRef("state", 1, 64, 8))
    # For x of two elements the state still has three, the last of which stays as it is in the other half.
    two_refs = (BufferRef("state", 0, 0, 8), BufferRef("input", 0, 0, 8))
    two_refs += (BufferRef("output", 0, 0, 8), BufferRef("state", 1, 0, 8))
    two = Step(Kernel("ingot_sum_add_two", kernel.params, 2), two_refs, "Add")
    two_picked = (BufferRef("input", 0, 0, 8), BufferRef("output", 1, 0, 8), BufferRef("state", 1, 64, 8))
    pick_two = Step(replace(pick, symbol="ingot_sum_pick_two"), two_picked, "Compress")
    program = Program(
        buckets=(Bucket((two, pick_two), ((2,),), ((2,), (2,))),),
        steps=(Step(kernel, refs, "Add"), Step(pick, picked, "Compress")),
        objects=(compile_c(KERNELS_C, load_target(HOST).zig_triple, load_target(HOST).baseline()),),
        weights=bytes(64) + initial.tobytes() + bytes(116) if initial.any() else b"",
        arena_bytes=0,
        macs=0,
        state_bytes=128,
        counters={3: 64},
        initial_state=64 if initial.any() else None,
    )
    imported = Imported(
        module=None,  # type: ignore[arg-type]
        weights={},
        inputs=(replace(spec, name="s"), spec),
        outputs=(*(replace(spec, name=name) for name in "ytz"), TensorSpec("z#count", "int64", (1,))),
        name="sum",
        source_format="onnx",
        source_sha256="ef" * 32,
        source_peak_bytes=0,
        notices=(),
        states=(StateTensor(0, 1, initial),),
        counts=(Counted(2, 0, 3),),
    )
    x = random_inputs(imported.user_inputs, SEED)["x"]
    twice = store(initial + x + x, imported.user_outputs[0], 1e-6)
    above = store(np.zeros(3, np.float32), imported.user_outputs[1], 1e-6)  # the seeded x are below 1
    return program, imported, SelfTest(SEED, (twice, above), runs=2)


def built(initial: np.ndarray = FIRST) -> Artifact:
    program, imported, selftest = parts(initial)
    return package(program, imported, load_target(HOST), precision="fp32", selftest=selftest)


@pytest.mark.parametrize("flags", [("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ("-O3", "-Wshadow")])
def test_state_from_c(flags: tuple[str, ...], gcc: str, tmp_path: Path) -> None:
    sources = built().sources
    for name, data in sources.files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "entry.c").write_text(sources.entry_c, encoding="utf-8")
    (tmp_path / "weights.S").write_text(sources.weights_s, encoding="utf-8")
    (tmp_path / "kernels.c").write_text(KERNELS_C)
    command = [gcc, "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *flags, f"-I{RUNTIME}"]
    command += [str(HERE / "state.c"), "entry.c", "kernels.c", "weights.S", "-o", "state", "-lm", "-lpthread"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "state"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("initial", [FIRST, np.zeros(3, np.float32)])
def test_state_from_python(initial: np.ndarray, tmp_path: Path) -> None:
    path = built(initial).save(tmp_path / "sum.so")
    x = np.array([1, 2, 3], np.float32)
    with load(path, threads=1) as model:
        assert [spec.name for spec in (*model.inputs, *model.outputs)] == ["x", "y", "z"]
        assert [(e["input"], e["output"], e["shape"]) for e in model.metadata["states"]] == [("s", "t", [3])]
        for times in (1, 2, 3):
            np.testing.assert_array_equal(model(x)[0], initial + times * x)
        assert model.outputs[1].shape == (3,) and model.metadata["outputs"][1]["counted"] == 0
        np.testing.assert_array_equal(model(x)[1], [2, 3])
        assert model(x - 9)[1].shape == (0,)
        mine = np.full(3, 7, np.float32)
        np.testing.assert_array_equal(model.run({"x": x}, {"z": mine})["z"], [2, 3])
        np.testing.assert_array_equal(mine, [2, 3, 0])
        model.reset()
        small = model(x[:2])
        np.testing.assert_array_equal(small[0], initial[:2] + x[:2])
        assert small[1].tolist() == [2]
        for wrong in (x[:1], np.zeros((1, 3), np.float32), np.zeros(4, np.float32)):
            with pytest.raises(InputError, match=r"x \[2\]; x \[3\]"):
                model(wrong)
        with pytest.raises(InputError, match="not an array"):
            model([[1.0], [1.0, 2.0]])
        with pytest.raises(InputError, match="dtype"):
            model(x[:2].astype(np.float64))
        model.reset()
        np.testing.assert_array_equal(model(x)[0], initial + x)
        assert model.selftest() == 0
        np.testing.assert_array_equal(model(x)[0], initial + x)


def test_a_program_that_writes_the_state_it_reads_is_refused() -> None:
    program, imported, _ = parts()
    step = program.steps[0]
    assert isinstance(step, Step)
    own = replace(step, args=(*step.args[:3], BufferRef("state", 0, 0, 12)))
    beyond = replace(step, args=(*step.args[:3], BufferRef("state", 1, 120, 12)))
    for wrong in (replace(program, steps=(own,)), replace(program, steps=(beyond,)), replace(program, state_bytes=32)):
        with pytest.raises(CompilerError, match="inconsistent"):
            package(wrong, imported, load_target(HOST), precision="fp32", selftest=None)
    with pytest.raises(CompilerError, match="state"):
        outside = replace(program, initial_state=192)
        package(outside, imported, load_target(HOST), precision="fp32", selftest=None)
