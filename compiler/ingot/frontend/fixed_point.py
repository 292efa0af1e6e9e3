"""`ingot.requantize`: sums of whole numbers to 8-bit integers in 32-bit fixed point, as one Relax operator.

    requantize(x, m, t, s) = clip(((h + t) >> s) + z, low, high),   h = (x * m + 2^30) >> 31

with x int32, and m, t, s int32 constants, one for all or one for each last index. h is gemmlowp's rounding doubling
high multiply (ARM's sqrdmulh), which takes halves upward; t holds the half of the second rounding and the zero point.
Shifted by more than 22 that may not fit: then z is the zero point, else it is 0 and nothing is added. The roundings:

- "up": as above, halves of the second rounding go upward.
- "away": they go away from zero: h is one less where it is negative.
- "once": clip(((x * m + 2^(30 + s)) >> (31 + s)) + t, low, high) in 64 bits; t is the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Op, register_op_attr
from tvm.ir import _ffi_api as tvm_ir

REQUANTIZE = "ingot.requantize"

#: A zero point of 8 bits, shifted by so much, and half of a step fit 32 bits.
_MOST_SHIFTED = 22

#: Numbers m * 2^(e - 31), as the arrays m (int64, below 2^31) and e.
Ratio = tuple[np.ndarray, np.ndarray]


def high_multiply(x: Any, multiplier: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return (x * multiplier + 2^30) >> 31 by its definition, in 64 bits: int32."""
    product = x.astype("int64") * multiplier.astype("int64") + tirx.const(1 << 30, "int64")
    return tirx.shift_right(product, tirx.const(31, "int64")).astype("int32")


def multiply_once(x: Any, multiplier: Any, shift: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return (x * multiplier + 2^(30 + shift)) >> (31 + shift): int32."""
    by = shift.astype("int64") + tirx.const(31, "int64")
    half = tirx.shift_left(tirx.const(1, "int64"), by - tirx.const(1, "int64"))
    return tirx.shift_right(x.astype("int64") * multiplier.astype("int64") + half, by).astype("int32")


def shift_offset(high: Any, offset: Any, shift: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return (high + offset) >> shift: int32."""
    return tirx.shift_right(high + offset, shift)


def define(
    builder: Any,  # noqa: ANN401
    call: Any,  # noqa: ANN401
    multiply: Any = high_multiply,  # noqa: ANN401
    once: Any = multiply_once,  # noqa: ANN401
    shifted: Any = shift_offset,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return the loop nest of a call of the operator.

    `multiply` computes h, `shifted` its second rounding, `once` the product rounded once.
    """
    attrs = call.attrs
    low, high = (tirx.const(int(attrs[key]), "int32") for key in ("low", "high"))
    rounding, after = str(attrs["rounding"]), int(attrs["after"])
    numbers = [_one_number(arg) for arg in call.args[1:]]
    tensors = [arg for arg, number in zip(call.args[1:], numbers, strict=True) if number is None]

    def compute(x: Any, *others: Any) -> Any:  # noqa: ANN401 - TE tensors
        rest = iter(others)
        sources = [number if number is not None else next(rest) for number in numbers]

        def at(*index: Any) -> Any:  # noqa: ANN401
            m, t, s = (
                tirx.const(item, "int32") if isinstance(item, int) else item(*index[len(index) - len(item.shape) :])
                for item in sources
            )
            if rounding == "once":
                return tirx.min(tirx.max(once(x(*index), m, s) + t, low), high).astype(str(attrs["dtype"]))
            h = multiply(x(*index), m)
            if rounding == "away":
                h = h + tirx.shift_right(h, tirx.const(31, "int32"))
            scaled = shifted(h, t, s)
            scaled = scaled + tirx.const(after, "int32") if after else scaled
            return tirx.min(tirx.max(scaled, low), high).astype(str(attrs["dtype"]))

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


def decompose(ratio: np.ndarray) -> Ratio:
    """Return 31-bit fractions m (int64) and exponents e with ratio = m * 2^(e - 31), as TFLite quantises multipliers.

    m lies in [2^30, 2^31) or is 0.
    """
    fraction, exponent = np.frexp(ratio)
    multiplier = np.rint(fraction * np.exp2(31)).astype(np.int64)
    exponent = exponent + (multiplier == 1 << 31)
    return np.where(multiplier == 1 << 31, 1 << 30, multiplier), exponent


def is_simple(exponent: np.ndarray, rounding: str) -> bool:
    """Say whether the operator expresses ratios with these exponents without overflow for sums below 2^30.

    They must be below 1 (below 1/2 if halves go away from zero); rounded once, below 2^23 and not below 2^-32.
    """
    most, least = {"up": (0, None), "away": (-1, None), "once": (23, -31)}[rounding]
    return bool(np.all(exponent <= most) and (least is None or np.all(exponent >= least)))


@dataclass(frozen=True)
class Constants:
    """What the operator multiplies by, adds and shifts by (int32 arrays m, t, s), and what it adds at last (z)."""

    multiplier: np.ndarray
    offset: np.ndarray
    shift: np.ndarray
    after: int = 0

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return m, t and s."""
        return self.multiplier, self.offset, self.shift


def constants(ratio: Ratio, zero_point: int, rounding: str) -> Constants:
    """Return the operator's constants for simple ratios."""
    multiplier, exponent = ratio
    shift = np.minimum(-exponent.astype(np.int64), 31)  # beyond, all sums below 2^30 become zero, as with 31
    if rounding == "once":
        return _int32(multiplier, np.full(shift.shape, zero_point), shift)
    half = np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0)
    if np.all(shift <= _MOST_SHIFTED):
        return _int32(multiplier, half + (zero_point << np.maximum(shift, 0)), shift)
    return _int32(multiplier, half, shift, zero_point)


def _int32(multiplier: np.ndarray, offset: np.ndarray, shift: np.ndarray, after: int = 0) -> Constants:
    return Constants(multiplier.astype(np.int32), offset.astype(np.int32), shift.astype(np.int32), after)


def requantize(
    x: Any,  # noqa: ANN401 - Relax expressions
    numbers: tuple[Any, Any, Any],
    limits: tuple[int, int],
    dtype: str,
    rounding: str,
    after: int = 0,
) -> Any:  # noqa: ANN401
    """Return the call on int32 `x`; `numbers` are m, t and s as expressions, `after` is z."""
    attrs = tvm.ir.make_node("ir.DictAttrs", low=limits[0], high=limits[1], dtype=dtype, rounding=rounding, after=after)
    return relax.Call(_OPERATOR, [x, *numbers], attrs)
