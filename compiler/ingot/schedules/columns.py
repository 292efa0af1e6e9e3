"""Columns of a depthwise window for instructions that add four products to a lane: meaning and machine form.

    acc[i] += sum over k < rows of data[k, 0, i] * weight[i, k]        for i < lanes, in int32

The rows of a column lie apart, each with its channels side by side; the instruction wants the four factors of a lane in
four neighbouring bytes. Two steps of interleaving bring them there: first bytes of two rows, then pairs of bytes of two
pairs of rows. Windows that overlap read the same columns, and LLVM interleaves those once.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.script import tirx as T  # noqa: N812 - the name TVM's script parser knows

from ingot.target import Target

#: Products that the instruction adds to a lane.
DOT_ROWS = 4
_DOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"


def takes_columns(target: Target) -> bool:
    """Say whether the target has the instruction."""
    return target.arch == "aarch64" and "dotprod" in target.features


def column_name(rows: int, lanes: int) -> str:
    """Return the name under which schedules tensorize with a column of 2 to 4 rows and 8 or 16 channels.

    It is registered on first use.
    """
    name = f"ingot.column{rows}x{lanes}"
    if s_tir.TensorIntrin.get(name, allow_missing=True) is None:
        s_tir.TensorIntrin.register(name, _description(rows, lanes), _implementation(rows, lanes))
    return name


def _description(rows: int, lanes: int) -> Any:  # noqa: ANN401 - a PrimFunc
    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        row_stride, column_stride, lane_stride = T.int32(), T.int32(), T.int32()
        A = T.match_buffer(a, (rows, 1, lanes), "int8", strides=[row_stride, column_stride, 1], offset_factor=1)
        B = T.match_buffer(b, (lanes, rows), "int8", strides=[lane_stride, 1], offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:rows, 0, 0:lanes], B[0:lanes, 0:rows])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, rows):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk, 0, vi], "int32") * T.cast(B[vi, vk], "int32")

    return description


def _interleaved(first: Any, second: Any, kind: str, lanes: int, *, high: bool) -> Any:  # noqa: ANN401
    """Return every element of the low or high half of one vector before that of the other."""
    start = lanes // 2 if high else 0
    order = [lane for i in range(start, start + lanes // 2) for lane in (i, lanes + i)]
    return T.reinterpret(tirx.Shuffle([first, second], order), dtype=kind)


def _step(rows: int, lanes: int, first: int, a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401 - buffers
    """Return the sums of four channels, from `first` on."""
    loaded = [a.vload([k, 0, 0], dtype=f"int8x{lanes}") for k in range(rows)]
    if rows < DOT_ROWS:  # these meet weights of 0; a row interleaved with itself would be another instruction
        loaded += loaded[DOT_ROWS - rows - 1 :: -1]
    if lanes == 8:  # the low half of a register
        loaded = [T.vectorcombine("int8x16", row, row) for row in loaded]
    pairs = [_interleaved(loaded[k], loaded[k + 1], "int16x8", 16, high=first >= 8) for k in (0, 2)]
    fours = _interleaved(pairs[0], pairs[1], "int8x16", 8, high=first % 8 == 4)
    weight, acc = b.vload([first, 0], dtype="int8x16"), c.vload([first], dtype="int32x4")
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(_DOT), acc, weight, fours, dtype="int32x4")


def _implementation(rows: int, lanes: int) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the machine form."""

    def step(first: int, a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401 - buffers
        return _step(rows, lanes, first, a, b, c)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def implementation8(a: T.handle, b: T.handle, c: T.handle) -> None:
        row_stride, column_stride, lane_stride = T.int32(), T.int32(), T.int32()
        A = T.match_buffer(a, (rows, 1, lanes), "int8", strides=[row_stride, column_stride, 1], offset_factor=1)
        B = T.match_buffer(b, (lanes, rows), "int8", strides=[lane_stride, 1], offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:rows, 0, 0:lanes], B[0:lanes, 0:rows])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, 4)] = step(0, A, B, C)
            C[T.ramp(T.int32(4), 1, 4)] = step(4, A, B, C)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def implementation16(a: T.handle, b: T.handle, c: T.handle) -> None:
        row_stride, column_stride, lane_stride = T.int32(), T.int32(), T.int32()
        A = T.match_buffer(a, (rows, 1, lanes), "int8", strides=[row_stride, column_stride, 1], offset_factor=1)
        B = T.match_buffer(b, (lanes, rows), "int8", strides=[lane_stride, 1], offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:rows, 0, 0:lanes], B[0:lanes, 0:rows])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, 4)] = step(0, A, B, C)
            C[T.ramp(T.int32(4), 1, 4)] = step(4, A, B, C)
            C[T.ramp(T.int32(8), 1, 4)] = step(8, A, B, C)
            C[T.ramp(T.int32(12), 1, 4)] = step(12, A, B, C)

    return implementation8 if lanes == 8 else implementation16
