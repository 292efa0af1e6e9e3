"""Direct convolution and matrix product with constant weights: one register tile for both.

The weights are packed at compile time as [CO/b][KH][KW][CI][b], so that the innermost loops read them in order; the
activations are NHWC. One tile computes `pixels` output positions of `b` channels in registers:

    for kh, kw, ci:                      # reduction
        for p in pixels:                 # unrolled
            acc[p][0:b] += x[p, kh, kw, ci] * w[kh, kw, ci][0:b]

and the fused epilogue (bias, activation, residual add) reads the registers and makes the only store.
A matrix product [M, K] x [K, N] is the case KH = KW = 1 with M positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from ingot.schedules.padding import Dequantize, copy_patch, pad_nhwc
from ingot.schedules.vector import annotate_block, ceil_div, largest_divisor, registers
from ingot.target import Target


@dataclass(frozen=True)
class Conv2DWorkload:
    """One convolution, NHWC x OHWI, groups = 1. `padding` is (top, left, bottom, right)."""

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    dtype: str

    @property
    def out_height(self) -> int:
        """Return the output's height."""
        span = (self.kernel[0] - 1) * self.dilation[0] + 1
        return (self.height + self.padding[0] + self.padding[2] - span) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Return the output's width."""
        span = (self.kernel[1] - 1) * self.dilation[1] + 1
        return (self.width + self.padding[1] + self.padding[3] - span) // self.strides[1] + 1

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of one inference."""
        positions = self.batch * self.out_height * self.out_width
        return positions * self.out_channels * self.kernel[0] * self.kernel[1] * self.in_channels

    @property
    def pointwise(self) -> bool:
        """Say whether output position i reads input position i alone: rows can be joined."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.padding)


@dataclass(frozen=True)
class TileConfig:
    """The register tile: `pixels` output positions x `block` output channels, `unroll` input channels a step."""

    pixels: int
    block: int
    unroll: int


