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

from ingot.schedules.lanes import LANES, mark_lanes
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
        return self.positions * self.out_channels * self.kernel[0] * self.kernel[1] * self.in_channels

    @property
    def positions(self) -> int:
        """Return the number of output positions of one inference."""
        return self.batch * self.out_height * self.out_width

    @property
    def pointwise(self) -> bool:
        """Say whether output position i reads input position i alone: rows can be joined."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.padding)


@dataclass(frozen=True)
class TileConfig:
    """The register tile: `pixels` output positions x `block` output channels, `unroll` input channels a step.

    order: which tile comes next: of another position (POSITIONS_INNER, one block of weights stays), of another block
    of channels (CHANNELS_INNER), or what reads fewer bytes again (BY_BYTES). group: so many blocks of channels are one
    task, which copies its patch of input once.
    """

    pixels: int
    block: int
    unroll: int
    order: int = 0
    group: int = 1


BY_BYTES, POSITIONS_INNER, CHANNELS_INNER = 0, 1, 2


#: Input channels a step of the inner loop takes, at most.
MAX_UNROLL = 4
#: More accumulators than this bring no more speed on any core we know: the FMA latency is hidden by far fewer.
MAX_VECTORS = 4
#: FMA instructions in flight that hide the latency of one on a core with two pipes.
_LATENCY_FMAS = 8


def configs(workload: Conv2DWorkload, target: Target) -> list[TileConfig]:
    """Return the space of tiles: every one whose accumulators and operands fit the register file."""
    regs = registers(target)
    needed = ceil_div(workload.out_channels, regs.lanes)
    unroll = largest_divisor(workload.in_channels, MAX_UNROLL if target.arch != "arm" else 1)
    if workload.positions == 1:  # a matrix-vector product: bound by memory; independent sums hide the latency
        return [TileConfig(1, vectors * regs.lanes, unroll) for vectors in range(1, min(8, needed) + 1)]
    found = []
    for vectors in range(1, min(MAX_VECTORS, needed) + 1):
        for pixels in _tile_widths(workload, regs.count):
            if _registers_used(pixels, vectors, unroll, target) <= regs.count:
                found.append(TileConfig(pixels, vectors * regs.lanes, unroll))
    return found


def variants(workload: Conv2DWorkload, target: Target) -> list[TileConfig]:
    """Return the space of a search: every tile of `configs`, in both orders, with shorter steps, and in groups.

    For groups there must be something to copy: rows of tiles that reach beyond the image.
    """
    tiles = configs(workload, target)
    found = list(tiles)
    patches = any(workload.padding) or not workload.pointwise
    for tile in tiles:
        blocks = ceil_div(workload.out_channels, tile.block)
        groups = [g for g in (1, 2, 4, 8, blocks) if g <= blocks and blocks % g == 0] if patches else [1]
        steps = [u for u in (1, 2, 4, 8) if workload.in_channels % u == 0 and tile.pixels * u <= 64]
        for unroll in dict.fromkeys((tile.unroll, *steps)):
            for order in (POSITIONS_INNER, CHANNELS_INNER):
                for group in dict.fromkeys(groups):
                    found.append(TileConfig(tile.pixels, tile.block, unroll, order, group))
    return found


def default_config(workload: Conv2DWorkload, target: Target) -> TileConfig:
    """Return the tile with the least estimated cost."""
    if workload.positions == 1:
        return configs(workload, target)[-1]
    return min(configs(workload, target), key=lambda c: (cost(workload, c, target), -c.pixels, c.block))


def uses_lanes(target: Target, unroll: int) -> bool:
    """Say whether inputs are loaded four at a time and multiplied lane by lane (see `schedules.lanes`)."""
    return target.arch == "aarch64" and registers(target).lanes == LANES and unroll == LANES


def _registers_used(pixels: int, vectors: int, unroll: int, target: Target) -> int:
    """Return accumulators + weights of one step + inputs.

    With lanes an input takes one register a position, else one in all; LLVM's 32-bit ARM code loads them ahead too.
    """
    inputs = pixels if uses_lanes(target, unroll) or target.arch == "arm" else 1
    return pixels * vectors + vectors + inputs


def _tile_widths(workload: Conv2DWorkload, limit: int) -> list[int]:
    """Return the tile widths to consider.

    Case 1: a pointwise convolution of few columns may join whole rows.
    Case 2: parts of one row.
    """
    width, rows = workload.out_width, workload.batch * workload.out_height
    widths = list(range(1, min(width, limit) + 1))
    if workload.pointwise:
        widths += [width * k for k in range(2, limit // width + 1) if rows % k == 0]
    return widths


def cost(workload: Conv2DWorkload, config: TileConfig, target: Target) -> float:
    """Return the estimated cycles of one core (up to a constant): the formula that ranks tiles without measuring.

    A step of the inner loop, per input channel and window position, issues pixels * vectors FMAs and loads its weights
    and inputs; x86 runs loads beside FMAs, the smaller ARM cores issue both from the same slots. A tile also pays for
    its epilogue, and for copying its patch of input where it has one.
    """
    lanes = registers(target).lanes
    vectors, pixels = config.block // lanes, config.pixels
    fmas = pixels * vectors
    steps = workload.kernel[0] * workload.kernel[1] * workload.in_channels
    # All weights of a block pass by once per tile: from the first-level cache if they stay there, else from the second.
    far = steps * config.block * 4 > target.cache.l1d_kib * 1024 // 2
    if uses_lanes(target, config.unroll):
        step = max(fmas, _LATENCY_FMAS) + vectors * (1.5 if far else 0.5) + pixels / LANES + 4 / config.unroll
    elif target.arch == "x86_64":
        step = max(fmas, vectors + pixels, _LATENCY_FMAS) + vectors * (1.0 if far else 0.125) + pixels / 8
    else:
        step = max(fmas, _LATENCY_FMAS) + vectors * (2.0 if far else 1.0) + pixels
    across = ceil_div(workload.out_width, pixels)
    rows = workload.batch * workload.out_height
    tiles = rows * across if pixels <= workload.out_width else ceil_div(rows * workload.out_width, pixels)
    ragged = pixels <= workload.out_width and workload.out_width % pixels != 0
    patch = 0.0
    if ragged or any(workload.padding):
        columns = (pixels - 1) * workload.strides[1] + workload.kernel[1]
        patch = 2.5 * workload.kernel[0] * columns * ceil_div(workload.in_channels, lanes)
    blocks = ceil_div(workload.out_channels, config.block)
    return tiles * blocks * (steps * step + 4 * fmas + 24 + patch)


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


def schedule(
    sch: Any,  # noqa: ANN401
    anchor: Any,  # noqa: ANN401
    output: Any,  # noqa: ANN401
    config: TileConfig,
    target: Target,
    instruction: str | None = None,
) -> None:
    """Schedule the tile: `anchor` is the reduction block, `output` the block that stores the result.

    Everything between them has been inlined into `output`; a padded copy of the input, if there is one, stays a loop
    nest of its own. With `instruction`, the name of a tensor intrinsic, the lanes of a register and the last reduction
    axis become one instruction; without, the lanes are a vector FMA.
    """
    lanes = registers(target).lanes
    *lead, x, c = sch.get_loops(output)
    n_reduce = len(sch.get_loops(anchor)) - len(lead) - 2
    out_channels, width = int(sch.get(c).extent), int(sch.get(x).extent)
    channels_first = config.order == POSITIONS_INNER or (not config.order and _weights_stay(sch, anchor, config))
    if config.pixels > width and lead:  # whole rows joined: the tile is rows x width
        row, rows = sch.split(lead[-1], [None, config.pixels // width])
        lead = [*lead[:-1], row]
        x_tile, inner = [], [rows, x]
    else:
        x_outer, x_inner = sch.split(x, [None, config.pixels])
        x_tile, inner = [x_outer], [x_inner]
    c_tiles, c_inner = sch.split(c, [None, config.block])
    grouped = []
    if config.group > 1:
        c_tiles, *grouped = sch.split(c_tiles, [None, config.group])
    if channels_first:
        order = [c_tiles, *lead, *x_tile]
    else:
        order = [*lead, *x_tile, c_tiles] if config.order == CHANNELS_INNER else [*lead, c_tiles, *x_tile]
    sch.reorder(*order, *grouped, *inner, c_inner)
    c_registers, c_lanes = sch.split(c_inner, [None, min(lanes, out_channels & -out_channels)])
    # Everything above the tile can run in parallel.
    task = sch.fuse(*order)
    sch.compute_at(anchor, grouped[0] if grouped else task, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(c_registers)
    for loop in inner:
        sch.unroll(loop)
    # compute_at left the tile's own loops below: positions and channels, then the reduction.
    below = sch.get_loops(anchor)[1 + len(grouped) :]
    tile, reduction = below[: len(below) - n_reduce], below[len(below) - n_reduce :]
    *positions, channel = tile
    w_registers, w_lanes = sch.split(channel, [None, lanes])
    within = [reduction.pop()] if instruction is not None else []
    rc_outer, rc_inner = sch.split(reduction[-1], [None, config.unroll])
    sch.reorder(*reduction[:-1], rc_outer, rc_inner, *positions, w_registers, w_lanes, *within)
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    for loop in (*positions, w_registers, rc_inner):
        sch.unroll(loop)
    if instruction is None:
        sch.vectorize(w_lanes)
    init = sch.decompose_reduction(anchor, reduction[0] if len(reduction) > 1 else rc_outer)
    copy_patch(sch, task, target)
    if instruction is not None:
        sch.vectorize(sch.get_loops(init)[-1])
        sch.tensorize(w_lanes, instruction)


def finish(function: Any, block: str, config: TileConfig, target: Target) -> Any:  # noqa: ANN401
    """Apply what a schedule cannot express to the scheduled function: loads of four inputs at once."""
    return mark_lanes(function, block + "_update") if uses_lanes(target, config.unroll) else function


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
