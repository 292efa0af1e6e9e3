"""Convolution and matrix product by instructions on tiles (`schedules.amx`), bfloat16 and 8-bit integers.

Positions are the rows of a tile, output channels its columns. A task computes `down` tiles of positions x `across`
tiles of channels; its sums stay in tile registers over the whole reduction, pass through a buffer on the stack, and
the epilogue makes the only store. A tile reads its positions where they lie, a step apart:

Case 1: a 1x1 window without padding and strides joins all positions; others take the positions of one output row.
Case 2: padding, or channels that do not fill four bytes: the image is copied first, with the padding's value around it.

The window's columns and the channels are one axis of the reduction where they are neighbours in memory. Neither tiles
nor tasks need to divide their axis: the last ones end with it, and compute some results again. What a step reads does
divide it, so nothing is read past the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from ingot.schedules import amx, written
from ingot.schedules.amx import INTEGERS, TDPBF16, TILE_ROWS, TILES, Block, Tdp
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload
from ingot.schedules.half import BF16, Half
from ingot.schedules.indices import unravel
from ingot.schedules.microkernels import weight_kind
from ingot.schedules.statements import Expr, Stmt, buffer, integer, lanes_of, loop_over, named, unrolled, with_buffers
from ingot.schedules.vector import DTYPE_BYTES, annotate_block, ceil_div, lanes_for, largest_divisor, registers
from ingot.schedules.written import STORE_ROW
from ingot.target import Target

TEMPLATE, HALF_TEMPLATE = "conv2d_amx", "conv2d_half_amx"
#: Smaller layers stay with vector instructions: fewer positions than a tile has rows, shorter sums than a row of one.
MIN_POSITIONS, MIN_BYTES = 16, 64
#: Bytes a cycle that tiles are loaded with, from the first-level cache and from the second.
_NEAR, _FAR = 64, 32
#: `conv2d.cost` counts FMAs, of which these cores issue two a cycle.
_UNIT = 2.0
#: Units of a task's beginning and end, and of one more kernel before the first.
_TASK, _KERNEL = 100, 6000


@dataclass(frozen=True)
class Plan:
    """How a layer lies: its image, and what of it is contiguous.

    lead: the dimensions of positions, as data and result have them. joined: they are one row. channels: those of the
    image that tiles read, a copy if `copied`. run: values of the reduction that are neighbours; runs: how many such.
    """

    workload: Conv2DWorkload
    tdp: Tdp
    lead: tuple[int, ...]
    joined: bool
    copied: bool
    channels: int

    @property
    def height(self) -> int:
        """Return the rows of output positions."""
        return 1 if self.joined else self.workload.out_height

    @property
    def width(self) -> int:
        """Return the output positions of one row."""
        return self.workload.positions if self.joined else self.workload.out_width

    @property
    def batch(self) -> int:
        """Return the images."""
        return 1 if self.joined else self.workload.batch

    @property
    def window(self) -> tuple[int, int]:
        """Return the places of a window from which a run begins."""
        (kh, kw), spread = self.workload.kernel, self.workload.dilation[1]
        return kh, 1 if spread == 1 else kw

    @property
    def run(self) -> int:
        """Return the neighbouring values of a window."""
        return self.channels * self.workload.kernel[1] // self.window[1]

    @property
    def size(self) -> tuple[int, int]:
        """Return the rows and columns of the image that tiles read."""
        w = self.workload
        if self.joined:
            return 1, w.positions
        if not self.copied:
            return w.height, w.width
        (kh, kw), (sh, sw), (dh, dw) = w.kernel, w.strides, w.dilation
        return (w.out_height - 1) * sh + (kh - 1) * dh + 1, (w.out_width - 1) * sw + (kw - 1) * dw + 1

    @property
    def columns(self) -> int:
        """Return the tiles of one row of positions."""
        return ceil_div(self.width, TILE_ROWS)

    @property
    def row_tiles(self) -> int:
        """Return the tiles of all positions."""
        return self.batch * self.height * self.columns

    @property
    def channel_tiles(self) -> int:
        """Return the tiles of all output channels."""
        return ceil_div(self.workload.out_channels, TILE_ROWS)


def tdp_of(target: Target, stored: str, weight: np.ndarray) -> Tdp | None:
    """Return the target's instruction for `stored` data, uint8 or int8, and these whole-number weights, or None."""
    if not np.all(weight == np.rint(weight)):
        return None
    kind = {"p7": "int8", "q7": "int8", "q8": "int8", "u8": "uint8"}.get(weight_kind(weight))
    fitting = (t for t in INTEGERS if t.feature in target.features and (t.data, t.weight) == (stored, kind))
    return next(fitting, None)


