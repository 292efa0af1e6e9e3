"""exp, log, sigmoid, tanh, erf, sin, cos and atan as arithmetic, so that they vectorise on every ISA and call no libm.

Each is an LLVM function of its own that is inlined (`schedules.llvm_forms`): as TIR expressions, whose values are used
several times, they would be analysed again by every pass at every level of nesting, which is exponential. In TIR they
are operators (`name_calls`), which are vectorised like any other.

Largest errors against float64, over all arguments in the stated range (`tests/schedules/test_vector_math.py`):
exp 1.1 ulp for x in [-86.6, 88.7] (smaller results flush to 0, larger are inf), as is `decay` for x <= 0; sigmoid 2.5
ulp where the result is normal; log 1.1 ulp; tanh absolute error 4e-7; erf absolute error 4e-7; sin and cos 2.2 ulp for
|x| <= 25,000, beyond which libm's are called; atan 2.7 ulp. NaN stays NaN. Only float32 is replaced.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import _ffi_api as ir_api

from ingot.schedules import llvm_forms
from ingot.target import Target


class _Function:
    """The text of an LLVM function of one float32 vector, or scalar; values are LLVM's words for them."""

    def __init__(self, lanes: int, target: Target) -> None:
        self.lanes = lanes
        self.target = target
        self.lines: list[str] = []
        self.declared: set[str] = set()
        self.float, self.int, self.bool = (f"<{lanes} x {t}>" if lanes > 1 else t for t in ("float", "i32", "i1"))

    def value(self, text: str) -> str:
        """Add an instruction and return its result."""
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def constant(self, value: float) -> str:
        """Return a float32 constant, which LLVM wants as the bits of a float64."""
        rounded = struct.unpack("f", struct.pack("f", value))[0]
        text = f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
        return f"splat (float {text})" if self.lanes > 1 else text

    def whole(self, value: int) -> str:
        """Return an int32 constant."""
        return f"splat (i32 {value})" if self.lanes > 1 else str(value)

    def arithmetic(self, operation: str, a: str, b: str) -> str:
        """Return fadd, fsub, fmul or fdiv of two values."""
        return self.value(f"{operation} {self.float} {a}, {b}")

    def call(self, intrinsic: str, *values: str) -> str:
        """Return LLVM's intrinsic of the values."""
        name = f"@llvm.{intrinsic}.{f'v{self.lanes}f32' if self.lanes > 1 else 'f32'}"
        self.declared.add(f"declare {self.float} {name}({', '.join([self.float] * len(values))})")
        return self.value(f"call {self.float} {name}({', '.join(f'{self.float} {v}' for v in values)})")

    def fma(self, a: str, b: str, c: str) -> str:
        """Return a * b + c, rounded once where the CPU has an instruction for it."""
        return self.call("fmuladd", a, b, c)

    def clamped(self, x: str, low: float, high: float) -> str:
        """Return x between low and high; NaN stays NaN."""
        least, most = self.constant(low), self.constant(high)
        if self.target.arch == "aarch64":
            return self.call("minimum", self.call("maximum", x, least), most)
        # A comparison with NaN is false, which leaves it: minps and maxps in this order of operands.
        raised = self.chosen(self.compared("ogt", least, x), least, x)
        return self.chosen(self.compared("olt", most, raised), most, raised)

    def horner(self, x: str, coefficients: tuple[float, ...]) -> str:
        """Return the polynomial with the given coefficients, highest power first."""
        total = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.constant(coefficient))
        return total

    def chosen(self, condition: str, a: str, b: str) -> str:
        """Return a where the condition holds, else b."""
        return self.value(f"select {self.bool} {condition}, {self.float} {a}, {self.float} {b}")

    def compared(self, how: str, a: str, b: str) -> str:
        """Return a comparison of floats (`ogt`, `ult`, ...)."""
        return self.value(f"fcmp {how} {self.float} {a}, {b}")

    def bits(self, operation: str, a: str, b: str) -> str:
        """Return an operation on two int32 values."""
        return self.value(f"{operation} {self.int} {a}, {b}")

    def as_bits(self, x: str) -> str:
        """Return the bits of a float."""
        return self.value(f"bitcast {self.float} {x} to {self.int}")

    def as_float(self, x: str) -> str:
        """Return the float of these bits."""
        return self.value(f"bitcast {self.int} {x} to {self.float}")

    def leave_to_libm(self, condition: str, name: str, x: str) -> None:
        """Return libm's function of x at once if the condition holds for any lane."""
        condition = self.any_of(condition)
        self.lines.append(f"br i1 {condition}, label %rare, label %usual")
        self.lines.append("rare:")
        self.declared.add(f"declare float @{name}(float)")
        result = x if self.lanes > 1 else self.value(f"call float @{name}(float {x})")
        for lane in range(self.lanes if self.lanes > 1 else 0):
            one = self.value(f"extractelement {self.float} {x}, i32 {lane}")
            one = self.value(f"call float @{name}(float {one})")
            result = self.value(f"insertelement {self.float} {result}, float {one}, i32 {lane}")
        self.lines.append(f"ret {self.float} {result}")
        self.lines.append("usual:")

    def any_of(self, condition: str) -> str:
        """Return whether a condition holds for any lane."""
        if self.lanes == 1:
            return condition
        name = f"@llvm.vector.reduce.or.v{self.lanes}i1"
        self.declared.add(f"declare i1 {name}({self.bool})")
        return self.value(f"call i1 {name}({self.bool} {condition})")

    def text(self, name: str, result: str) -> str:
        """Return the function with its declarations."""
        head = f"define {self.float} @{name}({self.float} %x) alwaysinline {{"
        return "\n".join([head, *self.lines, f"ret {self.float} {result}", "}", *sorted(self.declared)])


