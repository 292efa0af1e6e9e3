"""Operators over one axis that Relax either lacks or lowers to a sort on the heap: running sums, the k largest,
writing at indices, one-hot rows.

Each is a definition that computes every output element on its own, so all of them are data parallel and none writes
where an index points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.onnx_ops.index import bounded_indices
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

    shape, dtype = ctx.shape(), ctx.dtype()
    axis = normal_axis(ctx.attr("axis", -1), len(shape))
    length, count = shape[axis], ctx.out_shape()[axis]
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

        return te.compute(ctx.out_shape(), at, name="places")

    def values(x: Any, where: Any) -> Any:  # noqa: ANN401
        # With NaN among the values several may share a rank: `min` keeps the sum of their places inside.
        return te.compute(
            ctx.out_shape(),
            lambda *i: x(*_replaced(i, axis, tirx.min(where(*i), tirx.const(length - 1, "int64")))),
            name="values",
        )

    ranks = ctx.emit(ctx.bb.call_te(rank, ctx.inputs[0], primfunc_name_hint="topk_rank"))
    where = ctx.emit(ctx.bb.call_te(places, ranks, primfunc_name_hint="topk_places"))
    return [ctx.bb.call_te(values, ctx.inputs[0], where, primfunc_name_hint="topk_values"), where]


def _scatter(
    ctx: Context,
    data: Expr,
    sources: list[Expr],
    extents: tuple[int, ...],
    hit: Callable[..., Any],
    update: Callable[..., Any],
) -> Expr:
    """`data` with updates written in: for each element, over all candidates `k`, those that `hit` says are its own.

    hit(index, k, *sources) and update(index, k, *sources) are TE expressions; without a reduction the last one wins.
    """
    from tvm import te, tirx

    shape, dtype = ctx.shape(), ctx.dtype()
    kind = ctx.attr("reduction", "none")
    count = int(np.prod(extents, dtype=np.int64))
    if dtype == "bool" and kind != "none":
        raise ctx.unsupported("a reduction of bool", "numbers")

    def last(*tensors: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, count), "k")

        def at(*index: Any) -> Any:  # noqa: ANN401
            return te.max(tirx.Select(hit(index, k, *tensors), k.astype("int32"), tirx.const(-1, "int32")), axis=k)

        return te.compute(shape, at, name="last")

    def chosen(values: Any, where: Any, *tensors: Any) -> Any:  # noqa: ANN401
        def at(*index: Any) -> Any:  # noqa: ANN401
            k = tirx.max(where(*index), tirx.const(0, "int32")).astype("int64")
            return tirx.if_then_else(where(*index) >= 0, update(index, k, *tensors), values(*index))

        return te.compute(shape, at, name="scatter")

    if kind == "none":
        where = ctx.emit(ctx.bb.call_te(last, *sources, primfunc_name_hint="scatter_last"))
        return ctx.bb.call_te(chosen, data, where, *sources, primfunc_name_hint="scatter")

    limits = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    low, high = (-np.inf, np.inf) if np.dtype(dtype).kind == "f" else (int(limits.min), int(limits.max))
    neutral = {"add": 0, "mul": 1, "max": low, "min": high}.get(kind)
    if neutral is None:
        raise ctx.unsupported(f"reduction {kind!r}", "none, add, mul, max or min")
    combine: Callable[[Any, Any], Any] = {
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "max": tirx.max,
        "min": tirx.min,
    }[kind]
    reducer = te.comm_reducer(lambda x, y: combine(x, y), lambda t: tirx.const(neutral, t), name=kind)

    def reduced(*tensors: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, count), "k")

        def at(*index: Any) -> Any:  # noqa: ANN401
            value = tirx.if_then_else(hit(index, k, *tensors), update(index, k, *tensors), tirx.const(neutral, dtype))
            return reducer(value, axis=k)

        return te.compute(shape, at, name="updates")

    def joined(values: Any, updates: Any) -> Any:  # noqa: ANN401
        return te.compute(shape, lambda *i: combine(values(*i), updates(*i)), name="scatter")

    updates = ctx.emit(ctx.bb.call_te(reduced, *sources, primfunc_name_hint="scatter_updates"))
    return ctx.bb.call_te(joined, data, updates, primfunc_name_hint="scatter")


@converts("Scatter", "ScatterElements")
def _scatter_elements(ctx: Context) -> Expr:
    from tvm import tirx

    shape, places = ctx.shape(), ctx.shape(1)
    axis = normal_axis(ctx.attr("axis", 0), len(shape))
    bounded = ctx.emit(bounded_indices(ctx, 1, (shape[axis],)))

    def inside(index: tuple[Any, ...]) -> Any:  # noqa: ANN401
        checks = [index[i] < places[i] for i in range(len(shape)) if i != axis and places[i] < shape[i]]
        result = tirx.const(True, "bool")
        for check in checks:
            result = tirx.And(result, check)
        return result

    def safe(index: tuple[Any, ...], k: Any) -> tuple[Any, ...]:  # noqa: ANN401
        moved = tuple(
            tirx.min(item, tirx.const(places[i] - 1, "int64")) if places[i] < shape[i] else item
            for i, item in enumerate(index)
        )
        return _replaced(moved, axis, k)

    def hit(index: tuple[Any, ...], k: Any, indices: Any, _: Any) -> Any:  # noqa: ANN401
        return tirx.And(inside(index), indices(*safe(index, k)).astype("int64").equal(index[axis]))

    def update(index: tuple[Any, ...], k: Any, _: Any, updates: Any) -> Any:  # noqa: ANN401
        return updates(*safe(index, k))

    return _scatter(ctx, ctx.inputs[0], [bounded, ctx.inputs[2]], (places[axis],), hit, update)


@converts("ScatterND")
def _scatter_nd(ctx: Context) -> Expr:
    from tvm import relax, tirx

    shape, places = ctx.shape(), ctx.shape(1)
    depth, count = places[-1], int(np.prod(places[:-1], dtype=np.int64))
    bounded = ctx.emit(bounded_indices(ctx, 1, shape[:depth]))
    indices = ctx.emit(relax.op.reshape(bounded, (count, depth)))
    updates = ctx.emit(relax.op.reshape(ctx.inputs[2], (count, *shape[depth:])))

    def hit(index: tuple[Any, ...], k: Any, where: Any, _: Any) -> Any:  # noqa: ANN401
        result = tirx.const(True, "bool")
        for i in range(depth):
            result = tirx.And(result, where(k, i).astype("int64").equal(index[i]))
        return result

    def update(index: tuple[Any, ...], k: Any, _: Any, values: Any) -> Any:  # noqa: ANN401
        return values(k, *index[depth:])

    return _scatter(ctx, ctx.inputs[0], [indices, updates], (count,), hit, update)


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
