"""Activations that TVM converts to something harder to optimise than Relax's own operators."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr


@converts("Clip")
def _clip(ctx: Context) -> Expr:
    from tvm import relax

    x, dtype = ctx.inputs[0], np.dtype(ctx.dtype())
    low = ctx.attr("min") if ctx.opset < 11 else None
    high = ctx.attr("max") if ctx.opset < 11 else None
    for index in (1, 2):
        if not ctx.has(index):
            continue
        value = ctx.value(index)
        if value is not None and value.size == 1:
            # Through float64: what relax.clip keeps its bounds in. NaN means no bound.
            bound = float(value.reshape(()))
            if not np.isnan(bound) and index == 1:
                low = bound
            elif not np.isnan(bound):
                high = bound
            continue
        x = ctx.emit((relax.op.maximum if index == 1 else relax.op.minimum)(x, ctx.inputs[index]))
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype) if dtype.kind in "iu" else None
    if low is not None and limits is not None and low <= float(limits.min):
        low = None
    if high is not None and limits is not None and high >= float(limits.max):
        high = None
    if low is None and high is None:
        return x
    if dtype.kind == "f" and low == 0 and high is None:
        return relax.op.nn.relu(x)
    if low is None:
        return relax.op.minimum(x, ctx.const(high if high is not None else 0))
    if high is None:
        return relax.op.maximum(x, ctx.const(low))
    if low > high:
        # ONNX: the upper bound wins.
        return relax.op.minimum(relax.op.maximum(x, ctx.const(low)), ctx.const(high))
    return relax.op.clip(x, low, high)


@converts("HardSigmoid")
def _hard_sigmoid(ctx: Context) -> Expr:
    from tvm import relax

    op, zero, one = relax.op, ctx.const(0), ctx.const(1)
    line = op.add(op.multiply(ctx.inputs[0], ctx.const(ctx.attr("alpha", 0.2))), ctx.const(ctx.attr("beta", 0.5)))
    line = ctx.emit(line)
    # Chosen by comparisons, which NaN fails: it stays NaN, while a clip would make it a bound.
    return op.where(op.greater(line, one), one, op.where(op.less(line, zero), zero, line))


@converts("Elu", "Selu")
def _elu(ctx: Context) -> Expr:
    """gamma * x where x is not below 0, gamma * alpha * (exp(x) - 1) elsewhere; NaN stays NaN."""
    from tvm import relax

    op, x, selu = relax.op, ctx.inputs[0], ctx.node.op_type == "Selu"
    alpha = float(ctx.attr("alpha", 1.67326319217681884765625 if selu else 1.0))
    gamma = float(ctx.attr("gamma", 1.05070102214813232421875)) if selu else 1.0
    below = op.multiply(ctx.const(gamma * alpha), op.subtract(op.exp(x), ctx.const(1)))
    above = x if gamma == 1.0 else op.multiply(ctx.const(gamma), x)
    return op.where(op.greater_equal(x, ctx.const(0)), above, below)


@converts("ThresholdedRelu")
def _thresholded_relu(ctx: Context) -> Expr:
    from tvm import relax

    x = ctx.inputs[0]
    return relax.op.where(relax.op.greater(x, ctx.const(float(ctx.attr("alpha", 1.0)))), x, ctx.const(0))


@converts("Sign")
def _sign(ctx: Context) -> Expr:
    from tvm import relax

    x = ctx.inputs[0]
    if np.dtype(ctx.dtype()).kind != "f":
        return relax.op.sign(x)
    return relax.op.where(relax.op.isnan(x), x, relax.op.sign(x))


@converts("HardSwish")
def _hard_swish(ctx: Context) -> Expr:
    from tvm import relax

    x = ctx.inputs[0]
    line = relax.op.add(relax.op.multiply(x, ctx.const(1 / 6)), ctx.const(0.5))
    return relax.op.multiply(x, relax.op.clip(line, 0.0, 1.0))


@converts("Softmax", "LogSoftmax")
def _softmax(ctx: Context) -> Expr:
    from tvm import relax

    operator = relax.op.nn.softmax if ctx.node.op_type == "Softmax" else relax.op.nn.log_softmax
    rank = len(ctx.shape())
    axis = ctx.attr("axis", 1 if ctx.opset < 13 else -1)
    axis = axis + rank if axis < 0 else axis
    shape = ctx.shape()
    # Before opset 13 all axes from `axis` on are one; the same thing if only one of them is longer than 1.
    if ctx.opset >= 13 or axis == rank - 1:
        return operator(ctx.inputs[0], axis=axis)
    long = [index for index in range(axis, rank) if shape[index] != 1]
    if len(long) <= 1:
        return operator(ctx.inputs[0], axis=long[0] if long else axis)
    rows = int(np.prod(shape[:axis], dtype=np.int64))
    flat = relax.op.reshape(ctx.inputs[0], (rows, int(np.prod(shape[axis:], dtype=np.int64))))
    return relax.op.reshape(operator(flat, axis=1), shape)


@converts("Swish")
def _swish(ctx: Context) -> Expr:
    from tvm import relax

    x, alpha = ctx.inputs[0], float(ctx.attr("alpha", 1.0))
    inner = x if alpha == 1.0 else relax.op.multiply(x, ctx.const(alpha))
    return relax.op.multiply(x, relax.op.sigmoid(inner))