# exp(r) for |r| <= ln(2) / 2 as 1 + r + r^2 * p(r), p of degree 4: the least largest relative error, 3.1e-9, by
# Lawson's iteration.
_EXP = (1.3814540073709362e-3, 8.368745107786856e-3, 4.166839078557527e-2, 1.6666520399054607e-1, 4.99999934321196e-1)
_LOG2E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Below the first the result would be subnormal, at the second it is infinite.
_EXP_LOW, _EXP_HIGH = -86.6, 89.0
_SIGMOID_LIMIT = 87.0
# Adding 1.5 * 2^23 to a float32 of modest size rounds it to an integer, held in the low bits of the sum.
_ROUND = 12582912.0
# The sign of a float32, as an int32.
_SIGN = -(1 << 31)


def _power(f: _Function, x: str, *, may_overflow: bool) -> str:
    """Return e^x for NaN and x in [_EXP_LOW, _EXP_HIGH]: 2^n * exp(r) with x = n ln 2 + r and |r| <= ln(2) / 2.

    (Cody and Waite's reduction.) If it may overflow, n may be 128, for which the exponent field has no room: the factor
    is 2^(n-1) then, and 2.
    """
    shifted = f.fma(x, f.constant(_LOG2E), f.constant(_ROUND))
    n = f.arithmetic("fsub", shifted, f.constant(_ROUND))
    r = f.fma(n, f.constant(-_LN2_LOW), f.fma(n, f.constant(-_LN2_HIGH), x))
    # p(r) by pairs of coefficients (Estrin): a chain half as long as Horner's, of as many instructions.
    square = f.arithmetic("fmul", r, r)
    first, *pairs = (f.constant(c) for c in _EXP)
    second, third = (f.fma(a, r, b) for a, b in (pairs[:2], pairs[2:]))
    series = f.fma(f.fma(first, square, second), square, third)
    value = f.arithmetic("fadd", f.fma(series, square, r), f.constant(1.0))
    bits = f.bits("add", f.as_bits(shifted), f.whole(127 - may_overflow - 0x4B400000))
    scaled = f.arithmetic("fmul", value, f.as_float(f.bits("shl", bits, f.whole(23))))
    return f.arithmetic("fmul", scaled, f.constant(2.0)) if may_overflow else scaled


def _exp(f: _Function, x: str) -> str:
    """Return e^x."""
    power = _power(f, f.clamped(x, _EXP_LOW, _EXP_HIGH), may_overflow=True)
    return f.chosen(f.compared("olt", x, f.constant(_EXP_LOW)), f.constant(0.0), power)


# Below it the power of two is 2^-127, whose bits are those of 0.
_DECAY_LOW = -88.0


def _decay(f: _Function, x: str) -> str:
    """Return e^x for x <= 0 (up to 88): nothing overflows, and what is too small is 0 without a comparison."""
    if f.target.arch == "aarch64":
        return _power(f, f.call("maximum", x, f.constant(_DECAY_LOW)), may_overflow=False)
    least = f.constant(_DECAY_LOW)
    return _power(f, f.chosen(f.compared("ogt", least, x), least, x), may_overflow=False)


def _sigmoid(f: _Function, x: str) -> str:
    """Return 1 / (1 + e^-x); below -87 it stays 1.6e-38."""
    negative = f.clamped(f.arithmetic("fsub", f.constant(0.0), x), -_SIGMOID_LIMIT, _SIGMOID_LIMIT)
    one = f.constant(1.0)
    return f.arithmetic("fdiv", one, f.arithmetic("fadd", one, _power(f, negative, may_overflow=False)))


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


