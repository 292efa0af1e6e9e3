"""Transposes of matrices: squares of registers, turned by shuffles; nothing is loaded or stored one by one.

A square of `lanes` x `lanes` is loaded as rows, turned in registers, and stored as columns. Four squares are moved
together where the matrix has room, so that each line of the cache is read and written whole. Squares that do not divide
the matrix overlap: the last one ends with it, and moves some elements again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx

from ingot.schedules import written
from ingot.schedules.indices import unravel
from ingot.schedules.statements import Expr, Stmt, float_buffer, integer, lanes_of, loop_over, named, with_buffers
from ingot.schedules.vector import annotate_block, ceil_div, registers
from ingot.schedules.written import STORE_ROW
from ingot.target import Target

#: Fewer elements are moved faster than a call is made.
MIN_ELEMENTS = 2048
#: There are about so many tasks, if the matrix has as many squares.
_TASKS = 16
#: Lanes among which one instruction of any ISA can shuffle.
_GROUP = 4


@dataclass(frozen=True)
class TransposeWorkload:
    """[batch, rows, columns] to [batch, columns, rows] in float32; `shape` and `out_shape` are the tensors' own."""

    batch: int
    rows: int
    columns: int
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]


@dataclass(frozen=True)
class TransposeConfig:
    """Squares of `lanes`; `parts` of the rows are tasks of their own."""

    lanes: int
    parts: int


def workload_of(shape: Sequence[int], axes: Sequence[int]) -> TransposeWorkload | None:
    """Return the transpose of matrices that moving `axes` of a tensor comes to, or None where it is something else."""
    order = [axis for axis in axes if shape[axis] != 1]
    groups: list[list[int]] = []
    for axis in order:
        between = [a for a in range(groups[-1][-1] + 1, axis) if shape[a] != 1] if groups else [axis]
        if groups and axis > groups[-1][-1] and not between:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    places = sorted(range(len(groups)), key=lambda i: groups[i][0])
    sizes = []
    for i in places:
        size = 1
        for axis in groups[i]:
            size *= shape[axis]
        sizes.append(size)
    if places == [1, 0]:
        sizes = [1, *sizes]
    elif places != [0, 2, 1]:
        return None
    return TransposeWorkload(sizes[0], sizes[1], sizes[2], tuple(shape), tuple(shape[axis] for axis in axes))


def default_config(workload: TransposeWorkload, target: Target) -> TransposeConfig | None:
    """Return the squares, or None where the matrices are too small for them."""
    w, lanes = workload, min(8, registers(target).lanes)
    if min(w.rows, w.columns) < lanes or w.batch * w.rows * w.columns < MIN_ELEMENTS:
        return None
    edge = _edge(w.columns, lanes)
    stripes = w.batch * ceil_div(w.columns, edge)
    parts = min(ceil_div(_TASKS, stripes), ceil_div(w.rows, _edge(w.rows, lanes)))
    return TransposeConfig(lanes, parts)


def _edge(size: int, lanes: int) -> int:
    """Return how much of an axis is moved together: two squares, if there are two."""
    return 2 * lanes if size >= 2 * lanes else lanes


def primitive(workload: TransposeWorkload, config: TransposeConfig) -> Expr:
    """Return the PrimFunc (data, output) of one transpose."""
    w = workload
    data, result = float_buffer(w.shape, "data"), float_buffer(w.out_shape, "transposed")
    nest = _nest(w, config, data, result)
    notes = annotate_block("transpose", "transpose", config)
    return written.primitive([data], [written.nest([data], [result], "transpose", nest, notes)], result)


