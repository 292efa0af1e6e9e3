"""QuantizeLinear and DequantizeLinear, per tensor or per channel, with constant scales."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


def _parameters(ctx: Context, stored: str) -> tuple[Expr, Expr, int]:
    """Scale, zero point and axis as Relax wants them."""
    if ctx.attr("block_size", 0):
        raise ctx.unsupported("blocked quantisation", "per tensor or per channel")
    scale = ctx.need(1, "scale")
    zero = ctx.need(2, "zero point") if ctx.has(2) else np.zeros(scale.shape, dtype=np.dtype(stored))
    axis = normal_axis(ctx.attr("axis", 1), max(len(ctx.shape()), 1)) if scale.size > 1 else 0
    if scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    if scale.size > 1 and np.all(zero == zero.reshape(-1)[0]):
        zero = zero.reshape(-1)[:1].reshape(())
    return ctx.array("scale", scale), ctx.array("zero_point", zero), axis


@converts("QuantizeLinear")
def _quantize(ctx: Context) -> Expr:
    from tvm import relax

    scale, zero, axis = _parameters(ctx, ctx.out_dtype())
    return relax.op.quantize(ctx.inputs[0], scale, zero, axis=axis, out_dtype=ctx.out_dtype())


@converts("DequantizeLinear")
def _dequantize(ctx: Context) -> Expr:
    from tvm import relax

    scale, zero, axis = _parameters(ctx, ctx.dtype())
    return relax.op.dequantize(ctx.inputs[0], scale, zero, axis=axis, out_dtype=ctx.out_dtype())
