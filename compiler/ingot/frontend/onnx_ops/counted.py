"""Operators that choose how many results they have: NonZero, Compress, Unique (`suppression` has NonMaxSuppression).

Each has one more output than in ONNX, an int64[1] that counts the results; the others have their largest size, and
zeros behind the last result. What runs in order (compaction, sorting) is one kernel on one thread; all else is
computed for every element on its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


def integer(value: int) -> Any:  # noqa: ANN401 - TIR
    """A number as int64, as indices are."""
    from tvm import tirx

    return tirx.const(value, "int64")


def _places(ctx: Context, mask: Expr, length: int) -> list[Expr]:
    """Indices of the true entries of mask[length] in order, zeros behind them, and their number."""
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        (flags,), (places, count) = ins, outs
        count[0] = integer(0)
        with T.serial(0, integer(length)) as i, T.If(flags[i]), T.Then():
            places[count[0]] = i
            count[0] = count[0] + 1
        with T.serial(count[0], integer(length)) as i:
            places[i] = integer(0)

    return call_loops(ctx.bb, "places", [mask], [((length,), "int64"), ((1,), "int64")], body)


@converts("NonZero")
def _non_zero(ctx: Context) -> list[Expr]:
    from tvm import relax, te, tirx

    shape = ctx.shape() or (1,)
    length = int(np.prod(shape, dtype=np.int64))
    flat = ctx.emit(relax.op.reshape(ctx.inputs[0], (length,)))
    mask = flat if ctx.dtype() == "bool" else ctx.emit(relax.op.not_equal(flat, ctx.const(0)))
    places, count = _places(ctx, mask, length)
    if len(shape) == 1:
        return [relax.op.reshape(places, (1, length)), count]
    rows = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    parts = []
    for stride, size in zip(rows, shape, strict=True):
        coordinate = ctx.bb.call_te(
            lambda p, stride=stride, size=size: te.compute(
                (1, length),
                lambda _, k: tirx.floormod(tirx.floordiv(p(k), integer(stride)), integer(size)),
                name="coordinate",
            ),
            places,
            primfunc_name_hint="coordinate",
        )
        parts.append(ctx.emit(coordinate))
    return [relax.op.concat(parts, axis=0), count]


@converts("Compress")
def _compress(ctx: Context) -> list[Expr]:
    from tvm import relax

    axis = ctx.attr("axis")
    shape, data = ctx.shape(), ctx.inputs[0]
    if axis is None:
        shape = (int(np.prod(shape, dtype=np.int64)),)
        data = ctx.emit(relax.op.reshape(data, shape))
    axis = normal_axis(int(axis or 0), len(shape))
    length, fixed, mask = ctx.out_shape()[axis], ctx.value(1), ctx.inputs[1]
    if fixed is not None:
        chosen = np.flatnonzero(fixed[: shape[axis]])
        return [relax.op.take(data, ctx.array("places", chosen), axis, mode="clip")]
    if ctx.shape(1)[0] > length:
        mask = ctx.emit(relax.op.strided_slice(mask, [0], [0], [length], [1]))
    places, count = _places(ctx, mask, length)
    return [relax.op.take(data, places, axis, mode="clip"), count]


@converts("Unique")
def _unique(ctx: Context) -> list[Expr]:
    from tvm import relax

    axis, shape, data = ctx.attr("axis"), ctx.shape(), ctx.inputs[0]
    if axis is None:
        entries, width = int(np.prod(shape, dtype=np.int64)), 1
        data = rows = ctx.emit(relax.op.reshape(data, (entries,)))
    else:
        axis = normal_axis(int(axis), len(shape))
        entries = shape[axis]
        width = int(np.prod(shape, dtype=np.int64)) // entries
        rows = ctx.emit(relax.op.permute_dims(data, [axis, *(i for i in range(len(shape)) if i != axis)]))
    rows = ctx.emit(relax.op.reshape(rows, (entries, width)))
    compared = {"bool": "uint8", "float16": "float32", "bfloat16": "float32"}.get(ctx.dtype(), ctx.dtype())
    if compared != ctx.dtype():
        rows = ctx.emit(relax.op.astype(rows, compared))
    real = compared.startswith("float")
    in_order = bool(ctx.attr("sorted", 1))

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        _distinct(ins, outs, (entries, width), real=real, in_order=in_order)

    # Where each result comes from, which result each entry is, how often, how many; then the entries in order.
    outputs = [((entries,), "int64")] * 3 + [((1,), "int64"), ((entries,), "int64")]
    where, ranks, times, count, _ = call_loops(ctx.bb, "unique", [rows], outputs, body)
    return [ctx.emit(relax.op.take(data, where, axis or 0, mode="clip")), where, ranks, times, count]


def _distinct(ins: Any, outs: Any, sizes: tuple[int, int], *, real: bool, in_order: bool) -> None:  # noqa: ANN401
    """Sort the rows' places by a heap, equal ones by place, and number the groups of equals.

    A NaN comes last and is like no other entry, not even itself.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    (rows,), (where, ranks, times, count, order), (entries, width) = ins, outs, sizes
    column, hole, child, place, first = (scalar("int64") for _ in range(5))
    less, same, settled = (scalar("bool") for _ in range(3))

    def below(x: Any, y: Any) -> Any:  # noqa: ANN401
        if not real:
            return x < y
        return tirx.Or(x < y, tirx.And(tirx.isnan(y), tirx.Not(tirx.isnan(x))))

    def compare(p: Any, q: Any) -> None:  # noqa: ANN401
        """Set `same`, and `less` if row p comes before row q."""
        column[0] = integer(0)
        if width > 1:
            with T.While(tirx.And(column[0] < width - 1, rows[p, column[0]].equal(rows[q, column[0]]))):
                column[0] = column[0] + 1
        x, y = rows[p, column[0]], rows[q, column[0]]
        same[0] = x.equal(y)
        less[0] = tirx.Or(below(x, y), tirx.And(tirx.Not(below(y, x)), p < q))

    def sift(size: Any) -> None:  # noqa: ANN401
        """Put `place` into a heap of `size` places, the last in order at its root, at or below the free `hole`."""
        settled[0] = tirx.const(False, "bool")
        with T.While(tirx.And(hole[0] * 2 + 1 < size, tirx.Not(settled[0]))):
            child[0] = hole[0] * 2 + 1
            compare(order[child[0]], order[tirx.min(child[0] + 1, size - 1)])
            with T.If(less[0]), T.Then():
                child[0] = child[0] + 1
            compare(order[child[0]], place[0])
            settled[0] = less[0]
            with T.If(tirx.Not(settled[0])), T.Then():
                order[hole[0]] = order[child[0]]
                hole[0] = child[0]
        order[hole[0]] = place[0]

    def begin(p: Any) -> None:  # noqa: ANN401
        """Open a result, whose first entry is at p."""
        where[count[0]] = p
        times[count[0]] = integer(0)
        count[0] = count[0] + 1

    with T.serial(0, integer(entries)) as i:
        order[i] = i
    with T.serial(0, integer(entries // 2)) as k:
        hole[0] = integer(entries // 2 - 1) - k
        place[0] = order[hole[0]]
        sift(integer(entries))
    with T.serial(0, integer(entries - 1)) as k:
        last = integer(entries - 1) - k
        place[0] = order[last]
        order[last] = order[0]
        hole[0] = integer(0)
        sift(last)
    count[0] = integer(0)
    with T.serial(0, integer(entries)) as k:
        place[0] = order[k]
        same[0] = tirx.const(False, "bool")
        with T.If(k > 0), T.Then():
            compare(order[k - 1], place[0])
        with T.If(tirx.Not(same[0])), T.Then():
            first[0] = place[0]
            if in_order:
                begin(place[0])
        # Of results in the order of their first entries, only that entry is known yet.
        ranks[place[0]] = count[0] - 1 if in_order else first[0]
    if not in_order:
        with T.serial(0, integer(entries)) as i:
            place[0] = ranks[i]  # at most i: numbered already, or this one
            with T.If(place[0].equal(i)):
                with T.Then():
                    begin(i)
                    ranks[i] = count[0] - 1
                with T.Else():
                    ranks[i] = ranks[place[0]]
    with T.serial(0, integer(entries)) as i:
        times[ranks[i]] = times[ranks[i]] + 1
    with T.serial(count[0], integer(entries)) as i:
        where[i] = integer(0)
        times[i] = integer(0)