def default_config(workload: Conv2DWorkload, target: Target) -> TileConfig:
    """Return the tile that fills the register file without spilling and wastes least at the edges."""
    regs = registers(target)
    positions = workload.batch * workload.out_height * workload.out_width
    vectors = 4 if regs.lanes == 4 and regs.count >= 32 else 2
    needed = ceil_div(workload.out_channels, regs.lanes)
    if positions == 1:  # a matrix-vector product: bound by memory; independent accumulators hide the FMA latency
        vectors = min(8, needed)
        return TileConfig(pixels=1, block=vectors * regs.lanes, unroll=largest_divisor(workload.in_channels, 4))
    vectors = min(vectors, needed)
    # accumulators + one weight register per vector + one for the broadcast input (four with lane-indexed FMA).
    spare = 1 if regs.lanes > 4 else 4
    limit = max(1, (regs.count - vectors - spare) // vectors)
    limit = min(limit, 14 if vectors > 1 else 24)
    pixels = _tile_width(workload, limit)
    unroll = largest_divisor(workload.in_channels, 4)
    return TileConfig(pixels=pixels, block=vectors * regs.lanes, unroll=unroll)


def _tile_width(workload: Conv2DWorkload, limit: int) -> int:
    """Return the tile width, at most `limit`, that covers the output with least waste; wider wins ties.

    Case 1: a pointwise convolution of few columns joins whole rows.
    Case 2: else the width that wastes least of the last tile of a row.
    """
    width = workload.out_width
    if workload.pointwise and width <= limit:
        return width * largest_divisor(workload.batch * workload.out_height, limit // width)
    widths = range(max(1, limit // 2), limit + 1)
    return min(widths, key=lambda w: (ceil_div(width, w) * w, -w))


def pack_weight(weight: np.ndarray, block: int) -> np.ndarray:
    """Pack OHWI weights to [CO/block][KH][KW][CI][block], the last block padded with zeros."""
    co, kh, kw, ci = weight.shape
    blocks = ceil_div(co, block)
    padded = np.zeros((blocks * block, kh, kw, ci), weight.dtype)
    padded[:co] = weight
    return np.ascontiguousarray(padded.reshape(blocks, block, kh, kw, ci).transpose(0, 2, 3, 4, 1))


def compute(workload: Conv2DWorkload, config: TileConfig, convert: Dequantize | None = None) -> list[Any]:
    """Return the TE tensors [data NHWC, packed weight, output NHWC] of one convolution.

    With `convert` the data are stored integers that each tile turns into float32 as it copies its patch.
    """
    w = workload
    kh, kw = w.kernel
    sh, sw = w.strides
    dh, dw = w.dilation
    top, left = w.padding[0], w.padding[1]
    height, width, co = w.out_height, w.out_width, w.out_channels
    blocks = ceil_div(co, config.block)
    stored = convert.dtype if convert is not None else w.dtype
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels), stored, name="data")
    weight = te.placeholder((blocks, kh, kw, w.in_channels, config.block), w.dtype, name="weight")
    tiled_width = width if config.pixels > width else ceil_div(width, config.pixels) * config.pixels
    need_h = (height - 1) * sh + (kh - 1) * dh + 1
    need_w = (tiled_width - 1) * sw + (kw - 1) * dw + 1
    source = pad_nhwc(data, top, left, need_h, need_w, convert)
    ry = te.reduce_axis((0, kh), "ry")
    rx = te.reduce_axis((0, kw), "rx")
    rc = te.reduce_axis((0, w.in_channels), "rc")
    conv = te.compute(
        (w.batch, height, tiled_width, blocks * config.block),
        lambda n, y, x, c: te.sum(
            source[n, y * sh + ry * dh, x * sw + rx * dw, rc] * weight[c // config.block, ry, rx, rc, c % config.block],
            axis=[ry, rx, rc],
        ),
        name="conv",
        attrs=annotate_block("conv2d", "conv2d", config),
    )
    out = te.compute((w.batch, height, width, co), lambda n, y, x, c: conv[n, y, x, c], name="conv_out")
    return [data, weight, out]


@dataclass(frozen=True)
class MatmulWorkload:
    """A matrix product [..., M, K] x [K, N] with constant right-hand side; `lead` are the dimensions before K."""

    lead: tuple[int, ...]
    k: int
    n: int
    dtype: str

    @property
    def positions(self) -> int:
        """Return the number of rows of the left-hand side."""
        return int(np.prod(self.lead, dtype=np.int64))

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of one inference."""
        return self.positions * self.n * self.k

    def as_conv(self) -> Conv2DWorkload:
        """Return the 1x1 convolution that computes the same."""
        return Conv2DWorkload(1, 1, self.positions, self.k, self.n, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), self.dtype)


def compute_matmul(workload: MatmulWorkload, config: TileConfig, convert: Dequantize | None = None) -> list[Any]:
    """Return the TE tensors [data (lead..., K), packed weight, output (lead..., N)] of one matrix product."""
    blocks = ceil_div(workload.n, config.block)
    stored = convert.dtype if convert is not None else workload.dtype
    data = te.placeholder((*workload.lead, workload.k), stored, name="data")
    source = data
    if convert is not None:
        source = te.compute((*workload.lead, workload.k), lambda *i: convert(data(*i)), name="padded")
    weight = te.placeholder((blocks, 1, 1, workload.k, config.block), workload.dtype, name="weight")
    rc = te.reduce_axis((0, workload.k), "rc")
    conv = te.compute(
        (*workload.lead, blocks * config.block),
        lambda *i: te.sum(
            source(*i[:-1], rc) * weight[i[-1] // config.block, 0, 0, rc, i[-1] % config.block], axis=[rc]
        ),
        name="matmul",
        attrs=annotate_block("matmul", "conv2d", config),
    )
    out = te.compute((*workload.lead, workload.n), lambda *i: conv(*i), name="matmul_out")
    return [data, weight, out]


def schedule(sch: Any, anchor: Any, output: Any, config: TileConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile: `anchor` is the reduction block, `output` the block that stores the result.

    Everything between them has been inlined into `output`; a padded copy of the input, if there is one, stays a loop
    nest of its own.
    """
    lanes = registers(target).lanes
    *lead, x, c = sch.get_loops(output)
    n_reduce = len(sch.get_loops(anchor)) - len(lead) - 2
    out_channels, width = int(sch.get(c).extent), int(sch.get(x).extent)
    channels_first = _weights_stay(sch, anchor, config)
    if config.pixels > width and lead:  # whole rows joined: the tile is rows x width
        row, rows = sch.split(lead[-1], [None, config.pixels // width])
        lead = [*lead[:-1], row]
        x_tile, inner = [], [rows, x]
    else:
        x_outer, x_inner = sch.split(x, [None, config.pixels])
        x_tile, inner = [x_outer], [x_inner]
    c_tiles, c_inner = sch.split(c, [None, config.block])
    order = [c_tiles, *lead, *x_tile] if channels_first else [*lead, c_tiles, *x_tile]
    sch.reorder(*order, *inner, c_inner)
    c_registers, c_lanes = sch.split(c_inner, [None, min(lanes, out_channels & -out_channels)])
    # Everything above the tile can run in parallel.
    task = sch.fuse(*order)
    sch.compute_at(anchor, task, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(c_registers)
    for loop in inner:
        sch.unroll(loop)
    # compute_at left the tile's own loops below `task`: positions and channels, then the reduction.
    below = sch.get_loops(anchor)[1:]
    tile, reduction = below[: len(below) - n_reduce], below[len(below) - n_reduce :]
    *positions, channel = tile
    w_registers, w_lanes = sch.split(channel, [None, lanes])
    rc_outer, rc_inner = sch.split(reduction[-1], [None, config.unroll])
    sch.reorder(*reduction[:-1], rc_outer, rc_inner, *positions, w_registers, w_lanes)
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    sch.vectorize(w_lanes)
    for loop in (*positions, w_registers, rc_inner):
        sch.unroll(loop)
    sch.decompose_reduction(anchor, reduction[0] if len(reduction) > 1 else rc_outer)
    copy_patch(sch, task, target)


def _weights_stay(sch: Any, anchor: Any, config: TileConfig) -> bool:  # noqa: ANN401
    """Say whether one block of output channels should visit all positions before the next block starts.

    Compares the bytes each order reads again: the activations once per block of channels, or all weights once per
    row of tiles.
    """
    node = sch.get(anchor)
    sizes = [int(np.prod([int(d) for d in r.source.shape], dtype=np.int64)) for r in node.reads[-2:]]
    out_shape = [int(d) for d in node.writes[0].source.shape]
    blocks = ceil_div(out_shape[-1], config.block)
    rows = max(1, int(np.prod(out_shape[:-2], dtype=np.int64)))
    return sizes[0] * blocks <= sizes[1] * rows
