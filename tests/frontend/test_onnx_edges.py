"""What ONNX leaves to those who compute it, as ONNX Runtime does it: NaN and infinities, windows beyond the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from ingot.errors import UnsupportedError
from ingot.frontend import import_model
from passes.execute import Executable, compile_state

from .tiny_models import model_of

SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3e38, -3e38, 1e-40, -1e-40, 88.0, -88.0, 20.0, -20.0],
    np.float32,
)


def _agree(nodes: Sequence[onnx.NodeProto], x: np.ndarray, folder: Path, weights: dict[str, np.ndarray]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    outputs = [node.output[0] for node in nodes]
    model = model_of(nodes, {"x": ("float32", x.shape)}, outputs, weights, opset=20)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    found = Executable(compile_state(import_model(path)), folder).run([x])
    wanted = runtime.InferenceSession(path.read_bytes()).run(None, {"x": x})
    for node, left, right in zip(nodes, found, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7, err_msg=f"{node.op_type} {x.shape}")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    forms: list[tuple[str, dict[str, float], list[str]]] = [
        ("Elu", {}, []), ("Elu", {"alpha": 2.0}, []), ("Selu", {}, []), ("Celu", {"alpha": 0.7}, []),
        ("LeakyRelu", {"alpha": 0.1}, []), ("PRelu", {}, ["slope"]), ("ThresholdedRelu", {"alpha": 0.5}, []),
        ("HardSigmoid", {}, []), ("HardSwish", {}, []), ("Softplus", {}, []), ("Softsign", {}, []),
        ("Sigmoid", {}, []), ("Tanh", {}, []), ("Erf", {}, []), ("Gelu", {}, []), ("Mish", {}, []), ("Exp", {}, []),
        ("Log", {}, []), ("Sqrt", {}, []), ("Reciprocal", {}, []), ("Abs", {}, []), ("Sign", {}, []),
        ("Floor", {}, []), ("Ceil", {}, []), ("Round", {}, []), ("Neg", {}, []), ("IsNaN", {}, []), ("IsInf", {}, []),
    ]  # fmt: skip
    nodes = [helper.make_node(op, ["x", *more], [f"y{i}"], **values) for i, (op, values, more) in enumerate(forms)]
    _agree(nodes, SPECIAL, tmp_path, {"slope": np.full(SPECIAL.shape, 0.25, np.float32)})


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((1, 3, 1, 8), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ((1, 3, 2, 8), {"kernel_shape": [5, 2], "strides": [4, 2], "pads": [1, 0, 0, 0]}),
    ],
)
def test_windows_larger_than_the_image(
    tmp_path: Path, shape: tuple[int, ...], attributes: dict[str, list[int]]
) -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["y0"], **attributes),
        helper.make_node("AveragePool", ["x"], ["y1"], **attributes),
    ]
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32) - 3
    _agree(nodes, x, tmp_path, {})


def test_pads_that_count_around_such_a_window_are_refused(tmp_path: Path) -> None:
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "count_include_pad": 1}
    path = tmp_path / "m.onnx"
    model = model_of(
        [helper.make_node("AveragePool", ["x"], ["y"], **attributes)], {"x": ("float32", (1, 1, 1, 4))}, ["y"]
    )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="larger than the padded image"):
        import_model(path)
