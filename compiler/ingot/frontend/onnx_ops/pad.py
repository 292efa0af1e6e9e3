"""Padding, with amounts known at compile time."""

from __future__ import annotations

from typing import Any

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


@converts("Pad")
def _pad(ctx: Context) -> Expr:
    from tvm import relax

    shape = ctx.shape()
    amounts = ctx.ints("pads", 1)
    if amounts is None:
        raise ctx.unsupported("no pads", "constant pads")
    axes = [normal_axis(axis, len(shape)) for axis in (ctx.ints("axes", 3) or range(len(shape)))]
    before, after = [0] * len(shape), [0] * len(shape)
    for place, axis in enumerate(axes):
        before[axis], after[axis] = amounts[place], amounts[place + len(axes)]
    x = ctx.inputs[0]
    cut = [axis for axis in range(len(shape)) if before[axis] < 0 or after[axis] < 0]
    if cut:
        # A negative pad removes elements.
        begins = [max(-before[axis], 0) for axis in cut]
        ends = [shape[axis] + min(after[axis], 0) for axis in cut]
        x = ctx.emit(relax.op.strided_slice(x, cut, begins, ends, [1] * len(cut)))
        before, after = [max(value, 0) for value in before], [max(value, 0) for value in after]
    if not any(before) and not any(after):
        return x
    mode = ctx.attr("mode", "constant")
    value = float(ctx.attr("value", 0.0))
    if ctx.opset >= 11 and ctx.has(2):
        known = ctx.value(2)
        if known is None and mode == "constant":
            return _with_computed(ctx, x, before)
        value = 0.0 if known is None else known.reshape(-1)[0].item()
    widths = [width for pair in zip(before, after, strict=True) for width in pair]
    if mode == "constant":
        return relax.op.nn.pad(x, widths, pad_value=value)
    if mode == "reflect":
        return relax.op.nn.pad(x, widths, pad_mode="reflect")
    return _by_slices(ctx, x, before, after, mode)


def _by_slices(ctx: Context, x: Expr, before: list[int], after: list[int], mode: str) -> Expr:
    """Edge and wrap padding: one axis after the other, by joining pieces of the tensor itself."""
    from tvm import relax

    if mode not in ("edge", "wrap"):
        raise ctx.unsupported(f"mode {mode!r}", "constant, reflect, edge or wrap")
    shape = [size - cut for size, cut in zip(ctx.out_shape(), map(sum, zip(before, after, strict=True)), strict=True)]
    for axis, size in enumerate(shape):
        first, last = before[axis], after[axis]
        if not first and not last:
            continue
        if mode == "wrap" and max(first, last) > size:
            raise ctx.unsupported(f"wrapping by more than the axis of {size}", f"at most {size}")
        pieces = [x]
        for amount, front in ((first, True), (last, False)):
            if not amount:
                continue
            if mode == "edge":
                begin = 0 if front else size - 1
                piece = relax.op.strided_slice(x, [axis], [begin], [begin + 1], [1])
                piece = relax.op.repeat(piece, amount, axis)
            else:
                begin = size - amount if front else 0
                piece = relax.op.strided_slice(x, [axis], [begin], [begin + amount], [1])
            pieces.insert(0 if front else len(pieces), ctx.emit(piece))
        x = ctx.emit(relax.op.concat(pieces, axis=axis))
    return x


def _with_computed(ctx: Context, x: Expr, before: list[int]) -> Expr:
    """Constant padding with a value that is computed at run time."""
    from tvm import relax, te, tirx

    shape = [int(dim) for dim in ctx.bb.normalize(x).ty.shape]
    value = ctx.emit(relax.op.reshape(ctx.inputs[2], (1,)))

    def define(source: Any, fill: Any) -> Any:  # noqa: ANN401
        def at(*index: Any) -> Any:  # noqa: ANN401
            place = [item - begin for item, begin in zip(index, before, strict=True)]
            inside = [tirx.all(p >= 0, p < size) for p, size in zip(place, shape, strict=True)]
            safe = [tirx.max(tirx.min(p, size - 1), 0) for p, size in zip(place, shape, strict=True)]
            return tirx.if_then_else(tirx.all(*inside), source(*safe), fill(0))

        return te.compute(ctx.out_shape(), at, name="pad")

    return ctx.bb.call_te(define, x, value, primfunc_name_hint="pad")
