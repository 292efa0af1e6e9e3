"""Dot products of a few small integers: each instruction's meaning and machine form, declared once.

    acc[i] += sum over k < group of data[k] * weight[k, i]        for i < lanes, in int32

The meaning is a TIR function that a schedule matches (`description`); the machine form calls LLVM intrinsics
(`implementation`). `tests/schedules/test_microkernels.py` runs one against the other. All are exact: no sum saturates
or wraps for any data and any weights the instruction is used with (`Dot.fits`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import s_tir
from tvm.script import tirx as T  # noqa: N812 - the name TVM's script parser knows

from ingot.schedules.lanes import spread
from ingot.schedules.vector import registers
from ingot.target import Target


@dataclass(frozen=True)
class Dot:
    """An instruction, or a few, that add `lanes` dot products of `group` products each.

    data: dtype of the values that are broadcast to all lanes. weight: dtype in which weights are stored; those of a
    register lie as [split][lanes][group / split]. form: how it is written. features: what the CPU must have.
    """

    name: str
    lanes: int
    group: int
    data: str
    weight: str
    form: str
    features: tuple[str, ...] = ()
    arch: str = ""
    intrinsic: str = ""
    split: int = 1
    #: Its cost beside one vector FMA of the same lanes.
    cost: float = 1.0
    #: For one position alone: it takes fewer instructions for each load of weights, and more for each position.
    single: bool = False

    def fits(self, weight: np.ndarray) -> bool:
        """Say whether whole-number weights (zero points subtracted) can be used with it.

        The pairs of products that "pairs" and "signs" sum in 16 bits stay below 2^15 unless both weights are -128;
        those of "bytes" if the weights of a pair that have one sign sum up to at most 128: 255 x 128 < 2^15.
        """
        if self.form == "bytes" and not _pairs_fit(weight):
            return False
        narrow = self.form in ("pairs", "signs")
        low, high = (-127 if narrow else -128, 127) if self.weight == "int8" else (-255, 255)
        return bool(
            np.all(weight == np.rint(weight)) and weight.min(initial=0) >= low and weight.max(initial=0) <= high
        )


#: In order of preference; of "madd" and "widen" there is a form for every weight and register width (`dots_of`).
DOTS: tuple[Dot, ...] = (
    Dot(
        "u8s8_avx512vnni", 16, 4, "uint8", "int8", "dot4",
        ("avx512vnni",), intrinsic="llvm.x86.avx512.vpdpbusd.512", cost=1.0,
    ),
    Dot("u8s8_avxvnni", 8, 4, "uint8", "int8", "dot4", ("avxvnni",), intrinsic="llvm.x86.avx512.vpdpbusd.256"),
    Dot(
        "s8s8_dotprod", 4, 4, "int8", "int8", "dot4",
        ("dotprod",), arch="aarch64", intrinsic="llvm.aarch64.neon.sdot.v4i32.v16i8",
    ),
    Dot(
        "s8s8_neon", 4, 4, "int8", "int8", "pairs",
        ("neon",), arch="aarch64", intrinsic="llvm.aarch64.neon.saddlp.v4i32.v8i16", split=2, cost=3.2,
    ),
    Dot(
        "s8s8_neon32", 4, 4, "int8", "int8", "pairs",
        ("neon",), arch="arm", intrinsic="llvm.arm.neon.vpadals.v4i32.v8i16", split=2, cost=3.2,
    ),
    Dot("u8s8_avx512bw", 16, 4, "uint8", "int8", "bytes", ("avx512bw",), cost=2.4),
    Dot("u8s8_avx2", 8, 4, "uint8", "int8", "bytes", ("avx2",), cost=1.9),
    Dot("u8s8_ssse3", 4, 4, "uint8", "int8", "bytes", ("ssse3",), cost=1.9),
    Dot(
        "s8s8_avx2", 8, 4, "int8", "int8", "signs",
        ("avx2",), intrinsic="llvm.x86.avx2.psign.b", cost=2.4, single=True,
    ),
    Dot(
        "s8s8_ssse3", 4, 4, "int8", "int8", "signs",
        ("ssse3",), intrinsic="llvm.x86.ssse3.psign.b.128", cost=2.4, single=True,
    ),
    Dot("s16_avx512", 16, 2, "int16", "", "madd", ("avx512bw",), intrinsic="llvm.x86.avx512.pmaddw.d.512", cost=1.5),
    Dot("s16_avx2", 8, 2, "int16", "", "madd", ("avx2",), intrinsic="llvm.x86.avx2.pmadd.wd", cost=1.2),
    Dot("s16_sse2", 4, 2, "int16", "", "madd", arch="x86_64", intrinsic="llvm.x86.sse2.pmadd.wd", cost=1.2),
    Dot("s16", 0, 2, "int16", "", "widen", split=2, cost=2.4),
)  # fmt: skip


#: What the weights of one sign in a pair of neighbouring input channels sum up to at most, for "bytes".
PAIR_LIMIT = 128


def pair_sums(weight: np.ndarray) -> np.ndarray:
    """Return the larger of the sums of a pair's positive weights and of its negative ones' sizes: [..., CI / 2]."""
    pairs = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, weight.shape[-1] % 2)])
    pairs = pairs.reshape(*weight.shape[:-1], -1, 2)
    both = np.maximum(pairs, 0).sum(axis=-1), np.maximum(-pairs, 0).sum(axis=-1)
    return np.asarray(np.maximum(*both))


def _pairs_fit(weight: np.ndarray) -> bool:
    """Say whether OHWI weights fit "bytes", paired within a tap's channels or within a row of taps."""
    fits = pair_sums(weight).max(initial=0) <= PAIR_LIMIT
    if fits and weight.ndim == 4 and weight.shape[3] % 4:
        fits = pair_sums(weight.reshape(*weight.shape[:2], -1)).max(initial=0) <= PAIR_LIMIT
    return bool(fits)


