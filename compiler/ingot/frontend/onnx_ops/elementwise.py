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
    if ctx.node.op_type == "Equal" and ctx.dtype() == "bool":
        # LLVM code for a vector of bools compared by TVM's `equal` is not valid.
        return relax.op.logical_not(relax.op.logical_xor(left, right))
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


@converts("Mod")
def _mod(ctx: Context) -> Expr:
    from tvm import relax

    left, right = ctx.inputs
    kind = np.dtype(ctx.dtype()).kind
    if kind in "iu" and not ctx.attr("fmod", 0):
        return relax.op.floor_mod(left, right)
    # C's fmod has the sign of the dividend; Python's has that of the divisor, which needs one more addition.
    rest = ctx.emit(relax.op.mod(left, right))
    if ctx.attr("fmod", 0):
        return rest
    zero = ctx.const(0)
    differs = relax.op.logical_xor(relax.op.less(rest, zero), relax.op.less(right, zero))
    wrong = relax.op.logical_and(relax.op.not_equal(rest, zero), differs)
    signed_zero = relax.op.multiply(relax.op.abs(rest), relax.op.sign(right))
    rest = relax.op.where(wrong, relax.op.add(rest, right), rest)
    return relax.op.where(relax.op.equal(rest, zero), signed_zero, rest)


@converts("BitShift")
def _bit_shift(ctx: Context) -> Expr:
    """A shift by the type's width or more, or by a negative amount, gives 0 (or the sign, to the right)."""
    from tvm import relax

    x, amount = ctx.inputs
    dtype = ctx.dtype()
    width = np.dtype(dtype).itemsize * 8
    left = ctx.attr("direction", "LEFT") == "LEFT"
    bounded = relax.op.clip(amount, 0, width - 1)
    inside = relax.op.less(amount, ctx.const(width))
    if not dtype.startswith("u"):
        inside = relax.op.logical_and(inside, relax.op.greater_equal(amount, ctx.const(0)))
    shifted = relax.op.left_shift(x, bounded) if left else relax.op.right_shift(x, bounded)
    if left or dtype.startswith("u"):
        return relax.op.where(inside, shifted, ctx.const(0))
    return relax.op.where(inside, shifted, relax.op.right_shift(x, ctx.const(width - 1)))


@converts("Cosh", "Sinh")
def _hyperbolic(ctx: Context) -> Expr:
    from tvm import relax

    # In double precision: near 0 the difference of two exponentials loses what float32 holds.
    x = relax.op.astype(ctx.inputs[0], "float64")
    up, down = relax.op.exp(x), relax.op.exp(relax.op.negative(x))
    total = relax.op.add(up, down) if ctx.node.op_type == "Cosh" else relax.op.subtract(up, down)
    return relax.op.astype(relax.op.multiply(total, ctx.const(0.5, "float64")), ctx.out_dtype())


@converts("Celu")
def _celu(ctx: Context) -> Expr:
    from tvm import relax

    x, alpha = ctx.inputs[0], float(ctx.attr("alpha", 1.0))
    inner = relax.op.subtract(relax.op.exp(relax.op.divide(x, ctx.const(alpha))), ctx.const(1))
    negative = relax.op.minimum(ctx.const(0), relax.op.multiply(ctx.const(alpha), inner))
    return relax.op.add(relax.op.maximum(ctx.const(0), x), negative)
