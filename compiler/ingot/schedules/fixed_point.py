"""The rounding doubling high multiply, (x * m + 2^30) >> 31 on int32: one operator in TIR, a few instructions on a CPU.

In 64-bit arithmetic by definition (`frontend.fixed_point.high_multiply`), which compilers turn into unpacking, twice
the multiplications they need, and packing. So templates write an operator of its own, loops over it are vectorised
like any other, and code generation chooses the form (`lower`):

- AArch64 and 32-bit ARM with NEON: one sqrdmulh / vqrdmulh. It differs from the definition only for x = m = -2^31.
- Other vector units: the products of even and odd lanes apart, each in a 64-bit lane, as x86's pmuldq makes them.
- Scalars: the definition.
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
_PURE = 1


def _register(name: str, meaning: str) -> None:
    if name not in [str(known) for known in Op.list_op_names()]:
        tvm_ir.RegisterOp(name, meaning)
        register_op_attr(name, "TCallEffectKind", _PURE)
        register_op_attr(name, "TVectorizable", True)
        register_op_attr(name, "TScriptPrinterName", name.removeprefix("tirx."))


_register(_NAME, "(x * m + 2^30) >> 31")
_register(_ONCE, "(x * m + 2^(30 + s)) >> (31 + s)")


def multiply(x: Any, multiplier: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the operator on int32 scalars; `multiplier` is not negative."""
    return tirx.call_intrin("int32", _NAME, x, multiplier)


def once(x: Any, multiplier: Any, shift: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Return the operator of one rounding on int32 scalars: always by its definition, since few kernels use it.

    An operator too, because 64-bit numbers in a loop nest would be narrowed on 32-bit targets.
    """
    return tirx.call_intrin("int32", _ONCE, x, multiplier, shift)


def lower(function: Any, target: Target) -> Any:  # noqa: ANN401 - a lowered, vectorised PrimFunc
    """Replace the operator by what the target computes best."""
    neon = {"aarch64": "llvm.aarch64.neon.sqrdmulh.v4i32", "arm": "llvm.arm.neon.vqrdmulh.v4i32"}
    intrinsic = neon.get(target.arch, "") if "neon" in target.features else ""

    def call(expr: Any) -> Any:  # noqa: ANN401
        if str(getattr(expr.op, "name", "")) == _ONCE:
            return multiply_once(*expr.args) if int(expr.ty.dtype.lanes) == 1 else _once_in_64_bits(*expr.args)
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
    # The value is written once for every part of it: of several in a row that would be too much code.
    if value is expr.value or len(multiplications) != 1:
        return expr
    count = int(lanes)
    narrow = _narrow("llvm.aarch64.neon.sqxtn.v4i16", "int16", count, 4, value, "int32")
    last = "llvm.aarch64.neon.sqxtn.v8i8" if kind == "int8" else "llvm.aarch64.neon.sqxtun.v8i8"
    result = _narrow(last, kind, count, 8, narrow, "int16")
    if low > limits[0]:
        result = tirx.Max(result, tirx.Broadcast(tirx.const(low, kind), count))
    if high < limits[1]:
        result = tirx.Min(result, tirx.Broadcast(tirx.const(high, kind), count))
    return result


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


def _narrow(intrinsic: str, kind: str, lanes: int, step: int, value: Any, wide: str) -> Any:  # noqa: ANN401
    """Return `lanes` values narrowed `step` at a time."""
    if lanes == step:
        return tirx.call_llvm_pure_intrin(f"{kind}x{step}", intrinsic, value)
    half = lanes // 2
    parts = [side(f"{wide}x{half}", value) for side in (T.vectorlow, T.vectorhigh)]
    return T.vectorcombine(f"{kind}x{lanes}", *(_narrow(intrinsic, kind, half, step, part, wide) for part in parts))


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
