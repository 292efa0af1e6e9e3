"""Operators that Relax lacks: one-hot rows, entries of a cache, bits as another type.

Each is a definition that computes every output element on its own, so all of them are data parallel and none writes
where an index points.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


def _replaced(index: tuple[Any, ...], axis: int, value: Any) -> tuple[Any, ...]:  # noqa: ANN401 - TE expressions
    return (*index[:axis], value, *index[axis + 1 :])


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
