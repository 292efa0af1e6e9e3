"""The generated C: readable, safe for any name, and refused where the program contradicts itself."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ingot
from handmade import COLUMNS, ROWS, expected, handmade
from ingot.errors import CompilerError
from ingot.frontend.interface import Quantization, TensorSpec
from ingot.packager.artifact import package
from ingot.packager.entry import c_comment, c_string, check_program, entry_c, weights_s
from ingot.program import BufferRef, CopyStep, Kernel, Param, Program, Step

HOSTILE = [
    'quote " and \\ backslash',
    "trigraph ??/ and ??) and ??=",
    "*/ int evil(void) { return 1; } /*",
    "line\nbreak\r\n\t and // comment \\",
    "%s%n%99999d",
    "unicode: Grüße 输入 🙂 \u202ereversed\u202c",
    "\x01\x1f7 digits after a control character",
    "x" * 5000,
    "",
]


def test_golden(golden: Callable[..., None]) -> None:
    program, imported, target, selftest = handmade("raspberry-pi-4")
    text = entry_c(program, imported, target, "fp32", selftest)
    golden(text.replace(ingot.__version__, "VERSION"), ".c")
    assert entry_c(program, imported, target, "fp32", selftest) == text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_survive(name: str, gcc: str, tmp_path: Path) -> None:
    names = tuple(f"{name}{i}" for i in range(5))
    program, imported, target, selftest = handmade(names=names)
    steps = tuple(replace(step, label=name) for step in program.steps)
    target = target.model_copy(update={"description": name})
    artifact = package(replace(program, steps=steps), imported, target, precision="fp32", selftest=selftest)
    path = artifact.save(tmp_path / "m.so")
    model = ingot.load(path, threads=1)
    assert [t.name for t in (*model.inputs, *model.outputs)] == list(names)
    x, k = np.ones((ROWS, COLUMNS), np.float32), np.arange(3)
    outputs = model.run({names[0]: x, names[1]: k})
    assert list(outputs) == list(names[2:])
    np.testing.assert_array_equal(outputs[names[3]], expected(x, k)[1])
    # A second compiler reads the same source and the header without a warning.
    (tmp_path / "entry.c").write_text(artifact.entry_c, encoding="utf-8")
    (tmp_path / "model.h").write_text(artifact.header, encoding="utf-8")
    runtime = Path(ingot.__file__).parent / "runtime"
    strict = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    for command in (["-std=c11", f"-I{runtime}", "entry.c"], ["-std=c11", "-trigraphs", "-x", "c", "model.h"]):
        subprocess.run([gcc, *strict, *command], cwd=tmp_path, check=True)


def test_names_are_the_same_bytes_through_the_abi(tmp_path: Path) -> None:
    name = 'Grüße "\\??/\n*/ \x017 %s'
    program, imported, target, _ = handmade(names=(name, "k", "y", "index", "same"))
    package(program, imported, target, precision="fp32", selftest=None).save(tmp_path / "m.so")
    library = ctypes.CDLL(str(tmp_path / "m.so"))
    library.ingot_demo_api.restype = ctypes.c_void_p
    model = ingot.load(tmp_path / "m.so")
    with pytest.raises(ingot.IngotError) as error:
        model(np.zeros((1, 1), np.float32), np.zeros(3, np.int64))
    assert "Gr\u00fc\u00dfe" in str(error.value)


def test_c_string_is_plain_ascii() -> None:
    assert c_string('a"b\\c?d\n7é') == '"a\\042b\\134c\\077d\\0127\\303\\251"'
    assert all(ord(c) < 127 for name in HOSTILE for c in c_string(name))


def test_c_comment_cannot_be_left() -> None:
    for name in HOSTILE:
        text = c_comment(name)
        assert not re.search(r"[*\\?\n\r\u202e]", text)
        assert len(text) <= 160


def test_nothing_to_compute(tmp_path: Path) -> None:
    """Zero-sized tensors, no weights, no arena, no kernels: only copies."""
    _, imported, target, _ = handmade()
    imported = replace(
        imported,
        inputs=(TensorSpec("empty", "float32", (0, 3)), TensorSpec("scalar", "int8", ())),
        outputs=(TensorSpec("also_empty", "float32", (3, 0)), TensorSpec("copied", "int8", ())),
    )
    steps = (
        CopyStep(BufferRef("input", 0), BufferRef("output", 0), 0, "Reshape"),
        CopyStep(BufferRef("input", 1, 0, 1), BufferRef("output", 1, 0, 1), 1, "Identity"),
    )
    program = Program(steps=steps, objects=(), weights=b"", arena_bytes=0, macs=0)
    artifact = package(program, imported, target, precision="fp32", selftest=None)
    model = ingot.load(artifact.save(tmp_path / "m.so"), threads=2)
    outputs = model(np.zeros((0, 3), np.float32), np.array(7, np.int8))
    assert outputs[0].shape == (3, 0)
    assert outputs[1] == 7
    assert artifact.metadata["weights_bytes"] == 0


def test_no_inputs(tmp_path: Path) -> None:
    """A model that answers the same always: its output is a weight."""
    _, imported, target, _ = handmade()
    quantization = Quantization((0.1, 1e-30), (-128, 127), 0)
    imported = replace(imported, inputs=(), outputs=(TensorSpec("y", "int8", (2,), quantization),))
    step = CopyStep(BufferRef("weight", 0, 64, 2), BufferRef("output", 0, 0, 2), 2, "Constant")
    program = Program(steps=(step,), objects=(), weights=bytes(64) + b"\x05\xff", arena_bytes=0, macs=0)
    artifact = package(program, imported, target, precision="fp32", selftest=None)
    model = ingot.load(artifact.save(tmp_path / "m.so"))
    np.testing.assert_array_equal(model(), [5, -1])
    assert artifact.metadata["outputs"][0]["quantization"]["zero_points"] == [-128, 127]


READ, WRITE = Param("float32", readonly=True), Param("float32", readonly=False)


def kernel_step(*args: BufferRef, **changes: object) -> Step:
    fields: dict[str, object] = {"symbol": "ingot_demo_scale", "params": (READ, WRITE), "extent": 1} | changes
    return Step(Kernel(**fields), args, "the step")  # type: ignore[arg-type]


X, Y = BufferRef("input", 0, 0, 4), BufferRef("output", 0, 0, 4)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (kernel_step(X), "wrong number of arguments"),
        (kernel_step(X, BufferRef("output", 3, 0, 4)), "no such output"),
        (kernel_step(BufferRef("input", -1, 0, 4), Y), "no such input"),
        (kernel_step(BufferRef("input", 0, 97 * 33 * 4, 4), Y), "reaches beyond its input of 12804 bytes"),
        (kernel_step(BufferRef("weight", 0, 64, 69), Y), "reaches beyond its weight of 132 bytes"),
        (kernel_step(BufferRef("arena", 0, -4, 4), Y), "reaches beyond"),
        (kernel_step(BufferRef("arena", 0, 2, 4), Y), "not aligned to 4 bytes"),
        (kernel_step(X, BufferRef("input", 0, 0, 4)), "read-only input"),
        (kernel_step(X, BufferRef("weight", 0, 0, 4)), "read-only weight"),
        (kernel_step(X, Y, symbol="strlen"), "must start with 'ingot_demo_'"),
        (kernel_step(X, Y, symbol="ingot_demo_x();"), "must start with"),
        (kernel_step(X, Y, extent=2**31), "out of range"),
        (kernel_step(X, Y, grain=0), "out of range"),
        (kernel_step(X, Y, params=(READ, Param("int4", readonly=False))), "unknown dtype"),
        (CopyStep(X, Y, 12808, "copy"), "reaches beyond"),
        (CopyStep(Y, X, 4, "copy"), "read-only input"),
    ],
)
def test_inconsistent_programs_are_refused(step: Step | CopyStep, message: str) -> None:
    program, imported, _, _ = handmade()
    with pytest.raises(CompilerError, match="inconsistent") as error:
        check_program(replace(program, steps=(step,)), imported)
    assert message in str(error.value)


def test_one_symbol_names_one_kernel() -> None:
    program, imported, _, _ = handmade()
    steps = (kernel_step(X, Y), kernel_step(X, Y, extent=2))
    with pytest.raises(CompilerError, match="share a symbol"):
        check_program(replace(program, steps=steps), imported)


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("y", "int4", (1,)),
        TensorSpec("y", "int8", (1,) * 9),
        TensorSpec("y", "int8", (-1,)),
        TensorSpec("y", "int8", (2,), Quantization((1.0, 2.0), (0,), 0)),
        TensorSpec("y", "int8", (2,), Quantization((1.0, 2.0), (0, 0), 1)),
        TensorSpec("y", "int8", (2,), Quantization((float("inf"),), (0,), 0)),
        TensorSpec("y", "int8", (2,), Quantization((float("nan"),), (0,), 0)),
        TensorSpec("y", "int8", (2,), Quantization((1.0,), (2**31,), 0)),
    ],
)
def test_tensors_beyond_the_abi_are_refused(spec: TensorSpec) -> None:
    program, imported, _, _ = handmade()
    with pytest.raises(CompilerError, match="the ABI cannot describe"):
        check_program(program, replace(imported, outputs=(spec, *imported.outputs[1:])))


def test_weights_source_names_its_contents() -> None:
    """The toolchain's cache does not look into included binaries: the text must change with them."""
    _, imported, target, selftest = handmade()
    texts = {
        weights_s(imported, target, weights, note, test)
        for weights in (b"", b"a", b"b")
        for note in (b"{}", b"[]")
        for test in (None, selftest)
    }
    assert len(texts) == 12
