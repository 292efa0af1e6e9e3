"""Operators over one axis that Relax either lacks or lowers to a sort on the heap: running sums, the k largest,
one-hot rows, entries of a cache.

Each is a definition that computes every output element on its own, so all of them are data parallel and none writes
where an index points.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr

# Comparisons of one TopK: beyond it the quadratic definition is no longer reasonable.
_MAX_COMPARISONS = 2**31


def _replaced(index: tuple[Any, ...], axis: int, value: Any) -> tuple[Any, ...]:  # noqa: ANN401 - TE expressions
    return (*index[:axis], value, *index[axis + 1 :])


@converts("CumSum", "CumProd")
def _cumulative(ctx: Context) -> Expr:
    from tvm import te, tirx

    shape, dtype = ctx.shape(), ctx.dtype()
    axis = normal_axis(int(ctx.need(1, "axis").reshape(())), len(shape))
    exclusive, backwards = bool(ctx.attr("exclusive", 0)), bool(ctx.attr("reverse", 0))
    product = ctx.node.op_type == "CumProd"
    length = shape[axis]
    one = te.comm_reducer(lambda x, y: x * y, lambda t: tirx.const(1, t), name="prod")

    def define(x: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, length), "k")

        def at(*index: Any) -> Any:  # noqa: ANN401
            here = index[axis]
            inside = k > here if backwards else k < here
            if not exclusive:
                inside = tirx.Or(inside, k.equal(here))
            value = tirx.Select(inside, x(*_replaced(index, axis, k)), tirx.const(1 if product else 0, dtype))
            return one(value, axis=k) if product else te.sum(value, axis=k)

        return te.compute(shape, at, name="cumulative")

    return ctx.bb.call_te(define, ctx.inputs[0], primfunc_name_hint="cumulative")


@converts("TopK")
def _top_k(ctx: Context) -> Expr:
    from tvm import te, tirx

    """The k largest; where k is computed at run time, all of them in order, and how many are asked for."""
    shape, dtype = ctx.shape(), ctx.dtype()
    axis = normal_axis(ctx.attr("axis", -1), len(shape))
    given = next(name for name in ctx.node.output if name in ctx.types)  # argsort reads the places alone
    out_shape = ctx.types[given].shape
    length, count = shape[axis], out_shape[axis]
    largest = bool(ctx.attr("largest", 1))
    total = int(np.prod(shape, dtype=np.int64)) * (length + count)
    if total > _MAX_COMPARISONS:
        raise ctx.unsupported(f"{total} comparisons for an axis of {length}", f"at most {_MAX_COMPARISONS}")
    if dtype == "bool":
        raise ctx.unsupported("bool values", "numbers")

    def rank(x: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, length), "k")

        def at(*index: Any) -> Any:  # noqa: ANN401
            other, mine = x(*_replaced(index, axis, k)), x(*index)
            ahead = other > mine if largest else other < mine
            tie = tirx.And(other.equal(mine), k < index[axis])
            return te.sum(tirx.Select(tirx.Or(ahead, tie), tirx.const(1, "int32"), tirx.const(0, "int32")), axis=k)

        return te.compute(shape, at, name="rank")

    def places(ranks: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, length), "k")

        def at(*index: Any) -> Any:  # noqa: ANN401
            hit = ranks(*_replaced(index, axis, k)).equal(index[axis].astype("int32"))
            return te.sum(tirx.Select(hit, k.astype("int64"), tirx.const(0, "int64")), axis=k)

        return te.compute(out_shape, at, name="places")

    def values(x: Any, where: Any) -> Any:  # noqa: ANN401
        # With NaN among the values several may share a rank: `min` keeps the sum of their places inside.
        return te.compute(
            out_shape,
            lambda *i: x(*_replaced(i, axis, tirx.min(where(*i), tirx.const(length - 1, "int64")))),
            name="values",
        )

    ranks = ctx.emit(ctx.bb.call_te(rank, ctx.inputs[0], primfunc_name_hint="topk_rank"))
    where = ctx.emit(ctx.bb.call_te(places, ranks, primfunc_name_hint="topk_places"))
    best = ctx.bb.call_te(values, ctx.inputs[0], where, primfunc_name_hint="topk_values")
    if len(ctx.node.output) < 3:
        return [best, where]

    def asked(k: Any) -> Any:  # noqa: ANN401
        bounds = tirx.const(0, "int64"), tirx.const(length, "int64")
        return te.compute((1,), lambda i: tirx.max(tirx.min(k(i), bounds[1]), bounds[0]), name="asked")

    return [best, where, ctx.bb.call_te(asked, ctx.inputs[1], primfunc_name_hint="topk_count")]


@converts("TensorScatter")
def _tensor_scatter(ctx: Context) -> Expr:
    """A cache with new entries written from a place on, which each batch entry names."""
    from tvm import te, tirx

    shape, new = ctx.shape(), ctx.shape(1)
    axis = normal_axis(ctx.attr("axis", -2), len(shape))
    size, length, ring = shape[axis], new[axis], ctx.attr("mode", "linear") == "circular"

    def define(past: Any, update: Any, *where: Any) -> Any:  # noqa: ANN401
        def at(*index: Any) -> Any:  # noqa: ANN401
            begin = where[0](index[0]).astype("int64") if where else tirx.const(0, "int64")
            offset = index[axis].astype("int64") - begin
            if ring:
                offset = tirx.floormod(offset, tirx.const(size, "int64"))
            bounded = tirx.max(tirx.min(offset, tirx.const(length - 1, "int64")), tirx.const(0, "int64"))
            value = update(*_replaced(index, axis, bounded))
            return tirx.if_then_else(tirx.And(offset >= 0, offset < length), value, past(*index))

        return te.compute(shape, at, name="tensor_scatter")

    arguments = [ctx.inputs[0], ctx.inputs[1], *([ctx.inputs[2]] if ctx.has(2) else [])]
    return ctx.bb.call_te(define, *arguments, primfunc_name_hint="tensor_scatter")


@converts("OneHot")
def _one_hot(ctx: Context) -> Expr:
    from tvm import te, tirx

    shape = ctx.out_shape()
    axis = normal_axis(ctx.attr("axis", -1), len(shape))
    depth, dtype = shape[axis], ctx.dtype(0)

    def define(indices: Any, values: Any) -> Any:  # noqa: ANN401
        def at(*index: Any) -> Any:  # noqa: ANN401
            place = indices(*index[:axis], *index[axis + 1 :])
            here = index[axis].astype(dtype)
            hit = place.equal(here)
            if not dtype.startswith("u"):
                hit = tirx.Or(hit, (place + tirx.const(depth, dtype)).equal(here))
            return tirx.if_then_else(hit, values(1), values(0))

        return te.compute(shape, at, name="one_hot")

    return ctx.bb.call_te(define, ctx.inputs[0], ctx.inputs[2], primfunc_name_hint="one_hot")


@converts("BitCast")
def _bit_cast(ctx: Context) -> Expr:
    from tvm import relax, te, tirx

    source, target, shape = ctx.dtype(), ctx.out_dtype(), ctx.shape()
    if ctx.out_shape() != shape:
        raise ctx.unsupported(f"{source} to {target}", "types of the same size")
    if source == target:
        return ctx.inputs[0]
    if target == "bool":
        return relax.op.not_equal(ctx.inputs[0], ctx.const(0))
    if source == "bool":
        return relax.op.astype(ctx.inputs[0], target)
    return ctx.bb.call_te(
        lambda x: te.compute(shape, lambda *i: tirx.reinterpret(target, x(*i)), name="bit_cast"),
        ctx.inputs[0],
        primfunc_name_hint="bit_cast",
    )


@converts("EyeLike")
def _eye_like(ctx: Context) -> Expr:
    rows, columns = ctx.out_shape()
    return ctx.array("eye", np.eye(rows, columns, ctx.attr("k", 0)).astype(np.dtype(ctx.out_dtype())))
