"""The loop nests of a Winograd convolution (`schedules.winograd`), written as statements.

    transform   V[tile][position][ci] = B^T patch B                         (the patch is zero outside the image)
    multiply    for each block of G * T tiles x b output channels:
                    for each position, G times:
                        M[position][tile][b] = V x U of T tiles, in registers, kept on the stack
                    output tile = A^T M A, then the fused epilogue, then the only store

Schedule primitives cannot cut an image into blocks of tiles that end in the middle of a row, nor share subexpressions
between the rows of a transform; so the nests are built as they are to run (`schedules.written`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from ingot.schedules import prefetch, written
from ingot.schedules.conv2d import Conv2DWorkload, uses_lanes
from ingot.schedules.lanes import lane_of
from ingot.schedules.microkernels import Dot, add_products
from ingot.schedules.statements import (
    Body,
    Expr,
    Stmt,
    buffer,
    integer,
    lanes_of,
    loop_over,
    named,
    unrolled,
    with_buffers,
)
from ingot.schedules.vector import annotate_block, lanes_for, registers
from ingot.schedules.winograd import FLOAT, Form, Tiling, WinogradConfig, matrices
from ingot.schedules.written import STORE_COLUMN, STORE_ROW, nest
from ingot.target import Target


def _span(first: Expr, lanes: int) -> Expr:
    """Return the indices first, first + 1, ... of one vector."""
    return tirx.Ramp(first, integer(1), lanes) if lanes > 1 else first


def _vector(dtype: str, lanes: int) -> str:
    """Return the dtype of a vector."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


class _Vectors:
    """Emits assignments of vectors of one dtype to names."""

    def __init__(self, lanes: int, dtype: str) -> None:
        self.lanes = lanes
        self.dtype = _vector(dtype, lanes)
        self.statements: list[Stmt] = []

    def let(self, value: Expr) -> Expr:
        """Give a vector a name and return it."""
        var = tirx.Var("v", self.dtype)
        self.statements.append(tirx.Bind(var, value))
        return var

    def load(self, buffer: Expr, *indices: Expr) -> Expr:
        """Load a vector; the last index is its first element's."""
        return self.let(tirx.BufferLoad(buffer, [*indices[:-1], _span(indices[-1], self.lanes)]))

    def store(self, value: Expr, buffer: Expr, *indices: Expr) -> None:
        """Store a vector; the last index is its first element's."""
        self.statements.append(tirx.BufferStore(buffer, value, [*indices[:-1], _span(indices[-1], self.lanes)]))

    def sum(self, terms: list[tuple[float, Expr]]) -> Expr:
        """Return the sum of coefficient * vector."""
        total: Expr = None
        for coefficient, vector in sorted(terms, key=lambda term: term[0] != 1.0):
            if total is None:
                total = vector if coefficient == 1.0 else vector * tirx.const(coefficient, self.dtype)
            elif abs(coefficient) == 1.0:
                total = total + vector if coefficient > 0 else total - vector
            else:
                total = total + vector * tirx.const(coefficient, self.dtype)
        return total if len(terms) == 1 and terms[0][0] == 1.0 else self.let(total)

    def by_rows(self, matrix: np.ndarray, vectors: list[Expr]) -> list[Expr]:
        """Return matrix x vectors; rows that differ in the sign of their odd terms only share the two halves."""
        results: dict[int, Expr] = {}
        for row, values in enumerate(matrix):
            if row in results:
                continue
            terms = list(zip((float(v) for v in values), vectors, strict=True))
            even, odd = ([term for term in terms[first::2] if term[0]] for first in (0, 1))
            twin = _twin(matrix, row)
            if twin is None or not even or not odd:
                results[row] = self.sum([*even, *odd])
            else:
                a, b = self.sum(even), self.sum(odd)
                results[row], results[twin] = self.let(a + b), self.let(a - b)
        return [results[row] for row in range(len(matrix))]

    def by_columns(self, matrix: np.ndarray, vectors: list[Expr]) -> list[Expr]:
        """Return matrix x vectors; columns that differ in the sign of their odd rows only share sum and difference."""
        terms: list[list[tuple[float, Expr]]] = [[] for _ in matrix]
        done: set[int] = set()
        for column, values in enumerate(matrix.T):
            if column in done:
                continue
            twin = _twin(matrix.T, column)
            even = odd = vectors[column]
            if twin is not None:
                done.add(twin)
                even, odd = self.let(even + vectors[twin]), self.let(odd - vectors[twin])
            for row, value in enumerate(values):
                if value:
                    terms[row].append((float(value), odd if row % 2 else even))
        return [self.sum(items) for items in terms]


