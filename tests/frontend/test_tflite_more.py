"""TFLite operators that a model of one operator cannot show: complex numbers in between, states over several runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ingot
from conformance.tflite_cases import Case
from conformance.tflite_list import cases
from conformance.tflite_suite import litert
from ingot.errors import UnsupportedError
from ingot.frontend import Imported, import_model
from passes.execute import compile_state, execute

from .tiny_models import Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]


@pytest.mark.parametrize("shape", [(8, 8), (4, 6), (1, 16)])
def test_spectra_and_their_parts(write: Write, run_imported: Build, shape: tuple[int, int]) -> None:
    rows, columns = shape
    lengths = Tensor("lengths", (2,), "int32", np.array(shape, np.int32))
    parts = (2, rows, columns // 2 + 1)
    tensors = [Tensor("x", (2, *shape)), lengths, Tensor("spectrum", parts, "complex64")]
    tensors += [Tensor(name, parts) for name in ("real", "imaginary", "size")]
    ops = [Op("RFFT2D", (0, 1), (2,)), Op("REAL", (2,), (3,)), Op("IMAG", (2,), (4,)), Op("COMPLEX_ABS", (2,), (5,))]
    data = tflite_of(tensors, ops, [0], [3, 4, 5])
    x = np.random.default_rng(3).standard_normal((2, *shape)).astype(np.float32)
    spectrum = np.fft.rfft2(x)
    found = run_imported(import_model(write(data, "m.tflite")))(x)
    for value, wanted in zip(found, (spectrum.real, spectrum.imag, np.abs(spectrum)), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    if {rows & rows - 1, columns & columns - 1} == {0}:  # LiteRT's lengths are powers of two
        for value, wanted in zip(found, litert(data, [x]), strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)


def _in_a_row(case: Case, feeds: list[list[np.ndarray]], shapes: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(model_content=case.model(shapes, real=True), experimental_op_resolver_type=kind)
    runner.allocate_tensors()
    found = []
    for arrays in feeds:
        for detail, array in zip(runner.get_input_details(), arrays, strict=True):
            runner.set_tensor(detail["index"], array)
        runner.invoke()
        found.append([runner.get_tensor(detail["index"]).copy() for detail in runner.get_output_details()])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "UNIDIRECTIONAL_SEQUENCE_LSTM float32",
        "UNIDIRECTIONAL_SEQUENCE_LSTM int8",
        "SVDF float32",
        "SVDF int8",
        "BIDIRECTIONAL_SEQUENCE_RNN hybrid activation 4",
    ],
)
def test_states_live_from_run_to_run(write: Write, tmp_path: Path, name: str) -> None:
    case = next(case for case in cases() if case.name == name)
    feeds = [case.feeds(seed) for seed in range(3)]
    shapes = [array.shape for array in litert(case.model(real=True), feeds[0])]
    artifact = ingot.compile(write(case.model(shapes), "m.tflite"))
    with ingot.load(artifact.save(tmp_path / "m.so")) as loaded:
        assert loaded.selftest() < 1
        for arrays, wanted in zip(feeds, _in_a_row(case, feeds, shapes), strict=True):
            found = loaded(*arrays)
            for left, right in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
                np.testing.assert_allclose(left, right, rtol=2e-5, atol=1e-5)
        loaded.reset()
        again = loaded(*feeds[0])
        first = _in_a_row(case, feeds[:1], shapes)[0]
        np.testing.assert_allclose(again[0] if isinstance(again, tuple) else again, first[0], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [1, 2])
def test_mediapipes_transposed_convolution(write: Write, tmp_path: Path, padding: int) -> None:
    from ai_edge_litert.interpreter import Interpreter

    rng = np.random.default_rng(padding)
    weights, bias = rng.standard_normal((5, 3, 4, 6)).astype("f4"), rng.standard_normal(5).astype("f4")
    tensors = [Tensor("x", (1, 7, 8, 6)), Tensor("w", weights.shape, "float32", weights)]
    tensors += [Tensor("b", bias.shape, "float32", bias)]
    tensors.append(Tensor("y", (1, 14, 24, 5) if padding == 1 else (1, 15, 25, 5)))
    options = np.array([padding, 3, 2], "<i4").tobytes()  # the width's stride first
    ops = [Op("CUSTOM", (0, 1, 2), (3,), custom="Convolution2DTransposeBias", custom_options=options)]
    data = tflite_of(tensors, ops, [0], [3])
    x = rng.standard_normal((1, 7, 8, 6)).astype(np.float32)
    (found,) = execute(compile_state(import_model(write(data, "m.tflite"))), [x], tmp_path)
    runner = Interpreter(model_content=data)  # its XNNPACK delegate has this operator
    runner.allocate_tensors()
    runner.set_tensor(runner.get_input_details()[0]["index"], x)
    runner.invoke()
    np.testing.assert_allclose(found, runner.get_tensor(runner.get_output_details()[0]["index"]), rtol=1e-5, atol=1e-5)


def test_options_of_mediapipes_operators_are_not_trusted(write: Write) -> None:
    tensors = [Tensor("x", (1, 2, 2, 1)), Tensor("w", (1, 2, 2, 1), "float32", np.ones((1, 2, 2, 1), np.float32))]
    tensors += [Tensor("b", (1,), "float32", np.ones(1, np.float32)), Tensor("y", (1, 4, 4, 1))]
    for options in (None, b"\1\0\0\0", np.array([1, 0, 2], "<i4").tobytes(), np.array([7, 2, 2], "<i4").tobytes()):
        ops = [Op("CUSTOM", (0, 1, 2), (3,), custom="Convolution2DTransposeBias", custom_options=options)]
        with pytest.raises(UnsupportedError, match="options cannot be used"):
            import_model(write(tflite_of(tensors, ops, [0], [3]), "m.tflite"))