def half_tdp_of(target: Target, half: Half) -> Tdp | None:
    """Return the target's instruction for a half-precision format, or None."""
    return TDPBF16 if half is BF16 and TDPBF16.feature in target.features else None


@dataclass(frozen=True)
class TilesConfig:
    """What a search chooses: `down` tiles of positions x `across` of channels a task, which reads the image where it
    lies or a copy of it with `copied` channels (0: where it lies).
    """

    down: int
    across: int
    copied: int


@dataclass(frozen=True)
class Choice:
    """A layer's plan and block of tiles, and its estimated cycles of one core in the unit of `conv2d.cost`."""

    plan: Plan
    block: Block
    cost: float

    @property
    def config(self) -> TilesConfig:
        """Return what tells it from the layer's other choices."""
        return TilesConfig(self.block.down, self.block.across, self.plan.channels if self.plan.copied else 0)


def choices(workload: Conv2DWorkload | MatmulWorkload, tdp: Tdp, target: Target) -> list[Choice]:
    """Return all ways to compute a layer with an instruction; none for a layer that is too small."""
    plans = [plan for plan in plans_of(workload, tdp) if fits(plan)]
    return [Choice(p, block, cost(p, block, target)) for p in plans for block in configs(p)]


def choose(workload: Conv2DWorkload | MatmulWorkload, tdp: Tdp, target: Target) -> Choice | None:
    """Return the fastest way to compute a layer with an instruction; None for one that is too small."""
    return min(choices(workload, tdp, target), key=lambda choice: choice.cost, default=None)


