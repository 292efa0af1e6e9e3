"""Dot products of four 8-bit integers: each instruction's meaning and machine form, declared once.

    acc[i] += sum over k < 4 of data[k] * weight[i][k]        for i < lanes, in int32

The meaning is a TIR function that a schedule matches (`description`); the machine form calls the LLVM intrinsic
(`implementation`). `tests/schedules` runs one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import s_tir
from tvm.script import tirx as T  # noqa: N812 - the name TVM's script parser knows

from ingot.schedules.vector import registers
from ingot.target import Target


@dataclass(frozen=True)
class Dot4:
    """An instruction that adds `lanes` dot products of four 8-bit values each.

    data: dtype of the value that is broadcast to all lanes; the weights are int8. feature: what the CPU must have.
    """

    name: str
    lanes: int
    data: str
    feature: str
    intrinsic: str


#: In order of preference.
DOT4: tuple[Dot4, ...] = (
    Dot4("dot4_u8s8_avx512vnni", 16, "uint8", "avx512vnni", "llvm.x86.avx512.vpdpbusd.512"),
    Dot4("dot4_u8s8_avxvnni", 8, "uint8", "avxvnni", "llvm.x86.avx512.vpdpbusd.256"),
    Dot4("dot4_s8s8_dotprod", 4, "int8", "dotprod", "llvm.aarch64.neon.sdot.v4i32.v16i8"),
)


def dot4_of(target: Target) -> Dot4 | None:
    """Return the best dot product instruction of a target that fills its registers, or None."""
    lanes = registers(target).lanes
    return next((dot for dot in DOT4 if dot.feature in target.features and dot.lanes == lanes), None)


def _description(dot: Dot4) -> Any:  # noqa: ANN401 - a PrimFunc
    lanes, data = dot.lanes, dot.data

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((4,), data, offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return description


def _implementation(dot: Dot4) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the machine form; LLVM types the operands of all these intrinsics as vectors of bytes."""
    lanes, data, intrinsic = dot.lanes, dot.data, dot.intrinsic

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4,), data, offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(intrinsic),
                C.vload([0], dtype=f"int32x{lanes}"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], f"{data}x4"), dtype="int32"), lanes),
                    dtype=f"{data}x{4 * lanes}",
                ),
                B.vload([0, 0], dtype=f"int8x{4 * lanes}"),
                dtype=f"int32x{lanes}",
            )

    return implementation


def intrinsic_name(dot: Dot4) -> str:
    """Return the name under which schedules tensorize with `dot`, registering it on first use."""
    name = "ingot." + dot.name
    if s_tir.TensorIntrin.get(name, allow_missing=True) is None:
        s_tir.TensorIntrin.register(name, _description(dot), _implementation(dot))
    return name
