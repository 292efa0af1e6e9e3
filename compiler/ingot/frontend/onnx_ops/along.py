"""Operators that walk along one axis and keep what they have met: running sums and products, the k largest.

A tensor is seen as [outer, length, inner] with the axis in the middle: what lies in `inner` is contiguous and goes
together, a vector at a time where each step is the same for all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr

# Neighbours along `inner` that stay in one task: a few vectors of them.
_TOGETHER = 64
_MOST_PARTS = 16


def _middle(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """[outer, length, inner] of a tensor of `shape`."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _parts(inner: int) -> int:
    """Into how many equal parts `inner` is cut, one for each task."""
    return max(n for n in range(1, _MOST_PARTS + 1) if inner % n == 0 and (n == 1 or inner // n >= _TOGETHER))


@converts("CumSum", "CumProd")
def _cumulative(ctx: Context) -> Expr:
    from tvm import relax, tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    shape, dtype = ctx.shape(), ctx.dtype()
    if 0 in shape:
        return ctx.inputs[0]
    axis = normal_axis(int(ctx.need(1, "axis").reshape(())), len(shape))
    exclusive, backwards = bool(ctx.attr("exclusive", 0)), bool(ctx.attr("reverse", 0))
    product = ctx.node.op_type == "CumProd"
    outer, length, inner = view = _middle(shape, axis)
    parts = _parts(inner)
    step, first = (-1, length - 1) if backwards else (1, 0)

    def body(ins: Any, outs: Any, task: Any) -> None:  # noqa: ANN401
        (x,), (out,) = ins, outs
        row, begin = task // parts, task % parts * (inner // parts)
        with T.serial(0, inner // parts) as i:
            out[row, first, begin + i] = tirx.const(int(product), dtype) if exclusive else x[row, first, begin + i]
        with T.serial(0, length - 1) as k, T.serial(0, inner // parts) as i:
            before = first + step * k
            met, new = out[row, before, begin + i], x[row, before + (0 if exclusive else step), begin + i]
            out[row, before + step, begin + i] = met * new if product else met + new

    seen = ctx.emit(relax.op.reshape(ctx.inputs[0], view))
    return relax.op.reshape(
        call_loops(ctx.bb, "cumulative", [seen], [(view, dtype)], body, tasks=outer * parts)[0], shape
    )


@converts("TopK")
def _top_k(ctx: Context) -> Expr:
    """The k largest; where k is computed at run time, all of them in order, and how many are asked for.

    The best so far are a heap in the outputs themselves, the worst of them at its root: an element that is better takes
    its place. In the end the roots, taken one after the other, fill the outputs from behind.
    """
    from tvm import relax, te, tirx

    shape, dtype = ctx.shape(), ctx.dtype()
    axis = normal_axis(ctx.attr("axis", -1), len(shape))
    given = next(name for name in ctx.node.output if name in ctx.types)  # argsort reads the places alone
    out_shape = ctx.types[given].shape
    length = shape[axis]
    if dtype == "bool":
        raise ctx.unsupported("bool values", "numbers")
    if 0 in out_shape:
        best, where = ctx.array("values", np.zeros(out_shape, dtype)), ctx.array("places", np.zeros(out_shape, "int64"))
    else:
        seen = ctx.emit(relax.op.reshape(ctx.inputs[0], _middle(shape, axis)))
        found = _best(ctx, seen, out_shape[axis], largest=bool(ctx.attr("largest", 1)))
        best, where = (relax.op.reshape(part, out_shape) for part in found)
    if len(ctx.node.output) < 3:
        return [best, where]

    def asked(k: Any) -> Any:  # noqa: ANN401
        bounds = tirx.const(0, "int64"), tirx.const(length, "int64")
        return te.compute((1,), lambda i: tirx.max(tirx.min(k(i), bounds[1]), bounds[0]), name="asked")

    return [best, where, ctx.bb.call_te(asked, ctx.inputs[1], primfunc_name_hint="topk_count")]


def _best(ctx: Context, x: Expr, count: int, *, largest: bool) -> list[Expr]:
    """The `count` best along axis 1 of x [outer, length, inner], in order, and their places: of equals the first."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    outer, length, inner = (int(dim) for dim in x.ty.shape)
    parts, dtype = _parts(inner), ctx.dtype()

    def body(ins: Any, outs: Any, task: Any) -> None:  # noqa: ANN401
        (values,), (best, where) = ins, outs
        row, begin = task // parts, task % parts * (inner // parts)
        value, place = scalar(dtype), scalar("int64")
        hole, child, settled = scalar("int64"), scalar("int64"), scalar("bool")

        def ahead(a: Any, b: Any) -> Any:  # noqa: ANN401
            return a > b if largest else a < b

        def behind(at: Any, value: Any, place: Any, column: Any) -> Any:  # noqa: ANN401
            """Whether the entry at `at` comes after another one."""
            mine = best[row, at, column]
            later = tirx.And(mine.equal(value), where[row, at, column] > place)
            return tirx.Or(ahead(value, mine), later)

        def sift(size: Any, column: Any) -> None:  # noqa: ANN401
            """Put value and place into a heap of `size` whose entry at `hole` is free, at or below it."""
            settled[0] = tirx.const(False, "bool")
            with T.While(tirx.And(hole[0] * 2 + 1 < size, tirx.Not(settled[0]))):
                child[0] = hole[0] * 2 + 1
                with T.If(child[0] + 1 < size), T.Then():
                    left = best[row, child[0], column], where[row, child[0], column]
                    with T.If(behind(child[0] + 1, *left, column)), T.Then():
                        child[0] = child[0] + 1
                settled[0] = tirx.Not(behind(child[0], value[0], place[0], column))
                with T.If(tirx.Not(settled[0])), T.Then():
                    best[row, hole[0], column] = best[row, child[0], column]
                    where[row, hole[0], column] = where[row, child[0], column]
                    hole[0] = child[0]
            best[row, hole[0], column] = value[0]
            where[row, hole[0], column] = place[0]

        with T.serial(0, count) as k, T.serial(0, inner // parts) as i:
            best[row, k, begin + i] = values[row, k, begin + i]
            where[row, k, begin + i] = T.Cast("int64", k)
        with T.serial(0, inner // parts) as i, T.serial(0, count // 2) as k:
            hole[0] = T.Cast("int64", count // 2 - 1 - k)
            value[0], place[0] = best[row, hole[0], begin + i], where[row, hole[0], begin + i]
            sift(count, begin + i)
        with T.serial(0, length - count) as after, T.serial(0, inner // parts) as i:
            k = after + count
            with T.If(ahead(values[row, k, begin + i], best[row, 0, begin + i])), T.Then():
                hole[0] = tirx.const(0, "int64")
                value[0], place[0] = values[row, k, begin + i], T.Cast("int64", k)
                sift(count, begin + i)
        with T.serial(0, inner // parts) as i, T.serial(0, count - 1) as k:
            last = T.Cast("int64", count - 1 - k)
            hole[0] = tirx.const(0, "int64")
            value[0], place[0] = best[row, last, begin + i], where[row, last, begin + i]
            best[row, last, begin + i], where[row, last, begin + i] = best[row, 0, begin + i], where[row, 0, begin + i]
            sift(last, begin + i)

    outputs = [((outer, count, inner), dtype), ((outer, count, inner), "int64")]
    return call_loops(ctx.bb, "top_k", [x], outputs, body, tasks=outer * parts)