def plans_of(workload: Conv2DWorkload | MatmulWorkload, tdp: Tdp) -> list[Plan]:
    """Return the ways a layer can lie: in place if it can, and copied with channels that make few or full steps."""
    if isinstance(workload, MatmulWorkload):
        w, lead, joined = workload.as_conv(), workload.lead, True
    else:
        w = workload
        lead, joined = (w.batch, w.out_height, w.out_width), w.pointwise and w.strides == (1, 1)
    in_place = not any(w.padding) and w.in_channels % tdp.group == 0
    plan = Plan(w, tdp, lead, joined, copied=False, channels=w.in_channels)
    paddings = [ceil_div(w.in_channels, size) * size for size in (tdp.group, tdp.widest // 2, tdp.widest)]
    useful = (channels for channels in dict.fromkeys(paddings) if channels > w.in_channels or not in_place)
    copies = [replace(plan, copied=True, channels=channels) for channels in useful]
    return [plan, *copies] if in_place else copies


def _steps(plan: Plan) -> int:
    """Return the steps of one task."""
    return plan.window[0] * plan.window[1] * plan.run // _depth(plan)


def _depth(plan: Plan) -> int:
    """Return the values one step multiplies: whole groups, which divide a run."""
    return largest_divisor(plan.run // plan.tdp.group, TILE_ROWS) * plan.tdp.group


def configs(plan: Plan) -> list[Block]:
    """Return the space of a plan: every block of tiles that fits the tile registers, the largest first."""
    rows, n, k = ceil_div(plan.width, plan.columns), min(TILE_ROWS, plan.workload.out_channels), _depth(plan)
    found = [
        Block(down, across, rows, k, n)
        for down in range(1, min(3, plan.row_tiles) + 1)
        for across in range(1, min(3, plan.channel_tiles) + 1)
    ]
    return sorted((c for c in found if c.tiles <= TILES), key=lambda c: -c.tiles)


def fits(plan: Plan) -> bool:
    """Say whether a layer is large enough for tiles."""
    w = plan.workload
    depth = w.kernel[0] * w.kernel[1] * w.in_channels * DTYPE_BYTES[plan.tdp.data]
    return w.positions >= MIN_POSITIONS and depth >= MIN_BYTES and w.batch > 0 and w.groups == 1


def cost(plan: Plan, config: Block, target: Target) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`.

    A product takes a cycle for each of its rows, and the next one into the same sums waits for it; loads take what the
    caches give. The instruction's times are Intel's (optimisation manual, chapter on AMX), measured on no machine here.
    """
    b, size = config, DTYPE_BYTES[plan.tdp.data]
    steps = _steps(plan)
    weights = b.across * b.k * b.n * size
    near = weights * steps <= target.cache.l1d_kib * 512
    loads = b.down * b.rows * b.k * size / _FAR + weights / (_NEAR if near else _FAR)
    vectors = ceil_div(b.n, registers(target).lanes)
    task = _UNIT * steps * max(b.cycles, loads) + 6 * b.down * b.across * b.rows * vectors + _TASK
    tasks = ceil_div(plan.row_tiles, b.down) * ceil_div(plan.channel_tiles, b.across)
    copy = 0.0
    if plan.copied:
        height, width = plan.size
        copy = plan.batch * height * width * plan.channels * size / 16 + _KERNEL
    return tasks * task + copy


def _firsts(plan: Plan, config: Block) -> list[int]:
    """Return the first output channel of each tile."""
    last = plan.workload.out_channels - config.n
    return [min(TILE_ROWS * tile, last) for tile in range(plan.channel_tiles)]


def pack_weight(weight: np.ndarray, plan: Plan, config: Block) -> np.ndarray:
    """Pack OHWI weights, of the instruction's dtype, to [tile][runs][steps][k/g][n][g]; copied channels are zeros."""
    co, kh, kw, ci = weight.shape
    padded = np.zeros((co, kh, kw, plan.channels), plan.tdp.weight)
    padded[..., :ci] = weight
    runs, g = plan.window[0] * plan.window[1], plan.tdp.group
    shaped = padded.reshape(co, runs, plan.run // config.k, config.k // g, g)
    tiles = [shaped[first : first + config.n].transpose(1, 2, 3, 0, 4) for first in _firsts(plan, config)]
    return np.ascontiguousarray(np.stack(tiles))


def primitive(plan: Plan, config: Block, target: Target, padding: int = 0, corrected: str | None = None) -> Expr:
    """Return the PrimFunc (data, packed weight, output) of one layer.

    padding: what lies around the image, as it is stored. corrected: the dtype of an output of integers, to whose sums
    an int32 for each output channel is added: (data, packed weight, correction, output).
    """
    w, tdp = plan.workload, plan.tdp
    runs = plan.window[0] * plan.window[1]
    shape = (*plan.lead, w.in_channels) if plan.joined else (w.batch, w.height, w.width, w.in_channels)
    data = buffer(shape, "data", tdp.data)
    packed = (plan.channel_tiles, runs, plan.run // config.k, config.k // tdp.group, config.n, tdp.group)
    given = [data, buffer(packed, "weight", tdp.weight)]
    correction = None
    if corrected is not None:
        correction = buffer((w.out_channels,), "correction", "int32")
        given.append(correction)
    result = buffer((*plan.lead, w.out_channels), "tiles", corrected or tdp.total)
    nests, image = [], data
    if plan.copied:
        image = buffer((plan.batch, *plan.size, plan.channels), "image", tdp.data)
        nests.append(written.nest([data], [image], "amx_image", _copy(plan, data, image, padding, target)))
    layer = _Layer(plan, config, image, given[1], correction, result, target)
    template = HALF_TEMPLATE if tdp is TDPBF16 else TEMPLATE
    notes = annotate_block("amx", template, config)
    kind = written.REAL_PRODUCTS if tdp is TDPBF16 else written.WHOLE_PRODUCTS
    notes[kind] = str(w.macs)
    reads = [image, *given[1:]]
    nests.append(written.nest(reads, [result], "amx", layer.multiply(), notes))
    return written.primitive(given, nests, result, [image] if plan.copied else [])


def _copy(plan: Plan, data: Expr, image: Expr, padding: int, target: Target) -> Stmt:
    """Return the nest that makes the image of case 2: a task copies a row, or one of the joined positions."""
    w, dtype = plan.workload, plan.tdp.data
    (height, width), (top, left) = plan.size, w.padding[:2]
    whole = plan.channels == w.in_channels
    lanes = lanes_for(target, dtype, w.in_channels) if whole else 1
    outside = tirx.const(padding, dtype)

    def pixel(n: Expr, y: Expr, x: Expr) -> Stmt:
        def vector(first: Expr) -> Stmt:
            def element(lane: Expr) -> Stmt:
                c = first * lanes + lane
                place, inside = [n, y - top, x - left, c], [y >= top, y < w.height + top, x >= left, x < w.width + left]
                if plan.joined:
                    place, inside = [*unravel(x, plan.lead), c], []
                inside += [] if whole else [c < w.in_channels]
                value = tirx.if_then_else(tirx.all(*inside), tirx.BufferLoad(data, place), outside)
                return tirx.BufferStore(image, value, [n, y, x, c])

            return lanes_of(lanes, element) if lanes > 1 else element(integer(0))

        return loop_over(plan.channels // lanes, vector, "c")

    def row(task: Expr) -> Stmt:
        return loop_over(width, lambda x: pixel(task // height, task % height, x), "x")

    def position(task: Expr) -> Stmt:
        return pixel(integer(0), integer(0), task)

    tasks, body = (width, position) if plan.joined else (plan.batch * height, row)
    return loop_over(tasks, body, "task", tirx.ForKind.PARALLEL)


@dataclass(frozen=True)
class _Layer:
    """Writes the nest of the product."""

    plan: Plan
    config: Block
    image: Expr
    weight: Expr
    correction: Expr | None
    result: Expr
    target: Target

    def multiply(self) -> Stmt:
        """Return the nest: tasks of one block of weights, or of one block of positions, come one after another."""
        p, c = self.plan, self.config
        down, across = ceil_div(p.row_tiles, c.down), ceil_div(p.channel_tiles, c.across)
        size = DTYPE_BYTES[p.tdp.data]
        data = int(np.prod([int(d) for d in self.image.shape], dtype=np.int64)) * size
        weights = int(np.prod([int(d) for d in self.weight.shape], dtype=np.int64)) * size
        stay = data * across <= weights * down  # the bytes each order reads again

        def task(index: Expr) -> Stmt:
            m, j = (index % down, index // down) if stay else (index // across, index % across)
            firsts = {"first": _last_ends(m, c.down, p.row_tiles), "column": _last_ends(j, c.across, p.channel_tiles)}
            return named(firsts, self._places)

        return loop_over(down * across, task, "task", tirx.ForKind.PARALLEL)

    def _places(self, first: Expr, column: Expr) -> Stmt:
        """Bind the places of a task's tiles to names."""
        p, c = self.plan, self.config
        names = {}
        for i in range(c.down):
            tile = first + i
            x = tile % p.columns * c.rows
            names[f"x{i}"] = x if p.width % c.rows == 0 else tirx.min(x, integer(p.width - c.rows))
            names[f"y{i}"] = tile // p.columns % p.height
            names[f"n{i}"] = tile // (p.columns * p.height)
        for j in range(c.across):
            channel = (column + j) * TILE_ROWS
            exact = p.workload.out_channels % TILE_ROWS == 0
            names[f"c{j}"] = channel if exact else tirx.min(channel, integer(p.workload.out_channels - c.n))

        def body(*places: Expr) -> Stmt:
            positions = [(places[3 * i], places[3 * i + 1], places[3 * i + 2]) for i in range(c.down)]
            return self._task(positions, column, places[3 * c.down :])

        return named(names, body)

    def _task(self, positions: list[tuple[Expr, Expr, Expr]], column: Expr, channels: Sequence[Expr]) -> Stmt:
        """Return one task; positions: (x, y, image) of each tile's first row."""
        p, c, w = self.plan, self.config, self.plan.workload
        (sh, sw), (dh, dw) = w.strides, w.dilation
        if p.joined:
            sh = sw = 1
        stride = sw * p.channels * DTYPE_BYTES[p.tdp.data]
        across = p.window[1]
        sums = buffer((c.down, c.across, c.rows, c.n), "sums", p.tdp.total)

        def step(ry: Expr, rx: Expr, s: Expr) -> Stmt:
            data = [
                amx.address(self.image, self._pixel(n, y * sh + ry * dh, x * sw + rx * dw, s * c.k))
                for x, y, n in positions
            ]
            zero = integer(0)
            run = ry * across + rx
            weights = [amx.address(self.weight, [column + j, run, s, zero, zero, zero]) for j in range(c.across)]
            return amx.step(p.tdp, c, sums, data, stride, weights)

        def steps(ry: Expr) -> Stmt:
            return loop_over(across, lambda rx: loop_over(p.run // c.k, lambda s: step(ry, rx, s), "step"), "rx")

        body = [
            amx.zero(p.tdp, c, sums),
            loop_over(p.window[0], steps, "ry"),
            amx.store(p.tdp, c, sums),
            *(self._store(sums, i, place, channels) for i, place in enumerate(positions)),
        ]
        return with_buffers([sums], tirx.SeqStmt(body), "task")

    def _pixel(self, n: Expr, y: Expr, x: Expr, c: Expr) -> list[Expr]:
        """Return the place in the image of a pixel's value."""
        if self.plan.joined and not self.plan.copied:
            return [*unravel(x, self.plan.lead), c]
        return [n, y, x, c]

    def _store(self, sums: Expr, i: int, place: tuple[Expr, Expr, Expr], channels: Sequence[Expr]) -> Stmt:
        """Return the stores of one tile's rows, all channels of a position before the next."""
        p, c = self.plan, self.config
        lanes = lanes_for(self.target, "float32", c.n)
        x, y, n = place

        def row(r: Expr) -> Stmt:
            where = unravel(x + r, p.lead) if p.joined else [n, y, x + r]

            def tile(j: int) -> Stmt:
                def vector(v: Expr) -> Stmt:
                    def element(lane: Expr) -> Stmt:
                        value = tirx.BufferLoad(sums, [integer(i), integer(j), r, v * lanes + lane])
                        channel = channels[j] + v * lanes + lane
                        if self.correction is not None:
                            value = value + tirx.BufferLoad(self.correction, [channel])
                            value = value.astype(str(self.result.dtype))
                        return tirx.BufferStore(self.result, value, [*where, channel])

                    return lanes_of(lanes, element) if lanes > 1 else element(integer(0))

                return unrolled(c.n // lanes, vector, "v")

            return tirx.SeqStmt([tile(j) for j in range(c.across)]) if c.across > 1 else tile(0)

        return loop_over(c.rows, row, STORE_ROW)


def _last_ends(index: Expr, size: int, total: int) -> Expr:
    """Return where a part of `size` begins, the last of which ends with the axis."""
    start = index * size
    return start if total % size == 0 else tirx.min(start, integer(total - size))
