"""Products of two rows with two rows in one instruction: ARM's matrix multiplication of 8-bit integers and bfloat16.

    acc[p][q] += sum over k < group of data[p][k] * weight[q][k]        for p, q < 2

A row is 64 bits long: 8 integers, summed in int32, or 4 bfloat16 values, summed in float32. The meaning is a TIR
function that a schedule matches (`description`); the machine form is LLVM text (`_text`), with the instruction where
the target has it and as plain arithmetic elsewhere. Integers are exact; bfmmla rounds and flushes in ways of its own,
about 2^-24 of the larger product, so that the meaning fixes no order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import s_tir
from tvm.script import tirx as T  # noqa: N812 - the name TVM's script parser knows

from ingot.schedules.half import widen_bf16
from ingot.schedules.llvm_forms import call, name_of, register
from ingot.target import Target

_FAMILY = "mmla"


@dataclass(frozen=True)
class Mmla:
    """An instruction. data, weight, total: dtypes of the factors and of the sums. feature: what the CPU must have."""

    name: str
    group: int
    data: str
    weight: str
    total: str
    feature: str
    intrinsic: str

    def fits(self, weight: np.ndarray) -> bool:
        """Say whether whole-number weights (zero points subtracted) can be used with it."""
        info = np.iinfo(self.weight)
        whole = bool(np.all(weight == np.rint(weight)))
        return whole and bool(weight.min(initial=0) >= info.min and weight.max(initial=0) <= info.max)


BFMMLA = Mmla("bfmmla", 4, "uint16", "uint16", "float32", "bf16", "llvm.aarch64.neon.bfmmla")
#: Of integers, in order of preference for data that are stored as int8; uint8 data need no shift with the last two.
INTEGERS: tuple[Mmla, ...] = (
    Mmla("smmla", 8, "int8", "int8", "int32", "i8mm", "llvm.aarch64.neon.smmla.v4i32.v16i8"),
    Mmla("usmmla", 8, "uint8", "int8", "int32", "i8mm", "llvm.aarch64.neon.usmmla.v4i32.v16i8"),
    Mmla("ummla", 8, "uint8", "uint8", "int32", "i8mm", "llvm.aarch64.neon.ummla.v4i32.v16i8"),
)
ALL = (BFMMLA, *INTEGERS)


def integer_mmla(target: Target, stored: str, weight: np.ndarray) -> Mmla | None:
    """Return the target's instruction for whole-number weights, one that takes `stored` data as they are if it can."""
    fitting = [m for m in INTEGERS if m.feature in target.features and m.fits(weight)]
    return min(fitting, key=lambda m: m.data != stored, default=None)


def mmla_named(name: str) -> Mmla:
    """Return the instruction of that name."""
    return next(mmla for mmla in ALL if mmla.name == name)


def _description(mmla: Mmla) -> Any:  # noqa: ANN401 - a PrimFunc
    group, data, weight, total = mmla.group, mmla.data, mmla.weight, mmla.total

    def wide(value: Any) -> Any:  # noqa: ANN401 - a TIR expression
        return widen_bf16(value) if total == "float32" else value.astype(total)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        stride = T.int32()
        A = T.match_buffer(a, (2, group), data, strides=[stride, 1], offset_factor=1)
        B = T.match_buffer(b, (2, group), weight, offset_factor=1)
        C = T.match_buffer(c, (2, 2), total, offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:2, 0:2], A[0:2, 0:group], B[0:2, 0:group])
            T.writes(C[0:2, 0:2])
            for p in T.serial(0, 2):
                for q in T.serial(0, 2):
                    for k in T.serial(0, group):
                        with T.sblock("update"):
                            vp, vq, vk = T.axis.remap("SSR", [p, q, k])
                            C[vp, vq] = C[vp, vq] + wide(A[vp, vk]) * wide(B[vq, vk])

    return description


