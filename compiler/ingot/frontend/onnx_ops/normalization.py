"""Normalisation with constant statistics is a scale and a shift per channel."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr


@converts("BatchNormalization")
def _batch_norm(ctx: Context) -> Expr:
    from tvm import relax

    if ctx.attr("training_mode", 0) or len([name for name in ctx.node.output if name in ctx.types]) > 1:
        raise ctx.unsupported("training mode", "inference mode", "export the model in evaluation mode")
    if ctx.attr("spatial", 1) != 1:
        raise ctx.unsupported("spatial=0", "one mean and variance per channel")
    x, dtype = ctx.inputs[0], np.dtype(ctx.dtype())
    per_channel = (1, -1) + (1,) * (len(ctx.shape()) - 2) if len(ctx.shape()) > 1 else (-1,)
    values = [ctx.value(index) for index in (1, 2, 3, 4)]
    epsilon = float(ctx.attr("epsilon", 1e-5))
    gamma, beta, mean, variance = values
    if gamma is not None and beta is not None and mean is not None and variance is not None:
        # In double precision: one rounding instead of five.
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        shift = beta.astype(np.float64) - mean.astype(np.float64) * scale
        scaled = relax.op.multiply(x, ctx.array("scale", scale.astype(dtype).reshape(per_channel)))
        return relax.op.add(scaled, ctx.array("shift", shift.astype(dtype).reshape(per_channel)))
    channels = ctx.shape(1)
    shape = tuple(channels[0] if dim == -1 else 1 for dim in per_channel)
    g, b, m, v = (relax.op.reshape(ctx.inputs[index], shape) for index in (1, 2, 3, 4))
    deviation = relax.op.sqrt(relax.op.add(v, ctx.const(epsilon, ctx.dtype(4))))
    return relax.op.add(relax.op.multiply(relax.op.divide(relax.op.subtract(x, m), deviation), g), b)
