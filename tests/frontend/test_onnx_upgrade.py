"""Models of opset 6 and IR 3: broadcasting along an axis, slopes of channels, training flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from ingot.errors import UnsupportedError
from ingot.frontend import import_model

from .tiny_models import model_of

_RNG = np.random.default_rng(3)


def _w(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


X = _w(2, 3, 4)
WEIGHTS = {"three": _w(3), "two": _w(2, 1, 1), "slope": _w(3), "factor": _w(4, 5), "shift": _w(5), "var": _w(3) ** 2}


def _model(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "old",
        [helper.make_tensor_value_info("x", 1, X.shape)],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3)


def test_operators_of_opset_6_mean_what_they_meant(tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    norm = ["x", "slope", "three", "three", "var"]
    nodes = [
        helper.make_node("Add", ["x", "three"], ["add"], broadcast=1, axis=1),
        helper.make_node("Mul", ["x", "two"], ["mul"], broadcast=1, axis=0),
        helper.make_node("Sub", ["x", "x"], ["sub"]),
        helper.make_node("PRelu", ["x", "slope"], ["prelu"]),
        helper.make_node("BatchNormalization", norm, ["norm"], is_test=1, epsilon=1e-3),
        helper.make_node("Dropout", ["x"], ["dropped"], is_test=1),
        helper.make_node("Reshape", ["dropped", "shape"], ["flat"]),
        helper.make_node("Gemm", ["flat", "factor", "shift"], ["gemm"], broadcast=1),
    ]
    model = _model(nodes, ["add", "mul", "sub", "prelu", "norm", "gemm"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([6, 4]), "shape"))
    onnx.save(model, tmp_path / "model.onnx")
    found = run_imported(import_model(tmp_path / "model.onnx"))(X)
    three, slope, var = (WEIGHTS[name][:, None] for name in ("three", "slope", "var"))
    wanted = [
        X + three,
        X * WEIGHTS["two"],
        X - X,
        np.where(X < 0, X * slope, X),
        (X - three) / np.sqrt(var + 1e-3) * slope + three,
        X.reshape(6, 4) @ WEIGHTS["factor"] + WEIGHTS["shift"],
    ]
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["Dropout", "BatchNormalization"])
def test_training_forms_of_opset_6_are_refused(op: str, tmp_path: Path) -> None:
    inputs = ["x"] if op == "Dropout" else ["x", "slope", "three", "three", "var"]
    onnx.save(_model([helper.make_node(op, inputs, ["y"])], ["y"]), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="training"):
        import_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("opset", [12, 15, 16])
def test_operators_whose_inference_is_that_of_their_body(
    tmp_path: Path, run_imported: Callable[..., Any], opset: int
) -> None:
    nodes = [helper.make_node("GreaterOrEqual", ["x", "w"], ["a"]), helper.make_node("LessOrEqual", ["w", "x"], ["b"])]
    nodes += [helper.make_node("And", ["a", "b"], ["y"])]
    model = model_of(nodes, {"x": ("float32", (2, 3))}, ["y"], {"w": np.float32([0.0, 1.0, 2.0])}, opset)
    x = np.float32([[0, 0, 0], [1, 1, 2]])
    onnx.save(model, tmp_path / "m.onnx")
    (found,) = run_imported(import_model(tmp_path / "m.onnx"))(x)
    np.testing.assert_array_equal(found, x >= np.float32([0, 1, 2]))
