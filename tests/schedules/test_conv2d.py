"""The convolution template (and groups without one) over sizes at the edges of vectors and tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.schedules import conv2d
from ingot.target import load_target
from schedules.common import (
    CHANNELS,
    EPILOGUES,
    KERNELS,
    TARGETS,
    WIDTHS,
    Branches,
    check,
    property_settings,
)

PIECES = (1, 2, 3, 7)


def model(*layers, **same):
    branches = Branches()
    for layer in layers:
        branches.conv(**{"batch": 1, "size": (6, 9), "kernel": (3, 3), "pads": (1, 1, 1, 1), **same, **layer})
    return branches


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_channels(tmp_path, target, kernel):
    pads = (kernel[0] // 2,) * 4
    layers = [{"channels": 5, "out_channels": c} for c in CHANNELS]
    layers += [{"channels": c, "out_channels": 6} for c in CHANNELS]
    check(model(*layers, kernel=kernel, pads=pads, epilogue="bias"), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_widths(tmp_path, target, kernel):
    pads = (kernel[0] // 2,) * 4
    layers = [{"size": (3, w)} for w in WIDTHS] + [{"size": (w, 3)} for w in WIDTHS[:6]]
    check(model(*layers, channels=7, out_channels=17, kernel=kernel, pads=pads), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_strides_and_padding(tmp_path, target):
    layers = [
        {"kernel": k, "strides": (s, s), "pads": p}
        for k in KERNELS
        for s, p in ((1, (0, 0, 0, 0)), (2, (1, 0, 2, 3)), (3, (0, 2, 1, 1)))
    ]
    check(model(*layers, channels=4, out_channels=19, size=(9, 16)), tmp_path, target, (2, 7))


@pytest.mark.parametrize("target", TARGETS)
def test_dilation_and_uneven_strides(tmp_path, target):
    layers = [
        {"dilations": (2, 2), "pads": (2, 2, 2, 2)},
        {"dilations": (1, 2), "strides": (2, 1), "pads": (0, 0, 0, 0)},
        {"dilations": (2, 2), "kernel": (5, 3), "pads": (4, 1, 3, 2), "strides": (1, 3)},
        {"strides": (1, 2), "pads": (0, 1, 0, 0)},
        {"strides": (3, 1), "pads": (2, 2, 2, 2)},
    ]
    check(model(*layers, channels=8, out_channels=33, size=(11, 14)), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_batch_of_three(tmp_path, target):
    layers = [
        {"channels": 3, "out_channels": 8},
        {"channels": 8, "out_channels": 33, "kernel": (1, 1), "pads": (0, 0, 0, 0)},
        {"channels": 8, "out_channels": 16, "strides": (2, 2)},
        {"channels": 16, "out_channels": 9, "kernel": (1, 1), "pads": (0, 0, 0, 0), "size": (1, 1)},
    ]
    check(model(*layers, batch=3), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(tmp_path, target, epilogue):
    layers = [
        {"channels": 3, "out_channels": 16},
        {"channels": 16, "out_channels": 33},
        {"channels": 8, "out_channels": 64, "kernel": (1, 1), "pads": (0, 0, 0, 0), "size": (7, 7)},
        {"channels": 8, "out_channels": 10, "kernel": (1, 1), "pads": (0, 0, 0, 0), "size": (1, 1)},
    ]
    check(model(*layers, epilogue=epilogue), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_real_groups(tmp_path, target):
    layers = [
        {"channels": 4, "out_channels": 6, "group": 2},
        {"channels": 32, "out_channels": 32, "group": 2, "strides": (2, 2)},
        {"channels": 18, "out_channels": 34, "group": 2, "kernel": (1, 1), "pads": (0, 0, 0, 0)},
        {"channels": 9, "out_channels": 9, "group": 3, "dilations": (2, 2), "pads": (2, 2, 2, 2)},
        {"channels": 4, "out_channels": 12, "group": 4},
    ]
    check(model(*layers, epilogue="relu"), tmp_path, target, PIECES)


@st.composite
def layers(draw):
    kernel = draw(st.sampled_from(KERNELS))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    pads = tuple(draw(st.integers(0, 3)) for _ in range(4))
    spans = [(kernel[i] - 1) * dilations[i] + 1 for i in range(2)]
    size = tuple(max(draw(st.sampled_from(WIDTHS[:8])), spans[i] - pads[i] - pads[i + 2]) for i in range(2))
    channels, out_channels = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    while size[0] * size[1] * channels * out_channels * kernel[0] * kernel[1] > 4_000_000:
        channels, out_channels = max(1, channels // 2), max(1, out_channels - 7)
    group = 2 if channels % 2 == out_channels % 2 == 0 and draw(st.integers(0, 4)) == 0 else 1
    return {
        "batch": draw(st.sampled_from([1, 1, 1, 3])),
        "channels": channels,
        "out_channels": out_channels,
        "size": size,
        "kernel": kernel,
        "strides": draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 2)])),
        "pads": pads,
        "dilations": dilations,
        "group": group,
        "epilogue": draw(st.sampled_from(EPILOGUES)),
    }


@property_settings
@given(st.lists(layers(), min_size=1, max_size=3), st.sampled_from(TARGETS), st.sampled_from(PIECES))
def test_any_convolution(tmp_path_factory, drawn, target, pieces):
    check(model(*drawn), tmp_path_factory.mktemp("conv"), target, (pieces,))


# -- the template's parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("block", [4, 8, 16, 32, 64])
def test_packing_is_undone_by_unpacking(channels, block):
    w = np.random.default_rng(0).standard_normal((channels, 3, 2, 5)).astype(np.float32)
    packed = conv2d.pack_weight(w, block)
    assert packed.shape == (-(-channels // block), 3, 2, 5, block)
    flat = packed.transpose(0, 4, 1, 2, 3).reshape(-1, 3, 2, 5)
    np.testing.assert_array_equal(flat[:channels], w)
    assert not flat[channels:].any()


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "raspberry-pi-4", "raspberry-pi-4-32bit"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("out_channels", [1, 16, 33, 512])
def test_tiles_fit_the_register_file(target, width, out_channels):
    from ingot.schedules.vector import registers

    board = load_target(target)
    regs = registers(board)
    workload = conv2d.Conv2DWorkload(1, width, width, 16, out_channels, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "float32")
    config = conv2d.default_config(workload, board)
    assert config.block % regs.lanes == 0
    assert config.pixels * (config.block // regs.lanes) + config.block // regs.lanes < regs.count + 1
    assert workload.in_channels % config.unroll == 0
