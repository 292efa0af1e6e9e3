"""The selftest: the same numbers in C and in Python, real differences found, no interpreter able to hurt."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ingot
from handmade import SEED, handmade
from ingot.errors import IngotError
from ingot.frontend.interface import Imported, TensorSpec
from ingot.packager import apart
from ingot.packager import selftest as module
from ingot.packager.artifact import package
from ingot.packager.metadata import DTYPES, tensor_bytes
from ingot.packager.selftest import (
    STORED_ELEMENTS,
    Reference,
    SelfTest,
    SelfTestOutput,
    build_selftest,
    expected_outputs,
    random_input,
    random_inputs,
    store,
)
from ingot.program import BufferRef, CopyStep, Program

Load = Callable[..., "ingot.Model"]


def selftest_of(path: Path, imported: Imported) -> tuple[SelfTest | None, str | None]:
    with closing(Reference(path, imported)) as reference:
        return build_selftest(reference, imported, precision="fp32")


@pytest.fixture
def copies(tmp_path: Path) -> Load:
    """A function that makes a model whose outputs are its inputs, or stored arrays, with a given selftest."""
    count = 0

    def make(
        specs: tuple[TensorSpec, ...], outputs: tuple[SelfTestOutput, ...], stored: tuple[np.ndarray, ...] | None = None
    ) -> ingot.Model:
        nonlocal count
        count += 1
        _, imported, target, _ = handmade()
        steps, weights = [], b""
        for i, spec in enumerate(specs):
            size = tensor_bytes(spec)
            source = BufferRef("input", i, 0, size)
            if stored is not None:
                source = BufferRef("weight", 0, len(weights), size)
                weights += stored[i].tobytes()
            steps.append(CopyStep(source, BufferRef("output", i, 0, size), size, "Identity"))
        imported = replace(imported, inputs=specs if stored is None else (), outputs=specs)
        program = Program(steps=tuple(steps), objects=(), weights=weights, arena_bytes=0, macs=0)
        artifact = package(program, imported, target, precision="fp32", selftest=SelfTest(SEED, outputs))
        return ingot.load(artifact.save(tmp_path / f"{count}.so"), threads=1)

    return make


def test_generator_is_the_same_in_c(copies: Load) -> None:
    """Every dtype, with sizes around the edges; not one bit may differ."""
    specs = tuple(
        TensorSpec(f"{dtype}_{size}", dtype, (size,)) for dtype in DTYPES for size in (0, 1, 7, 1023, 1024, 1025, 3000)
    )
    arrays = random_inputs(specs, SEED)
    model = copies(specs, tuple(store(arrays[s.name], s, 0.0) for s in specs))
    assert model.selftest() == 0.0


def test_generator_values() -> None:
    spec = TensorSpec("x", "float32", (10_000,))
    values = random_input(spec, SEED, 0)
    assert values.min() >= -1
    assert values.max() < 1
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1 / np.sqrt(3)) < 0.02
    assert not np.array_equal(values, random_input(spec, SEED, 1))
    assert not np.array_equal(values, random_input(spec, SEED + 1, 0))
    assert set(random_input(TensorSpec("i", "int64", (100,)), SEED, 0)) == {0, 1}
    assert set(random_input(TensorSpec("b", "bool", (100,)), SEED, 0)) == {False, True}
    bytes_ = random_input(TensorSpec("u", "int8", (10_000,)), SEED, 0)
    assert (bytes_.min(), bytes_.max()) == (-128, 127)
    assert random_input(TensorSpec("s", "float32", ()), SEED, 0).shape == ()
    # Frozen: an artifact of today must pass the selftest of any later runtime.
    assert values[:3].tolist() == [-0.8273580074310303, 0.3551650047302246, -0.5858765840530396]


def test_every_float_is_read_right(copies: Load) -> None:
    """All 65,536 float16 and bfloat16 values, infinities and NaNs included, and the largest and smallest others."""
    specs = tuple(TensorSpec(f"{dtype}_{i}", dtype, (1024,)) for dtype in ("float16", "bfloat16") for i in range(64))
    arrays = []
    for i in range(128):
        bits = np.arange(1024 * (i % 64), 1024 * (i % 64) + 1024).astype(np.uint16)
        arrays.append(bits.view(np.float16) if i < 64 else bits)
    for dtype in ("float32", "float64"):
        info = np.finfo(dtype)
        specials = [0, -0.0, info.tiny, info.smallest_subnormal, info.max, -info.max, np.inf, -np.inf, np.nan]
        specs += (TensorSpec(dtype, dtype, (9,)),)
        arrays.append(np.array(specials, dtype))
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        specs += (TensorSpec(dtype, dtype, (2,)),)
        arrays.append(np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype))
    outputs = tuple(store(a, s, 0.0) for a, s in zip(arrays, specs, strict=True))
    assert copies(specs, outputs, tuple(arrays)).selftest() == 0.0


@pytest.mark.parametrize(
    ("dtype", "actual", "expected", "deviation"),
    [
        ("float32", [1, 2, 4], [1, 2, 8], 0.5),
        ("float32", [1, np.nan], [1, 2], np.inf),
        ("float32", [1, np.inf], [1, np.nan], np.inf),
        ("float32", [1, np.inf], [1, -np.inf], np.inf),
        ("float32", [0.25, 0], [0, 0], 0.25),
        ("float64", [1e300, 0], [-1e300, 0], 2.0),
        ("float16", [2, 1], [2, 1.5], 0.25),
        ("int8", [-128, 0], [127, 0], 1.0),
        ("uint8", [0, 51], [0, 0], 0.2),
        ("int32", [1, 2, 3, 4], [1, 2, 3, -(2**31)], 0.25),
        ("bool", [True, False], [False, False], 0.5),
    ],
)
def test_differences_are_measured(
    dtype: str, actual: list[float], expected: list[float], deviation: float, copies: Load
) -> None:
    spec = TensorSpec("y", dtype, (len(actual),))
    stored = (np.array(actual, dtype),)
    wanted = np.array(expected, dtype)
    finite = np.isfinite(deviation)
    if finite:
        assert copies((spec,), (store(wanted, spec, deviation * 1.001),), stored).selftest() == pytest.approx(deviation)
    model = copies((spec,), (store(wanted, spec, deviation * 0.999 if finite else 1e300),), stored)
    with pytest.raises(IngotError, match="selftest") as error:
        model.selftest()
    assert f"output 'y' is off by {'' if finite else 'inf'}" in str(error.value)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 2048, 2049, 1_000_003])
def test_stored_elements(size: int) -> None:
    output = store(np.arange(size, dtype=np.float32).reshape(1, size), TensorSpec("y", "float32", (1, size)), 0.1)
    assert output.values.size <= STORED_ELEMENTS
    assert output.values.size >= min(size, STORED_ELEMENTS // 2)
    np.testing.assert_array_equal(output.values, np.arange(0, size, output.stride, dtype=np.float32))


def test_without_a_selftest(tmp_path: Path) -> None:
    program, imported, target, _ = handmade()
    model = ingot.load(
        package(program, imported, target, precision="fp32", selftest=None).save(tmp_path / "m.so"), threads=1
    )
    with pytest.raises(IngotError, match="no selftest"):
        model.selftest()


# ---- the interpreters ----


def as_imported(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Imported:
    _, imported, _, _ = handmade()
    return replace(imported, inputs=inputs, outputs=outputs)


@pytest.fixture(scope="module")
def onnx_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x * 2 and k + 1."""
    from onnx import TensorProto, helper, save

    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Add", ["k", "k"], ["z"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3]), value("k", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, ["n", 3]), value("z", TensorProto.INT64, [2])],
    )
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


