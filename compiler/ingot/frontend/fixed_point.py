"""`ingot.requantize`: sums of whole numbers to 8-bit integers in 32-bit fixed point, as one Relax operator.

    requantize(x, m, t, s) = clip((h + t) >> s, low, high),   h = (x * m + 2^30) >> 31

with x int32, and m, t, s int32 constants, one for all or one for each last index. h is gemmlowp's rounding doubling
high multiply (ARM's sqrdmulh), which takes halves upward; t holds the half of the second rounding and the zero point.
With `away` the second rounding takes halves away from zero: h is one less where it is negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Op, register_op_attr
from tvm.ir import _ffi_api as tvm_ir

REQUANTIZE = "ingot.requantize"


def high_multiply(x: Any, multiplier: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return (x * multiplier + 2^30) >> 31 by its definition, in 64 bits: int32."""
    product = x.astype("int64") * multiplier.astype("int64") + tirx.const(1 << 30, "int64")
    return tirx.shift_right(product, tirx.const(31, "int64")).astype("int32")


def define(builder: Any, call: Any, multiply: Any = high_multiply) -> Any:  # noqa: ANN401
    """Return the loop nest of a call of the operator; `multiply` computes h."""
    attrs = call.attrs
    low, high = (tirx.const(int(attrs[key]), "int32") for key in ("low", "high"))
    away = bool(attrs["away"])
    numbers = [_one_number(arg) for arg in call.args[1:]]
    tensors = [arg for arg, number in zip(call.args[1:], numbers, strict=True) if number is None]

    def compute(x: Any, *others: Any) -> Any:  # noqa: ANN401 - TE tensors
        rest = iter(others)
        sources = [number if number is not None else next(rest) for number in numbers]

        def at(*index: Any) -> Any:  # noqa: ANN401
            m, t, s = (
                tirx.const(item, "int32") if isinstance(item, int) else item(*index[-len(item.shape) :])
                for item in sources
            )
            h = multiply(x(*index), m)
            if away:
                h = h + tirx.shift_right(h, tirx.const(31, "int32"))
            return tirx.min(tirx.max(tirx.shift_right(h + t, s), low), high).astype(str(attrs["dtype"]))

        return te.compute(x.shape, at, name="requantize")

    return builder.call_te(compute, call.args[0], *tensors, primfunc_name_hint="requantize")


def _one_number(expr: Any) -> int | None:  # noqa: ANN401
    """Return the value of a constant of one element."""
    if not isinstance(expr, tvm.ir.GenericConst):
        return None
    value = expr.value.numpy()
    return int(value.reshape(-1)[0]) if value.size == 1 else None


def _register() -> Op:
    """Make the operator known to Relax; TVM has one table of operators for the process."""
    if REQUANTIZE not in [str(name) for name in Op.list_op_names()]:
        tvm_ir.RegisterOp(REQUANTIZE, "Whole-number sums to 8-bit integers, in fixed point.")
        register_op_attr(
            REQUANTIZE, "FInferType", lambda call, _: relax.TensorType(call.args[0].ty.shape, call.attrs["dtype"])
        )
        register_op_attr(REQUANTIZE, "FPurity", True)
        register_op_attr(REQUANTIZE, "FLegalize", define)
    return Op.get(REQUANTIZE)


_OPERATOR = _register()


def decompose(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 31-bit fractions m (int64) and exponents e with ratio = m * 2^(e - 31), as TFLite quantises multipliers.

    m lies in [2^30, 2^31) or is 0.
    """
    fraction, exponent = np.frexp(ratio)
    multiplier = np.rint(fraction * np.exp2(31)).astype(np.int64)
    exponent = exponent + (multiplier == 1 << 31)
    return np.where(multiplier == 1 << 31, 1 << 30, multiplier), exponent


def is_simple(ratio: np.ndarray, away: bool) -> bool:
    """Say whether the operator expresses these ratios without overflow for sums below 2^30.

    They must be below 1 (below 1/2 if halves go away from zero) and not below 2^-23, since t holds zero_point << s.
    """
    exponent = decompose(ratio)[1]
    return bool(np.all(exponent <= (-1 if away else 0)) and np.all(exponent >= -22))


def constants(ratio: np.ndarray, zero_point: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return m, t and s (int32) for simple ratios; equal ones are one number."""
    if np.all(ratio == ratio.reshape(-1)[0]):
        ratio = ratio.reshape(-1)[:1]
    multiplier, exponent = decompose(ratio)
    shift = -exponent.astype(np.int64)
    offset = np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0) + (zero_point << shift)
    return multiplier.astype(np.int32), offset.astype(np.int32), shift.astype(np.int32)


def requantize(
    x: Any,  # noqa: ANN401 - Relax expressions
    numbers: tuple[Any, Any, Any],
    limits: tuple[int, int],
    dtype: str,
    away: bool,
) -> Any:  # noqa: ANN401
    """Return the call on int32 `x`; `numbers` are m, t and s as expressions."""
    attrs = tvm.ir.make_node("ir.DictAttrs", low=limits[0], high=limits[1], dtype=dtype, away=away)
    return relax.Call(_OPERATOR, [x, *numbers], attrs)
