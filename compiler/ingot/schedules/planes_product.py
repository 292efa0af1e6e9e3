"""1x1 convolution of NCHW images, for layers that no NHWC layer stands next to: weights x image, as it lies.

    out[co, position] = sum over ci of weight[co, ci] * image[ci, position]

Positions are the lanes, so neither the image nor the result is transposed. A tile keeps `rows` output channels x
`vectors` of positions in registers. Where more than a few tiles read the same positions, a nest before packs them as
[block][ci][vectors * lanes]; it also leaves out what strides skip. Weights are packed as [tile][ci][rows].

Neither rows nor vectors need to divide their axis: the last of them end with it, and compute some results again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from ingot.schedules import written
from ingot.schedules.statements import (
    Body,
    Expr,
    Stmt,
    float_buffer,
    integer,
    lanes_of,
    loop_over,
    named,
    unrolled,
    with_buffers,
)
from ingot.schedules.vector import annotate_block, ceil_div, largest_divisor, registers
from ingot.schedules.written import STORE_COLUMN, STORE_ROW
from ingot.target import Target

#: The template needs at least so many output channels and positions.
MIN_ROWS = 4
#: A tile is at most so many registers wide.
MAX_VECTORS = 6
#: Steps of the sum in one pass of the inner loop, at most.
_UNROLL = 4
_LATENCY_FMAS = 8
_BYTES_PER_CYCLE = 24
#: With fewer tiles than this for each block of positions, packing costs more than it saves.
MIN_PACKED_TILES = 3
#: Blocks of positions that one task packs: it reads that much of a row at once.
_PACKED_BLOCKS = 4


@dataclass(frozen=True)
class ProductWorkload:
    """A 1x1 convolution of NCHW float32 images without padding."""

    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    strides: tuple[int, int]

    @property
    def positions(self) -> int:
        """Return the output positions of one image."""
        return self.out_height * self.out_width

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of one inference."""
        return self.batch * self.positions * self.out_channels * self.in_channels


@dataclass(frozen=True)
class ProductConfig:
    """The register tile: `rows` output channels x `vectors` of `lanes` positions; `packed` (1) or as they lie (0)."""

    rows: int
    vectors: int
    lanes: int
    packed: int


def default_config(workload: ProductWorkload, target: Target) -> ProductConfig | None:
    """Return the tile of least cost that fits the register file, or None where the template does not fit."""
    w, regs = workload, registers(target)
    if w.batch == 0 or w.in_channels == 0 or w.out_channels < MIN_ROWS or w.positions < MIN_ROWS:
        return None
    lanes = min(regs.lanes, 1 << (w.positions.bit_length() - 1))
    most = min(MAX_VECTORS, ceil_div(w.positions, lanes))
    rows = range(1, min(w.out_channels, regs.count) + 1)
    tiles = [(r, v) for v in range(1, most + 1) for r in rows if r * v + v + 1 <= regs.count]
    best, vectors = min(tiles, key=lambda tile: (_cost(w, tile[0], tile[1], lanes), *tile))
    packed = w.strides != (1, 1) or ceil_div(w.out_channels, best) >= MIN_PACKED_TILES
    return ProductConfig(best, vectors, lanes, int(packed))


def _cost(workload: ProductWorkload, rows: int, vectors: int, lanes: int) -> float:
    """Return the estimated cycles of one image: of a core with two FMA pipes and two loads a cycle.

    Every block of positions reads all weights again, from the second-level cache or beyond.
    """
    w = workload
    tiles, blocks = ceil_div(w.out_channels, rows), ceil_div(w.positions, lanes * vectors)
    step = max(rows * vectors, rows + vectors, _LATENCY_FMAS) / 2 + (rows + vectors) / 16
    weights = w.out_channels * w.in_channels * 4 / _BYTES_PER_CYCLE
    return blocks * (tiles * (w.in_channels * step + 2 * rows * vectors + 12) + weights)


def pack_weight(weight: np.ndarray, rows: int) -> np.ndarray:
    """Pack [CO, CI] to [tile][CI][rows]; the last tile holds the last `rows` channels."""
    co = weight.shape[0]
    firsts = [min(first, co - rows) for first in range(0, co, rows)]
    return np.stack([np.ascontiguousarray(weight[first : first + rows].T) for first in firsts])


def primitive(workload: ProductWorkload, config: ProductConfig) -> Expr:
    """Return the PrimFunc (data NCHW, packed weight, output NCHW) of one layer."""
    w, c = workload, config
    tiles, blocks = ceil_div(w.out_channels, c.rows), ceil_div(w.positions, c.vectors * c.lanes)
    data = float_buffer((w.batch, w.in_channels, w.height, w.width), "data")
    weight = float_buffer((tiles, w.in_channels, c.rows), "weight")
    packed = float_buffer((w.batch, blocks, w.in_channels, c.vectors, c.lanes), "packed")
    result = float_buffer((w.batch, w.out_channels, w.out_height, w.out_width), "product")
    product = _Product(w, c, data, weight, packed, result)
    notes = annotate_block("planes_product", "planes_product", config)
    if not c.packed:
        return written.primitive(
            [data, weight],
            [written.nest([data, weight], [result], "planes_product", product.multiply(), notes)],
            result,
        )
    nests = [
        written.nest([data], [packed], "planes_packed", product.pack()),
        written.nest([packed, weight], [result], "planes_product", product.multiply(), notes),
    ]
    return written.primitive([data, weight], nests, result, [packed])


