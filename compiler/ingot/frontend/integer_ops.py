"""Relax operators of whole numbers that Relax lacks: look-up tables, average pools and softmax of 8-bit integers.

    lookup(x, table)          table[x - least stored value], for any function of one 8-bit value
    average_pool(x)           the mean of a window, halves away from zero, padding not counted
    softmax(x, exponentials)  TFLite's fixed-point softmax over the last axis; `tflite_tables` makes the table

Each brings its definition as a loop nest, so that no later step needs to know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Op, register_op_attr
from tvm.ir import _ffi_api as tvm_ir

from ingot.frontend.fixed_point import high_multiply
from ingot.frontend.tflite_tables import SUM_BITS

LOOKUP = "ingot.lookup"
AVERAGE_POOL = "ingot.average_pool"
SOFTMAX = "ingot.softmax"

Expr = Any  # TVM ships no types: Relax and TIR expressions


def lookup(x: Expr, table: Expr) -> Expr:
    """Return the call: `x` int8 or uint8 of any shape, `table` [256], its first entry for the smallest value of `x`."""
    return relax.Call(_OPERATORS[LOOKUP], [x, table], None)


def average_pool(
    x: Expr, window: Sequence[int], strides: Sequence[int], padding: Sequence[int], limits: tuple[int, int]
) -> Expr:
    """Return the call: `x` int8 or uint8 NHWC; `padding` is [top, left, bottom, right]; stored values in `limits`."""
    attrs = tvm.ir.make_node(
        "ir.DictAttrs",
        window=list(window),
        strides=list(strides),
        padding=list(padding),
        low=limits[0],
        high=limits[1],
    )
    return relax.Call(_OPERATORS[AVERAGE_POOL], [x], attrs)


def softmax(x: Expr, exponentials: Expr) -> Expr:
    """Return the call: `x` int8 or uint8; `exponentials` int32[256], of the differences 0 ... 255 to the maximum.

    The result has x's dtype, the scale 1/256 and the dtype's smallest value as its zero point.
    """
    return relax.Call(_OPERATORS[SOFTMAX], [x, exponentials], None)


def _index(value: Expr) -> Expr:
    """Return the place of a stored value in a table."""
    whole = value.astype("int32")
    return whole + tirx.const(128, "int32") if str(value.ty.dtype) == "int8" else whole


def _define_lookup(builder: Expr, call: Expr) -> Expr:
    def compute(x: Expr, table: Expr) -> Expr:
        return te.compute(x.shape, lambda *i: table[_index(x(*i))], name="lookup")

    return builder.call_te(compute, *call.args, primfunc_name_hint="lookup")


def _pooled_shape(call: Expr) -> tuple[int, ...]:
    n, height, width, c = (int(dim) for dim in call.args[0].ty.shape)
    window, strides, padding = (_integers(call, key) for key in ("window", "strides", "padding"))
    rows = (height + padding[0] + padding[2] - window[0]) // strides[0] + 1
    return n, rows, (width + padding[1] + padding[3] - window[1]) // strides[1] + 1, c


def _integers(call: Expr, key: str) -> list[int]:
    return [int(item) for item in call.attrs[key]]


def _define_average_pool(builder: Expr, call: Expr) -> Expr:
    (kh, kw), (sh, sw), (top, left, _, _) = (_integers(call, key) for key in ("window", "strides", "padding"))
    _, height, width, _ = (int(dim) for dim in call.args[0].ty.shape)
    shape, padded = _pooled_shape(call), any(_integers(call, "padding"))
    low, high = (tirx.const(int(call.attrs[key]), "int32") for key in ("low", "high"))

    def compute(x: Expr) -> Expr:
        ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")

        def value(n: Expr, y: Expr, x_: Expr, c: Expr) -> Expr:
            row, column = y * sh + ry - top, x_ * sw + rx - left
            stored = x(n, row, column, c).astype("int32")
            if not padded:
                return stored
            inside = te.all(row >= 0, row < height, column >= 0, column < width)
            return te.if_then_else(inside, stored, tirx.const(0, "int32"))

        sums = te.compute(shape, lambda *i: te.sum(value(*i), axis=[ry, rx]), name="pool_sum")

        def span(position: Expr, size: int, stride: int, before: int, kernel: int) -> Expr:
            first = tirx.max(position * stride - before, tirx.const(0, position.ty.dtype))
            return tirx.min(position * stride - before + kernel, tirx.const(size, position.ty.dtype)) - first

        def mean(n: Expr, y: Expr, x_: Expr, c: Expr) -> Expr:
            total, count = sums(n, y, x_, c), tirx.const(kh * kw, "int32")
            if padded:
                count = (span(y, height, sh, top, kh) * span(x_, width, sw, left, kw)).astype("int32")
            half = tirx.truncdiv(count, tirx.const(2, "int32"))
            away = tirx.Select(total > 0, total + half, total - half)
            return tirx.min(tirx.max(tirx.truncdiv(away, count), low), high).astype(str(x.dtype))

        return te.compute(shape, mean, name="pool_mean")

    return builder.call_te(compute, call.args[0], primfunc_name_hint="average_pool")


def _reciprocals(
    shape: tuple[int, ...], total: Expr, zeros: Expr, attrs: dict[str, str], multiply: Callable[[Expr, Expr], Expr]
) -> Expr:
    """Return 1 / (total * 2^(zeros - 31)) with 31 bits after the point, as a TE tensor of int32.

    total: positive int32; zeros: its leading zero bits. Three steps of Newton's method from 48/17 - 32/17 x, x being
    half of the denominator, between 1/2 and 1; the steps' numbers have 29 bits after the point. Each step is a tensor
    of its own: nested in one expression they would be computed over and over.
    """

    def number(value: float, bits: int) -> Expr:
        return tirx.const(round(value * 2.0**bits), "int32")

    def stage(name: str, value: Callable[..., Expr]) -> Expr:
        return te.compute(shape, value, name=f"row_{name}_scale")

    def halved(*row: Expr) -> Expr:
        return tirx.shift_left(total(*row), zeros(*row) - tirx.const(1, "int32"))

    half = stage("half", halved)
    x = stage("guess", lambda *row: number(48 / 17, 29) + multiply(number(-32 / 17, 29), half(*row)))

    def improved(x: Expr, step: int) -> Expr:
        error = stage(f"error{step}", lambda *row: number(1, 29) - multiply(x(*row), half(*row)))
        return stage(f"step{step}", lambda *row: x(*row) + multiply(x(*row), error(*row)) * number(4, 0))

    for step in range(3):
        x = improved(x, step)

    def doubled(*row: Expr) -> Expr:
        half_of_most, most = (tirx.const(v, "int32") for v in ((1 << 30) - 1, (1 << 31) - 1))
        return tirx.Select(x(*row) > half_of_most, most, x(*row) * tirx.const(2, "int32"))

    return te.compute(shape, doubled, name="row_scale", attrs=attrs)


def define_softmax(
    builder: Expr,
    call: Expr,
    attrs: dict[str, str] | None = None,
    multiply: Callable[[Expr, Expr], Expr] = high_multiply,
) -> Expr:
    """Return the loop nest of a softmax: blocks named `row_...` and the result; `attrs` annotates the last of them.

    `multiply` is the rounding doubling high multiply of int32. Nothing here is wider than 32 bits.
    """
    dtype = str(call.args[0].ty.dtype.dtype)
    least, most = (tirx.const(int(v), "int32") for v in (np.iinfo(dtype).min, np.iinfo(dtype).max))

    def compute(x: Expr, table: Expr) -> Expr:
        *rows, length = (int(dim) for dim in x.shape)
        shape = tuple(rows) or (1,)

        def at(row: Sequence[Expr], i: Expr) -> Expr:
            return x(*(row if rows else ()), i).astype("int32")

        k, j = te.reduce_axis((0, length), "k"), te.reduce_axis((0, length), "j")
        top = te.compute(shape, lambda *row: te.max(at(row, k), axis=[k]), name="row_max")

        def coarse(*row: Expr) -> Expr:
            more = tirx.shift_right(table[top(*row) - at(row, j)], tirx.const(SUM_BITS - 1, "int32"))
            one = tirx.const(1, "int32")
            return tirx.shift_right(more + one, one)  # rounded; adding the half first would overflow

        total = te.compute(shape, lambda *row: te.sum(coarse(*row), axis=[j]), name="row_sum")
        zeros = te.compute(shape, lambda *row: tirx.clz(total(*row)).astype("int32"), name="row_zeros_scale")
        shift = te.compute(
            shape,
            lambda *row: tirx.min(tirx.const(SUM_BITS + 31 - 8 - 1, "int32") - zeros(*row), tirx.const(31, "int32")),
            name="row_shift_scale",
        )
        scale = _reciprocals(shape, total, zeros, attrs or {}, multiply)

        def share(*i: Expr) -> Expr:
            row = i[:-1] if rows else (tirx.const(0, "int64"),)
            power = table[top(*row) - at(row, i[-1])]
            # One bit less than the shift, rounded by the last: adding the half first would overflow. The mask changes
            # nothing but tells TVM the shift's bounds, without which it takes the result to be small and drops the min.
            less, one = tirx.bitwise_and(shift(*row), tirx.const(31, "int32")), tirx.const(1, "int32")
            more = tirx.shift_right(multiply(scale(*row), power), less)
            return tirx.min(tirx.shift_right(more + one, one) + least, most).astype(dtype)

        return te.compute(x.shape, share, name="softmax")

    return builder.call_te(compute, *call.args, primfunc_name_hint="softmax")


def _register(name: str, meaning: str, define: Callable[[Expr, Expr], Expr], infer: Callable[[Expr], Expr]) -> Op:
    """Make an operator known to Relax; TVM has one table of operators for the process."""
    if name not in [str(known) for known in Op.list_op_names()]:
        tvm_ir.RegisterOp(name, meaning)
        register_op_attr(name, "FInferType", lambda call, _: infer(call))
        register_op_attr(name, "FPurity", True)
        register_op_attr(name, "FLegalize", define)
    return Op.get(name)


def _same_type(call: Expr) -> Expr:
    return call.args[0].ty


def _table_type(call: Expr) -> Expr:
    return relax.TensorType(call.args[0].ty.shape, call.args[1].ty.dtype.dtype)


def _pooled_type(call: Expr) -> Expr:
    return relax.TensorType(_pooled_shape(call), call.args[0].ty.dtype.dtype)


_OPERATORS = {
    LOOKUP: _register(LOOKUP, "A function of 8-bit values, from a table.", _define_lookup, _table_type),
    AVERAGE_POOL: _register(AVERAGE_POOL, "Means of 8-bit windows.", _define_average_pool, _pooled_type),
    SOFTMAX: _register(SOFTMAX, "Softmax of 8-bit rows, in fixed point.", define_softmax, _same_type),
}
