"""round(x / s) + z, saturated to 8 bits, with two multiplications in place of the division.

A division of 512 bits takes as long as 20 to 32 other instructions, that of a small ARM core too, and the rest of
requantising takes ten. (One of 256 bits is done beside those ten, and costs nothing.) s is known while compiling,
so x / s can be computed by its reciprocal in two parts, h = RN(1 / s) and l = RN(1 / s - h):

    q = RN(x h + RN(x l))        a multiplication and an FMA

(N. Brisebarre, J.-M. Muller, S. K. Raina: Accelerating correctly rounded floating-point division when the divisor is
known in advance, IEEE Transactions on Computers 53(8), 2004.) q can differ from RN(x / s), and here only the integer it
is rounded to counts. x is clipped first, so that few integers are left, and `reciprocal` compares both ways around all
the numbers where the integer changes: as both grow with x, they agree everywhere once they agree there. Where they do
not, the division stays.

Adding 1.5 * 2^23 rounds q to the nearest integer, ties to even, which is then in the low bits of the sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx

from ingot.schedules import llvm_forms
from ingot.target import Target

_FAMILY = "quotient"
_MAGIC = np.float32(1.5 * 2**23)
#: Bits of the vectors whose division is slow.
_WIDE = 512
#: Neighbouring floats on each side of a step at which both ways are compared; they can differ by less than two.
_NEAR = 4


@dataclass(frozen=True)
class Reciprocal:
    """What replaces a divisor: 1 / s in two parts, and between which numbers x is clipped first."""

    first: float
    second: float
    low: float
    high: float


@functools.lru_cache(maxsize=4096)
def reciprocal(divisor: float, low: int, high: int) -> Reciprocal | None:
    """Return what divides float32 numbers so that they round to the same integers from `low` to `high`, or None."""
    s = np.float32(divisor)
    if not (np.isfinite(s) and s > 0):
        return None
    with np.errstate(all="ignore"):
        exact = 1 / np.float64(s)
        first = np.float32(exact)
        second = np.float32(exact - np.float64(first))
        ends = np.array([low, high], np.float32) * s
        places = [np.clip((np.arange(low, high) + 0.5) * np.float64(s), *ends).astype(np.float32)]
        for side in (-np.inf, np.inf):
            near = places[0]
            for _ in range(_NEAR):
                near = np.nextafter(near, np.float32(side))
                places.append(np.clip(near, *ends))
        x = np.concatenate([ends, *places])
        rounded = (_fma(x, first, x * second) + _MAGIC).view(np.int32) - _MAGIC.view(np.int32)
        wanted = np.rint(x / s)
    same = np.isfinite(ends).all() and list(wanted[:2]) == [low, high] and np.array_equal(rounded, wanted)
    return Reciprocal(float(first), float(second), float(ends[0]), float(ends[1])) if same else None


def _fma(x: np.ndarray, factor: np.float32, addend: np.ndarray) -> np.ndarray:
    """Return x * factor + addend of float32 numbers, rounded once: to odd in float64, then to float32."""
    product, term = x.astype(np.float64) * np.float64(factor), addend.astype(np.float64)
    total = product + term
    part = total - product
    error = (product - (total - part)) + (term - part)
    bits = total.view(np.int64)
    even = (bits & 1 == 0) & (error != 0)
    odd: np.ndarray = np.where(even, bits + np.where((error > 0) == (total > 0), 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


def lower(function: Any, target: Target) -> Any:  # noqa: ANN401 - a lowered, vectorised PrimFunc
    """Replace divisions by constants whose quotients become bytes."""
    if target.arch != "aarch64" and target.vector_bits < _WIDE:
        return function
    return tvm_ffi.structural_map(function, [(tirx.Cast, _cast)])


def _cast(expr: Any) -> Any:  # noqa: ANN401
    kind, _, lanes = str(expr.ty.dtype).partition("x")
    if kind not in ("int8", "uint8") or str(expr.value.ty.dtype) != (f"float32x{lanes}" if lanes else "float32"):
        return expr
    value, low, high = expr.value, -np.inf, np.inf
    while isinstance(value, tirx.Min | tirx.Max):
        limit = _constant(value.b)
        if limit is None:
            return expr
        low, high = (low, min(high, limit)) if isinstance(value, tirx.Min) else (max(low, limit), high)
        value = value.a
    zero = 0.0
    if isinstance(value, tirx.Add):
        found = _constant(value.b)
        if found is None:
            return expr
        zero, value = found, value.a
    if str(getattr(getattr(value, "op", None), "name", "")) != "tirx.round":
        return expr
    quotient, limits = value.args[0], np.iinfo(kind)
    divisor = _constant(quotient.b) if isinstance(quotient, tirx.Div) else None
    whole = all(float(number).is_integer() for number in (zero, low, high))
    if divisor is None or not whole or low < limits.min or high > limits.max or low > high:
        return expr
    by = reciprocal(divisor, int(low - zero), int(high - zero))
    if by is None:
        return expr
    numbers = [tirx.const(number, "float32") for number in (by.first, by.second, by.low, by.high)]
    name = llvm_forms.name_of(_FAMILY, lanes or 1)
    return llvm_forms.call(str(expr.ty.dtype), name, quotient.a, *numbers, tirx.const(int(zero), "int32"))


def _constant(expr: Any) -> float | None:  # noqa: ANN401
    """Return the number that a constant has in all lanes, or None."""
    value = expr.value if isinstance(expr, tirx.Broadcast) else expr
    return float(value.value) if isinstance(value, tirx.FloatImm) else None


def _text(target: Target, name: str) -> str:
    """Write the function; NaN becomes the largest number, as it does where quotients are clipped."""
    lanes = int(name.rpartition("_")[2])
    f, i, b, c = (f"<{lanes} x {t}>" if lanes > 1 else t for t in ("float", "i32", "i8", "i1"))
    suffix = f"v{lanes}f32" if lanes > 1 else "f32"
    lines = []

    def spread(argument: str, kind: str) -> str:
        """Return an argument in all lanes."""
        if lanes == 1:
            return f"%{argument}"
        wide = f"<{lanes} x {kind}>"
        lines.append(f"%{argument}0 = insertelement {wide} poison, {kind} %{argument}, i32 0")
        lines.append(
            f"%{argument}s = shufflevector {wide} %{argument}0, {wide} poison, <{lanes} x i32> zeroinitializer"
        )
        return f"%{argument}s"

    first, second, low, high = (spread(argument, "float") for argument in ("first", "second", "low", "high"))
    zero = spread("zero", "i32")
    magic = f"0x{np.float64(_MAGIC).view(np.uint64):016X}"
    lines += [
        f"%under = fcmp olt {f} %x, {high}",
        f"%lower = select {c} %under, {f} %x, {f} {high}",
        f"%over = fcmp ogt {f} %lower, {low}",
        f"%clipped = select {c} %over, {f} %lower, {f} {low}",
        f"%rest = fmul {f} %clipped, {second}",
        f"%quotient = call {f} @llvm.fma.{suffix}({f} %clipped, {f} {first}, {f} %rest)",
        f"%rounded = fadd {f} %quotient, {f'splat (float {magic})' if lanes > 1 else magic}",
        f"%bits = bitcast {f} %rounded to {i}",
        f"%moved = add {i} %bits, {zero}",
        f"%r = trunc {i} %moved to {b}",
    ]
    arguments = f"{f} %x, float %first, float %second, float %low, float %high, i32 %zero"
    head = f"define {b} @{name}({arguments}) alwaysinline {{"
    return "\n".join([head, *lines, f"ret {b} %r", "}", f"declare {f} @llvm.fma.{suffix}({f}, {f}, {f})"])


llvm_forms.register(_FAMILY, _text)