@dataclass(frozen=True)
class _Product:
    """Writes the nests."""

    workload: ProductWorkload
    config: ProductConfig
    data: Expr
    weight: Expr
    packed: Expr
    result: Expr

    def _start(self, block: Expr, vector: Expr) -> Expr:
        """Return the first position of a vector."""
        c, positions = self.config, self.workload.positions
        start = (block * c.vectors + vector) * c.lanes
        return start if positions % (c.vectors * c.lanes) == 0 else tirx.min(start, integer(positions - c.lanes))

    def _input(self, n: Expr, channel: Expr, position: Expr) -> Expr:
        """Return the load of the element of the image that an output position reads."""
        w = self.workload
        y, x = position // w.out_width * w.strides[0], position % w.out_width * w.strides[1]
        return tirx.BufferLoad(self.data, [n, channel, y, x])

    def pack(self) -> Stmt:
        """Return the nest that packs; a task copies some blocks, all channels of each."""
        w, c = self.workload, self.config
        blocks = ceil_div(w.positions, c.vectors * c.lanes)
        count = largest_divisor(blocks, _PACKED_BLOCKS)

        def task(index: Expr) -> Stmt:
            def body(n: Expr, first: Expr) -> Stmt:
                def vector(channel: Expr, block: Expr, v: Expr) -> Stmt:
                    def element(start: Expr) -> Stmt:
                        def store(lane: Expr) -> Stmt:
                            place = [n, first + block, channel, v, lane]
                            return tirx.BufferStore(self.packed, self._input(n, channel, start + lane), place)

                        return lanes_of(c.lanes, store) if w.strides == (1, 1) else loop_over(c.lanes, store, "lane")

                    return named({"start": self._start(first + block, v)}, element)

                def copies(channel: Expr) -> Stmt:
                    def block(b: Expr) -> Stmt:
                        return unrolled(c.vectors, lambda v: vector(channel, b, v), "v")

                    return unrolled(count, block, "block")

                return loop_over(w.in_channels, copies, "ci")

            return named({"n": index // (blocks // count), "first": index % (blocks // count) * count}, body)

        return loop_over(w.batch * (blocks // count), task, "task", tirx.ForKind.PARALLEL)

    def multiply(self) -> Stmt:
        """Return the nest of the register tiles: all tiles of one block of positions come one after another."""
        w, c = self.workload, self.config
        tiles, blocks = ceil_div(w.out_channels, c.rows), ceil_div(w.positions, c.vectors * c.lanes)

        def task(index: Expr) -> Stmt:
            names = {"tile": index % tiles, "block": index // tiles % blocks, "n": index // (tiles * blocks)}
            return named(names, self._tile)

        return loop_over(w.batch * blocks * tiles, task, "task", tirx.ForKind.PARALLEL)

    def _tile(self, tile: Expr, block: Expr, n: Expr) -> Stmt:
        """Return one tile: its sums, and their stores."""
        w, c = self.workload, self.config
        sums = float_buffer((c.rows, c.vectors, c.lanes), "sums")
        step = largest_divisor(w.in_channels, _UNROLL)

        def each(body: Body) -> Stmt:
            def row(r: Expr) -> Stmt:
                return unrolled(c.vectors, lambda v: lanes_of(c.lanes, lambda lane: body(r, v, lane)), STORE_COLUMN)

            return unrolled(c.rows, row, STORE_ROW)

        def multiply(channel: Expr) -> Stmt:
            def add(r: Expr, v: Expr, lane: Expr) -> Stmt:
                if c.packed:
                    value = tirx.BufferLoad(self.packed, [n, block, channel, v, lane])
                else:
                    value = self._input(n, channel, self._start(block, v) + lane)
                product = tirx.BufferLoad(self.weight, [tile, channel, r]) * value
                return tirx.BufferStore(sums, tirx.BufferLoad(sums, [r, v, lane]) + product, [r, v, lane])

            return each(add)

        def store(r: Expr, v: Expr, lane: Expr) -> Stmt:
            first = tile * c.rows
            if w.out_channels % c.rows:
                first = tirx.min(first, integer(w.out_channels - c.rows))
            position = self._start(block, v) + lane
            place = [n, first + r, position // w.out_width, position % w.out_width]
            return tirx.BufferStore(self.result, tirx.BufferLoad(sums, [r, v, lane]), place)

        zero = each(lambda r, v, lane: tirx.BufferStore(sums, tirx.const(0.0, "float32"), [r, v, lane]))
        steps = loop_over(
            w.in_channels // step, lambda outer: unrolled(step, lambda k: multiply(outer * step + k), "ki"), "k"
        )
        return with_buffers([sums], tirx.SeqStmt([zero, steps, each(store)]), "tile")