def weight_kind(weight: np.ndarray) -> str:
    """Say which whole numbers weights (zero points subtracted) are: what instructions fit them depends on no more.

    "p7": from -127 to 127, in pairs that fit "bytes"; "q7": from -127 to 127; "q8": from -128; "u8": from 0 to 255;
    "q9": from -255 to 255, or anything else.
    """
    low, high = weight.min(initial=0), weight.max(initial=0)
    if high <= 127 and low >= -127 and _pairs_fit(weight):
        return "p7"
    if high <= 127:
        return "q7" if low >= -127 else "q8" if low >= -128 else "q9"
    return "u8" if low >= 0 and high <= 255 else "q9"


def dots_of(target: Target) -> list[Dot]:
    """Return the instructions of a target that fill its registers, best first; the last ones take any weights."""
    lanes, found = registers(target).lanes, []
    for dot in DOTS:
        has_all = all(feature in target.features for feature in dot.features)
        if not has_all or dot.lanes not in (0, lanes) or dot.arch not in ("", target.arch):
            continue
        if dot.weight:
            found.append(dot)
        else:
            found += [replace(dot, name=f"{dot.name}{w}_{lanes}", lanes=lanes, weight=w) for w in ("int8", "int16")]
    return found


def dot_of(target: Target, weight: np.ndarray, positions: int = 2) -> Dot | None:
    """Return the best instruction for these weights, or None if they are not whole numbers of at most 9 bits."""
    return next((dot for dot in dots_of(target) if dot.fits(weight) and (positions == 1 or not dot.single)), None)


def _description(dot: Dot) -> Any:  # noqa: ANN401 - a PrimFunc
    lanes, group, split, data, weight = dot.lanes, dot.group, dot.split, dot.data, dot.weight
    within = group // split

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((group,), data, offset_factor=1),
        B: T.Buffer((split, lanes, within), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:split, 0:lanes, 0:within])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, group):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vk // within, vi, vk % within], "int32")

    return description


