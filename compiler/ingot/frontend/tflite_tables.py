"""Tables of 8-bit functions as TFLite's reference kernels compute them, in numpy: one entry for each stored value.

The fixed-point arithmetic is gemmlowp's (its `fixedpoint.h` documents it): a number of Q bits holds its value times
2^Q. `high_multiply` takes halves upward, `divide_by_power` takes them away from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ingot.frontend.fixed_point import decompose

Array = np.ndarray


@dataclass(frozen=True)
class Scale:
    """How a tensor is stored: value = scale * (stored - zero_point), stored as `dtype` (int8 or uint8)."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def stored(self) -> Array:
        """Every stored value, the smallest first: int64[256]."""
        info = np.iinfo(self.dtype)
        return np.arange(int(info.min), int(info.max) + 1, dtype=np.int64)

    def clipped(self, values: Array) -> Array:
        """Return whole numbers as stored values, saturated."""
        info = np.iinfo(self.dtype)
        return np.asarray(np.clip(values, info.min, info.max).astype(self.dtype))


def high_multiply(a: Array, b: Array | int, bits: int = 32) -> Array:
    """Return a * b * 2^(1 - bits) rounded, saturated to `bits` bits: gemmlowp's rounding doubling high multiply."""
    product = a.astype(np.int64) * np.asarray(b, np.int64)
    return np.asarray(np.minimum((product + (1 << (bits - 2))) >> (bits - 1), (1 << (bits - 1)) - 1))


def divide_by_power(x: Array, power: Array | int) -> Array:
    """Return x / 2^power, rounded, halves away from zero."""
    shift = np.asarray(power, np.int64)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    return np.asarray((x + half - ((x < 0) & (shift > 0))) >> shift)


def scaled(x: Array, ratio: float) -> Array:
    """Return x * ratio as TFLite multiplies by a quantised multiplier."""
    multiplier, exponent = decompose(np.asarray(ratio, np.float64))
    left, right = max(int(exponent), 0), max(-int(exponent), 0)
    return divide_by_power(high_multiply(x << left, multiplier), min(right, 31))


def by_float(source: Scale, result: Scale, function: Callable[[Array], Array]) -> Array:
    """Return the table of a function that TFLite looks up too: computed in float32, halves away from zero.

    function: float64 to float64; its value is rounded to float32.
    """
    real = np.float32(source.scale) * (source.stored - source.zero_point).astype(np.float32)
    with np.errstate(all="ignore"):
        value = function(real.astype(np.float64)).astype(np.float32)
        steps = (value * (np.float32(1) / np.float32(result.scale))).astype(np.float64)
    rounded = np.trunc(steps + np.copysign(0.5, steps))
    return result.clipped(np.clip(np.nan_to_num(rounded), -(2.0**30), 2.0**30) + result.zero_point)


def rescaled(source: Scale, result: Scale) -> Array:
    """Return the table of the same value on another scale, in float32, halves away from zero: CONCATENATION's."""
    ratio = np.float32(source.scale) * (np.float32(1) / np.float32(result.scale))
    shift = np.float32(-source.zero_point) * ratio
    steps = (source.stored.astype(np.float32) * ratio + shift).astype(np.float64)
    return result.clipped(np.trunc(steps + np.copysign(0.5, steps)) + result.zero_point)


def leaky_relu(source: Scale, result: Scale, alpha: float) -> Array:
    """Return the table of max(x, 0) + alpha * min(x, 0)."""
    x = source.stored - source.zero_point
    ratio = np.float32(source.scale) / np.float32(result.scale)
    slope = np.float32(source.scale) * np.float32(alpha) / np.float32(result.scale)
    sign = -1 if slope < 0 else 1
    below = sign * scaled(x, float(abs(slope)))
    return result.clipped(np.where(x >= 0, scaled(x, float(ratio)), below) + result.zero_point)


def clamp(source: Scale, result: Scale, least: int, most: int) -> Array:
    """Return the table of a value on another scale, within stored values `least` to `most`."""
    ratio = np.float32(source.scale) / np.float32(result.scale)
    moved = scaled(source.stored - source.zero_point, float(ratio)) + result.zero_point
    return result.clipped(np.clip(moved, least, most))


