"""The NHWC layout: each numbered case against ONNX Runtime, and how many transposes are left."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from tvm import relax

from ingot.passes.rewriter import shape_of
from passes.build import (
    calls,
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

op, node = relax.op, helper.make_node
TO_LAYOUT = ("simplify", "fold_constants", "fold_batch_norm", "nhwc_layout", "clean_layout", "fold_layout")
X = (1, 3, 6, 8)
CONV = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1])]
W = {"w": normal((4, 3, 3, 3), 9)}


def check(folder, nodes, weights, transposes, inputs=None, outputs=("y",), opset=17, tolerance=1e-5):
    """Compile, compare with ONNX Runtime, and count the transposes; return the state in NHWC."""
    inputs = inputs or {"x": X}
    model = onnx_bytes(nodes, inputs, outputs, weights, opset)
    feeds = {name: normal(shape, i) for i, (name, shape) in enumerate(inputs.items())}
    state = run_steps(onnx_state(model, folder), *TO_LAYOUT)
    got = numbers(state, list(feeds.values()), folder, "select_templates")
    for mine, want in zip(got, onnxruntime_outputs(model, feeds), strict=True):
        close(mine, want, tolerance)
    assert transposes is None or ops(state).count("permute_dims") == transposes, ops(state)
    return state


# -- case 1 --------------------------------------------------------------------------------------------------------


def test_case_1_conv2d_has_a_transpose_at_each_edge_and_none_for_its_weight(tmp_path):
    state = check(tmp_path, CONV, W, 2, outputs=["c"])
    (conv,) = calls(state, "nn.conv2d")
    assert (str(conv.attrs.data_layout), str(conv.attrs.kernel_layout)) == ("NHWC", "OHWI")
    assert [v.shape for v in state.weights.values()] == [(4, 3, 3, 3)]


def test_case_1_one_channel_needs_no_transpose_at_all(tmp_path):
    nodes = [node("Conv", ["x", "w"], ["y"])]
    check(tmp_path, nodes, {"w": normal((1, 1, 3, 3))}, 0, {"x": (1, 1, 6, 8)})


def test_case_1_a_chain_of_convolutions_stays_in_nhwc(tmp_path):
    nodes = [*CONV, node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"], ["y"])]
    check(tmp_path, nodes, {**W, "v": normal((5, 4, 2, 2), 3)}, 2)


def test_case_1_a_weight_computed_at_run_time_is_transposed_there(tmp_path):
    nodes = [node("Relu", ["w"], ["v"]), node("Conv", ["x", "v"], ["y"])]
    state = check(tmp_path, nodes, {}, 3, {"x": X, "w": (4, 3, 3, 3)})
    assert not state.weights


TRANSPOSED = {
    "stride-1": ((3, 5, 3, 3), {"pads": [1, 1, 1, 1]}),
    "stride-2": ((3, 5, 3, 3), {"strides": [2, 2], "pads": [1, 0, 1, 1], "output_padding": [1, 0]}),
    "no-overlap": ((3, 5, 2, 2), {"strides": [2, 2]}),
    "gaps": ((3, 5, 1, 2), {"strides": [3, 3]}),
    "cut-by-padding": ((3, 5, 2, 4), {"strides": [1, 2], "pads": [2, 3, 2, 3]}),
    "dilation": ((3, 5, 3, 2), {"strides": [2, 1], "dilations": [2, 3]}),
    "uneven": ((3, 5, 4, 7), {"strides": [3, 2], "pads": [0, 2, 3, 1], "output_padding": [2, 1]}),
    "groups": ((4, 3, 3, 3), {"strides": [2, 2], "group": 2}),
    "depthwise": ((4, 1, 4, 4), {"strides": [2, 2], "pads": [1, 1, 1, 1], "group": 4}),
}
BY_PHASES = {"stride-2": 1, "no-overlap": 1, "gaps": 1, "cut-by-padding": 0, "uneven": 1}


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_case_1_conv2d_transpose_becomes_conv2d(tmp_path, kind):
    shape, attributes = TRANSPOSED[kind]
    nodes = [node("ConvTranspose", ["x", "w", "b"], ["t"], **attributes), node("Relu", ["t"], ["y"])]
    weights = {"w": normal(shape, 9), "b": normal((shape[1] * attributes.get("group", 1),), 8)}
    # The phases of rows are put together by one transpose; those of columns only by a view.
    state = check(tmp_path, nodes, weights, 2 + BY_PHASES.get(kind, 0), {"x": (1, shape[0], 6, 8)})
    assert "nn.conv2d_transpose" not in ops(state)
    assert ("nn.pad" in ops(state)) == (kind in ("dilation", "groups", "depthwise"))
    channels = shape_of(calls(state, "nn.conv2d")[0])[3]
    steps = attributes.get("strides", [1, 1])
    phases = steps[0] * steps[1] if kind in BY_PHASES else 1
    assert channels == shape[1] * attributes.get("group", 1) * phases


def test_case_1_conv2d_transpose_by_phases_in_many_sizes(tmp_path):
    rng = np.random.default_rng(3)
    nodes, weights, inputs = [], {}, {}
    while len(nodes) < 8:
        i = len(nodes)
        size, kernel, strides = rng.integers(1, 6, 2), rng.integers(1, 8, 2), rng.integers(1, 5, 2)
        extra, dilation, pads = rng.integers(0, strides), rng.integers(1, 3, 2), rng.integers(0, 5, 4)
        out = (size - 1) * strides + (kernel - 1) * dilation + 1 + extra - pads[:2] - pads[2:]
        if min(out) < 1:
            continue
        inputs[f"x{i}"], weights[f"w{i}"] = (1 + i % 2, 2, *map(int, size)), normal((2, 3, *map(int, kernel)), i)
        options = {"strides": strides, "pads": pads, "output_padding": extra, "dilations": dilation}
        attributes = {name: [int(v) for v in value] for name, value in options.items()}
        nodes.append(node("ConvTranspose", [f"x{i}", f"w{i}"], [f"y{i}"], **attributes))
    check(tmp_path, nodes, weights, None, inputs, [f"y{i}" for i in range(len(nodes))])


def test_case_1_conv2d_transpose_with_a_computed_weight(tmp_path):
    nodes = [node("Relu", ["w"], ["v"]), node("ConvTranspose", ["x", "v"], ["y"], strides=[2, 2], group=2)]
    state = check(tmp_path, nodes, {}, None, {"x": (1, 4, 6, 8), "w": (4, 3, 3, 2)})
    assert not state.weights


@pytest.mark.parametrize(
    "pool",
    [
        node("MaxPool", ["c"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1]),
        node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        node("AveragePool", ["c"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1]),
        node("AveragePool", ["c"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        node("GlobalAveragePool", ["c"], ["y"]),
        node("GlobalMaxPool", ["c"], ["y"]),
    ],
    ids=["max", "max-ceil", "average", "average-with-padding", "global-average", "global-max"],
)
def test_case_1_pooling(tmp_path, pool):
    transposes = 1 if pool.op_type.startswith("Global") else 2  # a 1x1 image is only viewed
    check(tmp_path, [*CONV, pool], W, transposes)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel", "align_corners"])
def test_case_1_resize(tmp_path, mode, coordinates):
    options = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        options["nearest_mode"] = "floor"
    nodes = [*CONV, node("Resize", ["c", "", "", "s"], ["y"], **options)]
    weights = {**W, "s": np.array([1, 4, 12, 16], np.int64)}
    check(tmp_path, nodes, weights, 2, tolerance=1e-4)


# -- case 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "transposes"),
    [((), 2), ((1,), 2), ((8,), 2), ((6, 1), 2), ((4, 1, 1), 2), ((1, 4, 6, 8), 2), ((1, 1, 6, 8), 2)],
)
@pytest.mark.parametrize("kind", ["Mul", "Div", "Max"])
def test_case_2_a_constant_operand_of_any_rank_is_brought_to_nhwc(tmp_path, shape, transposes, kind):
    nodes = [*CONV, node(kind, ["c", "k"], ["m"]), node("Relu", ["m"], ["y"])]
    check(tmp_path, nodes, {**W, "k": np.abs(normal(shape, 5)) + np.float32(0.5)}, transposes)


@pytest.mark.parametrize(
    ("shape", "transposes"),
    [((1, 4, 1, 1), 2), ((1, 1, 6, 8), 2), ((1, 4, 6, 8), 3), ((4, 1, 1), 2), ((8,), 2), ((1, 4, 1, 8), 3)],
)
def test_case_2_a_computed_operand_is_viewed_or_transposed(tmp_path, shape, transposes):
    nodes = [*CONV, node("Neg", ["k"], ["n"]), node("Add", ["n", "c"], ["y"])]
    check(tmp_path, nodes, W, transposes, {"x": X, "k": shape})


def test_case_2_a_residual_block_has_two_transposes(tmp_path):
    nodes = [
        *CONV,
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "v"], ["d"], pads=[1, 1, 1, 1]),
        node("Add", ["d", "r"], ["s"]),
        node("Clip", ["s", "lo", "hi"], ["y"]),
    ]
    weights = {**W, "v": normal((4, 4, 3, 3), 3), "lo": np.float32(0), "hi": np.float32(6)}
    check(tmp_path, nodes, weights, 2)


def test_case_2_a_result_of_more_dimensions_takes_the_nchw_form(tmp_path):
    nodes = [*CONV, node("Add", ["c", "k"], ["y"])]
    check(tmp_path, nodes, {**W, "k": normal((2, 1, 4, 6, 8), 5)}, 2)


def test_case_2_squeeze_and_excite_has_two_transposes(tmp_path):
    nodes = [
        *CONV,
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Conv", ["g", "v"], ["h"]),
        node("Sigmoid", ["h"], ["s"]),
        node("Mul", ["c", "s"], ["y"]),
    ]
    check(tmp_path, nodes, {**W, "v": normal((4, 4, 1, 1), 3)}, 2)


# -- case 3 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -3])
def test_case_3_concat(tmp_path, axis):
    nodes = [*CONV, node("Relu", ["c"], ["r"]), node("Concat", ["c", "r", "c"], ["y"], axis=axis)]
    check(tmp_path, nodes, W, 2)


def test_case_3_concat_with_a_constant_and_an_input(tmp_path):
    nodes = [*CONV, node("Concat", ["c", "k", "z"], ["y"], axis=1)]
    check(tmp_path, nodes, {**W, "k": normal((1, 2, 6, 8), 3)}, 3, {"x": X, "z": (1, 5, 6, 8)})


@pytest.mark.parametrize(("axis", "sizes"), [(1, [1, 3]), (2, [2, 4]), (3, [4, 4]), (-1, [1, 7])])
def test_case_3_split(tmp_path, axis, sizes):
    nodes = [
        *CONV,
        node("Split", ["c", "n"], ["a", "b"], axis=axis),
        node("Relu", ["a"], ["y"]),
        node("Neg", ["b"], ["z"]),
    ]
    one_channel = sum(1 for s in sizes if axis == 1 and s == 1)
    check(tmp_path, nodes, {**W, "n": np.array(sizes, np.int64)}, 3 - one_channel, outputs=["y", "z"])


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_case_3_softmax(tmp_path, kind, axis):
    check(tmp_path, [*CONV, node(kind, ["c"], ["y"], axis=axis)], W, 2)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[1], [2], [3], [2, 3], [1, 3], [1, 2, 3], [-1, -2], [0, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceMax"])
def test_case_3_reductions(tmp_path, kind, axes, keep):
    nodes = [*CONV, node(kind, ["c"], ["y"], axes=axes, keepdims=keep)]
    model = onnx_bytes(nodes, {"x": X}, ["y"], W)
    state = run_steps(onnx_state(model, tmp_path), *TO_LAYOUT)
    x = normal(X)
    close(numbers(state, [x], tmp_path, "select_templates")[0], onnxruntime_outputs(model, {"x": x})[0])
    assert ops(state).count("permute_dims") <= 2


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_case_3_quantize_and_dequantize_per_channel(tmp_path, axis):
    size = (1, 4, 6, 8)[axis]
    weights = {
        **W,
        "s": (np.abs(normal((size,), 4)) + np.float32(0.3)) / 20,
        "z": np.arange(size, dtype=np.int8) - 3,
    }
    nodes = [
        *CONV,
        node("QuantizeLinear", ["c", "s", "z"], ["q"], axis=axis),
        node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    model = onnx_bytes(nodes, {"x": X}, ["y"], weights)
    state = run_steps(onnx_state(model, tmp_path), *TO_LAYOUT)
    x = normal(X)
    got, want = numbers(state, [x], tmp_path, "select_templates")[0], onnxruntime_outputs(model, {"x": x})[0]
    # A value halfway between two steps may fall to either side.
    step = weights["s"].reshape([-1 if i == axis else 1 for i in range(4)])
    assert np.all(np.abs(got - want) <= step * 1.001)
    assert np.mean(np.abs(got - want) > step / 2) < 0.01
    assert ops(state).count("permute_dims") == 2


# -- case 4 --------------------------------------------------------------------------------------------------------


def test_case_4_a_transpose_to_nhwc_costs_nothing(tmp_path):
    check(tmp_path, [*CONV, node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 1])], W, 1)


@pytest.mark.parametrize("perm", [[0, 3, 1, 2], [3, 2, 1, 0], [0, 1, 3, 2], [0, 2, 1, 3], None])
def test_case_4_another_transpose_composes(tmp_path, perm):
    options = {"perm": perm} if perm else {}
    check(tmp_path, [*CONV, node("Transpose", ["c"], ["y"], **options)], W, 2)


# -- case 5 and the rest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_case_5_pad_moves_its_pairs(tmp_path, mode):
    nodes = [*CONV, node("Pad", ["c", "p", *(["v"] if mode == "constant" else [])], ["y"], mode=mode)]
    weights = {**W, "p": np.array([0, 0, 1, 2, 0, 0, 3, 4], np.int64)}
    if mode == "constant":
        weights["v"] = np.float32(1.5)
        weights["p"] = np.array([0, 1, 1, 2, 0, 2, 3, 4], np.int64)
    # Relax has no pad that repeats the edge: the frontend writes it as slices and repeats, which stay in NCHW.
    check(tmp_path, nodes, weights, None if mode == "edge" else 2)


def test_any_other_operator_gets_the_nchw_form(tmp_path):
    weights = {**W, "k": normal((8, 3), 5)}
    check(tmp_path, [*CONV, node("MatMul", ["c", "k"], ["y"])], weights, 2)


def test_two_readers_of_the_nchw_form_share_one_transpose(tmp_path):
    weights = {**W, "k": normal((8, 3), 5), "l": normal((8, 2), 6)}
    nodes = [*CONV, node("MatMul", ["c", "k"], ["y"]), node("MatMul", ["c", "l"], ["z"])]
    check(tmp_path, nodes, weights, 2, outputs=["y", "z"])


def test_flatten_after_a_global_pool_costs_nothing(tmp_path):
    nodes = [
        *CONV,
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "k"], ["y"]),
    ]
    check(tmp_path, nodes, {**W, "k": normal((4, 3), 5)}, 1)


def test_a_batch_of_three(tmp_path):
    check(tmp_path, [*CONV, node("Relu", ["c"], ["y"])], W, 2, {"x": (3, 3, 6, 8)})


def test_an_nhwc_model_has_no_transpose(tmp_path):
    w = normal((3, 3, 3, 4), 1)

    def body(e, x, w):
        y = e(op.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO"))
        return [e(op.nn.max_pool2d(y, (2, 2), layout="NHWC"))]

    state = run_steps(relax_state({"x": (1, 6, 8, 3)}, {"w": w}, body), *TO_LAYOUT)
    assert ops(state) == ["nn.conv2d", "nn.max_pool2d"]
    assert [v.shape for v in state.weights.values()] == [(4, 3, 3, 3)]
    x = normal((1, 6, 8, 3))
    y = np.zeros((1, 4, 6, 4), np.float64)
    for i in range(3):
        for j in range(3):
            y += x[:, i : i + 4, j : j + 6].astype(np.float64) @ w[i, j]
    want = np.max([y[:, i : i + 3, j : j + 5] for i in range(2) for j in range(2)], axis=0)
    close(numbers(state, [x], tmp_path, "select_templates")[0], want.astype(np.float32))


def test_tflite_depthwise_weights_become_ohwi(tmp_path):
    w = normal((3, 3, 9, 1), 1)

    def body(e, x, w):
        return [e(op.nn.conv2d(x, w, groups=9, data_layout="NHWC", kernel_layout="HWOI"))]

    state = run_steps(relax_state({"x": (1, 6, 8, 9)}, {"w": w}, body), *TO_LAYOUT)
    assert [v.shape for v in state.weights.values()] == [(9, 3, 3, 1)]
    x = normal((1, 6, 8, 9))
    want = sum(x[:, i : i + 4, j : j + 6] * w[i, j, :, 0] for i in range(3) for j in range(3))
    close(numbers(state, [x], tmp_path, "select_templates")[0], want)


# -- case 9 --------------------------------------------------------------------------------------------------------

VOLUMES = [
    ((1, 3, 5, 6, 7), (4, 3, 3, 3, 3), {"pads": [1, 1, 1, 1, 1, 1]}),
    ((2, 3, 7, 6, 5), (4, 3, 2, 3, 1), {"strides": [2, 1, 2], "pads": [1, 0, 0, 0, 1, 0]}),
    ((1, 2, 9, 8, 7), (5, 2, 3, 2, 3), {"dilations": [3, 2, 1], "pads": [2, 0, 1, 0, 0, 1]}),
    ((2, 8, 4, 3, 5), (8, 8, 1, 1, 1), {}),
    ((1, 2, 5, 4, 4), (3, 2, 1, 3, 3), {"strides": [3, 1, 1]}),
    ((1, 2, 4, 4, 4), (3, 2, 4, 4, 4), {}),
]


def test_case_9_every_form_of_a_conv3d(tmp_path):
    nodes, weights, inputs = [], {}, {}
    for i, (shape, weight, attributes) in enumerate(VOLUMES):
        inputs[f"x{i}"], weights[f"w{i}"], weights[f"b{i}"] = shape, normal(weight, i), normal((weight[0],), i)
        nodes.append(node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"], **attributes))
    state = check(tmp_path, nodes, weights, None, inputs, [f"y{i}" for i in range(len(VOLUMES))])
    assert ops(state).count("nn.conv2d") == len(VOLUMES)
    assert "nn.conv3d" not in ops(state)


def test_case_9_a_residual_block_of_volumes_is_transposed_at_its_edges_alone(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1] * 6),
        node("BatchNormalization", ["c", "s", "h", "m", "v"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "u", "h"], ["d"], pads=[1] * 6),
        node("Add", ["d", "r"], ["y"]),
    ]
    weights = {"w": normal((4, 3, 3, 3, 3), 1), "u": normal((4, 4, 3, 3, 3), 2)}
    weights |= {"s": normal((4,), 3), "h": normal((4,), 4), "m": normal((4,), 5), "v": np.abs(normal((4,), 6)) + 1}
    state = check(tmp_path, nodes, weights, 2, {"x": (2, 3, 4, 5, 6)})
    assert "multiply" not in ops(state)


@pytest.mark.parametrize("groups", [1, 2])
def test_case_9_groups_and_computed_weights_stay(tmp_path, groups):
    nodes = [node("Relu", ["w"], ["v"]), node("Conv", ["x", "v"], ["y"], group=groups)]
    state = check(tmp_path, nodes, {}, None, {"x": (1, 4, 4, 4, 4), "w": (4, 4 // groups, 2, 2, 2)})
    assert "nn.conv3d" in ops(state)


def test_case_9_in_ndhwc_nothing_is_transposed(tmp_path):
    weight = normal((2, 3, 3, 4, 5), 1)
    state = relax_state(
        {"x": (2, 5, 6, 7, 4)},
        {"w": weight},
        lambda _, x, w: [op.nn.conv3d(x, w, padding=[1] * 6, data_layout="NDHWC", kernel_layout="DHWIO")],
    )
    x = normal((2, 5, 6, 7, 4), 2)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 3, 3), (1, 2, 3))
    want = np.einsum("ndhwcxyz,xyzco->ndhwo", windows, weight, optimize=True)
    state = run_steps(state, *TO_LAYOUT)
    assert "permute_dims" not in ops(state)
    close(numbers(state, [x], tmp_path, "select_templates")[0], want, 1e-4)