def _implementation(mmla: Mmla) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the machine form: a call of the LLVM function that `_text` writes."""
    group, data, weight, total = mmla.group, mmla.data, mmla.weight, mmla.total
    name = name_of(_FAMILY, mmla.name)

    def step(a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401 - buffers
        rows = [T.reinterpret(a.vload([p, 0], dtype=f"{data}x{group}"), dtype="int64") for p in range(2)]
        weights = b.vload([0, 0], dtype=f"{weight}x{2 * group}")
        return call(f"{total}x4", name, c.vload([0, 0], dtype=f"{total}x4"), *rows, weights)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        stride = T.int32()
        A = T.match_buffer(a, (2, group), data, strides=[stride, 1], offset_factor=1)
        B = T.match_buffer(b, (2, group), weight, offset_factor=1)
        C = T.match_buffer(c, (2, 2), total, offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:2, 0:2], A[0:2, 0:group], B[0:2, 0:group])
            T.writes(C[0:2, 0:2])
            C[0, T.ramp(T.int32(0), 1, 4)] = step(A, B, C)

    return implementation


def _text(target: Target, name: str) -> str:
    mmla = mmla_named(name.rpartition("_")[2])
    count, bits = 2 * mmla.group, 64 // mmla.group
    t, w = ("<4 x float>" if mmla.total == "float32" else "<4 x i32>"), f"<{count} x i{bits}>"
    head = f"""define {t} @{name}({t} %c, i64 %first, i64 %second, {w} %b) alwaysinline {{
        %low = insertelement <2 x i64> poison, i64 %first, i32 0
        %rows = insertelement <2 x i64> %low, i64 %second, i32 1"""
    if mmla.feature in target.features:
        x = f"<{count} x bfloat>" if mmla is BFMMLA else w
        return f"""{head}
            %x = bitcast <2 x i64> %rows to {x}
            %y = bitcast {w} %b to {x}
            %r = call {t} @{mmla.intrinsic}({t} %c, {x} %x, {x} %y)
            ret {t} %r
            }}
            declare {t} @{mmla.intrinsic}({t}, {x}, {x})"""
    return "\n".join([head, f"%a = bitcast <2 x i64> %rows to {w}", *_portable(mmla, t, w)])


def _portable(mmla: Mmla, t: str, w: str) -> list[str]:
    """Return the same sums, a factor of each of the four at a time."""
    total, lines = "%c", []
    wide = f"<4 x i{64 // mmla.group}>"
    for k in range(mmla.group):
        for side, places in (("a", (0, 0, 1, 1)), ("b", (0, 1, 0, 1))):
            mask = ", ".join(f"i32 {row * mmla.group + k}" for row in places)
            lines.append(f"%{side}p{k} = shufflevector {w} %{side}, {w} poison, <4 x i32> <{mask}>")
            if mmla is BFMMLA:
                lines.append(f"%{side}z{k} = zext {wide} %{side}p{k} to <4 x i32>")
                lines.append(f"%{side}s{k} = shl <4 x i32> %{side}z{k}, splat (i32 16)")
                lines.append(f"%{side}{k} = bitcast <4 x i32> %{side}s{k} to {t}")
            else:
                signed = (mmla.data if side == "a" else mmla.weight) == "int8"
                lines.append(f"%{side}{k} = {'sext' if signed else 'zext'} {wide} %{side}p{k} to {t}")
        if mmla is BFMMLA:
            lines.append(f"%t{k} = call {t} @llvm.fmuladd.v4f32({t} %a{k}, {t} %b{k}, {t} {total})")
        else:
            lines += [f"%m{k} = mul {t} %a{k}, %b{k}", f"%t{k} = add {t} {total}, %m{k}"]
        total = f"%t{k}"
    end = [f"ret {t} {total}", "}"]
    return [*lines, *end, *([f"declare {t} @llvm.fmuladd.v4f32({t}, {t}, {t})"] if mmla is BFMMLA else [])]


register(_FAMILY, _text)


def intrinsic_name(mmla: Mmla) -> str:
    """Return the name under which schedules tensorize with `mmla`, registering it on first use."""
    name = "ingot." + mmla.name
    if s_tir.TensorIntrin.get(name, allow_missing=True) is None:
        s_tir.TensorIntrin.register(name, _description(mmla), _implementation(mmla))
    return name
