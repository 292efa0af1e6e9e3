"""Statements of kernels on 16-bit fixed-point numbers: sigmoid, tanh and products, as TFLite's integer kernels compute.

A number of n integer bits is stored in 16 bits as its value times 2^(15 - n). The functions are gemmlowp's (its
`fixedpoint.h` documents them): exp of a number below 0 is a polynomial for the last quarter times factors
exp(-1/4), exp(-1/2), ... that the other bits choose; 1 / (1 + e) comes from three steps of Newton's method.

Every value is kept in a variable of its own: nested in one expression, values would be computed over and over.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.fixed_point import high_multiply
from ingot.frontend.loops import scalar
from ingot.frontend.tflite_tables import divide_by_power
from ingot.frontend.tvm_types import Expr

_MOST, _LEAST = (1 << 15) - 1, -(1 << 15)


def keep(value: Expr, dtype: str = "int16") -> Expr:
    """Write a statement that computes `value`, as `dtype`, and return what reads it."""
    place: Any = scalar(dtype)
    place[0] = value.astype(dtype)
    return place[0]


def constant(value: int, dtype: str = "int32") -> Expr:
    """Return a number of the kernel."""
    from tvm import tirx

    return tirx.const(value, dtype)


def within(value: Expr, least: int, most: int) -> Expr:
    """Return an int32 value held to two limits."""
    from tvm import tirx

    return tirx.min(tirx.max(value, constant(least)), constant(most))


def rescale(value: Expr, ratio: tuple[int, int]) -> Expr:
    """Return an int32 value times m * 2^(e - 31), `ratio` being (m, e): rounded twice, the second time away from zero.

    It is TFLite's multiplication by a quantised multiplier; m below 2^31, e from -31 to 30.
    """
    from tvm import tirx

    multiplier, exponent = ratio
    shifted = tirx.shift_left(value, constant(exponent)) if exponent > 0 else value
    high = keep(high_multiply(shifted, constant(multiplier)), "int32")
    return divided(high, -exponent) if exponent < 0 else high


def divided(value: Expr, power: int) -> Expr:
    """Return an int32 value / 2^power, rounded, halves away from zero; power from 1 to 31."""
    from tvm import tirx

    sign = tirx.shift_right(value, constant(31))
    return keep(tirx.shift_right(value + constant(1 << (power - 1)) + sign, constant(power)), "int32")


def sigmoid(value: Expr) -> Expr:
    """Return the sigmoid of a number of 3 integer bits, with none."""
    from tvm import tirx

    inverse = _reciprocal(_exponential(_below_zero(value), 3))  # of half of 1 + e, with two integer bits
    above = keep(tirx.Select(_wide(inverse) > constant(_MOST >> 1), constant(_MOST), _wide(inverse) * constant(2)))
    sided = tirx.Select(_wide(value) > constant(0), _wide(above), constant(_MOST) - _wide(above))
    return keep(tirx.Select(_wide(value).equal(constant(0)), constant(1 << 14), sided))


def tanh(value: Expr, bits: int) -> Expr:
    """Return tanh of a number of `bits` integer bits (0 to 6), with none: 2 / (1 + exp(-2 x)) - 1."""
    from tvm import tirx

    # The same stored number with one integer bit more is twice the number.
    inverse = _reciprocal(_exponential(_below_zero(value), bits + 1))
    above = keep(_times_four(_wide(inverse) - constant(1 << 13)))
    sided = tirx.Select(_wide(value) < constant(0), -_wide(above), _wide(above))
    return keep(tirx.Select(_wide(value).equal(constant(0)), constant(0), sided))


def _wide(value: Expr) -> Expr:
    return value.astype("int32")


def _below_zero(value: Expr) -> Expr:
    """Return -|value|, which has no overflow."""
    from tvm import tirx

    return keep(tirx.Select(_wide(value) > constant(0), -_wide(value), _wide(value)))


def _multiplied(left: Expr, right: Expr | int) -> Expr:
    """Return (left * right + 2^14) >> 15, written as instructions that round a product do it."""
    from tvm import tirx

    product = _wide(left) * (constant(right) if isinstance(right, int) else _wide(right))
    return keep(tirx.shift_right(tirx.shift_right(product, constant(14)) + constant(1), constant(1)))


def _times_four(value: Expr) -> Expr:
    """Return an int32 value times 4, saturated to 16 bits where gemmlowp saturates."""
    from tvm import tirx

    most = (1 << 13) - 1
    above = tirx.Select(value > constant(most), constant(_MOST), value * constant(4))
    return tirx.Select(value < constant(-most), constant(_LEAST), above)


def _number(value: float, bits: int = 0) -> int:
    """Return a constant as gemmlowp stores it in 16 bits: rounded from 32."""
    whole = np.rint(value * 2.0 ** (31 - bits)).astype(np.int64)
    return int(divide_by_power(np.asarray(whole), 16))


def _exponential(value: Expr, bits: int) -> Expr:
    """Return exp of a number of `bits` integer bits that is not above 0, with none."""
    from tvm import tirx

    point = 15 - bits
    quarter = 1 << (point - 2)
    last = keep(tirx.bitwise_and(_wide(value), constant(quarter - 1)) - constant(quarter))
    # Four terms around -1/8.
    x = keep(tirx.shift_left(_wide(last), constant(bits)) + constant(1 << 12))
    x2 = _multiplied(x, x)
    x3, x4 = _multiplied(x2, x), _multiplied(x2, x2)
    fourth = divided(_wide(x4), 2)
    third = _multiplied(keep(fourth + _wide(x3)), _number(1 / 3))
    tail = divided(_wide(third) + _wide(x2), 1)
    start = _number(float(np.exp(-0.125)))
    slope = _multiplied(keep(_wide(x) + tail), start)
    result = keep(tirx.min(_wide(slope) + constant(start), constant(_MOST)))
    rest = keep(_wide(last) - _wide(value))
    for power in range(-2, min(bits, 5)):
        factor = _number(float(np.exp(-(2.0**power))))
        chosen = tirx.bitwise_and(_wide(rest), constant(1 << (point + power)))
        less = _multiplied(result, factor)
        result = keep(tirx.Select(chosen.equal(constant(0)), _wide(result), _wide(less)))
    if bits > 5:  # exp(-32) is 0
        tiny = _wide(value) < constant(-(1 << (20 - bits)))
        result = keep(tirx.Select(tiny, constant(0), _wide(result)))
    return keep(tirx.Select(_wide(value).equal(constant(0)), constant(_MOST), _wide(result)))


def _reciprocal(value: Expr) -> Expr:
    """Return 2 / (1 + value) with two integer bits, for a number from 0 to 1 with none."""
    from tvm import tirx

    half = keep(tirx.shift_right(_wide(value) + constant(_MOST + 1), constant(1)))
    x = keep(constant(_number(48 / 17, 2)) + _wide(_multiplied(half, _number(-32 / 17, 2))))
    for _ in range(3):
        error = keep(constant(1 << 13) - _wide(_multiplied(half, x)))
        x = keep(_wide(x) + _times_four(_wide(_multiplied(x, error))))
    return x


def inverse_root(value: Expr) -> tuple[Expr, Expr]:
    """Return (m, s) with 1 / sqrt(value) about m * 2^(-31 - s), for an int32 value from 1 to 2^30.

    It is TFLite's: five steps of Newton's method from 1, on numbers of 3 integer bits, after value is brought to
    2^27 ... 2^29 by an even shift.
    """
    from tvm import tirx

    def multiplied(left: Expr, right: Expr) -> Expr:
        return keep(high_multiply(left, right), "int32")

    def shifted(value: Expr, by: int) -> Expr:
        most = (1 << (31 - by)) - 1
        low, high = constant(-(1 << 31)), constant((1 << 31) - 1)
        more = tirx.Select(value > constant(most), high, tirx.shift_left(value, constant(by)))
        return keep(tirx.Select(value < constant(-most), low, more), "int32")

    large = value >= constant(1 << 29)
    less = keep(tirx.Select(large, tirx.shift_right(value, constant(2)), value), "int32")
    zeros = keep(tirx.clz(less), "int32")
    pairs = keep(tirx.shift_right(zeros - constant(1), constant(1)) - constant(1), "int32")
    even = keep(tirx.shift_left(less, pairs * constant(2)), "int32")
    shift = keep(tirx.Select(large, constant(12), constant(11)) - pairs, "int32")
    number = keep(tirx.shift_right(even, constant(1)), "int32")
    half = keep(tirx.shift_right(number + constant(1), constant(1)), "int32")
    x = constant(1 << 28)
    for _ in range(5):
        cube = shifted(multiplied(multiplied(x, x), x), 6)
        x = shifted(multiplied(constant(3 << 27), x) - multiplied(half, cube), 3)
    x = multiplied(x, constant(round(2.0**30.5)))
    left = keep(tirx.max(-shift, constant(0)), "int32")
    one = value <= constant(1)
    root = keep(tirx.Select(one, constant((1 << 31) - 1), tirx.shift_left(x, left)), "int32")
    return root, keep(tirx.Select(one, constant(0), tirx.max(shift, constant(0))), "int32")
