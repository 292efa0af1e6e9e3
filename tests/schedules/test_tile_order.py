"""The order of tiles: weights pass by again and again only where they come from a near cache in any case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ingot.schedules import conv2d
from ingot.schedules.conv2d import CHANNELS_INNER, POSITIONS_INNER, Conv2DWorkload, MatmulWorkload
from ingot.target import load_target


@pytest.fixture(scope="module")
def target():
    """A core with 32 KiB and 512 KiB of cache."""
    board = load_target("x86-64-v3")
    return board.model_copy(update={"cache": board.cache.model_copy(update={"l1d_kib": 32, "l2_kib": 512})})


def pointwise(size, channels, out, stride=1):
    return Conv2DWorkload(
        1, size, size, channels, out, (1, 1), (stride, stride), (0, 0, 0, 0), (1, 1), "float32"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "order"),
    [
        (pointwise(28, 128, 512), CHANNELS_INNER),  # 256 KiB of weights, blocks of 8 KiB
        (pointwise(56, 64, 256), POSITIONS_INNER),  # blocks of 4 KiB stay in the first-level cache
        (pointwise(7, 512, 2048), POSITIONS_INNER),  # 4 MiB of weights
        (pointwise(14, 1024, 2048, 2), POSITIONS_INNER),  # 8 MiB of weights; only a quarter of the image is read
        (MatmulWorkload((784,), 128, 512, "float32").as_conv(), CHANNELS_INNER),
    ],
)
def test_weights_pass_by_for_each_tile_where_they_stay_near(target, layer, order):
    assert conv2d.default_config(layer, target).order == order


def test_the_default_is_in_the_space_of_a_search(target):
    for layer in (pointwise(28, 128, 512), pointwise(56, 64, 256), pointwise(7, 512, 2048)):
        assert conv2d.default_config(layer, target) in conv2d.variants(layer, target)


def test_other_windows_and_groups_are_ordered_by_bytes(target):
    for layer in (
        replace(pointwise(28, 128, 512), kernel=(3, 3), padding=(1, 1, 1, 1)),
        replace(pointwise(28, 128, 512), groups=4),
        pointwise(1, 128, 512),
    ):
        assert conv2d.default_config(layer, target).order == conv2d.BY_BYTES
