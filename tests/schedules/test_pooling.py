"""Pools in NHWC and in NCHW, and what else stays in NCHW, over sizes at the edges of vectors and borders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.passes.rewriter import bindings_of, op_name
from ingot.schedules import planes, pooling
from ingot.target import load_target
from passes.build import finish, kernel_functions, normal, onnx_state, run_steps
from passes.execute import execute
from schedules.common import CHANNELS, EPILOGUES, TARGETS, WIDTHS, Branches, check, property_settings

PIECES = (1, 2, 3, 7)
KERNELS = ((1, 1), (2, 2), (3, 3), (5, 5), (1, 4), (3, 1), (2, 5))
KINDS = ("MaxPool", "AveragePool")
LAYOUTS = ("NCHW", "NHWC")


def pool(branches, kind, shape, layout="NCHW", epilogue="none", **options):
    """Add a pool of an NCHW image; in NHWC it stands between two transposes."""
    x = branches.input(shape if layout == "NCHW" else (shape[0], *shape[2:], shape[1]))
    if layout == "NHWC":
        x = branches.node("Transpose", [x], perm=[0, 3, 1, 2])
    y = branches.node(kind, [x], **options)
    if epilogue == "bias":
        y = branches.node("Relu", [branches.node("Add", [y, branches.weight(normal((1, shape[1], 1, 1), 7))])])
    branches.output(branches.node("Transpose", [y], perm=[0, 2, 3, 1]) if layout == "NHWC" else y)


@pytest.mark.parametrize("target", TARGETS)
def test_channels(tmp_path, target):
    branches = Branches()
    for i, channels in enumerate((1, 3, 8, 17, 33, 64)):
        options = {"kernel_shape": [3, 3], "strides": [1 + i % 2] * 2, "pads": [1, 1, 1, 1]}
        pool(branches, KINDS[i % 2], (1, channels, 6, 9), "NHWC", "bias", **options)
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_widths(tmp_path, target):
    branches = Branches()
    for i, width in enumerate(WIDTHS):
        options = {"kernel_shape": [2, 3], "strides": [1, 1 + i % 3], "pads": [0, 1, 1, 1]}
        pool(branches, KINDS[i % 2], (2, 5, 4, width), "NCHW", "bias", **options)
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_strides_and_padding(tmp_path, layout):
    branches = Branches()
    for i, kernel in enumerate(KERNELS):
        for stride in (1, 2, 3)[i % 2 :]:
            pads = [kernel[0] - 1, kernel[1] // 2, kernel[0] // 2, kernel[1] - 1]
            options = {"kernel_shape": kernel, "strides": [stride, 4 - stride], "pads": pads}
            kind = KINDS[(i + stride) % 2]
            if kind == "AveragePool":
                options["count_include_pad"] = stride % 2
            pool(branches, kind, (1, 16, 10, 21), layout, **options)
    check(branches, tmp_path, pieces=(3,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dilation_ceil_mode_and_large_windows(tmp_path, layout):
    branches = Branches()
    for options in (
        {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [2, 1, 2, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
        {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]},
        {"kernel_shape": [9, 13], "pads": [4, 6, 4, 6]},
        {"kernel_shape": [10, 14]},
        {"kernel_shape": [7, 6], "strides": [3, 4], "pads": [3, 2, 0, 0], "ceil_mode": 1},
    ):
        for kind in KINDS if "dilations" not in options else KINDS[:1]:
            pool(branches, kind, (2, 9, 10, 14), layout, **options)
    check(branches, tmp_path, pieces=PIECES)


def test_a_maximum_of_minus_infinity(tmp_path):
    x = normal((1, 3, 6, 8))
    x[0, 0], x[0, 1, :, :4] = -np.inf, -np.inf
    for layout in LAYOUTS:
        branches = Branches()
        pool(branches, "MaxPool", x.shape, layout, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        state = finish(onnx_state(branches.bytes(), tmp_path))
        (got,) = execute(state, [x if layout == "NCHW" else x.transpose(0, 2, 3, 1).copy()], tmp_path)
        got = got if layout == "NCHW" else got.transpose(0, 3, 1, 2)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        want = np.max([padded[:, :, i : i + 6, j : j + 8] for i in range(3) for j in range(3)], axis=0)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("target", TARGETS)
def test_depthwise_convolutions_alone(tmp_path, target):
    branches = Branches()
    for i, width in enumerate(WIDTHS):
        kernel, stride = KERNELS[i % len(KERNELS)], 1 + i % 3
        size = (9, max(width, kernel[1]))
        common = {"strides": (stride, stride), "pads": (1, kernel[1] - 1, 0, 1), "group": 6}
        branches.conv(2, 6, 6, size, kernel, epilogue=EPILOGUES[i % len(EPILOGUES)], nhwc=False, **common)
    branches.conv(1, 3, 3, (15, 17), (3, 3), (2, 1), (2, 4, 2, 4), (2, 4), 3, "relu", False)
    branches.conv(1, 2, 2, (9, 40), (7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 2, "relu", False)
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_shorter_than_a_vector(tmp_path, target):
    branches = Branches()
    for i, width in enumerate((3, 5, 6, 7, 11, 13)):
        stride, epilogue = 1 + i // 4, ("residual", "sigmoid", "none", "relu")[i % 4]
        common = {"strides": (stride, stride), "pads": (2, 2, 2, 2), "group": 6}
        branches.conv(1, 6, 6, (9, width), (5, 5), epilogue=epilogue, nhwc=False, **common)
        for kind in ("MaxPool", "AveragePool"):
            options = {"kernel_shape": [3, 3], "strides": [stride] * 2, "pads": [1] * 4}
            x = branches.node(kind, [branches.input((1, 6, 9, width))], **options)
            branches.output(branches.node("Sigmoid", [x]) if i % 2 else x)
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_products_alone(tmp_path, target):
    branches = Branches()
    sizes = ((1, 4), (2, 2), (3, 5), (4, 4), (7, 9), (5, 13), (8, 33))
    for i, channels in enumerate((1, 3, 4, 7, 16, 17, 65)):
        size, out_channels = sizes[i], (4, 5, 64, 33, 6, 13, 31)[i]
        common = {
            "kernel": (1, 1),
            "strides": (1 + i // 5, 1 + i // 4),
            "epilogue": EPILOGUES[i % len(EPILOGUES)],
            "nhwc": False,
        }
        branches.conv(1 + i % 2, channels, out_channels, size, **common)
    branches.conv(1, 24, 40, (6, 6), (1, 1), epilogue="residual", nhwc=False)
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_resizes_alone(tmp_path, target):
    branches = Branches()
    for i, scales in enumerate(((2, 2), (3, 1), (1, 5), (1.5, 2), (2, 2.25))):
        for mode in ("nearest", "linear"):
            options = {"mode": mode, "coordinate_transformation_mode": ("asymmetric", "half_pixel")[i % 2]}
            if mode == "nearest":
                options["nearest_mode"] = "floor"
            x = branches.input((1 + i % 2, 5, 4, (8, 13, 7, 20, 16)[i]))
            wanted = branches.weight(np.array([1, 1, *scales], np.float32))
            branches.output(branches.node("Relu", [branches.node("Resize", [x, "", wanted], **options)]))
    check(branches, tmp_path, target, PIECES)


@st.composite
def layers(draw):
    kernel = draw(st.sampled_from(KERNELS))
    pads = [draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    size = [max(draw(st.sampled_from(WIDTHS)), kernel[i] - pads[i] - pads[i + 2]) for i in range(2)]
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "shape": (draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from(CHANNELS)), *size),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "epilogue": draw(st.sampled_from(["none", "bias"])),
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(2)],
        "pads": pads,
    }


@property_settings
@given(st.lists(layers(), min_size=1, max_size=3), st.sampled_from(TARGETS), st.sampled_from(PIECES))
def test_any_pool(tmp_path_factory, drawn, target, pieces):
    branches = Branches()
    for layer in drawn:
        pool(branches, **layer)
    check(branches, tmp_path_factory.mktemp("pool"), target, (pieces,))


def layouts_of(branches, folder):
    """The layout of each pool and convolution after the layout pass."""
    state = run_steps(
        onnx_state(branches.bytes(), folder), "simplify", "whole_numbers", "fold_constants", "nhwc_layout"
    )
    found = []
    for binding in bindings_of(state.module["main"]):
        attrs = getattr(binding.value, "attrs", None)
        if op_name(binding.value).endswith(("pool2d", "conv2d")):
            found.append(str(getattr(attrs, "layout", None) or attrs.data_layout))
    return found


def test_what_stands_alone_stays_in_nchw(tmp_path):
    branches = Branches()
    pool(branches, "MaxPool", (1, 4, 8, 8), kernel_shape=[2, 2])
    x = branches.node("AveragePool", [branches.input((1, 4, 8, 8))], kernel_shape=[2, 2])
    branches.output(branches.node("MaxPool", [x], kernel_shape=[3, 3]))
    branches.conv(1, 4, 4, (8, 8), (3, 3), group=4, nhwc=False)
    branches.conv(1, 4, 9, (8, 8), (1, 1), (2, 2), nhwc=False)
    assert layouts_of(branches, tmp_path) == ["NCHW"] * 5


def test_what_a_convolution_reads_or_made_is_nhwc(tmp_path):
    branches = Branches()
    weight = branches.weight(normal((4, 4, 3, 3)))
    x = branches.node("MaxPool", [branches.input((1, 4, 9, 9))], kernel_shape=[2, 2])
    x = branches.node("Relu", [x])
    x = branches.node("Conv", [x, weight])
    branches.output(branches.node("AveragePool", [x], kernel_shape=[3, 3]))
    pool(branches, "MaxPool", (1, 4, 8, 8), "NHWC", kernel_shape=[2, 2])
    assert layouts_of(branches, tmp_path) == ["NHWC"] * 4


def test_quantised_layers_are_nhwc(tmp_path):
    branches = Branches()
    scale, zero = branches.weight(np.float32(0.1)), branches.weight(np.int8(3))
    narrow = branches.node("QuantizeLinear", [branches.input((1, 8, 6, 6)), scale, zero])
    x = branches.node("DequantizeLinear", [narrow, scale, zero])
    stored = branches.weight(np.arange(-32, 32, dtype=np.int8).reshape(8, 8, 1, 1))
    weight = branches.node("DequantizeLinear", [stored, scale, branches.weight(np.int8(0))])
    for y in (branches.node("Conv", [x, weight]), branches.node("MaxPool", [x], kernel_shape=[2, 2])):
        wide = branches.node("QuantizeLinear", [y, scale, zero])
        branches.output(branches.node("DequantizeLinear", [wide, scale, zero]))
    assert layouts_of(branches, tmp_path) == ["NHWC"] * 2


def test_lines_too_long_for_the_stack_are_left_to_nhwc(tmp_path):
    branches = Branches()
    pool(branches, "MaxPool", (1, 2, 3, 5000), kernel_shape=[1, 2], strides=[1, 2])
    assert layouts_of(branches, tmp_path) == ["NHWC"]
    check(branches, tmp_path)


def test_a_large_maximum_is_two(tmp_path):
    branches = Branches()
    pool(branches, "MaxPool", (1, 8, 13, 13), "NHWC", kernel_shape=[5, 5], pads=[2, 2, 2, 2])
    state = run_steps(
        onnx_state(branches.bytes(), tmp_path), "simplify", "fold_constants", "nhwc_layout", "select_templates"
    )
    assert len(kernel_functions(state)) == 2


def test_inverse_counts():
    work = pooling.PoolWorkload("mean", 1, 4, 5, 8, 2, 3, (2, 3), (2, 2), (0, 1, 0, 1), (1, 1))
    np.testing.assert_array_equal(1 / pooling.inverse_counts(work), [[4, 6, 4], [4, 6, 4]])
    include = pooling.PoolWorkload("mean", 1, 4, 5, 8, 2, 3, (2, 3), (2, 2), (0, 1, 0, 1), (1, 1), True)
    assert pooling.inverse_counts(include) == np.float32([[1 / 6]])


def test_tasks_of_planes_share_the_work_and_their_lines_fit():
    work = planes.PlaneWorkload("depthwise", 1, 3, 200, 300, 200, 300, (5, 5), (1, 1), (2, 2), (1, 1))
    config = planes.default_config(work, load_target("x86-64-v3"))
    assert 1 < config.rows <= 18
    assert ((config.rows - 1) + 5) * work.line_bytes <= planes.LINE_BYTES