def _twin(matrix: np.ndarray, row: int) -> int | None:
    """Return the later row that is this one with the sign of its odd elements changed, if it has any."""
    changed = matrix[row] * [(-1.0) ** k for k in range(matrix.shape[1])]
    if np.array_equal(changed, matrix[row]):
        return None
    return next((r for r in range(row + 1, len(matrix)) if np.array_equal(matrix[r], changed)), None)


def _both_sides(
    matrix: np.ndarray, image: list[list[Expr]], multiply: Callable[[np.ndarray, list[Expr]], list[Expr]]
) -> list[list[Expr]]:
    """Return matrix x image x matrix^T for an image of vectors, by columns and then by rows."""
    columns = [multiply(matrix, [row[j] for row in image]) for j in range(len(image[0]))]
    return [multiply(matrix, [column[i] for column in columns]) for i in range(len(columns[0]))]


# -- the phases --------------------------------------------------------------------------------------------------------


def _place(tiling: Tiling, tile: Expr) -> tuple[Expr, Expr, Expr]:
    """Return (image, first output row, first output column) of a tile."""
    inside = tirx.floormod(tile, tiling.rows * tiling.columns)
    row, column = tirx.floordiv(inside, tiling.columns), tirx.floormod(inside, tiling.columns)
    return tirx.floordiv(tile, tiling.rows * tiling.columns), row * tiling.config.size, column * tiling.config.size


