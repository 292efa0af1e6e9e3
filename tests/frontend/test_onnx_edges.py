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


def test_any_one_output_may_be_the_only_one_read(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(3)
    weights = {"k": np.array([2]), "w": rng.standard_normal((1, 16, 5)), "r": rng.standard_normal((1, 16, 4))}
    weights["n"] = rng.standard_normal(6)
    weights = {name: value if name == "k" else value.astype(np.float32) for name, value in weights.items()}
    shapes = {"a": (3, 6), "b": (1, 2, 6, 6), "c": (3, 2, 5)}
    forms = [
        ("TopK", ["a", "k"], 2, {"axis": 1}),
        ("Split", ["a"], 3, {"axis": 1, "num_outputs": 3}),
        ("MaxPool", ["b"], 2, {"kernel_shape": [2, 2]}),
        ("LSTM", ["c", "w", "r"], 3, {"hidden_size": 4}),
        ("Dropout", ["a"], 2, {}),
        ("DynamicQuantizeLinear", ["a"], 3, {}),
        ("LayerNormalization", ["a", "n", "n"], 3, {}),
    ]
    nodes, outputs = [], []
    for operator, inputs, count, attributes in forms:
        for place in range(count):
            names = [f"{operator}{place}.{i}" for i in range(count)]
            nodes.append(helper.make_node(operator, inputs, names, **attributes))
            outputs.append(names[place])
    model = model_of(nodes, {name: ("float32", shape) for name, shape in shapes.items()}, outputs, weights, 18)
    onnx.save(model, tmp_path / "m.onnx")
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found = Executable(compile_state(import_model(tmp_path / "m.onnx")), tmp_path).run(list(feeds.values()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, value, wanted in zip(outputs, found, session.run(None, feeds), strict=True):
        assert value.dtype == wanted.dtype, name
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
