"""Which operators get a template, how their weights are packed, and what stays an operator."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.passes.constant_eval import _evaluate_with_tvm
from ingot.passes.rewriter import bindings_of, op_name
from passes.build import close, kernel_functions, normal, numbers, ops, relax_state, run_steps

op = relax.op


def selected(inputs, weights, body, target="native"):
    return run_steps(relax_state(inputs, weights, body, target), "select_templates")


def convolution(**options):
    return lambda e, x, w: [e(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OHWI", **options))]


def nhwc(x, w, stride=1):
    """Convolution of NHWC x with OHWI w, no padding."""
    oh = (x.shape[1] - w.shape[1]) // stride + 1
    ow = (x.shape[2] - w.shape[2]) // stride + 1
    out = np.zeros((x.shape[0], oh, ow, w.shape[0]), np.float64)
    for i in range(w.shape[1]):
        for j in range(w.shape[2]):
            window = x[:, i : i + oh * stride : stride, j : j + ow * stride : stride].astype(np.float64)
            out += window @ w[:, i, j].T
    return out.astype(np.float32)


def templates(state):
    """The template named in each PrimFunc."""
    text = [str(f.script()) for f in kernel_functions(state).values()]
    return sorted(t.split('"ingot.template": "')[1].split('"')[0] for t in text if "ingot.template" in t)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33])
def test_case_1_conv2d_is_packed_in_blocks_padded_with_zeros(tmp_path, channels):
    w = normal((channels, 3, 2, 5), 1)
    state = selected({"x": (1, 6, 7, 5)}, {"w": w}, convolution())
    assert ops(state) == ["call_tir"]
    assert templates(state) == ["conv2d"]
    (packed,) = state.weights.values()
    blocks, kh, kw, ci, block = packed.shape
    assert (kh, kw, ci) == (3, 2, 5)
    assert (blocks - 1) * block < channels <= blocks * block
    flat = packed.transpose(0, 4, 1, 2, 3).reshape(-1, 3, 2, 5)
    np.testing.assert_array_equal(flat[:channels], w)
    assert not flat[channels:].any()
    assert state.macs == 4 * 6 * channels * 3 * 2 * 5
    x = normal((1, 6, 7, 5))
    close(numbers(state, [x], tmp_path, "fuse")[0], nhwc(x, w))


def test_case_2_depthwise_is_packed_by_window(tmp_path):
    w = normal((17, 3, 2, 1), 1)
    state = selected({"x": (1, 6, 7, 17)}, {"w": w}, convolution(groups=17))
    assert templates(state) == ["depthwise"]
    (packed,) = state.weights.values()
    np.testing.assert_array_equal(packed, w[..., 0].transpose(1, 2, 0))
    assert state.macs == 4 * 6 * 17 * 3 * 2
    x = normal((1, 6, 7, 17))
    want = sum(x[:, i : i + 4, j : j + 6] * w[:, i, j, 0] for i in range(3) for j in range(2))
    close(numbers(state, [x], tmp_path, "fuse")[0], want)


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3), (2, 1, 3)])
def test_case_3_matmul_is_a_pointwise_convolution(tmp_path, lead):
    w = normal((9, 33), 1)
    state = selected({"x": (*lead, 9)}, {"w": w}, lambda e, x, w: [e(op.matmul(x, w))])
    assert templates(state) == ["conv2d"]
    (packed,) = state.weights.values()
    assert packed.shape[1:4] == (1, 1, 9)
    assert state.macs == int(np.prod(lead)) * 9 * 33
    x = normal((*lead, 9))
    close(numbers(state, [x], tmp_path, "fuse")[0], x @ w)


def test_one_channel_in_and_out_is_still_right(tmp_path):
    w = normal((1, 3, 3, 1), 1)
    state = selected({"x": (1, 6, 7, 1)}, {"w": w}, convolution(groups=1))
    assert ops(state) == ["call_tir"]
    x = normal((1, 6, 7, 1))
    close(numbers(state, [x], tmp_path, "fuse")[0], nhwc(x, w))


def test_real_groups_are_counted_and_right(tmp_path):
    w = normal((6, 3, 3, 4), 1)
    state = selected({"x": (1, 6, 7, 8)}, {"w": w}, convolution(groups=2))
    assert state.macs == 4 * 5 * 6 * 3 * 3 * 4
    x = normal((1, 6, 7, 8))
    want = np.concatenate([nhwc(x[..., :4], w[:3]), nhwc(x[..., 4:], w[3:])], -1)
    close(numbers(state, [x], tmp_path, "fuse")[0], want)


def test_depthwise_with_a_multiplier_is_right(tmp_path):
    w = normal((8, 3, 3, 1), 1)
    state = selected({"x": (1, 6, 7, 4)}, {"w": w}, convolution(groups=4))
    assert state.macs == 4 * 5 * 8 * 3 * 3
    x = normal((1, 6, 7, 4))
    want = sum(np.repeat(x, 2, -1)[:, i : i + 4, j : j + 5] * w[:, i, j, 0] for i in range(3) for j in range(3))
    close(numbers(state, [x], tmp_path, "fuse")[0], want)


@pytest.mark.parametrize("channels", [1, 5, 16, 17, 40])
def test_case_9_computed_weights_are_packed_at_run_time(tmp_path, channels):
    state = selected({"x": (2, 6, 7, 4), "w": (channels, 3, 3, 4)}, {}, convolution())
    assert templates(state) == ["conv2d"]
    assert state.macs == 2 * 4 * 5 * channels * 3 * 3 * 4
    x, w = normal((2, 6, 7, 4)), normal((channels, 3, 3, 4), 1)
    close(numbers(state, [x, w], tmp_path, "fuse")[0], nhwc(x, w))


@pytest.mark.parametrize("channels", [3, 8, 20])
def test_case_9_depthwise_correlation(tmp_path, channels):
    state = selected({"x": (1, 9, 7, channels), "w": (channels, 5, 4, 1)}, {}, convolution(groups=channels))
    assert templates(state) == ["depthwise"]
    x, w = normal((1, 9, 7, channels)), normal((channels, 5, 4, 1), 1)
    want = sum(x[:, i : i + 5, j : j + 4] * w[:, i, j, 0] for i in range(5) for j in range(4))
    close(numbers(state, [x, w], tmp_path, "fuse")[0], want)


def test_computed_weights_of_several_groups_keep_the_operator(tmp_path):
    state = selected({"x": (1, 6, 7, 8), "w": (6, 3, 3, 4)}, {}, convolution(groups=2))
    assert ops(state) == ["nn.conv2d"]
    x, w = normal((1, 6, 7, 8)), normal((6, 3, 3, 4), 1)
    want = np.concatenate([nhwc(x[..., :4], w[:3]), nhwc(x[..., 4:], w[3:])], -1)
    close(numbers(state, [x, w], tmp_path, "fuse")[0], want)


@pytest.mark.parametrize(
    ("left", "right"), [((3, 5), (5, 7)), ((2, 3, 5), (2, 5, 7)), ((5,), (5, 7)), ((2, 3, 5), (5,)), ((5,), (5,))]
)
def test_a_product_of_two_inputs_keeps_the_operator(tmp_path, left, right):
    state = selected({"x": left, "y": right}, {}, lambda e, x, y: [e(op.matmul(x, y))])
    assert ops(state) == ["matmul"]
    x, y = normal(left), normal(right, 1)
    close(numbers(state, [x, y], tmp_path, "fuse")[0], np.asarray(x @ y))


def test_a_stack_of_constant_matrices_keeps_the_operator(tmp_path):
    w = normal((2, 5, 7), 1)
    state = selected({"x": (2, 3, 5)}, {"w": w}, lambda e, x, w: [e(op.matmul(x, w))])
    assert ops(state) == ["matmul"]
    x = normal((2, 3, 5))
    close(numbers(state, [x], tmp_path, "fuse")[0], x @ w)


def test_a_vector_times_a_constant_matrix_is_right(tmp_path):
    w = normal((5, 7), 1)
    state = selected({"x": (5,)}, {"w": w}, lambda e, x, w: [e(op.matmul(x, w))])
    x = normal((5,))
    close(numbers(state, [x], tmp_path, "fuse")[0], x @ w)


def test_other_operators_stay():
    state = selected({"x": (1, 6, 7, 4)}, {}, lambda e, x: [e(op.nn.relu(x)), e(op.nn.softmax(x))])
    assert ops(state) == ["nn.relu", "nn.softmax"]
    assert state.macs == 0


def test_macs_add_up():
    w, v = normal((4, 1, 1, 4), 1), normal((4, 1, 1, 4), 2)

    def body(e, x, w, v):
        options = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
        return [e(op.nn.conv2d(e(op.nn.conv2d(x, w, **options)), v, **options))]

    assert selected({"x": (3, 6, 7, 4)}, {"w": w, "v": v}, body).macs == 2 * 3 * 6 * 7 * 16


def test_weights_used_twice_are_packed_once():
    w = normal((16, 3, 3, 16), 1)
    same = selected(
        {"x": (1, 8, 8, 16), "y": (1, 8, 8, 16)},
        {"w": w},
        lambda e, x, y, w: [
            e(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OHWI")),
            e(op.nn.conv2d(y, w, data_layout="NHWC", kernel_layout="OHWI")),
        ],
    )
    assert len(same.weights) == 1
    functions = {str(b.value.args[0].name_hint) for b in bindings_of(same.module["main"]) if op_name(b.value)}
    assert len(functions) == 1, "equal layers must share one kernel"


RESIZES = [
    (method, coordinates, rounding)
    for method, roundings in (("nearest_neighbor", ("", "floor", "ceil", "round_prefer_ceil")), ("linear", ("",)))
    for coordinates in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn")
    for rounding in roundings
]


@pytest.mark.parametrize("sizes", [((4, 6), (8, 12)), ((5, 7), (8, 3)), ((3, 3), (1, 7))], ids=str)
@pytest.mark.parametrize(("method", "coordinates", "rounding"), RESIZES)
def test_case_4_resize_is_what_tvm_computes(tmp_path, sizes, method, coordinates, rounding):
    (h, w), out = sizes
    if coordinates == "align_corners" and 1 in out:
        out = (2, 7)  # TVM divides by the output's size less one

    def body(e, x):
        options = {"coordinate_transformation_mode": coordinates, "rounding_method": rounding}
        return [e(op.image.resize2d(x, out, layout="NHWC", method=method, **options))]

    state = selected({"x": (1, h, w, 5)}, {}, body)
    assert ops(state) == ["call_tir"]
    x = normal((1, h, w, 5))
    plain = relax_state({"x": (1, h, w, 5)}, {}, body)
    call = bindings_of(plain.module["main"])[0].value
    close(numbers(state, [x], tmp_path, "fuse")[0], _evaluate_with_tvm(call, [x]), 1e-4)