def _nest(w: TransposeWorkload, config: TransposeConfig, data: Expr, result: Expr) -> Stmt:
    """Return the loop over tasks: stripes of columns, in parts of the rows."""
    lanes, parts = config.lanes, config.parts
    high, wide = _edge(w.rows, lanes), _edge(w.columns, lanes)
    stripes, steps = ceil_div(w.columns, wide), ceil_div(w.rows, high)

    def square(b: Expr, row: Expr, column: Expr) -> Stmt:
        local, statements = float_buffer((lanes, lanes), "square"), []

        def let(value: Expr) -> Expr:
            var = tirx.Var("v", f"float32x{lanes}")
            statements.append(tirx.Bind(var, value))
            return var

        loaded = []
        for i in range(lanes):
            *lead, last = unravel((b * w.rows + row + i) * w.columns + column, w.shape)
            loaded.append(let(tirx.BufferLoad(data, [*lead, tirx.Ramp(last, integer(1), lanes)])))
        for i, vector in enumerate(turned(loaded, lanes, let)):
            statements.append(tirx.BufferStore(local, vector, [integer(i), tirx.Ramp(integer(0), integer(1), lanes)]))

        def store(i: Expr) -> Stmt:
            def element(lane: Expr) -> Stmt:
                place = unravel((b * w.columns + column + i) * w.rows + row + lane, w.out_shape)
                return tirx.BufferStore(result, tirx.BufferLoad(local, [i, lane]), place)

            return lanes_of(lanes, element)

        stores = loop_over(lanes, store, STORE_ROW, tirx.ForKind.UNROLLED)
        return with_buffers([local], tirx.SeqStmt([*statements, stores]), "square")

    def block(b: Expr, row: Expr, column: Expr) -> Stmt:
        places = [(i, j) for i in range(0, high, lanes) for j in range(0, wide, lanes)]
        # Lines that far apart that they share a set of the cache leave it soon: those are finished two squares at once.
        if _power_of_two(w.rows) > _power_of_two(w.columns):
            places.sort(key=lambda place: (place[1], place[0]))
        pieces = [square(b, row + i, column + j) for i, j in places]
        return tirx.SeqStmt(pieces) if len(pieces) > 1 else pieces[0]

    def task(index: Expr) -> Stmt:
        part, column = index % parts, _start(index // parts % stripes, wide, w.columns)
        begin, end = (tirx.floordiv((part + k) * steps, integer(parts)) for k in (0, 1))

        def rows(b: Expr, column: Expr, begin: Expr, count: Expr) -> Stmt:
            step = tirx.Var("step", "int64")
            body = named({"row": _start(step, high, w.rows)}, lambda row: block(b, row, column))
            return tirx.For(step, begin, count, tirx.ForKind.SERIAL, body)

        names = {"b": index // (parts * stripes), "column": column, "begin": begin, "count": end - begin}
        return named(names, rows)

    return loop_over(w.batch * stripes * parts, task, "task", tirx.ForKind.PARALLEL)


def _power_of_two(size: int) -> int:
    """Return the largest power of two that divides a size."""
    return size & -size


def _start(index: Expr, edge: int, size: int) -> Expr:
    """Return where a piece of an axis begins: the last one ends with the axis."""
    return index * edge if size % edge == 0 else tirx.min(index * edge, integer(size - edge))


def turned(rows: Sequence[Expr], lanes: int, let: Callable[[Expr], Expr]) -> list[Expr]:
    """Return the columns of a square of vectors; `let` names a vector. lanes: 4 or 8.

    Halves change places first, between rows 4 apart; then each 4 x 4 is turned by pairs.
    """

    def shuffle(a: Expr, b: Expr, places: Sequence[int]) -> Expr:
        one = [place if place < _GROUP else place - _GROUP + lanes for place in places]
        return let(tirx.Shuffle([a, b], [integer(first + i) for first in range(0, lanes, _GROUP) for i in one]))

    vectors = list(rows)
    if lanes == 2 * _GROUP:
        low, high = list(range(_GROUP)), list(range(_GROUP, lanes))
        swapped = list(vectors)
        for i in range(_GROUP):
            a, b = vectors[i], vectors[i + _GROUP]
            swapped[i] = let(tirx.Shuffle([a, b], [integer(k) for k in (*low, *(lanes + k for k in low))]))
            swapped[i + _GROUP] = let(tirx.Shuffle([a, b], [integer(k) for k in (*high, *(lanes + k for k in high))]))
        vectors = swapped
    for first in range(0, lanes, _GROUP):
        a, b, c, d = vectors[first : first + _GROUP]
        ab, cd = [[shuffle(x, y, places) for places in ((0, 4, 1, 5), (2, 6, 3, 7))] for x, y in ((a, b), (c, d))]
        pairs = [shuffle(ab[k], cd[k], places) for k in (0, 1) for places in ((0, 1, 4, 5), (2, 3, 6, 7))]
        vectors[first : first + _GROUP] = pairs
    return vectors