X, K = TensorSpec("x", "float32", (2, 3)), TensorSpec("k", "int64", (2,))
Y, Z = TensorSpec("y", "float32", (2, 3)), TensorSpec("z", "int64", (2,))


def test_onnx(onnx_model: Path) -> None:
    built, notice = selftest_of(onnx_model, as_imported((X, K), (Y, Z)))
    assert notice is None
    assert built is not None
    feeds = random_inputs((X, K), built.seed)
    np.testing.assert_array_equal(built.outputs[0].values, (feeds["x"] * 2).reshape(-1))
    np.testing.assert_array_equal(built.outputs[1].values, feeds["k"] * 2)
    assert [o.tolerance for o in built.outputs] == [1e-3, 1e-2]
    assert len(built.data()) == 24 + 16
    assert built.offsets() == [0, 24]


def test_onnx_reference_when_onnxruntime_fails(onnx_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "_run_onnxruntime", fail)
    fail.__name__ = "_run_fail"
    feeds = random_inputs((X, K), 1)
    arrays = expected_outputs(onnx_model, (X, K), feeds)
    assert arrays is not None
    np.testing.assert_array_equal(arrays[0], feeds["x"] * 2)
    monkeypatch.setattr(module, "_run_onnx_reference", fail)
    assert expected_outputs(onnx_model, (X, K), feeds) is None


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ((Y,), "gives 2 outputs, the model has 1"),
        ((TensorSpec("y", "float32", (3, 2)), Z), "for output 'y' the interpreter gives float32 [2, 3]"),
        ((Y, TensorSpec("z", "int32", (2,))), "for output 'z' the interpreter gives int64 [2], not int32 [2]"),
    ],
)
def test_disagreement_about_the_outputs(outputs: tuple[TensorSpec, ...], why: str, onnx_model: Path) -> None:
    built, notice = selftest_of(onnx_model, as_imported((X, K), outputs))
    assert built is None
    assert why in (notice or "")


