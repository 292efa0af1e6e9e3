"""Winograd convolution F(m x m, 3 x 3): 3x3 windows, stride 1, with fewer multiplications.

The output is cut into tiles of m x m positions. A tile reads a patch of a x a inputs, a = m + 2, and

    output tile = A^T [ (G w G^T) * (B^T patch B) ] A

where `*` is elementwise over the a^2 positions of the patch and sums over input channels: a^2 matrix products of
[tiles x CI] by [CI x CO], in place of 9 m^2 multiply-accumulates per tile and channel pair. Two loop nests:

    transform   V[tile][position][ci] = B^T patch B                         (the patch is zero outside the image)
    multiply    for each block of T tiles x b output channels:
                    M[position][tile][b] = V x U for all positions, in registers, kept next to the core
                    output tile = A^T M A, then the fused epilogue, then the only store

U = G w G^T is made at compile time in float64 and packed as [CO/b][a^2][CI][b].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from ingot.schedules.conv2d import Conv2DWorkload, default_config as tile_config
from ingot.schedules.padding import Dequantize
from ingot.schedules.vector import ceil_div, lanes_for, registers
from ingot.target import Target

# Interpolation points (infinity is added). Those of F(4x4) are exact in binary, and so are all of B^T and A^T: with
# the textbook's 0, +-1, +-2 the error is three times as large.
POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}

# Bytes of stack for the products M of one task.
PRODUCT_BYTES = 56 * 1024


@dataclass(frozen=True)
class WinogradConfig:
    """F(`size` x `size`, 3x3); a task multiplies `tiles` tiles by `block` channels, `pixels` tiles in registers at once.

    `lanes` is the vector width of the products; `unroll` the input channels a step.
    """

    size: int
    tiles: int
    pixels: int
    block: int
    lanes: int
    unroll: int

    @property
    def patch(self) -> int:
        """Return the edge of the input patch of one tile."""
        return self.size + 2


@lru_cache(maxsize=None)
def matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (A^T [m, a], G [a, 3], B^T [a, a]) of F(m, 3) in float64 (Toom and Cook's interpolation, transposed)."""
    points = POINTS[size]
    patch = size + 2

    def powers(count: int) -> np.ndarray:
        rows = [[p**k for k in range(count)] for p in points]
        return np.array([*rows, [0.0] * (count - 1) + [1.0]])

    bt = np.linalg.inv(powers(patch)).T
    # Scaled so that the smallest coefficient of each row of B^T is 1: fewer multiplications, made up for in G.
    scale = np.array([1.0 / np.abs(row[np.abs(row) > 1e-9]).min() for row in bt])
    bt = np.round(bt * scale[:, None] * 2.0**20) / 2.0**20
    return powers(size).T, powers(3) / scale[:, None], bt


def pack_weight(weight: np.ndarray, config: WinogradConfig) -> np.ndarray:
    """Transform OHWI weights [CO, 3, 3, CI] to [CO/block][a^2][CI][block], the last block padded with zeros."""
    _, g, _ = matrices(config.size)
    co, _, _, ci = weight.shape
    blocks = ceil_div(co, config.block)
    flat = weight.astype(np.float64).transpose(1, 2, 3, 0).reshape(3, 3, ci * co)
    rows = np.tensordot(g, flat, axes=(1, 0))  # [a, 3, ci * co]
    both = np.tensordot(g, rows, axes=(1, 1))  # [a (columns), a (rows), ci * co]
    positions = both.transpose(1, 0, 2).astype(weight.dtype).reshape(config.patch**2, ci, co)
    packed = np.zeros((blocks, config.patch**2, ci, config.block), weight.dtype)
    for block in range(blocks):
        part = positions[:, :, block * config.block : (block + 1) * config.block]
        packed[block, :, :, : part.shape[2]] = part
    return packed


# -- building statements -----------------------------------------------------------------------------------------------


