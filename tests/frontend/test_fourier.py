"""Transforms of real signals, folded or not, against numpy's in double precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from ingot.frontend import Imported, import_model

from .tiny_models import Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]
LENGTHS = (3, 64, 128, 130, 132, 400, 512, 2048)


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_of_every_length(write: Write, run_imported: Build) -> None:
    nodes = [helper.make_node("DFT", [f"x{n}"], [f"y{n}"], axis=1, onesided=1) for n in LENGTHS]
    inputs = [helper.make_tensor_value_info(f"x{n}", 1, (3, n, 1)) for n in LENGTHS]
    outputs = [helper.make_tensor_value_info(f"y{n}", 1, (3, n // 2 + 1, 2)) for n in LENGTHS]
    graph = helper.make_graph(nodes, "transforms", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    rng = np.random.default_rng(0)
    feeds = [rng.standard_normal((3, n, 1)).astype(np.float32) for n in LENGTHS]
    for found, x in zip(run_imported(import_model(write(model)))(*feeds), feeds, strict=True):
        wanted = np.fft.rfft(x[..., 0].astype(np.float64))
        _close(found[..., 0] + 1j * found[..., 1], wanted)


@pytest.mark.parametrize("step", [16, 160])
def test_of_frames_under_a_window(write: Write, run_imported: Build, step: int) -> None:
    weights = {"step": np.array(step), "window": np.hanning(400).astype(np.float32)}
    node = helper.make_node("STFT", ["x", "step", "window"], ["y"], onesided=1)
    graph = helper.make_graph(
        [node],
        "frames",
        [helper.make_tensor_value_info("x", 1, (2, 1000))],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(1).standard_normal((2, 1000)).astype(np.float32)
    (found,) = run_imported(import_model(write(onnx.shape_inference.infer_shapes(model))))(x)
    frames = np.lib.stride_tricks.sliding_window_view(x, 400, axis=1)[:, ::step] * weights["window"]
    _close(found[..., 0] + 1j * found[..., 1], np.fft.rfft(frames.astype(np.float64)))


def test_of_rows_of_a_picture_in_tflite(write: Write, run_imported: Build) -> None:
    tensors = [Tensor("x", (4, 256)), Tensor("n", (2,), "int32", np.array([4, 256], np.int32))]
    tensors += [Tensor("s", (4, 129), "complex64"), Tensor("real", (4, 129)), Tensor("imaginary", (4, 129))]
    ops = [Op("RFFT2D", (0, 1), (2,)), Op("REAL", (2,), (3,)), Op("IMAG", (2,), (4,))]
    x = np.random.default_rng(2).standard_normal((4, 256)).astype(np.float32)
    model = write(tflite_of(tensors, ops, [0], [3, 4]), "m.tflite")
    real, imaginary = run_imported(import_model(model))(x)
    _close(real + 1j * imaginary, np.fft.rfft2(x.astype(np.float64)))
