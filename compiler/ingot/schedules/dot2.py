"""Dot products of two bfloat16 values with float32 sums: each instruction's meaning and machine form.

    acc[i] += data[0] * weight[i][0] + data[1] * weight[i][1]        for i < lanes, in float32

The meaning is a TIR function that a schedule matches (`description`); the machine form is LLVM text (`_text`), with the
instruction where the target has it and as float32 arithmetic elsewhere. The instructions flush denormals and round the
two products' sum in ways of their own, about 2^-24 of the larger product: the meaning fixes no order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import s_tir
from tvm.script import tirx as T  # noqa: N812 - the name TVM's script parser knows

from ingot.schedules.half import BF16, Half, widen_bf16
from ingot.schedules.llvm_forms import call, name_of, register
from ingot.schedules.vector import registers
from ingot.target import Target

#: Input channels one instruction takes.
GROUP = 2


@dataclass(frozen=True)
class Dot2:
    """An instruction that adds `lanes` dot products of two values of format `half` each.

    feature: what the CPU must have.
    """

    name: str
    lanes: int
    half: Half
    feature: str
    intrinsic: str


DOT2: tuple[Dot2, ...] = (
    Dot2("avx512bf16", 16, BF16, "avx512bf16", "llvm.x86.avx512bf16.dpbf16ps.512"),
    Dot2("bfdot", 4, BF16, "bf16", "llvm.aarch64.neon.bfdot.v4f32.v8bf16"),
)


def dot2_of(target: Target, half: Half) -> Dot2 | None:
    """Return the dot product instruction of a target for the format that fills its registers, or None."""
    lanes = registers(target).lanes
    found = (dot for dot in DOT2 if dot.feature in target.features and dot.lanes == lanes and dot.half == half)
    return next(found, None)


def _description(dot: Dot2) -> Any:  # noqa: ANN401 - a PrimFunc
    lanes = dot.lanes
    widen = widen_bf16

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((2,), "uint16", offset_factor=1),
        B: T.Buffer((lanes, 2), "uint16", offset_factor=1),
        C: T.Buffer((lanes,), "float32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 2):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + widen(A[vk]) * widen(B[vi, vk])

    return description


def _implementation(dot: Dot2) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the machine form: a call of the LLVM function that `_text` writes."""
    lanes, name = dot.lanes, name_of("dot2", dot.name)

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((2,), "uint16", offset_factor=1),
        B: T.Buffer((lanes, 2), "uint16", offset_factor=1),
        C: T.Buffer((lanes,), "float32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = call(
                f"float32x{lanes}",
                name,
                C.vload([0], dtype=f"float32x{lanes}"),
                T.reinterpret(A.vload([0], "uint16x2"), dtype="int32"),
                B.vload([0, 0], dtype=f"uint16x{2 * lanes}"),
            )

    return implementation


def _text(target: Target, name: str) -> str:
    dot = next(dot for dot in DOT2 if name_of("dot2", dot.name) == name)
    lanes = dot.lanes
    f, i, s, b = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{2 * lanes} x bfloat>"
    head = f"""define {f} @{name}({f} %c, i32 %a, {s} %b) alwaysinline {{
        %one = insertelement {i} poison, i32 %a, i32 0
        %pairs = shufflevector {i} %one, {i} poison, {i} zeroinitializer"""
    if dot.feature in target.features:
        return f"""{head}
            %x = bitcast {i} %pairs to {b}
            %y = bitcast {s} %b to {b}
            %r = call {f} @{dot.intrinsic}({f} %c, {b} %x, {b} %y)
            ret {f} %r
            }}
            declare {f} @{dot.intrinsic}({f}, {b}, {b})"""
    lines = [head, f"%weights = bitcast {s} %b to {i}"]
    for value, source in (("x", "pairs"), ("y", "weights")):
        lines += [
            f"%{value}l = shl {i} %{source}, splat (i32 16)",
            f"%{value}0 = bitcast {i} %{value}l to {f}",
            f"%{value}h = and {i} %{source}, splat (i32 -65536)",
            f"%{value}1 = bitcast {i} %{value}h to {f}",
        ]
    fma = f"llvm.fmuladd.v{lanes}f32"
    lines += [
        f"%s = call {f} @{fma}({f} %x0, {f} %y0, {f} %c)",
        f"%r = call {f} @{fma}({f} %x1, {f} %y1, {f} %s)",
        f"ret {f} %r\n}}\ndeclare {f} @{fma}({f}, {f}, {f})",
    ]
    return "\n".join(lines)


register("dot2", _text)


def intrinsic_name(dot: Dot2) -> str:
    """Return the name under which schedules tensorize with `dot`, registering it on first use."""
    name = "ingot.dot2_" + dot.name
    if s_tir.TensorIntrin.get(name, allow_missing=True) is None:
        s_tir.TensorIntrin.register(name, _description(dot), _implementation(dot))
    return name
