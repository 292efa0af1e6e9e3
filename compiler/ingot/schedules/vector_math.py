"""exp, sigmoid, tanh and erf as arithmetic, so that they vectorise on every ISA and call no libm.

Largest errors against float64, over all arguments in the stated range (`tests/schedules/test_vector_math.py`):
exp 1.1 ulp for x in [-86.6, 88.7] (smaller results flush to 0, larger are inf); sigmoid 2.5 ulp where the result is
normal; tanh absolute error 4e-7; erf absolute error 4e-7. NaN stays NaN. Only float32 is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, tirx

Expr = Any  # TVM ships no types; a TIR expression


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Bind a value that is used several times to a name, so that the expression stays a small tree."""
    var = tirx.Var("t", str(value.ty.dtype))
    return tirx.Let(var, value, body(var))


def _f(value: float) -> Expr:
    return tirx.const(value, "float32")


def _horner(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Return the polynomial with the given coefficients, highest power first."""
    total: Expr = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _f(coefficient)
    return total


# Cephes expf (S. Moshier, 1989): exp(r) for |r| <= ln(2) / 2 as 1 + r + r^2 * p(r).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Below the first the result would be subnormal, at the second it is infinite.
_EXP_LOW, _EXP_HIGH = -86.6, 89.0
_SIGMOID_LIMIT = 87.0
# Adding 1.5 * 2^23 to a float32 of modest size rounds it to an integer, held in the low bits of the sum.
_ROUND = 12582912.0


def _clamped(x: Expr, low: float, high: float, body: Callable[[Expr], Expr]) -> Expr:
    """Return the body of x between low and high, or of NaN: a comparison with it is false, which leaves it."""

    def below(value: Expr) -> Expr:
        return _let(tirx.Select(_f(high) < value, _f(high), value), body)

    return _let(x, lambda value: _let(tirx.Select(_f(low) > value, _f(low), value), below))


def _power(x: Expr, *, may_overflow: bool) -> Expr:
    """Return e^x for NaN and x in [_EXP_LOW, _EXP_HIGH]: 2^n * exp(r) with x = n ln 2 + r and |r| <= ln(2) / 2.

    (Cody and Waite's reduction.) If it may overflow, n may be 128, for which the exponent field has no room: the factor
    is 2^(n-1) then, and 2.
    """

    def with_sum(shifted: Expr) -> Expr:
        def with_n(n: Expr) -> Expr:
            def with_r(r: Expr) -> Expr:
                value = (_horner(r, _EXP) * r) * r + r + _f(1.0)
                bits = tirx.reinterpret("int32", shifted) + tirx.const(127 - may_overflow - 0x4B400000, "int32")
                scaled = value * tirx.reinterpret("float32", tirx.shift_left(bits, tirx.const(23, "int32")))
                return scaled * _f(2.0) if may_overflow else scaled

            return _let(x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW), with_r)

        return _let(shifted - _f(_ROUND), with_n)

    return _let(x * _f(_LOG2E) + _f(_ROUND), with_sum)


def exp(x: Expr) -> Expr:
    """Return e^x."""

    def guarded(value: Expr) -> Expr:
        inside = _clamped(value, _EXP_LOW, _EXP_HIGH, lambda clamped: _power(clamped, may_overflow=True))
        return tirx.Select(value < _f(_EXP_LOW), _f(0.0), inside)

    return _let(x, guarded)


def sigmoid(x: Expr) -> Expr:
    """Return 1 / (1 + e^-x); below -87 it stays 1.6e-38."""

    def inside(negative: Expr) -> Expr:
        return _f(1.0) / (_f(1.0) + _power(negative, may_overflow=False))

    return _clamped(_f(0.0) - x, -_SIGMOID_LIMIT, _SIGMOID_LIMIT, inside)


# Rational approximation of tanh on [-9, 9], odd over even (Eigen, MathFunctionsImpl.h).
_TANH_ODD = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_TANH_LIMIT = 7.90531110763549805


def tanh(x: Expr) -> Expr:
    """Return tanh(x) by a rational approximation, within 4e-7 of +-1 beyond 7.9."""
    return _odd_rational(x, _TANH_LIMIT, _TANH_ODD, _TANH_EVEN)


# Rational approximation of erf on [-4, 4] (Eigen, SpecialFunctionsImpl.h).
_ERF_ODD = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_EVEN = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x: Expr) -> Expr:
    """Return the error function by a rational approximation, constant beyond 4."""
    return _odd_rational(x, 4.0, _ERF_ODD, _ERF_EVEN)


def _odd_rational(x: Expr, limit: float, odd: tuple[float, ...], even: tuple[float, ...]) -> Expr:
    """Return x * odd(x^2) / even(x^2) with x clamped to [-limit, limit]; NaN stays NaN."""

    def of_clamped(value: Expr) -> Expr:
        return _let(value * value, lambda square: value * _horner(square, odd) / _horner(square, even))

    return _clamped(x, -limit, limit, of_clamped)


_REPLACED: dict[str, Callable[[Expr], Expr]] = {
    "tirx.exp": exp,
    "tirx.sigmoid": sigmoid,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
}


def replace_calls(function: Any) -> Any:  # noqa: ANN401 - PrimFuncs
    """Return the PrimFunc with every float32 exp, sigmoid, tanh and erf replaced by arithmetic."""

    def visit(call: Any) -> Any:  # noqa: ANN401
        make = _REPLACED.get(str(getattr(call.op, "name", "")))
        if make is None or str(call.ty.dtype) != "float32":
            return call
        return make(call.args[0])

    return tvm_ffi.structural_map(function, [(ir.Call, visit)])
