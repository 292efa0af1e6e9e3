"""Direct convolution and matrix product with constant weights: one register tile for both.

The weights are packed at compile time as [CO/b][KH][KW][CI][b], so that the innermost loops read them in order; the
activations are NHWC. One tile computes `pixels` output positions of `b` channels in registers:

    for kh, kw, ci:                      # reduction
        for p in pixels:                 # unrolled
            acc[p][0:b] += x[p, kh, kw, ci] * w[kh, kw, ci][0:b]

and the fused epilogue (bias, activation, residual add) reads the registers and makes the only store. What a tile reads:

Case 1: a 1x1 window without padding is a matrix product [M, K] x [K, N] with M positions, in whatever dimensions they
        lie: tiles take the positions in order, over the ends of rows; the last one computes its last position again.
Case 2: other windows read the image; tiles at the borders are compiled apart (`schedules.border`).
Case 3: data stored as integers, or a window too wide to unroll: a tile copies its patch (`schedules.padding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from tvm import te, tirx

from ingot.schedules import groups, prefetch, tile_order
from ingot.schedules.border import guarded_load, mark, specialise
from ingot.schedules.indices import ravel, unravel
from ingot.schedules.lanes import LANES, mark_lanes
from ingot.schedules.padding import Dequantize, copy_patch, copy_rows, pad_nhwc
from ingot.schedules.vector import annotate_block, ceil_div, largest_divisor, registers
from ingot.target import Target


class Weight(Protocol):
    """What a template reads its weights through; TE tensors and expressions throughout."""

    @property
    def placeholders(self) -> list[Any]:
        """Return the tensors they are made of."""

    def at(self, block: Any, ry: Any, rx: Any, rc: Any, lane: Any) -> Any:  # noqa: ANN401
        """Return the weight of a lane in a block of output channels, for an input channel at a window's place."""

    def finish(self, total: Any, channel: Any) -> Any:  # noqa: ANN401
        """Return an output channel's result, given its sum."""