def _loop(extent: int, body: Callable[[Any], Any], name: str, kind: Any = tirx.ForKind.SERIAL) -> Any:  # noqa: ANN401
    if extent == 1 and kind != tirx.ForKind.PARALLEL:
        return body(tirx.const(0, "int64"))
    var = tirx.Var(name, "int64")
    return tirx.For(var, tirx.const(0, "int64"), tirx.const(extent, "int64"), kind, body(var))


def _unrolled(extent: int, body: Callable[[Any], Any], name: str) -> Any:  # noqa: ANN401
    return _loop(extent, body, name, tirx.ForKind.UNROLLED)


def _lanes(count: int, body: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    return _loop(count, body, "lane", tirx.ForKind.VECTORIZED)


def _sequence(items: Sequence[Any]) -> Any:  # noqa: ANN401
    return items[0] if len(items) == 1 else tirx.SeqStmt(list(items))


def _with(buffers: list[Any], body: Any, name: str) -> Any:  # noqa: ANN401
    """Return `body` with buffers of its own."""
    block = s_tir.SBlock([], [], [], name, body, None, buffers)
    return s_tir.SBlockRealize([], tirx.const(True, "bool"), block)


def _local(shape: Sequence[int], dtype: str, name: str) -> Any:  # noqa: ANN401
    return tirx.decl_buffer([tirx.const(d, "int64") for d in shape], dtype, name)


Vector = Callable[[Any], Any]  # lane -> scalar expression


def _combine(terms: list[tuple[float, Vector]]) -> Vector:
    """Return the sum of coefficient * vector."""

    def at(lane: Any) -> Any:  # noqa: ANN401
        total: Any = None
        for coefficient, vector in sorted(terms, key=lambda t: abs(t[0]) != 1.0):
            value = vector(lane)
            if total is None:
                total = value if coefficient == 1.0 else value * tirx.const(coefficient, "float32")
            elif coefficient == 1.0:
                total = total + value
            elif coefficient == -1.0:
                total = total - value
            else:
                total = total + value * tirx.const(coefficient, "float32")
        return total

    return at


class _Emitter:
    """Emits vector assignments into one local buffer of vectors."""

    def __init__(self, slots: int, lanes: int) -> None:
        self.lanes = lanes
        self.slots = slots
        self.used = 0
        self.statements: list[Any] = []
        self.buffer = _local((slots, lanes), "float32", "vectors")

    def let(self, vector: Vector) -> Vector:
        """Assign a vector to a fresh slot and return the slot."""
        slot, self.used = tirx.const(self.used, "int64"), self.used + 1
        self.statements.append(_lanes(self.lanes, lambda lane: tirx.BufferStore(self.buffer, vector(lane), [slot, lane])))
        return lambda lane: tirx.BufferLoad(self.buffer, [slot, lane])

    def multiply(self, matrix: np.ndarray, vectors: list[Vector]) -> list[Vector]:
        """Return matrix x vectors. Rows that differ only in the sign of their odd terms share their two halves."""
        results: list[Vector | None] = [None] * len(matrix)
        sign = np.array([(-1.0) ** k for k in range(matrix.shape[1])])
        for row in range(len(matrix)):
            if results[row] is not None:
                continue
            twins = [r for r in range(row + 1, len(matrix)) if np.array_equal(matrix[r], matrix[row] * sign)]
            halves = [
                [(float(c), v) for k, (c, v) in enumerate(zip(matrix[row], vectors, strict=True)) if c and k % 2 == odd]
                for odd in (0, 1)
            ]
            if twins and all(halves):
                even, odd = (self.let(_combine(half)) for half in halves)
                results[row] = self.let(lambda lane, e=even, o=odd: e(lane) + o(lane))
                results[twins[0]] = self.let(lambda lane, e=even, o=odd: e(lane) - o(lane))
            else:
                results[row] = self.let(_combine([*halves[0], *halves[1]]))
        return [r for r in results if r is not None]

    def multiply_pairs(self, matrix: np.ndarray, vectors: list[Vector]) -> list[Vector]:
        """Return matrix x vectors, where columns that differ only in the sign of their odd rows share sum and difference."""
        sign = np.array([(-1.0) ** k for k in range(len(matrix))])
        terms: list[list[tuple[float, Vector]]] = [[] for _ in matrix]
        done: set[int] = set()
        for column in range(matrix.shape[1]):
            if column in done:
                continue
            twins = [
                c
                for c in range(column + 1, matrix.shape[1])
                if np.array_equal(matrix[:, c], matrix[:, column] * sign) and not np.array_equal(matrix[:, c], matrix[:, column])
            ]
            a = vectors[column]
            if not twins:
                for row, value in enumerate(matrix[:, column]):
                    if value:
                        terms[row].append((float(value), a))
                continue
            done.add(twins[0])
            b = vectors[twins[0]]
            plus = self.let(lambda lane, a=a, b=b: a(lane) + b(lane))
            minus = self.let(lambda lane, a=a, b=b: a(lane) - b(lane))
            for row, value in enumerate(matrix[:, column]):
                if value:
                    terms[row].append((float(value), minus if row % 2 else plus))
        return [self.let(_combine(items)) for items in terms]

    def both_sides(self, matrix: np.ndarray, image: list[list[Vector]], multiply: Any) -> list[list[Vector]]:  # noqa: ANN401
        """Return matrix x image x matrix^T for an image of vectors, by columns and then by rows."""
        columns = [multiply(matrix, [row[j] for row in image]) for j in range(len(image[0]))]
        return [multiply(matrix, [column[i] for column in columns]) for i in range(len(columns[0]))]

    def block(self, name: str) -> Any:  # noqa: ANN401
        """Return the statements with their buffer."""
        return _with([self.buffer], _sequence(self.statements), name)


# -- the two nests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The tiling of one workload."""

    workload: Conv2DWorkload
    config: WinogradConfig

    @property
    def rows(self) -> int:
        return ceil_div(self.workload.out_height, self.config.size)

    @property
    def columns(self) -> int:
        return ceil_div(self.workload.out_width, self.config.size)

    @property
    def total(self) -> int:
        return self.workload.batch * self.rows * self.columns

    @property
    def tile_blocks(self) -> int:
        return ceil_div(self.total, self.config.tiles)

    @property
    def channel_blocks(self) -> int:
        return ceil_div(self.workload.out_channels, self.config.block)

    def place(self, tile: Any) -> tuple[Any, Any, Any]:  # noqa: ANN401
        """Return (image, first output row, first output column) of a tile."""
        per_image = self.rows * self.columns
        inside = tirx.floormod(tile, per_image)
        row, column = tirx.floordiv(inside, self.columns), tirx.floormod(inside, self.columns)
        return tirx.floordiv(tile, per_image), row * self.config.size, column * self.config.size


def _transform(plan: _Plan, data: Any, out: Any, lanes: int, convert: Dequantize | None) -> Any:  # noqa: ANN401
    """Return the nest that writes V [tile blocks][a^2][T][CI]; a task is one tile."""
    w, config = plan.workload, plan.config
    patch = config.patch
    _, _, bt = matrices(config.size)

    def read(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401
        value = tirx.BufferLoad(data, [n, y, x, c])
        return value if convert is None else convert(value)

    def task(index: Any) -> Any:  # noqa: ANN401
        # Tiles that fill the last block are copies of the last one: whatever they hold is not stored.
        tile = tirx.min(index, tirx.const(plan.total - 1, "int64")) if plan.total % config.tiles else index
        n, y0, x0 = plan.place(tile)
        top, left = y0 - w.padding[0], x0 - w.padding[1]

        def channels(vector: Any, guarded: bool) -> Any:  # noqa: ANN401
            first = vector * lanes
            emit = _Emitter(patch * patch * 5, lanes)

            def load(i: int, j: int) -> Vector:
                y, x = top + i, left + j
                value: Vector = lambda lane: read(n, y, x, first + lane)  # noqa: E731
                if not guarded:
                    return value
                inside = tirx.all(y >= 0, y < w.height, x >= 0, x < w.width)
                zero = tirx.const(0.0, "float32")
                return emit.let(lambda lane: tirx.if_then_else(inside, value(lane), zero))

            image = [[load(i, j) for j in range(patch)] for i in range(patch)]
            result = emit.both_sides(bt, image, emit.multiply)
            block, row = tirx.floordiv(index, config.tiles), tirx.floormod(index, config.tiles)
            for i in range(patch):
                for j in range(patch):
                    position = tirx.const(i * patch + j, "int64")
                    emit.statements.append(
                        _lanes(
                            lanes,
                            lambda lane, v=result[i][j], p=position: tirx.BufferStore(
                                out, v(lane), [block, p, row, first + lane]
                            ),
                        )
                    )
            return emit.block("patch")

        count = w.in_channels // lanes
        interior = _loop(count, lambda v: channels(v, guarded=False), "c")
        at_border = _loop(count, lambda v: channels(v, guarded=True), "c")
        inside = tirx.all(top >= 0, left >= 0, top + patch <= w.height, left + patch <= w.width)
        return tirx.IfThenElse(inside, interior, at_border)

    return _loop(plan.tile_blocks * config.tiles, task, "task", tirx.ForKind.PARALLEL)


def _multiply(plan: _Plan, v: Any, u: Any, out: Any, lanes: int, channels_first: bool) -> Any:  # noqa: ANN401
    """Return the nest that multiplies, transforms back and stores; a task is a block of tiles x a block of channels."""
    w, config = plan.workload, plan.config
    patch, size, ci = config.patch, config.size, w.in_channels
    vectors = config.block // config.lanes
    at, _, _ = matrices(size)
    products = _local((patch * patch, config.tiles, config.block), "float32", "products")

    def product(tb: Any, cb: Any, position: Any) -> Any:  # noqa: ANN401
        def rows(part: Any) -> Any:  # noqa: ANN401
            acc = _local((config.pixels, vectors, config.lanes), "float32", "acc")
            first = part * config.pixels

            def each(body: Callable[[Any, Any, Any], Any]) -> Any:  # noqa: ANN401
                return _unrolled(
                    config.pixels,
                    lambda p: _unrolled(vectors, lambda k: _lanes(config.lanes, lambda lane: body(p, k, lane)), "v"),
                    "p",
                )

            def step(c: Any) -> Any:  # noqa: ANN401
                return each(
                    lambda p, k, lane: tirx.BufferStore(
                        acc,
                        tirx.BufferLoad(acc, [p, k, lane])
                        + tirx.BufferLoad(v, [tb, position, first + p, c])
                        * tirx.BufferLoad(u, [cb, position, c, k * config.lanes + lane]),
                        [p, k, lane],
                    )
                )

            zero = each(lambda p, k, lane: tirx.BufferStore(acc, tirx.const(0.0, "float32"), [p, k, lane]))
            add = _loop(
                ci // config.unroll,
                lambda co: _unrolled(config.unroll, lambda c: step(co * config.unroll + c), "ci"),
                "co",
            )
            store = each(
                lambda p, k, lane: tirx.BufferStore(
                    products, tirx.BufferLoad(acc, [p, k, lane]), [position, first + p, k * config.lanes + lane]
                )
            )
            return _with([acc], tirx.SeqStmt([zero, add, store]), "product")

        return _loop(config.tiles // config.pixels, rows, "part")

    def back(tb: Any, cb: Any, row: Any) -> Any:  # noqa: ANN401
        tile = tb * config.tiles + row
        n, y0, x0 = plan.place(tile)

        def channels(vector: Any) -> Any:  # noqa: ANN401
            first = vector * lanes
            channel = cb * config.block + first
            emit = _Emitter(patch * patch * 4, lanes)
            image: list[list[Vector]] = [
                [
                    lambda lane, p=tirx.const(i * patch + j, "int64"): tirx.BufferLoad(products, [p, row, first + lane])
                    for j in range(patch)
                ]
                for i in range(patch)
            ]
            result = emit.both_sides(at, image, emit.multiply_pairs)
            for i in range(size):
                for j in range(size):
                    y, x = y0 + i, x0 + j
                    store = _lanes(
                        lanes,
                        lambda lane, r=result[i][j], y=y, x=x: tirx.BufferStore(out, r(lane), [n, y, x, channel + lane]),
                    )
                    # Only the last tile of a row or column can hold positions outside the output.
                    conditions = [y < w.out_height] if 0 < w.out_height % size <= i else []
                    conditions += [x < w.out_width] if 0 < w.out_width % size <= j else []
                    emit.statements.append(tirx.IfThenElse(tirx.all(*conditions), store, None) if conditions else store)
            body = emit.block("inverse")
            return tirx.IfThenElse(channel < w.out_channels, body, None) if w.out_channels % config.block else body

        body = _loop(config.block // lanes, channels, "c")
        return tirx.IfThenElse(tile < plan.total, body, None) if plan.total % config.tiles else body

    def task(index: Any) -> Any:  # noqa: ANN401
        if channels_first:
            cb, tb = tirx.floordiv(index, plan.tile_blocks), tirx.floormod(index, plan.tile_blocks)
        else:
            tb, cb = tirx.floordiv(index, plan.channel_blocks), tirx.floormod(index, plan.channel_blocks)
        multiply = _loop(patch * patch, lambda position: product(tb, cb, position), "position")
        inverse = _loop(config.tiles, lambda row: back(tb, cb, row), "tile")
        return _with([products], tirx.SeqStmt([multiply, inverse]), "task")

    return _loop(plan.tile_blocks * plan.channel_blocks, task, "task", tirx.ForKind.PARALLEL)


def compute(
    workload: Conv2DWorkload, config: WinogradConfig, target: Target, convert: Dequantize | None = None
) -> list[Any]:
    """Return the TE tensors [data NHWC, transformed weight, output NHWC] of one convolution.

    With `convert` the data are stored integers that the transform turns into float32.
    """
    w, plan = workload, _Plan(workload, config)
    stored = convert.dtype if convert is not None else w.dtype
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels), stored, name="data")
    positions = config.patch**2
    weight = te.placeholder((plan.channel_blocks, positions, w.in_channels, config.block), w.dtype, name="weight")

    def buffer(tensor: Any) -> Any:  # noqa: ANN401
        return tirx.decl_buffer(tensor.shape, str(tensor.dtype), str(tensor.op.name))

    def made(name: str, shape: tuple[int, ...], inputs: list[Any], body: Callable[..., Any]) -> Any:  # noqa: ANN401
        out = tirx.decl_buffer([tirx.const(d, "int32") for d in shape], w.dtype, name)
        return te.extern(
            [out.shape],
            inputs,
            lambda ins, outs: body(*ins, *outs),
            name=name,
            dtype=w.dtype,
            in_buffers=[buffer(item) for item in inputs],
            out_buffers=[out],
        )

    ci_lanes = lanes_for(target, w.dtype, w.in_channels)
    co_lanes = lanes_for(target, w.dtype, w.out_channels)
    transformed = made(
        "winograd_input",
        (plan.tile_blocks, positions, config.tiles, w.in_channels),
        [data],
        lambda d, out: _transform(plan, d, out, ci_lanes, convert),
    )
    conv = made(
        "winograd",
        (w.batch, w.out_height, w.out_width, w.out_channels),
        [transformed, weight],
        lambda v, u, out: _multiply(plan, v, u, out, co_lanes, _channels_first(plan)),
    )
    shape = (w.batch, w.out_height, w.out_width, w.out_channels)
    return [data, weight, te.compute(shape, lambda n, y, x, c: conv[n, y, x, c], name="conv_out")]


def _channels_first(plan: _Plan) -> bool:
    """Say whether one block of output channels visits all tiles before the next block starts."""
    weights = plan.channel_blocks * plan.config.block
    tiles = plan.tile_blocks * plan.config.tiles
    return tiles * plan.channel_blocks <= weights * plan.tile_blocks