def test_an_interpreter_that_refuses(onnx_model: Path, tmp_path: Path) -> None:
    wrong = TensorSpec("x", "float32", (2, 4))
    built, notice = selftest_of(onnx_model, as_imported((wrong, K), (Y, Z)))
    assert built is None
    assert notice
    assert notice.startswith("the artifact has no selftest: ")
    for data in (b"", b"garbage", b"\0\0\0\0TFL3 but no more"):
        (tmp_path / "bad").write_bytes(data)
        built, notice = selftest_of(tmp_path / "bad", as_imported((X,), (Y,)))
        assert built is None
        assert notice
    built, notice = selftest_of(tmp_path / "missing", as_imported((X,), (Y,)))
    assert built is None
    assert "No such file" in (notice or "")


@pytest.mark.parametrize(
    ("interpreter", "why"),
    [
        ("echo nonsense >&2; kill -11 $$", "nonsense"),
        ("kill -11 $$", "status -11"),
        ("exec sleep 60", "longer than"),
        (None, "No such file"),
    ],
)
def test_a_crash_costs_only_the_selftest(
    interpreter: str | None, why: str, onnx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interpreter(interpreter, tmp_path, monkeypatch)
    monkeypatch.setattr(apart, "TIME_LIMIT_S", 0.5)
    built, notice = selftest_of(onnx_model, as_imported((X, K), (Y, Z)))
    assert built is None
    assert why in (notice or "")


def test_an_interpreter_whose_answer_nobody_wants_is_ended(
    onnx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interpreter(f"echo $$ > {tmp_path}/pid; exec sleep 60", tmp_path, monkeypatch)
    reference = Reference(onnx_model, as_imported((X, K), (Y, Z)))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.01)
    reference.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def _interpreter(script: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script, or nothing, where Python was."""
    path = folder / "python"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setattr(apart.sys, "executable", str(path))


@pytest.mark.parametrize(
    ("path", "tolerance"),
    [
        ("mlperf_tiny_kws/kws_ref_model_int8.tflite", 0.1),
        ("mlperf_tiny_kws/kws_ref_model_float32.tflite", 0.25),  # its weights are 8-bit
        ("hand_keypoint_mlp/keypoint_classifier.tflite", 1e-3),
        ("mnist_cnn/mnist.onnx", 1e-3),
        ("squeezenet_int8_qdq/squeezenet_int8_qdq.onnx", 0.25),
    ],
)
def test_real_models(path: str, tolerance: float, shared_models: Path) -> None:
    """LiteRT and ONNX Runtime, quantised sources and others."""
    from ingot.frontend import import_model

    built, notice = selftest_of(shared_models / path, import_model(shared_models / path))
    assert notice is None
    assert built is not None
    assert [o.tolerance for o in built.outputs] == [tolerance]
    assert len(set(built.outputs[0].values.tolist())) > 1