@dataclass(frozen=True)
class Conv2DWorkload:
    """One convolution, NHWC x OHWI. `padding` is (top, left, bottom, right); `in_channels` are those of one group."""

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
    groups: int = 1

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
        """Say whether each output position reads one input position alone: all of them can be joined (case 1)."""
        return self.kernel == (1, 1) and not any(self.padding) and (self.groups == 1 or self.strides == (1, 1))

    def blocks(self, block: int) -> int:
        """Return the number of blocks of `block` output channels; each lies in one group, the last of it in part."""
        return self.groups * ceil_div(self.out_channels // self.groups, block)


@dataclass(frozen=True)
class TileConfig:
    """The register tile: `pixels` output positions x `block` output channels, `unroll` input channels a step.

    order: which tile comes next: of another position (POSITIONS_INNER, one block of weights stays), of another block
    of channels (CHANNELS_INNER), or what reads fewer bytes again (BY_BYTES). group: so many blocks of channels are one
    task, which copies its patch of input once. prefetch: 1 if the tiles of one block of weights fetch the next
    (`schedules.prefetch`), which they do where that block stays.
    """

    pixels: int
    block: int
    unroll: int
    order: int = 0
    group: int = 1
    prefetch: int = 0


BY_BYTES, POSITIONS_INNER, CHANNELS_INNER = 0, 1, 2


#: Input channels a step of the inner loop takes, at most.
MAX_UNROLL = 4
#: More accumulators than this bring no more speed on any core we know: the FMA latency is hidden by far fewer.
MAX_VECTORS = 4
#: FMA instructions in flight that hide the latency of one on a core with two pipes.
_LATENCY_FMAS = 8
#: What a vector load costs on x86, in FMAs: two are issued a cycle, but now and then they wait for each other.
_LOAD = 1.2
#: The share of the second-level cache in which weights stay from one inference to the next.
_KEPT = 0.25
#: Multiply-adds of one row of a window that may be unrolled, for each channel of a step.
MAX_WINDOW_CODE = 8192
#: The annotation of a block whose borders are compiled apart (case 2).
WINDOW = "ingot.window"
#: The annotation of a block whose tiles share copied rows: what `padding.copy_rows` needs.
SHARED = "ingot.shared_rows"
#: TVM's kind of a reduction axis.
_REDUCTION = 2


def configs(workload: Conv2DWorkload, target: Target) -> list[TileConfig]:
    """Return the space of tiles: every one whose accumulators and operands fit the register file."""
    regs = registers(target)
    needed = workload.blocks(regs.lanes) // workload.groups
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

    For groups there must be something to copy: a window too wide to read the image itself.
    """
    tiles = configs(workload, target)
    found = [*tiles, *(tile for t in tiles if (tile := _with_prefetch(workload, t, target)) != t)]
    for tile in tiles:
        for config in in_orders(workload, tile, copies=not workload.pointwise and not peels(workload, tile)):
            found.append(config)
            if config.order == POSITIONS_INNER:
                found.append(replace(config, prefetch=1))
    return found


def in_orders(workload: Conv2DWorkload, tile: TileConfig, *, copies: bool) -> list[TileConfig]:
    """Return a tile in both orders, with shorter steps too, and in groups where a task `copies` its patch."""
    blocks = ceil_div(workload.out_channels, tile.block)
    groups = [g for g in (1, 2, 4, 8, blocks) if g <= blocks and blocks % g == 0] if copies else [1]
    steps = [u for u in (1, 2, 4, 8) if workload.in_channels % u == 0 and tile.pixels * u <= 64]
    return [
        TileConfig(tile.pixels, tile.block, unroll, order, group)
        for unroll in dict.fromkeys((tile.unroll, *steps))
        for order in (POSITIONS_INNER, CHANNELS_INNER)
        for group in dict.fromkeys(groups)
    ]


def default_config(workload: Conv2DWorkload, target: Target) -> TileConfig:
    """Return the tile with the least estimated cost, in the order that reads less, with the prefetch that pays."""
    tile = default_tile(workload, target)
    if not workload.pointwise or workload.groups > 1 or workload.positions == 1:
        return _with_prefetch(workload, tile, target)
    if tile_order.channels_inner(workload, tile, target):
        return replace(tile, order=CHANNELS_INNER)
    return _with_prefetch(workload, replace(tile, order=POSITIONS_INNER), target)


def _with_prefetch(workload: Conv2DWorkload, config: TileConfig, target: Target) -> TileConfig:
    """Return a tile with the prefetch that pays: of weights that the second-level cache does not keep."""
    w = workload
    weights = w.kernel[0] * w.kernel[1] * w.in_channels * w.out_channels * 4
    far = weights > target.cache.l2_kib * 1024 * _KEPT and w.groups == 1
    return replace(config, prefetch=1) if target.arch == "x86_64" and far and w.positions > config.pixels else config


def default_tile(workload: Conv2DWorkload, target: Target) -> TileConfig:
    """Return the tile with the least estimated cost."""
    if workload.positions == 1:
        return configs(workload, target)[-1]
    return min(configs(workload, target), key=lambda c: (cost(workload, c, target), -c.pixels, c.block))


def joined(workload: Conv2DWorkload, count: int) -> Conv2DWorkload:
    """Return the convolution in which `count` groups at a time are one."""
    return replace(workload, groups=workload.groups // count, in_channels=workload.in_channels * count)


def groups_to_join(workload: Conv2DWorkload, target: Target) -> int:
    """Return how many groups become one for the least estimated cost."""
    spaces = {n: joined(workload, n) for n in groups.joinable(workload.groups, workload.out_channels)}
    return min(spaces, key=lambda n: cost(spaces[n], default_tile(spaces[n], target), target))


def uses_lanes(target: Target, unroll: int) -> bool:
    """Say whether inputs are loaded four at a time and multiplied lane by lane (see `schedules.lanes`)."""
    return target.arch == "aarch64" and registers(target).lanes == LANES and unroll == LANES


def _registers_used(pixels: int, vectors: int, unroll: int, target: Target) -> int:
    """Return accumulators + weights of one step + inputs.

    With lanes an input takes one register a position, else one in all; LLVM's 32-bit ARM code loads them ahead too.
    """
    inputs = pixels if uses_lanes(target, unroll) or target.arch == "arm" else 1
    return pixels * vectors + vectors + inputs


def _tile_widths(workload: Conv2DWorkload, limit: int) -> range:
    """Return the tile widths to consider: parts of one row, or of all positions where they are joined."""
    return range(1, min(workload.positions if workload.pointwise else workload.out_width, limit) + 1)


def cost(workload: Conv2DWorkload, config: TileConfig, target: Target, *, copies: bool = False) -> float:
    """Return the estimated cycles of one core (up to a constant): the formula that ranks tiles without measuring.

    A tile pays for the steps of its inner loop, its epilogue, and for copying its patch of input where it has one
    (`copies`: every tile has). The last tile of a row may be narrower.
    """
    w, lanes = workload, registers(target).lanes
    steps = w.kernel[0] * w.kernel[1] * w.in_channels
    blocks, vectors = w.blocks(config.block), config.block // lanes
    if w.pointwise:
        tiles, widths = ceil_div(w.positions, config.pixels), [config.pixels]
    else:
        tiles, rest = w.batch * w.out_height, w.out_width % config.pixels
        widths = [config.pixels] * (w.out_width // config.pixels) + ([rest] if rest else [])
    total = 0.0
    for width in widths:
        columns = (width - 1) * w.strides[1] + w.kernel[1]
        copied = (copies or not peels(w, config)) and not w.pointwise
        patch = 2.5 * w.kernel[0] * columns * ceil_div(w.in_channels, lanes) if copied else 0.0
        total += steps * _step(w, config, target, width) + 4 * width * vectors + 24 + patch
    return tiles * blocks * total


def _step(workload: Conv2DWorkload, config: TileConfig, target: Target, pixels: int) -> float:
    """Return the estimated cost of one step of the inner loop, in FMAs.

    Per input channel and window position it issues pixels * vectors FMAs and loads its weights and inputs; x86 runs
    loads beside FMAs, the smaller ARM cores issue both from the same slots.
    """
    w, regs = workload, registers(target)
    vectors = config.block // regs.lanes
    fmas = pixels * vectors
    # All weights of a block pass by once per tile: from the first-level cache if they stay there, else from the second.
    weights = w.kernel[0] * w.kernel[1] * w.in_channels * config.block * 4
    far = weights > target.cache.l1d_kib * 1024 // 2
    if uses_lanes(target, config.unroll):
        return max(fmas, _LATENCY_FMAS) + vectors * (1.5 if far else 0.5) + pixels / LANES + 4 / config.unroll
    if target.arch != "x86_64":
        return max(fmas, _LATENCY_FMAS) + vectors * (2.0 if far else 1.0) + pixels
    step = max(fmas, _LOAD * (vectors + pixels), _LATENCY_FMAS) + vectors * (0.5 if far else 0.125) + pixels / 8
    # LLVM sees that unrolled windows overlap, and keeps what they share in registers it may not have.
    overlap = w.kernel[1] > w.strides[1] and config.unroll == w.in_channels
    return step * 1.3 if overlap and fmas + vectors + pixels > regs.count else step


def pack_weight(weight: np.ndarray, block: int, groups: int = 1) -> np.ndarray:
    """Pack OHWI weights to [CO/block][KH][KW][CI][block], the last block of each group padded with zeros."""
    co, kh, kw, ci = weight.shape
    blocks = ceil_div(co // groups, block)
    padded = np.zeros((groups, blocks * block, kh, kw, ci), weight.dtype)
    padded[:, : co // groups] = weight.reshape(groups, -1, kh, kw, ci)
    return np.ascontiguousarray(padded.reshape(groups * blocks, block, kh, kw, ci).transpose(0, 2, 3, 4, 1))


def peels(workload: Conv2DWorkload, config: TileConfig) -> bool:
    """Say whether case 2 covers a convolution: its unrolled window is not too much code."""
    return workload.kernel[1] * config.pixels * config.block * config.unroll <= MAX_WINDOW_CODE


class PackedWeight:
    """Weights as `pack_weight` packs them: what a template reads. Others like it decode theirs (`schedules.stored`)."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        """Take the packed shape [CO/b][KH][KW][CI][b]."""
        self._weight = te.placeholder(shape, dtype, name="weight")
        self.placeholders = [self._weight]

    def at(self, block: Any, ry: Any, rx: Any, rc: Any, lane: Any) -> Any:  # noqa: ANN401 - TE expressions
        """Return one weight."""
        return self._weight[block, ry, rx, rc, lane]

    def finish(self, total: Any, channel: Any) -> Any:  # noqa: ANN401 - TE expressions
        """Return the sum of an output channel."""
        return total


def packed_shape(workload: Conv2DWorkload, config: TileConfig) -> tuple[int, int, int, int, int]:
    """Return the shape of a layer's packed weights."""
    kh, kw = workload.kernel
    return workload.blocks(config.block), kh, kw, workload.in_channels, config.block


def compute(
    workload: Conv2DWorkload, config: TileConfig, convert: Dequantize | None = None, weight: Weight | None = None
) -> list[Any]:
    """Return the TE tensors [data NHWC, packed weight, output NHWC] of one convolution.

    With `convert` the data are stored integers that each tile turns into float32 as it copies its patch. With `weight`
    the packed weight is what that is made of, one tensor or several.
    """
    w = workload
    kh, kw = w.kernel
    (sh, sw), (dh, dw) = w.strides, w.dilation
    top, left = w.padding[0], w.padding[1]
    height, width, co = w.out_height, w.out_width, w.out_channels
    stored = convert.dtype if convert is not None else w.dtype
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels * w.groups), stored, name="data")
    weight = weight or PackedWeight(packed_shape(w, config), w.dtype)
    if w.pointwise:
        lead = (w.batch, height, width)
        return _product(data, lead, co, config, "conv", weight, convert, lambda n, y, x: (n, y * sh, x * sw), w.groups)
    blocks, of_group = w.blocks(config.block), co // w.groups
    tiled_width = ceil_div(width, config.pixels) * config.pixels
    attrs: dict[str, Any] = {**annotate_block("conv2d", "conv2d", config), **groups.annotate(of_group, w.groups)}
    if convert is None and peels(w, config):
        attrs[WINDOW] = [w.height, w.width, sh, sw, dh, (kw - 1) * dw + 1, top, left]

        def load(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
            return guarded_load(data, n, y - top, x - left, c)
    else:
        need = (height - 1) * sh + (kh - 1) * dh + 1, (tiled_width - 1) * sw + (kw - 1) * dw + 1
        patch = pad_nhwc(data, top, left, *need, convert)

        def load(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
            return patch[n, y, x, c]

    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    rc = te.reduce_axis((0, w.in_channels), "rc")
    conv = te.compute(
        (w.batch, height, tiled_width, blocks * config.block),
        lambda n, y, x, c: te.sum(
            load(
                n,
                y * sh + ry * dh,
                x * sw + rx * dw,
                groups.channel(c, rc, w.in_channels, of_group, w.groups, config.block),
            )
            * weight.at(c // config.block, ry, rx, rc, c % config.block),
            axis=[ry, rx, rc],
        ),
        name="conv",
        attrs=attrs,
    )
    out = te.compute(
        (w.batch, height, width, co),
        lambda n, y, x, c: weight.finish(conv[n, y, x, groups.lane(c, of_group, w.groups, config.block)], c),
        name="conv_out",
    )
    return [data, *weight.placeholders, out]


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


def compute_matmul(
    workload: MatmulWorkload, config: TileConfig, convert: Dequantize | None = None, weight: Weight | None = None
) -> list[Any]:
    """Return the TE tensors [data (lead..., K), packed weight, output (lead..., N)] of one matrix product.

    `convert` and `weight` are those of `compute`.
    """
    w = workload
    weight = weight or PackedWeight(packed_shape(w.as_conv(), config), w.dtype)
    data = te.placeholder((*w.lead, w.k), convert.dtype if convert is not None else w.dtype, name="data")
    return _product(data, w.lead, w.n, config, "matmul", weight, convert, lambda *i: i)


def _product(
    data: Any,  # noqa: ANN401 - a TE tensor
    lead: tuple[int, ...],
    n: int,
    config: TileConfig,
    name: str,
    weight: Weight,
    convert: Dequantize | None,
    place: Callable[..., Sequence[Any]],
    n_groups: int = 1,
) -> list[Any]:
    """Case 1: the TE tensors [data, packed weight, output (lead..., n)], all positions of `lead` joined.

    place: where `data` holds the position at an index of `lead`.
    """
    k, of_group = int(data.shape[-1]) // n_groups, n // n_groups
    blocks = n_groups * ceil_div(of_group, config.block)
    rows = int(np.prod(lead, dtype=np.int64))
    tall = ceil_div(rows, config.pixels) * config.pixels

    def stored(row: Any, channel: Any) -> Any:  # noqa: ANN401 - TE expressions
        row = row if tall == rows else tirx.min(row, tirx.IntImm("int64", rows - 1))
        return data(*place(*unravel(row, lead)), channel)

    source: Any = stored
    if convert is not None:
        source = te.compute((tall, k * n_groups), lambda row, channel: convert(stored(row, channel)), name="padded")
    rc = te.reduce_axis((0, k), "rc")
    product = te.compute(
        (tall, blocks * config.block),
        lambda row, c: te.sum(
            source(row, groups.channel(c, rc, k, of_group, n_groups, config.block))
            * weight.at(c // config.block, 0, 0, rc, c % config.block),
            axis=[rc],
        ),
        name=name,
        attrs={**annotate_block(name, "conv2d", config), **groups.annotate(of_group, n_groups)},
    )
    out = te.compute(
        (*lead, n),
        lambda *i: weight.finish(
            product[ravel(i[:-1], lead), groups.lane(i[-1], of_group, n_groups, config.block)], i[-1]
        ),
        name=f"{name}_out",
    )
    return [data, *weight.placeholders, out]


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
    channels_first = config.order == POSITIONS_INNER or (
        not config.order and tile_order.weights_stay(sch, anchor, config)
    )
    window, shared, of_group = (_take(sch, anchor, name) for name in (WINDOW, SHARED, groups.GROUPED))
    kinds = [int(item.iter_type) for item in sch.get(anchor).iter_vars]
    n_reduce = kinds.count(_REDUCTION)
    rows, columns, inner = _tiles(sch, output, config, of_group, joined=len(kinds) - n_reduce == 2)
    c = sch.get_loops(output)[-1]
    out_channels = int(sch.get(c).extent)
    c_tiles, c_inner = sch.split(c, [None, config.block])
    if of_group is not None:
        c_tiles = sch.fuse(sch.get_loops(output)[-3], c_tiles)
    grouped = []
    if config.group > 1 and window is None:
        c_tiles, *grouped = sch.split(c_tiles, [None, config.group])
    order = [c_tiles, *rows] if channels_first else [*rows, c_tiles]
    if config.order == CHANNELS_INNER and window is None:
        order, columns = [*rows, *columns, c_tiles], []
    if shared is not None:
        order, columns, grouped = rows, [], [*columns, c_tiles]
    sch.reorder(*order, *columns, *grouped, *inner, c_inner)
    narrow = str(sch.get(output).writes[0].source.dtype) in ("int8", "uint8") and target.arch == "aarch64"
    # NEON narrows four registers of sums to one of bytes at once (sqxtn), if they are one vector.
    widest = min(4 * lanes, config.block & -config.block) if narrow else lanes
    c_registers, c_lanes = sch.split(c_inner, [None, min(widest, out_channels & -out_channels)])
    # Everything above the tile can run in parallel; tiles at the borders of a row are compiled apart.
    task = sch.fuse(*order) if window is not None else sch.fuse(*order, *columns)
    tile = columns[0] if window is not None else task
    sch.compute_at(anchor, grouped[-1] if grouped else tile, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(c_registers)
    for loop in inner:
        sch.unroll(loop)
    # compute_at left the tile's own loops below: positions and channels, then the reduction.
    below = sch.get_loops(anchor)[1 + len(grouped) + (window is not None) :]
    sch.vectorize(c_lanes)
    sch.unroll(c_registers)
    for loop in inner:
        sch.unroll(loop)
    reduction = below[len(below) - n_reduce :]
    *positions, channel = below[: len(below) - n_reduce]
    positions = [loop for loop in positions if int(sch.get(loop).extent) > 1]
    w_registers, w_lanes = sch.split(channel, [None, lanes])
    within = [reduction.pop()] if instruction is not None else []
    rc_outer, rc_inner = sch.split(reduction[-1], [None, config.unroll])
    sch.reorder(*reduction[:-1], rc_outer, rc_inner, *positions, w_registers, w_lanes, *within)
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    for loop in (*positions, w_registers, rc_inner, *(reduction[1:2] if window is not None else [])):
        sch.unroll(loop)
    if instruction is None:
        sch.vectorize(w_lanes)
    init = sch.decompose_reduction(anchor, reduction[0] if len(reduction) > 1 else rc_outer)
    if config.prefetch and channels_first:
        prefetch.mark(sch, rc_outer, tile=config.pixels, unroll=config.unroll)
    if window is not None:
        height, width, sh, sw, dilation, span, top, left = (int(v) for v in window)
        where = {"height": (height, sh, dilation, top), "width": (width, sw, span, left)}
        mark(sch, reduction[0], tile, tile=config.pixels, **where)
    if shared is not None:
        copy_rows(sch, task, [int(v) for v in shared])
    copy_patch(sch, task, target)
    if instruction is not None:
        sch.vectorize(sch.get_loops(init)[-1])
        sch.tensorize(w_lanes, instruction)


def _take(sch: Any, block: Any, name: str) -> Any:  # noqa: ANN401
    """Return an annotation of a block, which has it no longer; None if it had not."""
    value = sch.get(block).annotations.get(name)
    if value is not None:
        sch.unannotate(block, name)
    return value


def _tiles(
    sch: Any,  # noqa: ANN401
    output: Any,  # noqa: ANN401
    config: TileConfig,
    of_group: Any,  # noqa: ANN401
    *,
    joined: bool,
) -> tuple[list[Any], list[Any], list[Any]]:
    """Cut the positions of `output` into tiles; return the loops over rows, over tiles of a row, and inside a tile.

    Channels of several groups, `of_group` each, become two loops.
    """
    shape = tuple(int(sch.get(loop).extent) for loop in sch.get_loops(output)[:-1])
    if joined:
        layout = tirx.IndexMap.from_func(
            lambda *i: [ravel(i[:-1], shape), i[-1]], ndim=len(shape) + 1, index_dtype="int64"
        )
        sch.transform_block_layout(output, layout)
    if of_group is not None:
        groups.split_channels(sch, output, of_group)
    if joined:
        tile, inside = sch.split(sch.get_loops(output)[0], [None, config.pixels])
        return [tile], [], [inside]
    *lead, x = sch.get_loops(output)[: len(shape)]
    width = int(sch.get(x).extent)
    if config.pixels > width and lead:  # whole rows joined: the tile is rows x width
        row, rows = sch.split(lead[-1], [None, config.pixels // width])
        return [*lead[:-1], row], [], [rows, x]
    tile, inside = sch.split(x, [None, config.pixels])
    return lead, [tile], [inside]


def finish(function: Any, block: str, config: TileConfig, target: Target) -> Any:  # noqa: ANN401
    """Apply what a schedule cannot express to the scheduled function.

    These are loads of four inputs at once, border tiles, and weights fetched ahead.
    """
    lanes = uses_lanes(target, config.unroll)
    return prefetch.insert(specialise(mark_lanes(function, block + "_update") if lanes else function))