def _tanh(f: _Function, x: str) -> str:
    """Return tanh(x) by a rational approximation, within 4e-7 of +-1 beyond 7.9."""
    return _odd_rational(f, x, _TANH_LIMIT, _TANH_ODD, _TANH_EVEN)


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


def _erf(f: _Function, x: str) -> str:
    """Return the error function by a rational approximation, constant beyond 4."""
    return _odd_rational(f, x, 4.0, _ERF_ODD, _ERF_EVEN)


def _odd_rational(f: _Function, x: str, limit: float, odd: tuple[float, ...], even: tuple[float, ...]) -> str:
    """Return x * odd(x^2) / even(x^2) with x clamped to [-limit, limit]; NaN stays NaN."""
    value = f.clamped(x, -limit, limit)
    square = f.arithmetic("fmul", value, value)
    above = f.arithmetic("fmul", value, f.horner(square, odd))
    return f.arithmetic("fdiv", above, f.horner(square, even))


# Cephes logf (S. Moshier, 1989): log(1 + r) for sqrt(1/2) <= 1 + r < sqrt(2) as r - r^2 / 2 + r^3 * p(r).
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SQRT_HALF_BITS = 0x3F3504F3
_TINY, _INFINITY, _NAN = 2.0**-126, float("inf"), float("nan")


def _log(f: _Function, x: str) -> str:
    """Return ln(x): n ln 2 + log(m) with x = m * 2^n; -inf for 0, NaN below."""
    subnormal = f.compared("olt", x, f.constant(_TINY))
    normal = f.chosen(subnormal, f.arithmetic("fmul", x, f.constant(2.0**23)), x)
    bits = f.as_bits(normal)
    exponent = f.bits("ashr", f.bits("sub", bits, f.whole(_SQRT_HALF_BITS)), f.whole(23))
    m = f.as_float(f.bits("sub", bits, f.bits("shl", exponent, f.whole(23))))
    n = f.value(f"sitofp {f.int} {exponent} to {f.float}")
    n = f.arithmetic("fsub", n, f.chosen(subnormal, f.constant(23.0), f.constant(0.0)))
    r = f.arithmetic("fsub", m, f.constant(1.0))
    square = f.arithmetic("fmul", r, r)
    series = f.arithmetic("fmul", f.arithmetic("fmul", f.horner(r, _LOG), r), square)
    series = f.fma(n, f.constant(_LN2_LOW), series)
    series = f.fma(square, f.constant(-0.5), series)
    found = f.fma(n, f.constant(_LN2_HIGH), f.arithmetic("fadd", r, series))
    # What is not a positive number: 0, what has no logarithm, infinity and NaN.
    found = f.chosen(f.compared("oeq", x, f.constant(0.0)), f.constant(-_INFINITY), found)
    found = f.chosen(f.compared("olt", x, f.constant(0.0)), f.constant(_NAN), found)
    return f.chosen(f.compared("olt", x, f.constant(_INFINITY)), found, x)


# pi / 2 in parts of 10 bits and a rest: n times a part is exact for |n| < 2^14.
_QUARTER = (1.5703125, 4.8351287841796875e-4, 3.1385570764541626e-7, 6.07710062827671e-11)
_PERIODIC_LIMIT = 25_000.0
# Cephes sinf and cosf (S. Moshier, 1989): sin(r) = r + r^3 p(r^2), cos(r) = 1 - r^2 / 2 + r^4 q(r^2), |r| <= pi / 4.
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _periodic(f: _Function, x: str, name: str, quarters: int) -> str:
    """Return sin(x + quarters * pi / 2), by Cody and Waite's reduction to |r| <= pi / 4; far out by libm's `name`."""
    r = f.call("fabs", x)
    f.leave_to_libm(f.compared("ugt", r, f.constant(_PERIODIC_LIMIT)), name, x)
    shifted = f.fma(r, f.constant(2 / math.pi), f.constant(_ROUND))
    n = f.arithmetic("fsub", shifted, f.constant(_ROUND))
    for part in _QUARTER:
        r = f.fma(n, f.constant(-part), r)
    square = f.arithmetic("fmul", r, r)
    sine = f.fma(f.arithmetic("fmul", f.horner(square, _SIN), square), r, r)
    cosine = f.arithmetic("fmul", f.arithmetic("fmul", f.horner(square, _COS), square), square)
    cosine = f.arithmetic("fadd", f.fma(square, f.constant(-0.5), cosine), f.constant(1.0))
    quadrant = f.bits("add", f.as_bits(shifted), f.whole(quarters))
    odd = f.value(f"icmp ne {f.int} {f.bits('and', quadrant, f.whole(1))}, {f.whole(0)}")
    # The second half of a turn turns the sign.
    sign = f.bits("shl", f.bits("and", quadrant, f.whole(2)), f.whole(30))
    if not quarters:  # sin(-x) = -sin(x)
        sign = f.bits("xor", sign, f.bits("and", f.as_bits(x), f.whole(_SIGN)))
    return f.as_float(f.bits("xor", f.as_bits(f.chosen(odd, cosine, sine)), sign))


