"""Reading at indices. Indices from a user's input are data like any other, so none may reach outside a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


def bounded_indices(ctx: Context, index: int, sizes: tuple[int, ...]) -> Expr:
    """Input `index` with negative values counted from the end, and every value inside [0, size).

    One size for all values, or one for each place along the last axis.
    """
    from tvm import relax

    limits = np.array(sizes if len(sizes) > 1 else sizes[0], dtype=np.int64)
    value = ctx.value(index)
    if value is not None:
        fixed = np.where(value < 0, value + limits, value)
        if fixed.size and (fixed.min() < 0 or np.any(fixed >= limits)):
            raise ctx.unsupported(f"an index outside the axis of {limits}", "indices inside the axis")
        return ctx.array("indices", fixed.astype(value.dtype))
    indices, dtype = ctx.inputs[index], ctx.dtype(index)

    def limit(array: np.ndarray) -> Expr:
        return ctx.array("limits", array.astype(np.dtype(dtype)))

    if not dtype.startswith("u"):
        negative = relax.op.less(indices, ctx.const(0, dtype))
        indices = relax.op.where(negative, relax.op.add(indices, limit(limits)), indices)
        indices = relax.op.maximum(indices, ctx.const(0, dtype))
    return relax.op.minimum(indices, limit(limits - 1))


@converts("Gather")
def _gather(ctx: Context) -> Expr:
    from tvm import relax

    axis = normal_axis(ctx.attr("axis", 0), len(ctx.shape()))
    value = ctx.value(1)
    if value is not None and value.size == 1:
        # One fixed index is a slice, which needs no table of indices and can become a view.
        start = int(value.reshape(()))
        start = start + ctx.shape()[axis] if start < 0 else start
        if not 0 <= start < ctx.shape()[axis]:
            raise ctx.unsupported(f"index {start}", f"indices inside the axis of {ctx.shape()[axis]}")
        part = relax.op.strided_slice(ctx.inputs[0], [axis], [start], [start + 1], [1])
        return relax.op.reshape(part, ctx.out_shape())
    # The indices are already inside; `clip` makes the kernel itself safe too.
    return relax.op.take(ctx.inputs[0], ctx.emit(bounded_indices(ctx, 1, (ctx.shape()[axis],))), axis, mode="clip")


@converts("GatherElements")
def _gather_elements(ctx: Context) -> Expr:
    from tvm import relax

    axis = normal_axis(ctx.attr("axis", 0), len(ctx.shape()))
    return relax.op.gather_elements(ctx.inputs[0], ctx.emit(bounded_indices(ctx, 1, (ctx.shape()[axis],))), axis)


@converts("Slice")
def _slice(ctx: Context) -> Expr:
    from tvm import relax

    shape = ctx.shape()
    starts, ends = ctx.ints("starts", 1), ctx.ints("ends", 2)
    if starts is None or ends is None:
        raise ctx.unsupported("no starts or ends", "constant starts and ends")
    axes = ctx.ints("axes", 3) or list(range(len(starts)))
    steps = (ctx.ints("steps", 4) if ctx.opset >= 10 else None) or [1] * len(starts)
    x = ctx.inputs[0]
    begin, end, stride, used = [], [], [], []
    for start, stop, axis, step in zip(starts, ends, axes, steps, strict=True):
        where = normal_axis(axis, len(shape))
        first, last, _ = slice(start, stop, step).indices(shape[where])
        if (first, last, step) == (0, shape[where], 1):
            continue
        used.append(where)
        begin.append(first)
        # TVM counts a negative end from the back: stop one before the front is -size-1.
        end.append(last if last >= 0 else -shape[where] - 1)
        stride.append(step)
    if not used:
        return x
    return relax.op.strided_slice(x, used, begin, end, stride)


@converts("GatherND")
def _nd(ctx: Context) -> Expr:
    first = ctx.attr("batch_dims", 0)
    ctx.inputs[1] = ctx.emit(bounded_indices(ctx, 1, ctx.shape()[first : first + ctx.shape(1)[-1]]))
    return NotImplemented


@converts("ReverseSequence")
def _reverse_sequence(ctx: Context) -> Expr:
    """The first `sequence_lens[b]` entries along the time axis in reverse, the rest as they are."""
    from tvm import te, tirx

    shape = ctx.shape()
    time, batch = int(ctx.attr("time_axis", 0)), int(ctx.attr("batch_axis", 1))

    def define(x: Any, lengths: Any) -> Any:  # noqa: ANN401
        def at(*index: Any) -> Any:  # noqa: ANN401
            length = tirx.max(tirx.min(lengths[index[batch]].astype("int64"), shape[time]), 0)
            source = tirx.if_then_else(index[time] < length, length - 1 - index[time], index[time])
            return x(*index[:time], source, *index[time + 1 :])

        return te.compute(shape, at, name="reverse_sequence")

    return ctx.bb.call_te(define, ctx.inputs[0], ctx.inputs[1], primfunc_name_hint="reverse_sequence")
