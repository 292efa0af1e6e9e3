"""The depthwise template over sizes at the edges of vectors, tiles and borders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.schedules import depthwise
from ingot.target import load_target
from schedules.common import CHANNELS, EPILOGUES, KERNELS, TARGETS, WIDTHS, Branches, check, property_settings

PIECES = (1, 2, 3, 7)


def model(*layers, **same):
    branches = Branches()
    for layer in layers:
        options = {"batch": 1, "channels": 8, "size": (6, 9), "kernel": (3, 3), "pads": (1, 1, 1, 1), **same, **layer}
        branches.conv(**{"out_channels": options["channels"], "group": options["channels"], **options})
    return branches


@pytest.mark.parametrize("target", TARGETS)
def test_channels(tmp_path, target):
    check(model(*[{"channels": c} for c in CHANNELS], epilogue="bias"), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_widths(tmp_path, target):
    sizes = [{"size": (5, w)} for w in WIDTHS] + [{"size": (w, 5)} for w in WIDTHS]
    check(model(*sizes, channels=17), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_kernels_and_padding(tmp_path, target, stride):
    layers = [{"kernel": k, "pads": p} for k in KERNELS for p in ((0, 0, 0, 0), (1, 0, 2, 3), (0, 3, 1, 0))]
    check(model(*layers, channels=16, size=(10, 13), strides=(stride, stride)), tmp_path, target, (3,))


@pytest.mark.parametrize("target", TARGETS)
def test_dilation_batch_and_padding_wider_than_the_image(tmp_path, target):
    layers = [
        {"dilations": (2, 2), "pads": (2, 2, 2, 2)},
        {"dilations": (2, 2), "kernel": (5, 5), "pads": (4, 4, 4, 4), "size": (7, 7)},
        {"dilations": (1, 3), "strides": (2, 1), "pads": (0, 3, 0, 3), "size": (9, 9)},
        {"batch": 3, "strides": (2, 2)},
        {"batch": 3, "size": (1, 1)},
        {"size": (2, 2), "pads": (3, 3, 3, 3)},
        {"size": (1, 1), "kernel": (7, 7), "pads": (3, 3, 3, 3)},
        {"size": (3, 3), "kernel": (3, 3), "pads": (5, 5, 5, 5), "strides": (2, 2)},
    ]
    check(model(*layers, channels=24), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(tmp_path, target, epilogue):
    layers = [{"channels": 16}, {"channels": 33, "strides": (2, 2)}, {"channels": 7, "kernel": (5, 3)}]
    check(model(*layers, epilogue=epilogue), tmp_path, target, PIECES)


@st.composite
def layers(draw):
    kernel = draw(st.sampled_from(KERNELS))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    pads = tuple(draw(st.integers(0, 4)) for _ in range(4))
    spans = [(kernel[i] - 1) * dilations[i] + 1 for i in range(2)]
    return {
        "batch": draw(st.sampled_from([1, 1, 1, 3])),
        "channels": draw(st.sampled_from(CHANNELS)),
        "size": tuple(max(draw(st.sampled_from(WIDTHS)), spans[i] - pads[i] - pads[i + 2]) for i in range(2)),
        "kernel": kernel,
        "strides": draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (2, 1)])),
        "pads": pads,
        "dilations": dilations,
        "epilogue": draw(st.sampled_from(EPILOGUES)),
    }


@property_settings
@given(st.lists(layers(), min_size=1, max_size=3), st.sampled_from(TARGETS), st.sampled_from(PIECES))
def test_any_depthwise_convolution(tmp_path_factory, drawn, target, pieces):
    check(model(*drawn), tmp_path_factory.mktemp("depthwise"), target, (pieces,))


def test_packing():
    w = np.arange(5 * 3 * 2, dtype=np.float32).reshape(5, 3, 2, 1)
    packed = depthwise.pack_weight(w)
    assert packed.shape == (3, 2, 5)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed, w[..., 0].transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("size", "stride", "tile"),
    [(7, 1, (7, 8)), (13, 1, (7, 8)), (14, 1, (7, 8)), (56, 1, (8, 8)), (14, 2, (7, 8)), (56, 2, (2, 16))],
)
def test_tiles_of_few_registers(size: int, stride: int, tile: tuple[int, int]) -> None:
    """As measured on AVX2, all of the space: wide tiles of one vector, but narrow ones for long rows of stride 2."""
    work = depthwise.DepthwiseWorkload(1, size, size, 64, (3, 3), (stride, stride), (1, 1, 1, 1), (1, 1), "float32")
    config = depthwise.default_config(work, load_target("x86-64-v3"))
    assert (config.pixels, config.block) == tile
    assert config in depthwise.configs(work, load_target("x86-64-v3"))
