"""Element-wise operators whose conversion by TVM costs extra passes over the data."""

from __future__ import annotations

import functools

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr


@converts("Add", "Sub", "Mul", "Pow", "And", "Or", "Xor", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
def _binary(ctx: Context) -> Expr:
    from tvm import relax

    name = {
        "Add": "add", "Sub": "subtract", "Mul": "multiply", "Pow": "power", "And": "logical_and", "Or": "logical_or",
        "Xor": "logical_xor", "Equal": "equal", "Less": "less", "Greater": "greater", "LessOrEqual": "less_equal",
        "GreaterOrEqual": "greater_equal",
    }[ctx.node.op_type]  # fmt: skip
    left, right = ctx.inputs
    if ctx.node.op_type == "Pow":
        exponent = ctx.value(1)
        if exponent is not None and exponent.size == 1 and ctx.out_shape() == ctx.shape():
            if float(exponent.reshape(())) == 2.0:
                return relax.op.multiply(left, left)
            if float(exponent.reshape(())) == 0.5 and np.dtype(ctx.dtype()).kind == "f":
                return relax.op.sqrt(left)
        if np.dtype(ctx.dtype()).kind != "f":
            wide = relax.op.power(relax.op.astype(left, "float64"), relax.op.astype(right, "float64"))
            return relax.op.astype(wide, ctx.out_dtype())
        if ctx.dtype(0) != ctx.dtype(1):
            right = relax.op.astype(right, ctx.dtype(0))
    return getattr(relax.op, name)(left, right)


@converts("Min", "Max", "Sum", "Mean")
def _variadic(ctx: Context) -> Expr:
    from tvm import relax

    pair = {"Min": relax.op.minimum, "Max": relax.op.maximum}.get(ctx.node.op_type, relax.op.add)
    total = functools.reduce(lambda left, right: ctx.emit(pair(left, right)), ctx.inputs)
    if ctx.node.op_type != "Mean" or len(ctx.inputs) == 1:
        return total
    return relax.op.divide(total, ctx.const(len(ctx.inputs)))


@converts("Cast")
def _cast(ctx: Context) -> Expr:
    from tvm import relax

    source, target = np.dtype(ctx.dtype()), np.dtype(ctx.out_dtype())
    if source == target:
        return ctx.inputs[0]
    if target == np.dtype(bool):
        return relax.op.not_equal(ctx.inputs[0], ctx.const(0))
    return relax.op.astype(ctx.inputs[0], ctx.out_dtype())


@converts("IsInf")
def _is_inf(ctx: Context) -> Expr:
    from tvm import relax

    x = ctx.inputs[0]
    positive, negative = bool(ctx.attr("detect_positive", 1)), bool(ctx.attr("detect_negative", 1))
    if positive and negative:
        return relax.op.isinf(x)
    if not positive and not negative:
        return relax.op.zeros(ctx.shape(), "bool")
    return relax.op.equal(x, ctx.const(float("inf") if positive else float("-inf")))
