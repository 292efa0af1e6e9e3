"""Which tile of a convolution or matrix product comes next: of another position, or of another block of channels.

With the positions inner, one block of weights stays while all positions pass by: all activations are read again for
each block, and each tile stores a few channels of rows far apart. With the channels inner, a tile's activations stay:
all weights are read again for each tile of positions, and rows are stored whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.schedules.vector import ceil_div
from ingot.target import Target

if TYPE_CHECKING:
    from ingot.schedules.conv2d import Conv2DWorkload, TileConfig

#: The share of the first-level cache in which a block of weights stays while activations pass by.
_BESIDE = 0.25


def channels_inner(workload: Conv2DWorkload, config: TileConfig, target: Target) -> bool:
    """Say whether the channels of a 1x1 convolution without padding are inner, and its positions outer.

    A block of weights too large to stay in the first-level cache comes from the second in either order: then the
    weights cost nothing more, if all of them stay there. Otherwise the order that reads fewer bytes again is taken.
    """
    w = workload
    blocks, tiles = w.blocks(config.block), ceil_div(w.positions, config.pixels)
    block = w.in_channels * config.block * 4
    if block >= target.cache.l1d_kib * 1024 * _BESIDE and block * blocks <= target.cache.l2_kib * 1024:
        return True
    return w.positions * blocks > w.out_channels * tiles


def weights_stay(sch: Any, anchor: Any, config: TileConfig) -> bool:  # noqa: ANN401
    """Say whether one block of output channels should visit all positions before the next block starts.

    Compares the bytes each order reads again: the activations once per block of channels, or all weights once per
    row of tiles.
    """
    node = sch.get(anchor)
    sizes = [int(np.prod([int(d) for d in r.source.shape], dtype=np.int64)) for r in node.reads[-2:]]
    out_shape = [int(d) for d in node.writes[0].source.shape]
    blocks = ceil_div(out_shape[-1], config.block)
    joined = len(out_shape) == 2
    rows = out_shape[0] // config.pixels if joined else max(1, int(np.prod(out_shape[:-2], dtype=np.int64)))
    return sizes[0] * blocks <= sizes[1] * rows
