"""Matrix products."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr


def _scaled(ctx: Context, index: int, factor: float) -> Expr:
    """Input `index` times a number; in numpy if it is a constant."""
    from tvm import relax

    if factor == 1.0:
        return ctx.inputs[index]
    value = ctx.value(index)
    if value is not None:
        return ctx.array(f"scaled{index}", (value * value.dtype.type(factor)).astype(value.dtype))
    return relax.op.multiply(ctx.inputs[index], ctx.const(factor))


@converts("Gemm")
def _gemm(ctx: Context) -> Expr:
    from tvm import relax

    a, b = ctx.inputs[0], ctx.inputs[1]
    alpha = float(ctx.attr("alpha", 1.0))
    if alpha != 1.0:
        # On the weights if there are any: then it costs nothing at run time.
        a, b = (a, _scaled(ctx, 1, alpha)) if ctx.value(1) is not None else (_scaled(ctx, 0, alpha), b)
    if ctx.attr("transA", 0):
        a = relax.op.permute_dims(a, [1, 0])
    if ctx.attr("transB", 0):
        b = relax.op.permute_dims(b, [1, 0])
    result = relax.op.matmul(a, b)
    if not ctx.has(2):
        return result
    beta = float(ctx.attr("beta", 1.0))
    value = ctx.value(2)
    if beta == 0.0 or (value is not None and not np.any(value)):
        return result
    return relax.op.add(result, _scaled(ctx, 2, beta))


@converts("Einsum")
def _einsum(ctx: Context) -> Expr:
    from tvm import relax

    return relax.op.einsum(tuple(ctx.inputs), ctx.attr("equation").replace(" ", ""))