def _transform(tiling: Tiling, data: Expr, patches: Expr, where: tuple[Expr, Expr, Expr], target: Target) -> Stmt:
    """Return the transform of the patch of one tile; `where`: block of tiles, its place in `patches`, tile in block."""
    w, config, form = tiling.workload, tiling.config, tiling.form
    block, slot, row = where
    tile = block * config.together + row
    # Tiles that fill the last block are copies of the last one: whatever they hold is not stored.
    last = integer(tiling.total - 1)
    n, y0, x0 = _place(tiling, tirx.min(tile, last) if tiling.total % config.together else tile)
    lanes = lanes_for(target, form.patch, w.in_channels)

    def patch(n: Expr, top: Expr, left: Expr) -> Stmt:
        edge = config.patch
        inside = tirx.all(top >= 0, left >= 0, top + edge <= w.height, left + edge <= w.width)

        def channels(vector: Expr) -> Stmt:
            emit, first = _Vectors(lanes, form.patch), vector * lanes
            copy = buffer((edge, edge, lanes), "patch", form.patch)

            def fill(guarded: bool) -> Stmt:
                def element(i: Expr, j: Expr) -> Stmt:
                    y, x = top + i, left + j
                    value = tirx.BufferLoad(data, [n, y, x, _span(first, lanes)])
                    if form.stored != form.patch:
                        value = value.astype(emit.dtype) - tirx.const(form.zero_point, emit.dtype)
                    if guarded:
                        within = tirx.all(y >= 0, y < w.height, x >= 0, x < w.width)
                        value = tirx.if_then_else(within, value, tirx.const(0, emit.dtype))
                    return tirx.BufferStore(copy, value, [i, j, _span(integer(0), lanes)])

                return loop_over(edge, lambda i: loop_over(edge, lambda j: element(i, j), "j"), "i")

            # Only the elements of patches at the border are compared with it one by one.
            emit.statements.append(tirx.IfThenElse(inside, fill(guarded=False), fill(guarded=True)))
            image = [[emit.load(copy, integer(i), integer(j), integer(0)) for j in range(edge)] for i in range(edge)]
            result = _both_sides(matrices(config.size)[2], image, emit.by_rows)
            for i in range(edge):
                for j in range(edge):
                    emit.store(result[i][j], patches, slot, integer(i * edge + j), row, first)
            return with_buffers([copy], tirx.SeqStmt(emit.statements), "patch")

        return loop_over(w.in_channels // lanes, channels, "c")

    return named({"n": n, "top": y0 - w.padding[0], "left": x0 - w.padding[1]}, patch)


def _product(tiling: Tiling, tensors: tuple[Expr, Expr, Expr], at: tuple[Expr, Expr, Expr], target: Target) -> Stmt:
    """Return one matrix product, patches x weights -> products; `at`: place in patches, channel block, position."""
    config = tiling.config
    if config.group == 1:
        return _tiles_product(tiling, tensors, (*at, integer(0)), target)
    return loop_over(config.group, lambda g: _tiles_product(tiling, tensors, (*at, g), target), "group")


def _tiles_product(
    tiling: Tiling, tensors: tuple[Expr, Expr, Expr], at: tuple[Expr, Expr, Expr, Expr], target: Target
) -> Stmt:
    """Return the part of a product that is computed in registers at once; the last of `at`: which part of the block."""
    w, config, form = tiling.workload, tiling.config, tiling.form
    patches, weights, products = tensors
    slot, block, position, part = at
    first_tile = part * config.tiles
    width, by_lane = registers(target).lanes, uses_lanes(target, config.unroll)
    vectors = config.block // width
    acc = buffer((config.tiles, vectors, width), "acc", form.sums)

    def each(body: Body) -> Stmt:
        def row(t: Expr) -> Stmt:
            return unrolled(vectors, lambda k: lanes_of(width, lambda lane: body(t, k, lane)), "v")

        return unrolled(config.tiles, row, "t")

    def step(first: Expr, c: Expr) -> Stmt:
        def add(t: Expr, k: Expr, lane: Expr) -> Stmt:
            if by_lane:
                value = lane_of(tirx.BufferLoad(patches, [slot, position, first_tile + t, first]), c)
            else:
                value = tirx.BufferLoad(patches, [slot, position, first_tile + t, first + c])
            weight = tirx.BufferLoad(weights, [block, position, first + c, k * width + lane])
            return tirx.BufferStore(acc, tirx.BufferLoad(acc, [t, k, lane]) + value * weight, [t, k, lane])

        return each(add)

    def add_dots(dot: Dot, c: Expr) -> Stmt:
        """Add the products of one group of channels."""

        def add(t: Expr, k: Expr) -> Stmt:
            def data(first: int, count: int) -> Expr:
                return tirx.BufferLoad(patches, [slot, position, first_tile + t, _span(c * dot.group + first, count)])

            span = [t, k, _span(integer(0), width)]
            weight = tirx.BufferLoad(weights, [block, position, c, k * width, _span(integer(0), width * dot.group)])
            return tirx.BufferStore(acc, add_products(dot, data, weight, tirx.BufferLoad(acc, span)), span)

        return unrolled(config.tiles, lambda t: unrolled(vectors, lambda k: add(t, k), "v"), "t")

    def keep(t: Expr, k: Expr, lane: Expr) -> Stmt:
        place = [position, first_tile + t, k * width + lane]
        return tirx.BufferStore(products, tirx.BufferLoad(acc, [t, k, lane]), place)

    def steps(outer: Expr) -> Stmt:
        dot = form.dot
        if dot is not None:
            return unrolled(config.unroll, lambda c: add_dots(dot, outer * config.unroll + c), "ci")
        products = unrolled(config.unroll, lambda c: step(outer * config.unroll, c), "ci")
        if not config.prefetch:
            return products
        here = [block, position + 1, outer * config.unroll]
        lines = prefetch.lines(config.unroll * config.block, w.dtype)
        asks = prefetch.ask(weights, here, first_tile, config.together, config.tiles, lines)
        return tirx.SeqStmt([*asks, products])

    zero = each(lambda t, k, lane: tirx.BufferStore(acc, tirx.const(0, form.sums), [t, k, lane]))
    count = w.in_channels // form.group // config.unroll
    return with_buffers([acc], tirx.SeqStmt([zero, loop_over(count, steps, "co"), each(keep)]), "product")


def _inverse(tiling: Tiling, tensors: tuple[Expr, Expr, Expr], where: tuple[Expr, Expr, Expr], target: Target) -> Stmt:
    """Return the inverse transform and the stores of one tile; `where`: tile block, channel block, tile in block.

    tensors: products, the correction of integers or None, and the result.
    """
    w, config, form = tiling.workload, tiling.config, tiling.form
    products, correction, out = tensors
    tile_block, channel_block, row = where
    size, edge, lanes = config.size, config.patch, lanes_for(target, form.sums, w.out_channels)
    tile = tile_block * config.together + row
    n, y0, x0 = _place(tiling, tile)

    def outputs(n: Expr, y0: Expr, x0: Expr) -> Stmt:
        def channels(vector: Expr) -> Stmt:
            emit, first = _Vectors(lanes, form.sums), vector * lanes
            channel = channel_block * config.block + first
            image = [[emit.load(products, integer(i * edge + j), row, first) for j in range(edge)] for i in range(edge)]
            result = _both_sides(matrices(size)[0], image, emit.by_columns)
            if correction is not None:
                constant = emit.load(correction, channel)
                result = [[_whole(value, constant, lanes, form.result) for value in line] for line in result]
            local = buffer((size, size, lanes), "tile", form.result)
            for i in range(size):
                for j in range(size):
                    emit.store(result[i][j], local, integer(i), integer(j), integer(0))

            def store(i: Expr, j: Expr) -> Stmt:
                def element(lane: Expr) -> Stmt:
                    place = [n, y0 + i, x0 + j, channel + lane]
                    return tirx.BufferStore(out, tirx.BufferLoad(local, [i, j, lane]), place)

                # The last tile of a row or column may hold positions outside the output.
                conditions = [tirx.any(i < w.out_height % size, y0 + i < w.out_height)] if w.out_height % size else []
                conditions += [tirx.any(j < w.out_width % size, x0 + j < w.out_width)] if w.out_width % size else []
                body = lanes_of(lanes, element)
                return tirx.IfThenElse(tirx.all(*conditions), body, None) if conditions else body

            stores = unrolled(size, lambda i: unrolled(size, lambda j: store(i, j), STORE_COLUMN), STORE_ROW)
            body = with_buffers([local], tirx.SeqStmt([*emit.statements, stores]), "inverse")
            return tirx.IfThenElse(channel < w.out_channels, body, None) if w.out_channels % config.block else body

        return loop_over(config.block // lanes, channels, "c")

    body = named({"n": n, "y0": y0, "x0": x0}, outputs)
    return tirx.IfThenElse(tile < tiling.total, body, None) if tiling.total % config.together else body


def _whole(value: Expr, constant: Expr, lanes: int, result: str) -> Expr:
    """Return results of integers, whose weights were transformed by 2 G from both sides: sums are four times them."""
    quarter = tirx.shift_right(value, tirx.const(2, _vector("int32", lanes)))
    return (quarter + constant).astype(_vector(result, lanes))


# -- the nests ---------------------------------------------------------------------------------------------------------


def primitive(workload: Conv2DWorkload, config: WinogradConfig, target: Target, form: Form = FLOAT) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the PrimFunc (data NHWC, packed weights, [int32 of each output channel,] output NHWC) of a convolution.

    Results of integers have an int32 for each output channel added.
    """
    w, tiling, group = workload, Tiling(workload, config, form), form.group
    out_shape = (w.batch, w.out_height, w.out_width, w.out_channels)
    data = buffer((w.batch, w.height, w.width, w.in_channels), "data", form.stored)
    packed: tuple[int, ...] = (tiling.channel_blocks, config.positions, w.in_channels // group, config.block)
    if form.dot is not None:
        packed = (*packed, group)
    weights = buffer(packed, "weight", form.patch)
    correction = None if form.dot is None else buffer((w.out_channels,), "correction", "int32")
    slots = 1 if tiling.on_stack else config.parts or tiling.tile_blocks
    patches = buffer((slots, config.positions, config.together, w.in_channels), "patches", form.patch)
    conv = buffer(out_shape, "winograd", form.result)
    products = buffer((config.positions, config.together, config.block), "products", form.sums)

    def multiply(tile_block: Expr, channel_block: Expr, slot: Expr) -> Stmt:
        def product(position: Expr) -> Stmt:
            return _product(tiling, (patches, weights, products), (slot, channel_block, position), target)

        def inverse(row: Expr) -> Stmt:
            return _inverse(tiling, (products, correction, conv), (tile_block, channel_block, row), target)

        phases = [loop_over(config.positions, product, "position"), loop_over(config.together, inverse, "row")]
        return with_buffers([products], tirx.SeqStmt(phases), "task")

    constants = [weights] if correction is None else [weights, correction]
    if config.parts:
        nests = [_one_nest(tiling, data, patches, multiply, target)]
        reads, temporary = [data, *constants], [] if tiling.on_stack else [patches]
    else:
        forward, back = _two_nests(tiling, data, patches, multiply, target)
        nests = [nest([data], [patches], "winograd_input", forward), back]
        reads, temporary = [patches, *constants], [patches]
    writes = [conv, *temporary] if config.parts else [conv]
    notes = annotate_block("winograd", "winograd", config)
    if form.dot is not None:
        notes[written.WHOLE_PRODUCTS] = str(w.macs)
    nests[-1] = nest(reads, writes, "winograd", nests[-1], notes)
    return written.primitive([data, *constants], nests, conv, temporary)


def _one_nest(tiling: Tiling, data: Expr, patches: Expr, multiply: Body, target: Target) -> Stmt:
    """Return the nest whose tasks are parts of the image; each has a workspace for one block of tiles."""
    config, parts = tiling.config, tiling.config.parts

    def block(tile_block: Expr, slot: Expr) -> Stmt:
        def transform(row: Expr) -> Stmt:
            return _transform(tiling, data, patches, (tile_block, slot, row), target)

        channels = loop_over(tiling.channel_blocks, lambda cb: multiply(tile_block, cb, slot), "cb")
        return tirx.SeqStmt([loop_over(config.together, transform, "row"), channels])

    def part(index: Expr) -> Stmt:
        if tiling.on_stack:
            return with_buffers([patches], block(index, integer(0)), "part")
        begin, end = (tirx.floordiv((index + k) * tiling.tile_blocks, parts) for k in (0, 1))

        def blocks(begin: Expr, count: Expr) -> Stmt:
            var = tirx.Var("tb", "int64")
            return tirx.For(var, begin, count, tirx.ForKind.SERIAL, block(var, index))

        return named({"begin": begin, "count": end - begin}, blocks)

    return loop_over(parts, part, "task", tirx.ForKind.PARALLEL)


def _two_nests(tiling: Tiling, data: Expr, patches: Expr, multiply: Body, target: Target) -> tuple[Stmt, Stmt]:
    """Return the nest that transforms all patches, a task a tile, and the one whose tasks are blocks of products."""
    config = tiling.config

    def tile(index: Expr) -> Stmt:
        names = {"tb": tirx.floordiv(index, config.together), "row": tirx.floormod(index, config.together)}
        return named(names, lambda tb, row: _transform(tiling, data, patches, (tb, tb, row), target))

    def task(index: Expr) -> Stmt:
        inner = tiling.tile_blocks if tiling.channels_first else tiling.channel_blocks
        outer, rest = tirx.floordiv(index, inner), tirx.floormod(index, inner)
        tb, cb = (rest, outer) if tiling.channels_first else (outer, rest)
        return named({"tb": tb, "cb": cb}, lambda tb, cb: multiply(tb, cb, tb))

    tasks = tiling.tile_blocks * tiling.channel_blocks
    parallel = tirx.ForKind.PARALLEL
    return loop_over(tiling.tile_blocks * config.together, tile, "task", parallel), loop_over(
        tasks, task, "task", parallel
    )
