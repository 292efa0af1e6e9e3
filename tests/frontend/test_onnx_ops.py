"""Each converter against ONNX's reference implementation: one graph for each family, one output for each case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import helper

from ingot.errors import UnsupportedError
from ingot.frontend import import_model
from ingot.frontend.normal_form import check_normal_form

from .tiny_models import model_of


@dataclass(frozen=True)
class OpCase:
    """One node: its inputs by the name of a shared input, or as a constant array; None for one left out."""

    op: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def operands(self, number: int, weights: dict[str, np.ndarray], used: set[str]) -> list[str]:
        """The names of the inputs in a graph where this is node `number`; notes constants and shared inputs."""
        names = []
        for place, value in enumerate(self.inputs):
            if value is None:
                names.append("")
            elif isinstance(value, str):
                names.append(value)
                used.add(value)
            else:
                names.append(f"c{number}_{place}")
                weights[names[-1]] = np.asarray(value)
        return names


_RNG = np.random.default_rng(7)


def _weights(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


def _ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


INPUTS = {
    "x": ("float32", (1, 3, 9, 8)),
    "v": ("float32", (2, 3, 7)),
    "m": ("float32", (5, 6)),
    "p": ("float32", (2, 3, 4)),
    "i": ("int64", (2, 5)),
    "n": ("int32", (2, 3)),
    "b": ("bool", (2, 3)),
}


def _inputs() -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in INPUTS.items():
        if dtype == "float32":
            values[name] = _RNG.standard_normal(shape).astype(np.float32) * 3
        elif dtype == "bool":
            values[name] = _RNG.integers(0, 2, shape).astype(bool)
        else:
            values[name] = _RNG.integers(-4, 5, shape).astype(dtype)
    values["p"] = np.abs(values["p"]) + np.float32(0.1)
    return values


FAMILIES: dict[str, list[OpCase]] = {
    "activation": [
        OpCase("Clip", ("m", np.float32(0), np.float32(6))),
        OpCase("Clip", ("m", np.float32(0), None)),
        OpCase("Clip", ("m", None, np.float32(1.5))),
        OpCase("Clip", ("m", np.float32(-1), None)),
        OpCase("Clip", ("m", None, None)),
        OpCase("Clip", ("m", np.float32(2), np.float32(-2))),
        OpCase("Clip", ("n", np.int32(-1), np.int32(2))),
        OpCase("HardSigmoid", ("m",)),
        OpCase("HardSigmoid", ("m",), {"alpha": 0.3, "beta": 0.1}),
        OpCase("HardSwish", ("m",)),
        OpCase("Softmax", ("v",)),
        OpCase("Softmax", ("v",), {"axis": 1}),
        OpCase("LogSoftmax", ("m",), {"axis": 0}),
        OpCase("Gelu", ("m",)),
        OpCase("LeakyRelu", ("m",), {"alpha": 0.2}),
        OpCase("Elu", ("m",)),
        OpCase("Mish", ("m",)),
        OpCase("Softplus", ("m",)),
    ],
    "convolution": [
        OpCase("Conv", ("x", _weights(4, 3, 3, 3), _weights(4)), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
        OpCase("Conv", ("x", _weights(4, 3, 3, 2)), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        OpCase("Conv", ("x", _weights(4, 3, 2, 3)), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
        OpCase("Conv", ("x", _weights(4, 3, 3, 3)), {"auto_pad": "VALID", "dilations": [2, 2]}),
        OpCase("Conv", ("x", _weights(6, 1, 3, 3), _weights(6)), {"group": 3, "pads": [1, 1, 1, 1]}),
        OpCase("Conv", ("v", _weights(4, 3, 3), _weights(4)), {"pads": [1, 1]}),
        OpCase("ConvTranspose", ("x", _weights(3, 2, 3, 3), _weights(2)), {"strides": [2, 2]}),
        OpCase("MaxPool", ("x",), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
        OpCase("MaxPool", ("x",), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        OpCase("MaxPool", ("x",), {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        OpCase("AveragePool", ("x",), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        OpCase("AveragePool", ("x",), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        OpCase("AveragePool", ("v",), {"kernel_shape": [3], "strides": [2]}),
        OpCase("GlobalAveragePool", ("x",)),
        OpCase("GlobalMaxPool", ("x",)),
    ],
    "shape": [
        OpCase("Reshape", ("v", _ints(0, -1))),
        OpCase("Flatten", ("x",), {"axis": 2}),
        OpCase("Squeeze", ("x", _ints(0))),
        OpCase("Unsqueeze", ("m", _ints(0, 2))),
        OpCase("Expand", ("m", _ints(2, 5, 6))),
        OpCase("Transpose", ("v",)),
        OpCase("Transpose", ("v",), {"perm": [1, 0, 2]}),
        OpCase("Concat", ("m", "m", _weights(5, 1)), {"axis": -1}),
        OpCase("Split", ("v", _ints(2, 4, 1)), {"axis": 2}, outputs=3),
        OpCase("Tile", ("v", _ints(1, 2, 3))),
        OpCase("Identity", ("m",)),
        OpCase("DepthToSpace", (_weights(1, 8, 2, 3),), {"blocksize": 2}),
        OpCase("Pad", ("v", _ints(0, 1, 2, 0, 0, 3), np.float32(1.5))),
        OpCase("Pad", ("v", _ints(0, 0, 2, 0, 0, 3)), {"mode": "reflect"}),
        OpCase("Pad", ("v", _ints(0, 1, 2, 0, 2, 0)), {"mode": "edge"}),
    ],
    "index": [
        OpCase("Gather", ("m", _ints(0, -1, 3)), {"axis": 1}),
        OpCase("Gather", ("m", np.array(-2)), {"axis": 0}),
        OpCase("Gather", ("m", "i"), {"axis": 0}),
        OpCase("GatherElements", ("m", _ints(0, 1, 2, 3, 4, -1).reshape(1, 6)), {"axis": 0}),
        OpCase("Slice", ("v", _ints(1, 0), _ints(9, -1), _ints(1, 2), _ints(1, 2))),
        OpCase("Slice", ("v", _ints(-1), _ints(-100), _ints(2), _ints(-2))),
        OpCase("Slice", ("v", _ints(0, 0, 0), _ints(2, 3, 7))),
        OpCase("ArgMax", ("m",), {"axis": 1, "keepdims": 0}),
        OpCase("Where", ("b", np.float32(1), np.float32(2))),
    ],
    "linear": [
        OpCase("Gemm", ("m", _weights(6, 4), _weights(4))),
        OpCase("Gemm", ("m", _weights(4, 6), _weights(1, 4)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        OpCase("Gemm", ("m", _weights(5, 3)), {"transA": 1}),
        OpCase("MatMul", ("v", _weights(7, 2))),
        OpCase("MatMul", (_weights(2, 4, 3), "v")),
        OpCase("Einsum", ("v", _weights(7, 2)), {"equation": "bij,jk->bik"}),
    ],
    "normalization": [
        OpCase("BatchNormalization", ("x", _weights(3), _weights(3), _weights(3), np.abs(_weights(3)))),
        OpCase(
            "BatchNormalization", ("v", _weights(3), _weights(3), _weights(3), np.abs(_weights(3))), {"epsilon": 0.1}
        ),
        OpCase("LayerNormalization", ("v", _weights(7), _weights(7))),
        OpCase("InstanceNormalization", ("x", _weights(3), _weights(3))),
        OpCase("InstanceNormalization", ("v", _weights(3), _weights(3)), {"epsilon": 0.1}),
        OpCase("InstanceNormalization", (_weights(2, 3, 2, 3, 5) + 9, _weights(3), _weights(3))),
        OpCase("InstanceNormalization", (_weights(2, 3, 1, 1), _weights(3), _weights(3))),
    ],
    "reduce": [
        OpCase("ReduceMean", ("v", _ints(1)), {"keepdims": 0}),
        OpCase("ReduceMean", ("v",)),
        OpCase("ReduceSum", ("v", _ints(-1, 0))),
        OpCase("ReduceMax", ("v", _ints(2))),
        OpCase("ReduceMin", ("v", _ints(0))),
        OpCase("ReduceProd", ("p", _ints(1))),
        OpCase("ReduceL1", ("v", _ints(1))),
        OpCase("ReduceL2", ("v", _ints(1))),
        OpCase("ReduceSumSquare", ("v", _ints(1))),
        OpCase("ReduceLogSum", ("p", _ints(1))),
        OpCase("ReduceLogSumExp", ("v", _ints(1))),
    ],
    "elementwise": [
        OpCase("Add", ("v", _weights(3, 1))),
        OpCase("Sub", ("m", "m")),
        OpCase("Mul", ("m", np.float32(2))),
        OpCase("Div", ("m", np.float32(3))),
        OpCase("Div", ("n", np.int32(2))),
        OpCase("Pow", ("m", np.float32(2))),
        OpCase("Pow", ("p", np.float32(0.5))),
        OpCase("Pow", ("p", np.float32(1.7))),
        OpCase("Min", ("m", _weights(6), _weights(5, 1))),
        OpCase("Max", ("m", np.float32(0.5))),
        OpCase("Sum", ("m", "m", "m")),
        OpCase("Mean", ("m", _weights(5, 6))),
        OpCase("Equal", ("n", np.int32(1))),
        OpCase("LessOrEqual", ("m", np.float32(0))),
        OpCase("And", ("b", np.array(True))),
        OpCase("Cast", ("m",), {"to": onnx.TensorProto.INT32}),
        OpCase("Cast", ("n",), {"to": onnx.TensorProto.BOOL}),
        OpCase("Cast", ("b",), {"to": onnx.TensorProto.FLOAT}),
    ],
    "quantize": [
        OpCase("QuantizeLinear", ("m", np.float32(0.1), np.uint8(128))),
        OpCase("QuantizeLinear", ("m", np.float32(0.05), np.int8(3))),
        OpCase(
            "DequantizeLinear",
            (np.arange(6, dtype=np.int8).reshape(2, 3), np.array([0.5, 0.25], np.float32)),
            {"axis": 0},
        ),
    ],
    "resize": [
        OpCase("Resize", ("x", None, None, _ints(1, 3, 18, 16)), {"mode": "nearest"}),
        OpCase(
            "Resize",
            ("x", None, np.array([1, 1, 2, 2], np.float32)),
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        ),
        OpCase("Resize", ("x", None, None, _ints(1, 3, 18, 16)), {"mode": "linear"}),
        OpCase(
            "Resize",
            ("x", None, None, _ints(1, 3, 5, 20)),
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        ),
        OpCase(
            "Resize",
            ("x", None, None, _ints(1, 3, 5, 6)),
            {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
        ),
        OpCase("Resize", ("v", None, None, _ints(2, 3, 14)), {"mode": "linear"}),
    ],
}


def _graph(cases: list[OpCase], opset: int) -> onnx.ModelProto:
    nodes, outputs, weights, used = [], [], {}, set()
    for number, case in enumerate(cases):
        names = case.operands(number, weights, used)
        made = [f"{case.op}_{number}_{index}" for index in range(case.outputs)]
        nodes.append(helper.make_node(case.op, names, made, **case.attributes))
        outputs += made
    return model_of(nodes, {name: INPUTS[name] for name in INPUTS if name in used}, outputs, weights, opset)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_the_reference(family: str, tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    model = _graph(FAMILIES[family], opset=21)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    imported = import_model(path)
    check_normal_form(imported)
    values = _inputs()
    feeds = {spec.name: values[spec.name] for spec in imported.inputs}
    wanted = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    found = run_imported(imported)(*feeds.values())
    for spec, left, right in zip(imported.outputs, found, wanted, strict=True):
        right = np.asarray(right)
        assert left.dtype == right.dtype and left.shape == right.shape, spec.name
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-5, err_msg=spec.name)


def test_lrn_agrees_with_its_formula(tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    # ONNX's reference implementation leaves all but the first channels out: the specification's formula judges.
    size, alpha, beta, bias = 3, 0.5, 0.75, 1.0
    attributes = {"size": size, "alpha": alpha, "beta": beta, "bias": bias}
    model = model_of([helper.make_node("LRN", ["x"], ["y"], **attributes)], {"x": INPUTS["x"]}, ["y"])
    onnx.save(model, tmp_path / "model.onnx")
    x = _inputs()["x"]
    sums = np.stack([np.square(x)[:, max(0, c - 1) : c + 2].sum(axis=1) for c in range(3)], axis=1)
    found = run_imported(import_model(tmp_path / "model.onnx"))(x)[0]
    np.testing.assert_allclose(found, x / (bias + alpha / size * sums) ** beta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pads", [[0, 0, -1, 0, 1, -2], [0, -1, 3, 0, 0, -4]])
def test_negative_pads_cut(pads: list[int], tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    model = model_of([helper.make_node("Pad", ["v", "p"], ["y"])], {"v": INPUTS["v"]}, ["y"], {"p": _ints(*pads)})
    onnx.save(model, tmp_path / "model.onnx")
    v = _inputs()["v"]
    wanted = np.pad(v, [(max(pads[i], 0), max(pads[i + 3], 0)) for i in range(3)])
    cut = tuple(slice(max(-pads[i], 0), wanted.shape[i] - max(-pads[i + 3], 0)) for i in range(3))
    np.testing.assert_array_equal(run_imported(import_model(tmp_path / "model.onnx"))(v)[0], wanted[cut])


@pytest.mark.parametrize(
    ("op", "attributes", "inputs", "word"),
    [
        ("BatchNormalization", {"training_mode": 1}, ["x", "c", "c", "c", "c"], "training"),
        ("Resize", {"mode": "linear", "coordinate_transformation_mode": "odd"}, ["x", "", "", "sizes"], "odd"),
        ("Pad", {}, ["x", "amounts"], "static shape"),
    ],
)
def test_forms_that_are_refused_say_so(
    op: str, attributes: dict[str, Any], inputs: list[str], word: str, tmp_path: Path
) -> None:
    weights = {"c": np.ones(3, np.float32), "sizes": _ints(1, 3, 5, 4)}
    outputs = ["y", "mean", "variance"] if op == "BatchNormalization" else ["y"]
    node = helper.make_node(op, inputs, outputs, name="it", **attributes)
    declared = {"x": INPUTS["x"], **({"amounts": ("int64", (8,))} if op == "Pad" else {})}
    model = model_of([node], declared, ["y"], {key: weights[key] for key in weights if key in inputs}, opset=19)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match=word) as caught:
        import_model(tmp_path / "model.onnx")
    assert "'it'" in str(caught.value)