def _sin(f: _Function, x: str) -> str:
    """Return sin(x)."""
    return _periodic(f, x, "sinf", 0)


def _cos(f: _Function, x: str) -> str:
    """Return cos(x)."""
    return _periodic(f, x, "cosf", 1)


# Cephes atanf (S. Moshier, 1989): atan(r) = r + r^3 p(r^2) for |r| <= tan(pi / 8).
_ATAN = (8.05374449538e-2, -1.38776856032e-1, 1.99777106478e-1, -3.33329491539e-1)


def _atan(f: _Function, x: str) -> str:
    """Return atan(x): beyond tan(pi / 8) from atan((x - 1) / (x + 1)), beyond tan(3 pi / 8) from atan(-1 / x)."""
    size, one = f.call("fabs", x), f.constant(1.0)
    middle = f.compared("ogt", size, f.constant(math.tan(math.pi / 8)))
    large = f.compared("ogt", size, f.constant(math.tan(3 * math.pi / 8)))
    above = f.chosen(middle, f.arithmetic("fsub", size, one), size)
    below = f.chosen(middle, f.arithmetic("fadd", size, one), one)
    above, below = f.chosen(large, f.constant(-1.0), above), f.chosen(large, size, below)
    r = f.arithmetic("fdiv", above, below)
    square = f.arithmetic("fmul", r, r)
    series = f.fma(f.arithmetic("fmul", f.horner(square, _ATAN), square), r, r)
    start = f.chosen(middle, f.constant(math.pi / 4), f.constant(0.0))
    start = f.chosen(large, f.constant(math.pi / 2), start)
    found = f.arithmetic("fadd", start, series)
    sign = f.bits("and", f.as_bits(x), f.whole(_SIGN))
    return f.as_float(f.bits("xor", f.as_bits(found), sign))


def _kept(f: _Function, x: str) -> str:
    """Return x as it is, by what LLVM does not look into: a loop that copies so stays a loop, of vectors."""
    return f.value(f'call {f.float} asm "", "=x,0"({f.float} {x})') if f.target.arch == "x86_64" else x


_FORMULAS: dict[str, Callable[[_Function, str], str]] = {
    "exp": _exp, "decay": _decay, "log": _log, "sigmoid": _sigmoid, "tanh": _tanh, "erf": _erf, "sin": _sin,
    "cos": _cos, "atan": _atan, "kept": _kept,
}  # fmt: skip
_FAMILY = "math"
_PURE = 1


def _text(target: Target, name: str) -> str:
    _, formula, lanes = name.rsplit("_", 2)
    f = _Function(int(lanes), target)
    return f.text(name, _FORMULAS[formula](f, "%x"))


def _call(expr: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the call of the function that computes our operator."""
    formula, lanes = str(expr.op.name).rpartition("_")[2], int(expr.ty.dtype.lanes)
    return llvm_forms.call(str(expr.ty.dtype), llvm_forms.name_of(_FAMILY, formula, lanes), expr.args[0])


_PREFIX = "tirx.ingot_"


def _register() -> None:
    llvm_forms.register(_FAMILY, _text)
    for name in _FORMULAS:
        op = _PREFIX + name
        ir_api.RegisterOp(op, f"{name} on float32, as arithmetic.")
        ir.register_op_attr(op, "TCallEffectKind", _PURE)
        ir.register_op_attr(op, "TVectorizable", True)
        ir.register_op_attr(op, "TScriptPrinterName", op)
        llvm_forms.lower_operator(op, _call)


_register()


def decay(x: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return e^x of an x that is not positive, as in softmax: fewer instructions than exp."""
    if str(x.ty.dtype) != "float32":
        return tirx.exp(x)
    return tirx.call_intrin("float32", _PREFIX + "decay", x)


def kept(x: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return a float32 x of up to one register, which x86's LLVM must not copy by memcpy."""
    return tirx.call_intrin("float32", _PREFIX + "kept", x)


def name_calls(function: Any) -> Any:  # noqa: ANN401 - PrimFuncs
    """Return the PrimFunc with every float32 function that has a formula here as an operator of ours."""

    def visit(call: Any) -> Any:  # noqa: ANN401
        name = str(getattr(call.op, "name", "")).removeprefix("tirx.")
        if name not in _FORMULAS or str(call.ty.dtype) != "float32":
            return call
        return tirx.call_intrin("float32", _PREFIX + name, call.args[0])

    return tvm_ffi.structural_map(function, [(ir.Call, visit)])
