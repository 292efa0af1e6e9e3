"""Fusion: neighbours that end in one kernel each, and what main holds afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.passes.invariants import check
from ingot.passes.rewriter import bindings_of, dtype_of, shape_of
from passes.build import close, finish, kernel_functions, normal, numbers, ops, relax_state, run_steps

op = relax.op
LAYOUT = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
X = (1, 6, 8, 16)


def fused(inputs, weights, body):
    state = run_steps(relax_state(inputs, weights, body), "select_templates", "fuse")
    check(state, ("only_kernels",), "after fuse")
    return state


def conv(x, w):
    """A 1x1 convolution in numpy."""
    return x @ w[:, 0, 0].T


W, V, B = normal((16, 1, 1, 16), 1), normal((16, 1, 1, 16), 2), normal((16,), 3)


def test_bias_and_activation_join_the_convolution(tmp_path):
    def body(e, x, w, b):
        return [e(op.nn.relu(e(op.add(e(op.nn.conv2d(x, w, **LAYOUT)), b))))]

    state = fused({"x": X}, {"w": W, "b": B}, body)
    assert ops(state) == ["call_tir"]
    assert len(kernel_functions(state)) == 1
    x = normal(X)
    close(numbers(state, [x], tmp_path, "lower")[0], np.maximum(conv(x, W) + B, 0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_residual_add_joins_the_convolution(tmp_path, side):
    def body(e, x, r, w):
        y = e(op.nn.conv2d(x, w, **LAYOUT))
        return [e(op.clip(e(op.add(r, y) if side == "left" else op.add(y, r)), 0, 6))]

    state = fused({"x": X, "r": X}, {"w": W}, body)
    assert ops(state) == ["call_tir"]
    x, r = normal(X), normal(X, 5)
    close(numbers(state, [x, r], tmp_path, "lower")[0], np.clip(conv(x, W) + r, 0, 6))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gate_is_computed_once_not_once_a_pixel(tmp_path, side):
    def body(e, x, w, b):
        mean = e(op.mean(x, axis=[1, 2], keepdims=True))
        gate = e(op.clip(e(op.add(e(op.nn.conv2d(mean, w, **LAYOUT)), b)), 0, 1))
        return [e(op.multiply(x, gate) if side == "left" else op.multiply(gate, x))]

    state = fused({"x": X}, {"w": W, "b": B}, body)
    assert ops(state) == ["call_tir"] * 3
    shapes = [shape_of(call.var) for call in bindings_of(state.module["main"])[:3]]
    assert [shape for shape in shapes if shape == X] == [X]
    x = normal(X)
    gate = np.clip(conv(x.mean((1, 2), keepdims=True), W) + B, 0, 1)
    close(numbers(state, [x], tmp_path, "lower")[0], x * gate)


def test_a_function_of_a_row_is_computed_once_and_a_cheap_operand_where_it_is_read(tmp_path):
    def body(e, x, r):
        return [e(op.multiply(x, e(op.tanh(r)))), e(op.multiply(x, e(op.negative(r))))]

    state = fused({"x": X, "r": (16,)}, {}, body)
    assert ops(state) == ["call_tir"] * 3
    x, r = normal(X), normal((16,), 5)
    found = numbers(state, [x, r], tmp_path, "lower")
    close(found[0], x * np.tanh(r))
    close(found[1], x * -r)


def test_two_convolutions_are_two_kernels(tmp_path):
    def body(e, x, w, v):
        return [e(op.nn.conv2d(e(op.nn.relu(e(op.nn.conv2d(x, w, **LAYOUT)))), v, **LAYOUT))]

    state = fused({"x": X}, {"w": W, "v": V}, body)
    assert ops(state) == ["call_tir", "call_tir"]
    x = normal(X)
    close(numbers(state, [x], tmp_path, "lower")[0], conv(np.maximum(conv(x, W), 0), V))


def test_a_sum_of_two_convolutions_joins_one_of_them(tmp_path):
    def body(e, x, w, v):
        return [e(op.nn.relu(e(op.add(e(op.nn.conv2d(x, w, **LAYOUT)), e(op.nn.conv2d(x, v, **LAYOUT))))))]

    state = fused({"x": X}, {"w": W, "v": V}, body)
    assert ops(state) == ["call_tir", "call_tir"]
    x = normal(X)
    close(numbers(state, [x], tmp_path, "lower")[0], np.maximum(conv(x, W) + conv(x, V), 0))


def test_a_sum_of_two_convolutions_bytes_reads_bytes(tmp_path):
    def branch(e, x, w, factor):
        stored = e(op.astype(e(op.round(e(op.clip(e(op.nn.conv2d(x, w, **LAYOUT)), -127, 127)))), "int8"))
        return e(op.multiply(e(op.astype(stored, "int32")), relax.const(factor, "int32")))

    def body(e, x, w, v):
        return [e(op.add(branch(e, x, w, 3), branch(e, x, v, 5)))]

    state = fused({"x": X}, {"w": W, "v": V}, body)
    first, second = bindings_of(state.module["main"])[:2]
    assert dtype_of(first.var) == "int8"
    assert dtype_of(second.var) == "int32"
    assert ops(state) == ["call_tir", "call_tir"]
    x = (40 * normal(X)).astype(np.float32)
    bytes_of = [np.round(np.clip(conv(x, w), -127, 127)) for w in (W, V)]
    found = numbers(state, [x], tmp_path, "lower")[0]
    # Sums of another order may round one value to its neighbour.
    assert (found != 3 * bytes_of[0] + 5 * bytes_of[1]).mean() < 0.01


def test_a_value_with_two_readers_is_stored_for_both(tmp_path):
    def body(e, x, w, v):
        y = e(op.nn.relu(e(op.nn.conv2d(x, w, **LAYOUT))))
        return [e(op.add(e(op.nn.conv2d(y, v, **LAYOUT)), y))]

    state = fused({"x": X}, {"w": W, "v": V}, body)
    x = normal(X)
    y = np.maximum(conv(x, W), 0)
    close(numbers(state, [x], tmp_path, "lower")[0], conv(y, V) + y)


def test_a_value_that_is_also_an_output(tmp_path):
    def body(e, x, w):
        y = e(op.nn.conv2d(x, w, **LAYOUT))
        return [y, e(op.nn.relu(y))]

    state = fused({"x": X}, {"w": W}, body)
    x = normal(X)
    first, second = numbers(state, [x], tmp_path, "lower")
    close(first, conv(x, W))
    close(second, np.maximum(conv(x, W), 0))


def test_a_chain_of_elementwise_operators_is_one_kernel(tmp_path):
    def body(e, x):
        return [e(op.multiply(e(op.sigmoid(e(op.add(e(op.negative(x)), relax.const(1.0))))), x))]

    state = fused({"x": (5, 7)}, {}, body)
    assert ops(state) == ["call_tir"]
    x = normal((5, 7))
    close(numbers(state, [x], tmp_path, "lower")[0], (x / (1 + np.exp(x - 1))).astype(np.float32))


def test_reshapes_are_not_kernels(tmp_path):
    def body(e, x):
        return [e(op.exp(e(op.reshape(e(op.negative(x)), (7, 5)))))]

    state = fused({"x": (5, 7)}, {}, body)
    assert ops(state) == ["call_tir", "reshape", "call_tir"]
    x = normal((5, 7))
    close(numbers(state, [x], tmp_path, "lower")[0], np.exp(-x).reshape(7, 5))


def test_softmax_is_right_whatever_it_is_cut_into(tmp_path):
    state = fused({"x": (3, 17)}, {}, lambda e, x: [e(op.nn.softmax(x, -1))])
    x = normal((3, 17)) * 50
    wide = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    close(numbers(state, [x], tmp_path, "lower")[0], (wide / wide.sum(-1, keepdims=True)).astype(np.float32))


def test_equal_groups_share_one_function():
    def body(e, x, w, v):
        return [e(op.nn.relu(e(op.nn.conv2d(e(op.nn.relu(e(op.nn.conv2d(x, w, **LAYOUT)))), v, **LAYOUT))))]

    state = fused({"x": X}, {"w": W, "v": V}, body)
    assert len(kernel_functions(state)) == 1
    assert len(finish(relax_state({"x": X}, {"w": W, "v": V}, body)).lowered.kernels) == 1


@pytest.mark.parametrize("change", ["pad", "slice"])
def test_a_result_of_another_shape_is_another_kernel(tmp_path, change):
    def body(e, x, w):
        made = e(op.nn.conv2d(x, w, **LAYOUT))
        if change == "pad":
            return [e(op.nn.pad(made, [0, 0, 0, 1, 0, 0, 0, 5]))]
        return [e(op.strided_slice(made, [2, 3], [0, 0], [5, 9]))]

    state = fused({"x": X}, {"w": W}, body)
    assert ops(state) == ["call_tir", "call_tir"]
    x = normal(X)
    wanted = conv(x, W)
    wanted = np.pad(wanted, [(0, 0), (0, 1), (0, 0), (0, 5)]) if change == "pad" else wanted[:, :, :5, :9]
    close(numbers(state, [x], tmp_path, "lower")[0], wanted)
