"""The rounding doubling high multiply, (x * m + 2^30) >> 31 on int32: one operator in TIR, a few instructions on a CPU.

In 64-bit arithmetic by definition (`frontend.fixed_point.high_multiply`), which compilers turn into unpacking, twice
the multiplications they need, and packing. So templates write an operator of its own, loops over it are vectorised
like any other, and code generation chooses the form (`lower`):

- AArch64 and 32-bit ARM with NEON: one sqrdmulh / vqrdmulh. It differs from the definition only for x = m = -2^31.
- Other vector units: the products of even and odd lanes apart, each in a 64-bit lane, as x86's pmuldq makes them.
- Scalars: the definition.

So is the second rounding, (h + t) >> s with t = half a step and z steps (`shifted`). On AArch64, where sums are stored
as bytes, it is one srshl, the zero point z = t >> s is added to 16-bit numbers, and numbers are narrowed with
saturation.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Op, register_op_attr
from tvm.ir import _ffi_api as tvm_ir
from tvm.script import tirx as T  # noqa: N812 - the name TVM's script parser knows

from ingot.frontend.fixed_point import high_multiply, multiply_once
from ingot.target import Target

_NAME = "tirx.ingot_high_multiply"
_ONCE = "tirx.ingot_multiply_once"
_SHIFTED = "tirx.ingot_shifted"
_PURE = 1
#: Operators that compute each lane from the same lanes of their operands.
_LANEWISE = (_NAME, _SHIFTED, "tirx.shift_right", "tirx.shift_left")


def _register(name: str, meaning: str) -> None:
    if name not in [str(known) for known in Op.list_op_names()]:
        tvm_ir.RegisterOp(name, meaning)
        register_op_attr(name, "TCallEffectKind", _PURE)
        register_op_attr(name, "TVectorizable", True)
        register_op_attr(name, "TScriptPrinterName", name.removeprefix("tirx."))


_register(_NAME, "(x * m + 2^30) >> 31")
_register(_ONCE, "(x * m + 2^(30 + s)) >> (31 + s)")
_register(_SHIFTED, "(h + t) >> s, where t is half a step and z steps")


def multiply(x: Any, multiplier: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the operator on int32 scalars; `multiplier` is not negative."""
    return tirx.call_intrin("int32", _NAME, x, multiplier)


