"""Normalisation with constant statistics is a scale and a shift per channel."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


@converts("BatchNormalization")
def _batch_norm(ctx: Context) -> Expr:
    from tvm import relax

    if ctx.attr("training_mode", 0) or any(ctx.is_read(place) for place in range(1, 5)):
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
        with np.errstate(all="ignore"):
            exact = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
            shift = (beta.astype(np.float64) - mean.astype(np.float64) * exact).astype(dtype)
            scale = exact.astype(dtype)
        scaled = relax.op.multiply(x, ctx.array("scale", scale.reshape(per_channel)))
        return relax.op.add(scaled, ctx.array("shift", shift.reshape(per_channel)))
    channels = ctx.shape(1)
    shape = tuple(channels[0] if dim == -1 else 1 for dim in per_channel)
    g, b, m, v = (relax.op.reshape(ctx.inputs[index], shape) for index in (1, 2, 3, 4))
    deviation = relax.op.sqrt(relax.op.add(v, ctx.const(epsilon, ctx.dtype(4))))
    return relax.op.add(relax.op.multiply(relax.op.divide(relax.op.subtract(x, m), deviation), g), b)


@converts("LayerNormalization")
def _layer_norm(ctx: Context) -> Expr:
    from tvm import relax

    rank = len(ctx.shape())
    axis = normal_axis(ctx.attr("axis", -1), rank)
    axes, epsilon = list(range(axis, rank)), float(ctx.attr("epsilon", 1e-5))
    x, scale = ctx.inputs[0], ctx.inputs[1]
    whole = ctx.shape(1) == ctx.shape()[axis:]
    if not ctx.is_read(1) and not ctx.is_read(2) and ctx.has(2) and whole:
        return relax.op.nn.layer_norm(x, scale, ctx.inputs[2], axes, epsilon)
    # Statistics as outputs, no shift, or a scale that is broadcast: written out.
    kind = ctx.dtype()
    wide = x if kind in ("float32", "float64") else relax.op.astype(x, "float32")
    mean = ctx.emit(relax.op.mean(wide, axes, keepdims=True))
    centred = ctx.emit(relax.op.subtract(wide, mean))
    variance = relax.op.mean(relax.op.multiply(centred, centred), axes, keepdims=True)
    dtype = kind if kind == "float64" else "float32"
    spread = ctx.emit(
        relax.op.divide(ctx.const(1, dtype), relax.op.sqrt(relax.op.add(variance, ctx.const(epsilon, dtype))))
    )
    normal = ctx.emit(relax.op.multiply(centred, spread))
    result = relax.op.multiply(normal if dtype == kind else relax.op.astype(normal, kind), scale)
    return [relax.op.add(result, ctx.inputs[2]) if ctx.has(2) else result, mean, spread][: len(ctx.node.output)]


@converts("InstanceNormalization")
def _instance_norm(ctx: Context) -> Expr:
    """Each channel of each item is a row of its own: the norm of the row, then the channel's scale and shift."""
    from tvm import relax

    shape, dtype = ctx.shape(), ctx.dtype()
    batch, channels, *places = shape
    length = int(np.prod(places))
    rows = ctx.emit(relax.op.reshape(ctx.inputs[0], (batch, channels, length)))
    unit, zero = (ctx.array(name, np.full(length, v, dtype)) for name, v in (("norm_unit", 1), ("norm_zero", 0)))
    normal = ctx.emit(relax.op.nn.layer_norm(rows, unit, zero, [2], float(ctx.attr("epsilon", 1e-5))))
    scale, shift = (relax.op.reshape(ctx.inputs[index], (1, channels, 1)) for index in (1, 2))
    return relax.op.reshape(ctx.emit(relax.op.add(relax.op.multiply(normal, scale), shift)), shape)


@converts("LpNormalization")
def _lp_norm(ctx: Context) -> Expr:
    from tvm import relax

    x, axis = ctx.inputs[0], [normal_axis(ctx.attr("axis", -1), len(ctx.shape()))]
    if ctx.attr("p", 2) == 1:
        length = relax.op.sum(relax.op.abs(x), axis, keepdims=True)
    else:
        length = relax.op.sqrt(relax.op.sum(relax.op.multiply(x, x), axis, keepdims=True))
    zero = relax.op.equal(length, ctx.const(0))
    return relax.op.where(zero, ctx.const(0), relax.op.divide(x, length))
