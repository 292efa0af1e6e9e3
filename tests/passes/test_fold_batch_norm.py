"""Folding of scale and shift into the weights before: the cases, the layouts, and what must not fold."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from tvm import relax

from passes.build import (
    close,
    normal,
    numbers,
    onnx_bytes,
    onnx_state,
    onnxruntime_outputs,
    ops,
    relax_state,
    run_steps,
)

op = relax.op

# (weight shape, x shape, call, output channels, shape of a per-channel vector)
LINEAR = {
    "conv2d": ((5, 3, 3, 3), (1, 3, 6, 6), lambda x, w: op.nn.conv2d(x, w), (5, 1, 1)),
    "conv2d-groups": ((6, 2, 3, 3), (1, 4, 6, 6), lambda x, w: op.nn.conv2d(x, w, groups=2), (6, 1, 1)),
    "depthwise": ((4, 1, 3, 3), (1, 4, 6, 6), lambda x, w: op.nn.conv2d(x, w, groups=4), (4, 1, 1)),
    "depthwise-nhwc": (
        (3, 3, 4, 1),
        (1, 6, 6, 4),
        lambda x, w: op.nn.conv2d(x, w, groups=4, data_layout="NHWC", kernel_layout="HWOI"),
        (4,),
    ),
    "conv2d-nhwc": (
        (5, 3, 3, 4),
        (1, 6, 6, 4),
        lambda x, w: op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OHWI"),
        (5,),
    ),
    "conv2d-transpose": ((3, 5, 2, 2), (1, 3, 6, 6), lambda x, w: op.nn.conv2d_transpose(x, w, strides=2), (5, 1, 1)),
    "conv3d": ((5, 3, 2, 2, 2), (1, 3, 4, 4, 4), lambda x, w: op.nn.conv3d(x, w), (5, 1, 1, 1)),
    "conv1d": ((5, 3, 3), (1, 3, 9), lambda x, w: op.nn.conv1d(x, w), (5, 1)),
    "matmul": ((7, 5), (2, 4, 7), lambda x, w: op.matmul(x, w), (5,)),
}


def reference(state, feeds, folder):
    """The numbers without the pass."""
    from ingot.passes.pipeline import STEPS

    names = [name for name in STEPS if name != "fold_batch_norm"]
    from passes.execute import execute

    return execute(run_steps(state, *names), feeds, folder)


@pytest.mark.parametrize("kind", LINEAR)
def test_case_1_a_scale_goes_into_the_weight(tmp_path, kind):
    w_shape, x_shape, make, vector = LINEAR[kind]
    w, s = normal(w_shape, 1), normal(vector, 2)
    state = relax_state({"x": x_shape}, {"w": w, "s": s}, lambda e, x, w, s: [e(op.multiply(e(make(x, w)), s))])
    new = run_steps(state, "fold_batch_norm")
    assert len(ops(new)) == 1
    assert [v.shape for v in new.weights.values()] == [w_shape]
    x = normal(x_shape)
    close(numbers(new, [x], tmp_path)[0], reference(state, [x], tmp_path)[0])


@pytest.mark.parametrize("kind", LINEAR)
def test_case_2_a_scale_after_a_bias_goes_into_both(tmp_path, kind):
    w_shape, x_shape, make, vector = LINEAR[kind]
    w, b, s = normal(w_shape, 1), normal(vector, 2), normal(vector, 3)

    def body(e, x, w, b, s):
        return [e(op.multiply(e(op.add(e(make(x, w)), b)), s))]

    state = relax_state({"x": x_shape}, {"w": w, "b": b, "s": s}, body)
    new = run_steps(state, "fold_batch_norm")
    assert len(ops(new)) == 2
    assert ops(new)[-1] == "add"
    x = normal(x_shape)
    close(numbers(new, [x], tmp_path)[0], reference(state, [x], tmp_path)[0])


def test_case_3_two_shifts_are_one(tmp_path):
    w, b, c = normal((5, 3, 3, 3), 1), normal((5, 1, 1), 2), normal((1, 5, 1, 1), 3)

    def body(e, x, w, b, c):
        return [e(op.add(c, e(op.add(e(op.nn.conv2d(x, w)), b))))]

    state = relax_state({"x": (1, 3, 6, 6)}, {"w": w, "b": b, "c": c}, body)
    new = run_steps(state, "fold_batch_norm")
    assert ops(new) == ["nn.conv2d", "add"]
    x = normal((1, 3, 6, 6))
    close(numbers(new, [x], tmp_path)[0], reference(state, [x], tmp_path)[0])


def test_case_3_shifts_that_would_grow_stay(tmp_path):
    row, column = normal((4, 1), 1), normal((1, 5), 2)
    state = relax_state({"x": (4, 5)}, {"r": row, "c": column}, lambda e, x, r, c: [e(op.add(e(op.add(x, r)), c))])
    new = run_steps(state, "fold_batch_norm")
    assert ops(new) == ["add", "add"]
    x = normal((4, 5))
    close(numbers(new, [x], tmp_path)[0], x + row + column)


@pytest.mark.parametrize("affine", ["plain", "bias"])
def test_batch_normalization_of_a_model_leaves_conv_and_add(tmp_path, affine):
    """The whole chain as exporters write it: Conv (with bias), BatchNormalization, Relu."""
    names = ["x", "w", "b"] if affine == "bias" else ["x", "w"]
    weights = {
        "w": normal((8, 3, 3, 3), 1),
        "b": normal((8,), 2),
        "scale": normal((8,), 3),
        "shift": normal((8,), 4),
        "mean": normal((8,), 5),
        "var": np.abs(normal((8,), 6)) + np.float32(0.5),
    }
    nodes = [
        helper.make_node("Conv", names, ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    used = {k: v for k, v in weights.items() if k != "b" or affine == "bias"}
    model = onnx_bytes(nodes, {"x": (1, 3, 7, 7)}, ["y"], used)
    state = onnx_state(model, tmp_path)
    new = run_steps(state, "simplify", "fold_constants", "fold_batch_norm")
    assert ops(new) == ["nn.conv2d", "add", "nn.relu"]
    x = normal((1, 3, 7, 7))
    close(numbers(state, [x], tmp_path)[0], onnxruntime_outputs(model, {"x": x})[0])


def keeps(inputs, weights, body, folder, feeds):
    """The pass changes nothing, and the numbers stay."""
    state = relax_state(inputs, weights, body)
    new = run_steps(state, "fold_batch_norm")
    assert ops(new) == ops(state)
    for got, want in zip(numbers(new, feeds, folder), reference(state, feeds, folder), strict=True):
        close(got, want)


def test_a_value_with_a_second_reader_keeps_its_weight(tmp_path):
    def body(e, x, w, s):
        y = e(op.nn.conv2d(x, w))
        return [e(op.multiply(y, s)), e(op.nn.relu(y))]

    x = normal((1, 3, 6, 6))
    keeps({"x": x.shape}, {"w": normal((5, 3, 3, 3), 1), "s": normal((5, 1, 1), 2)}, body, tmp_path, [x])


def test_a_value_that_is_an_output_too_keeps_its_weight(tmp_path):
    def body(e, x, w, s):
        y = e(op.nn.conv2d(x, w))
        return [y, e(op.multiply(y, s))]

    x = normal((1, 3, 6, 6))
    keeps({"x": x.shape}, {"w": normal((5, 3, 3, 3), 1), "s": normal((5, 1, 1), 2)}, body, tmp_path, [x])


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 1, 4), (5, 4, 4)], ids=["by-row", "by-column", "by-element"])
def test_a_scale_along_another_dimension_stays(tmp_path, shape):
    def body(e, x, w, s):
        return [e(op.multiply(e(op.nn.conv2d(x, w)), s))]

    x = normal((1, 3, 6, 6))
    keeps({"x": x.shape}, {"w": normal((5, 3, 3, 3), 1), "s": normal(shape, 2)}, body, tmp_path, [x])


def test_a_scale_that_adds_a_dimension_stays(tmp_path):
    def body(e, x, w, s):
        return [e(op.multiply(e(op.nn.conv2d(x, w)), s))]

    x = normal((1, 3, 6, 6))
    keeps({"x": x.shape}, {"w": normal((5, 3, 3, 3), 1), "s": normal((2, 1, 5, 1, 1), 2)}, body, tmp_path, [x])


def test_a_scale_of_a_product_of_two_inputs_stays(tmp_path):
    def body(e, x, y, s):
        return [e(op.multiply(e(op.matmul(x, y)), s))]

    x, y = normal((4, 7)), normal((7, 5), 1)
    keeps({"x": x.shape, "y": y.shape}, {"s": normal((5,), 2)}, body, tmp_path, [x, y])


def test_a_scalar_scale_goes_into_every_channel(tmp_path):
    w = normal((5, 3, 3, 3), 1)
    state = relax_state(
        {"x": (1, 3, 6, 6)}, {"w": w}, lambda e, x, w: [e(op.multiply(e(op.nn.conv2d(x, w)), relax.const(0.5)))]
    )
    new = run_steps(state, "fold_batch_norm")
    assert ops(new) == ["nn.conv2d"]
    np.testing.assert_array_equal(next(iter(new.weights.values())), w * np.float32(0.5))
    x = normal((1, 3, 6, 6))
    close(numbers(new, [x], tmp_path)[0], reference(state, [x], tmp_path)[0])