def add_products(dot: Dot, data: Any, weight: Any, acc: Any) -> Any:  # noqa: ANN401 - TIR vectors
    """Return acc + the dot products; `data(first, count)` loads values, `weight` is a whole register's."""
    lanes = dot.lanes
    total = f"int32x{lanes}"
    if dot.form == "dot4":
        dot4, four = T.llvm_lookup_intrinsic_id(dot.intrinsic), data(0, 4)
        if dot.arch == "aarch64":  # the last operand may be one lane of a register
            lane = T.reinterpret(spread(four, lanes), dtype=f"{dot.data}x{4 * lanes}")
            return T.call_llvm_pure_intrin(dot4, acc, weight, lane, dtype=total)
        bytes_ = T.reinterpret(T.broadcast(T.reinterpret(four, dtype="int32"), lanes), dtype=f"{dot.data}x{4 * lanes}")
        return T.call_llvm_pure_intrin(dot4, acc, bytes_, weight, dtype=total)
    if dot.form in ("bytes", "signs"):
        return acc + _by_bytes(dot, data(0, 4), weight)
    if dot.form == "madd":
        pairs = T.reinterpret(T.broadcast(T.reinterpret(data(0, 2), dtype="int32"), lanes), dtype=f"int16x{2 * lanes}")
        wide = T.cast(weight, f"int16x{2 * lanes}")
        return acc + T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(dot.intrinsic), pairs, wide, dtype=total)
    if dot.form == "pairs":
        half, products = f"int8x{2 * lanes}", f"int16x{2 * lanes}"

        def product(first: int, side: Any) -> Any:  # noqa: ANN401
            """Multiply one half of a register of weights by pairs of data that fill the same half: smull or smull2."""
            if dot.arch == "aarch64":
                pairs = side(half, T.reinterpret(spread(data(first, 2), 2 * lanes), dtype=f"int8x{4 * lanes}"))
            else:
                pairs = T.reinterpret(T.broadcast(T.reinterpret(data(first, 2), dtype="int16"), lanes), dtype=half)
            return T.cast(pairs, products) * T.cast(side(half, weight), products)

        both = product(0, T.vectorlow) + product(2, T.vectorhigh)
        if dot.arch == "arm":  # this one adds to the sums itself
            return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(dot.intrinsic), acc, both, dtype=total)
        return acc + T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(dot.intrinsic), both, dtype=total)
    one, two = (T.broadcast(T.cast(data(first, 1), "int32"), lanes) for first in (0, 1))
    first, second = (side(f"{dot.weight}x{lanes}", weight) for side in (T.vectorlow, T.vectorhigh))
    return acc + one * T.cast(first, total) + two * T.cast(second, total)


#: What multiplies bytes and what multiplies words, by lanes.
_BYTES_AND_WORDS = {
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
}


def _by_bytes(dot: Dot, four: Any, weight: Any) -> Any:  # noqa: ANN401 - TIR vectors
    """Return the sums of four products: pmaddubsw multiplies unsigned bytes by signed ones.

    "signs" has signed data: |x| times w with the sign of x.
    """
    bytes_, words, wide = (f"{kind}x{dot.lanes * n}" for kind, n in (("int8", 4), ("int16", 2), ("int32", 1)))
    multiply, add = _BYTES_AND_WORDS[dot.lanes]

    def call(result: str, name: str, *args: Any) -> Any:  # noqa: ANN401
        return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=result)

    x = T.reinterpret(T.broadcast(T.reinterpret(four, dtype="int32"), dot.lanes), dtype=bytes_)
    if dot.form == "signs":
        size = T.max(x, T.broadcast(T.int8(0), 4 * dot.lanes) - x)
        x, weight = size, call(bytes_, dot.intrinsic, weight, x)
    pairs = call(words, multiply, x, weight)
    return call(wide, add, pairs, T.broadcast(T.int16(1), 2 * dot.lanes))


def _implementation(dot: Dot) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the machine form."""
    lanes, group, split, data, weight = dot.lanes, dot.group, dot.split, dot.data, dot.weight
    within = group // split

    def load(buffer: Any, first: int, count: int) -> Any:  # noqa: ANN401
        return buffer.vload([first], dtype=f"{data}x{count}" if count > 1 else data)

    def step(a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401 - buffers
        packed = b.vload([0, 0, 0], dtype=f"{weight}x{lanes * group}")
        return add_products(
            dot, lambda first, count: load(a, first, count), packed, c.vload([0], dtype=f"int32x{lanes}")
        )

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((group,), data, offset_factor=1),
        B: T.Buffer((split, lanes, within), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:split, 0:lanes, 0:within])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = step(A, B, C)

    return implementation


def intrinsic_name(dot: Dot) -> str:
    """Return the name under which schedules tensorize with `dot`, registering it on first use."""
    name = "ingot." + dot.name
    if s_tir.TensorIntrin.get(name, allow_missing=True) is None:
        s_tir.TensorIntrin.register(name, _description(dot), _implementation(dot))
    return name


def dot_named(name: str, target: Target) -> Dot:
    """Return the target's instruction of that name."""
    return next(dot for dot in dots_of(target) if dot.name == name)