def hard_swish(source: Scale, result: Scale) -> Array:
    """Return the table of x * min(max(x + 3, 0), 6) / 6, in 16-bit fixed point."""
    fine = np.float32(source.scale) / np.float32(128)  # the scale of x with seven more bits

    def sixteen(ratio: np.float32) -> tuple[int, int]:
        multiplier, exponent = decompose(np.asarray(np.float64(ratio)))
        return min((int(multiplier) + (1 << 15)) >> 16, (1 << 15) - 1), int(exponent)

    def shifted(value: Array, by: int) -> Array:
        return np.asarray(np.clip(value << by, -(1 << 15), (1 << 15) - 1))

    out_multiplier, out_exponent = sixteen(fine / np.float32(result.scale))
    gate_multiplier, gate_exponent = sixteen(fine / (np.float32(3) / np.float32(32768)))
    x = (source.stored - source.zero_point) << 7
    whole = high_multiply(x, out_multiplier, 16)
    gate = shifted(x, gate_exponent - 1) if gate_exponent > 0 else x
    gate = high_multiply(gate, gate_multiplier, 16)
    if gate_exponent > 0:
        gate = shifted(gate, 1)
    elif gate_exponent < 0:
        gate = divide_by_power(gate, -gate_exponent)
    gate = (gate + (1 << 15)) >> 1  # from -1 ... 1 to 0 ... 1
    product = np.sign(whole) * ((gate * np.abs(whole)) >> 15)  # this multiplication cuts off
    return result.clipped(divide_by_power(product, max(-out_exponent, 0)) + result.zero_point)


#: Bits before the point in sums of exponentials: rows of up to 2^12 elements cannot overflow.
SUM_BITS = 12
#: Softmax's differences have that many bits before the point.
_DIFFERENCE_BITS = 5


def exponentials(scale: float, beta: float) -> Array:
    """Return exp(-beta * scale * d) for d = 0 ... 255 with 31 bits after the point, 0 where TFLite takes it for 0."""
    ratio = min(float(np.float64(beta) * np.float64(scale) * (1 << (31 - _DIFFERENCE_BITS))), float((1 << 31) - 1))
    multiplier, exponent = decompose(np.asarray(ratio, np.float64))
    largest = ((1 << _DIFFERENCE_BITS) - 1) * (1 << (31 - _DIFFERENCE_BITS)) / (1 << int(exponent))
    difference = -np.arange(256, dtype=np.int64)
    fixed = high_multiply(difference << int(exponent), multiplier)
    return np.where(difference >= -int(np.floor(largest)), _exponential(fixed), 0).astype(np.int32)


def _exponential(a: Array) -> Array:
    """Return exp of numbers that are not positive, with 26 bits after the point: 31 bits after it.

    The last quarter is a polynomial; the other bits choose factors exp(-1/4), exp(-1/2), ... exp(-16).
    """
    point = 31 - _DIFFERENCE_BITS
    quarter = 1 << (point - 2)
    last = (a & (quarter - 1)) - quarter
    result = _near_minus_eighth(last << _DIFFERENCE_BITS)
    rest = last - a
    for power in range(-2, _DIFFERENCE_BITS):
        factor = int(np.rint(np.exp(-(2.0**power)) * 2.0**31))
        result = np.where(rest & (1 << (point + power)), high_multiply(result, factor), result)
    return np.where(a == 0, (1 << 31) - 1, result)


def _near_minus_eighth(a: Array) -> Array:
    """Return exp of -1/4 <= a < 0, all with 31 bits after the point: four terms around -1/8."""
    x = a + (1 << 28)
    x2 = high_multiply(x, x)
    x3 = high_multiply(x2, x)
    x4 = high_multiply(x2, x2)
    third = int(np.rint(2.0**31 / 3))
    fourth = divide_by_power(x4, 2)
    tail = divide_by_power(high_multiply(fourth + x3, third) + x2, 1)
    start = int(np.rint(np.exp(-0.125) * 2.0**31))
    return start + high_multiply(x + tail, start)