def once(x: Any, multiplier: Any, shift: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the operator of one rounding on int32 scalars: always by its definition, since few kernels use it.

    An operator too, because 64-bit numbers in a loop nest would be narrowed on 32-bit targets.
    """
    return tirx.call_intrin("int32", _ONCE, x, multiplier, shift)


def shifted(high: Any, offset: Any, shift: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the operator (high + offset) >> shift on int32 scalars.

    offset is half of 2^shift, rounded down, plus z * 2^shift, with one 8-bit number z for all channels.
    """
    return tirx.call_intrin("int32", _SHIFTED, high, offset, shift)


def lower(function: Any, target: Target) -> Any:  # noqa: ANN401 - a lowered, vectorised PrimFunc
    """Replace the operator by what the target computes best."""
    neon = {"aarch64": "llvm.aarch64.neon.sqrdmulh.v4i32", "arm": "llvm.arm.neon.vqrdmulh.v4i32"}
    intrinsic = neon.get(target.arch, "") if "neon" in target.features else ""

    def call(expr: Any) -> Any:  # noqa: ANN401
        if str(getattr(expr.op, "name", "")) == _ONCE:
            return multiply_once(*expr.args) if int(expr.ty.dtype.lanes) == 1 else _once_in_64_bits(*expr.args)
        if str(getattr(expr.op, "name", "")) == _SHIFTED:
            return tirx.shift_right(expr.args[0] + expr.args[1], expr.args[2])
        if str(getattr(expr.op, "name", "")) != _NAME:
            return expr
        x, multiplier = expr.args
        lanes = int(expr.ty.dtype.lanes)
        if lanes < 4:
            return high_multiply(x, multiplier) if lanes == 1 else _in_64_bits(x, multiplier, lanes)
        return _on_neon(x, multiplier, lanes, intrinsic) if intrinsic else _by_halves(x, multiplier, lanes)

    if target.arch == "aarch64" and intrinsic:
        function = tvm_ffi.structural_map(function, [(tirx.Cast, _saturate)])
    return tvm_ffi.structural_map(function, [(ir.Call, call)])


def _is_multiply(call: Any) -> bool:  # noqa: ANN401
    return str(getattr(call.op, "name", "")) == _NAME


def _saturate(expr: Any) -> Any:  # noqa: ANN401
    """Return a cast of clipped int32 vectors to bytes by NEON's narrowing with saturation, and the rest of the clip."""
    kind, _, lanes = str(expr.ty.dtype).partition("x")
    if kind not in ("int8", "uint8") or lanes not in ("8", "16") or str(expr.value.ty.dtype) != f"int32x{lanes}":
        return expr
    limits = {"int8": (-128, 127), "uint8": (0, 255)}[kind]
    value, (low, high) = _unclipped(expr.value, limits)
    multiplications: list[Any] = []
    tvm_ffi.structural_walk(
        value, [(ir.Call, lambda call: multiplications.append(call) if _is_multiply(call) else None)]
    )
    # Of several in a row, vectors between them would be cut apart and joined again. One may be written twice.
    several = any(not tvm_ffi.structural_equal(multiplications[0], other) for other in multiplications[1:])
    if value is expr.value or not multiplications or several:
        return expr
    count = int(lanes)
    last = "llvm.aarch64.neon.sqxtn.v8i8" if kind == "int8" else "llvm.aarch64.neon.sqxtun.v8i8"
    halves = [tirx.call_llvm_pure_intrin(f"{kind}x8", last, _words(value, first)) for first in range(0, count, 8)]
    result = halves[0] if count == 8 else T.vectorcombine(f"{kind}x16", *halves)
    if low > limits[0]:
        result = tirx.Max(result, tirx.Broadcast(tirx.const(low, kind), count))
    if high < limits[1]:
        result = tirx.Min(result, tirx.Broadcast(tirx.const(high, kind), count))
    return result


def _words(value: Any, first: int) -> Any:  # noqa: ANN401
    """Return eight lanes of an int32 vector, from `first` on, as int16 with saturation, the zero point added last."""
    zero, parts = None, []
    for place in (first, first + 4):
        part = _part(value, place, 4)
        if isinstance(part, ir.Call) and str(getattr(part.op, "name", "")) == _SHIFTED:
            high, _, by = part.args
            zero = tirx.shift_right(*(_lane(arg) for arg in value.args[1:]))
            by = tirx.Broadcast(tirx.const(0, "int32"), 4) - by
            part = tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.srshl.v4i32", high, by)
        parts.append(tirx.call_llvm_pure_intrin("int16x4", "llvm.aarch64.neon.sqxtn.v4i16", part))
    words = T.vectorcombine("int16x8", *parts)
    if zero is None:
        return words
    offset = tirx.Broadcast(zero.astype("int16"), 8)
    return tirx.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.sqadd.v8i16", words, offset)


def _lane(expr: Any) -> Any:  # noqa: ANN401
    """Return the first lane of a constant or of a vector that is loaded."""
    if isinstance(expr, tirx.Broadcast):
        return expr.value
    if isinstance(expr, ir.TensorLoad) and isinstance(expr.indices[-1], tirx.Ramp):
        return tirx.BufferLoad(expr.source, [*expr.indices[:-1], expr.indices[-1].base])
    return tirx.Shuffle([expr], [tirx.IntImm("int32", 0)])


def _part(expr: Any, first: int, count: int) -> Any:  # noqa: ANN401
    """Return `count` lanes of a vector, from `first` on, computed from as many lanes of what it is made of."""
    kind = f"{str(expr.ty.dtype).partition('x')[0]}x{count}"
    if isinstance(expr, tirx.Broadcast):
        return tirx.Broadcast(expr.value, count)
    if isinstance(expr, tirx.Add | tirx.Sub | tirx.Mul | tirx.Min | tirx.Max):
        return type(expr)(_part(expr.a, first, count), _part(expr.b, first, count))
    if isinstance(expr, tirx.Cast):
        return tirx.Cast(kind, _part(expr.value, first, count))
    if isinstance(expr, ir.Call) and str(getattr(expr.op, "name", "")) in _LANEWISE:
        return tirx.call_intrin(kind, expr.op, *(_part(arg, first, count) for arg in expr.args))
    if isinstance(expr, ir.TensorLoad) and isinstance(expr.indices[-1], tirx.Ramp):
        ramp = expr.indices[-1]
        place = tirx.Ramp(ramp.base + ramp.stride * first, ramp.stride, count)
        return tirx.BufferLoad(expr.source, [*expr.indices[:-1], place])
    return tirx.Shuffle([expr], [tirx.IntImm("int32", first + i) for i in range(count)])


def _unclipped(value: Any, limits: tuple[int, int]) -> tuple[Any, tuple[int, int]]:  # noqa: ANN401
    """Return what is clipped by constants, and to what: nothing unless both limits are there."""
    low, high = limits[0] - 1, limits[1] + 1
    inner = value
    while isinstance(inner, tirx.Min | tirx.Max):
        if not (isinstance(inner.b, tirx.Broadcast) and isinstance(inner.b.value, tirx.IntImm)):
            break
        limit = int(inner.b.value)
        low, high = (low, min(high, limit)) if isinstance(inner, tirx.Min) else (max(low, limit), high)
        inner = inner.a
    return (inner, (low, high)) if low >= limits[0] and high <= limits[1] else (value, limits)


def _in_64_bits(x: Any, m: Any, lanes: int) -> Any:  # noqa: ANN401
    """Return the definition on vectors."""
    wide = f"int64x{lanes}"
    half, by = (tirx.Broadcast(tirx.const(v, "int64"), lanes) for v in (1 << 30, 31))
    return tirx.shift_right(x.astype(wide) * m.astype(wide) + half, by).astype(f"int32x{lanes}")


def _once_in_64_bits(x: Any, m: Any, s: Any) -> Any:  # noqa: ANN401
    """Return the definition of one rounding on vectors."""
    lanes = int(x.ty.dtype.lanes)
    wide = f"int64x{lanes}"

    def number(value: int) -> Any:  # noqa: ANN401
        return tirx.Broadcast(tirx.const(value, "int64"), lanes)

    by = s.astype(wide) + number(31)
    half = tirx.shift_left(number(1), by - number(1))
    return tirx.shift_right(x.astype(wide) * m.astype(wide) + half, by).astype(f"int32x{lanes}")


def _on_neon(x: Any, m: Any, lanes: int, intrinsic: str) -> Any:  # noqa: ANN401
    """Return one instruction for each register of four."""
    if lanes == 4:
        return tirx.call_llvm_pure_intrin("int32x4", intrinsic, x, m)
    half = lanes // 2
    parts = []
    for side in (T.vectorlow, T.vectorhigh):
        parts.append(_on_neon(side(f"int32x{half}", x), side(f"int32x{half}", m), half, intrinsic))
    return T.vectorcombine(f"int32x{lanes}", *parts)


def _by_halves(x: Any, m: Any, lanes: int) -> Any:  # noqa: ANN401
    """Return even and odd lanes multiplied in 64-bit lanes (little-endian: the even lane is the low half)."""
    wide = f"int64x{lanes // 2}"

    def number(value: int) -> Any:  # noqa: ANN401
        return tirx.Broadcast(tirx.const(value, "int64"), lanes // 2)

    x64, m64, by = tirx.reinterpret(wide, x), tirx.reinterpret(wide, m), number(32)
    even = tirx.shift_right(tirx.shift_left(x64, by), by) * tirx.shift_right(tirx.shift_left(m64, by), by)
    odd = tirx.shift_right(x64, by) * tirx.shift_right(m64, by)
    half, low = number(1 << 30), number(0xFFFFFFFF)
    low_half = tirx.bitwise_and(tirx.shift_right(even + half, number(31)), low)
    high_half = tirx.bitwise_and(tirx.shift_left(odd + half, number(1)), tirx.bitwise_not(low))
    return tirx.reinterpret(f"int32x{lanes}", tirx.bitwise_or(low_half, high_half))
