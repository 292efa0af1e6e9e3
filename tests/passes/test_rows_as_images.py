"""Convolutions and pools of rows, and windows that step by many pixels, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from ingot.passes.pipeline import STEPS
from ingot.passes.rewriter import bindings_of, op_name
from passes.build import calls, close, normal, numbers, onnx_bytes, onnx_state, onnxruntime_outputs, ops, run_steps

node = helper.make_node
TO_IMAGES = STEPS[: STEPS.index("rows_as_images") + 1]
TO_CHANNELS = STEPS[: STEPS.index("fold_layout") + 1]


def check(folder, nodes, weights, inputs, steps=TO_IMAGES, outputs=("y",), opset=17):
    """Run these steps, compare what is compiled from there with ONNX Runtime; return the state after them."""
    model = onnx_bytes(nodes, inputs, outputs, weights, opset)
    feeds = {name: normal(shape, i) for i, (name, shape) in enumerate(inputs.items())}
    state = run_steps(onnx_state(model, folder), *steps)
    for mine, want in zip(
        numbers(state, list(feeds.values()), folder, STEPS[len(steps)]), onnxruntime_outputs(model, feeds), strict=True
    ):
        close(mine, want, 1e-5)
    return state


def test_case_1_every_form_of_a_convolution(tmp_path):
    forms = [
        ((1, 3, 17), (4, 3, 3), {"pads": [1, 2], "strides": [2]}),
        ((2, 4, 16), (6, 2, 5), {"group": 2, "dilations": [2], "pads": [4, 4]}),
        ((1, 8, 31), (8, 1, 3), {"group": 8, "pads": [1, 1]}),
        ((1, 5, 7), (9, 5, 1), {}),
    ]
    nodes, weights, inputs = [], {}, {}
    for i, (shape, weight, attributes) in enumerate(forms):
        inputs[f"x{i}"], weights[f"w{i}"], weights[f"b{i}"] = shape, normal(weight, i), normal((weight[0],), i)
        nodes.append(node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"], **attributes))
    state = check(tmp_path, nodes, weights, inputs, outputs=[f"y{i}" for i in range(len(forms))])
    assert ops(state).count("nn.conv2d") == len(forms)
    assert "nn.conv1d" not in ops(state)


def test_case_1_transposed_convolutions_and_pools(tmp_path):
    weights = {"w": normal((3, 2, 4), 1)}
    nodes = [
        node("ConvTranspose", ["x", "w"], ["t"], strides=[3], pads=[1, 2], output_padding=[1]),
        node("MaxPool", ["x"], ["m"], kernel_shape=[3], strides=[2], pads=[1, 0]),
        node("AveragePool", ["x"], ["a"], kernel_shape=[4], strides=[3], pads=[2, 1], count_include_pad=0),
        node("GlobalAveragePool", ["x"], ["g"]),
    ]
    state = check(tmp_path, nodes, weights, {"x": (2, 3, 19)}, outputs=["t", "m", "a", "g"])
    assert not [name for name in ops(state) if name.endswith("1d")]


def test_cases_2_and_3_stay_images(tmp_path):
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Mul", ["r", "scale"], ["s"]),
        node("Add", ["s", "z"], ["a"]),
        node("Pad", ["a", "pads"], ["p"]),
        node("Conv", ["p", "v"], ["d"]),
        node("Concat", ["d", "c"], ["k"], axis=1),
        node("Concat", ["k", "k"], ["l"], axis=2),
        node("Clip", ["l", "low", "high"], ["y"]),
    ]
    weights = {
        "w": normal((4, 3, 3), 1), "b": normal((4,), 2), "v": normal((5, 4, 3), 3), "scale": normal((4, 1), 4),
        "pads": np.array([0, 0, 0, 0, 0, 2], np.int64), "low": np.float32(-1), "high": np.float32(2),
    }  # fmt: skip
    state = check(tmp_path, nodes, weights, {"x": (2, 3, 12), "z": (2, 4, 12)})
    # x and z are seen as images, and y as rows again.
    assert ops(state).count("reshape") == 3


def test_other_readers_get_rows(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["t", "v"], ["y"]),
        node("ReduceMax", ["c"], ["m"], axes=[2], keepdims=0),
    ]
    check(tmp_path, nodes, {"w": normal((4, 3, 2)), "v": normal((4, 6), 1)}, {"x": (1, 3, 9)}, outputs=["y", "m"])


@pytest.mark.parametrize(
    ("shape", "weight", "attributes", "channels"),
    [
        ((1, 1, 16000), (34, 1, 512), {"strides": [160]}, 32),
        ((2, 1, 67), (5, 1, 6), {"strides": [4]}, 2),
        ((1, 1, 64), (5, 1, 8), {"strides": [4], "pads": [4, 5]}, 4),
        ((1, 1, 63), (5, 1, 8), {"strides": [4], "pads": [4, 5]}, 1),  # half a step of padding at the end
        ((1, 1, 64), (5, 1, 8), {"strides": [4], "pads": [2, 2]}, 1),
        ((1, 1, 64), (5, 1, 5), {"strides": [3]}, 1),
        ((1, 3, 32, 48), (10, 3, 16, 16), {"strides": [16, 16]}, 48),
        ((2, 3, 9, 14), (10, 3, 3, 4), {"strides": [2, 2], "pads": [1, 0, 1, 0]}, 6),
        ((1, 32, 12), (5, 32, 4), {"strides": [2]}, 32),  # enough channels
    ],
)
def test_strides_become_channels(tmp_path, shape, weight, attributes, channels):
    nodes = [node("Conv", ["x", "w", "b"], ["c"], **attributes), node("Relu", ["c"], ["y"])]
    weights = {"w": normal(weight, 3), "b": normal(weight[:1], 4)}
    (conv,) = calls(check(tmp_path, nodes, weights, {"x": shape}, TO_CHANNELS), "nn.conv2d")
    assert int(conv.args[0].ty.shape[3]) == channels


def test_quantised_rows_stay_on_integers(tmp_path):
    """x -> Q -> DQ -> Conv(DQ of 8-bit weights) -> Relu -> Q -> DQ, all as images between integers."""
    rng = np.random.default_rng(0)
    weights = {
        "sx": np.float32(0.05), "sy": np.float32(0.1), "z": np.int8(3),
        "w": rng.integers(-127, 128, (8, 4, 3), np.int8),
        "sw": rng.uniform(0.01, 0.02, 8).astype(np.float32), "zw": np.zeros(8, np.int8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "sx", "z"], ["q"]),
        node("DequantizeLinear", ["q", "sx", "z"], ["d"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=0),
        node("Conv", ["d", "dw"], ["c"], pads=[1, 1]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "sy", "z"], ["qr"]),
        node("DequantizeLinear", ["qr", "sy", "z"], ["y"]),
    ]
    model = onnx_bytes(nodes, {"x": (1, 4, 20)}, ("y",), weights, 17)
    state = run_steps(onnx_state(model, tmp_path), *TO_IMAGES)
    (conv,) = calls(state, "nn.conv2d")
    producers = {binding.var: binding.value for binding in bindings_of(state.module["main"])}
    assert [op_name(producers[arg]) for arg in conv.args] == ["relax.dequantize"] * 2
    feeds = {"x": normal((1, 4, 20), 1)}
    (found,) = numbers(state, list(feeds.values()), tmp_path, STEPS[len(TO_IMAGES)])
    (wanted,) = onnxruntime_outputs(model, feeds)
    assert np.abs(found - wanted).max() <= 0.1 + 1e-6  # one step
    assert np.mean(found != wanted) < 0.02
