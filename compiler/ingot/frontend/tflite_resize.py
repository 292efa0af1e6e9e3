"""TFLite's RESIZE_BILINEAR of stored integers, in fixed point: places and weights with 10 bits after the point.

    y[p] = round(sum of x[q] wy[p, q] wx[p, q] / 2^20)         over the four neighbours q, halves away from zero

For int8 and int16 the weights are those of TFLite's reference kernel, which rounds the scale to 10 bits. Its kernel of
uint8 works on float32; where its arithmetic loses nothing, as for all powers of two, the same sum gives its results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tflite_rounding import storage_type
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter

_BITS = 10
_ONE = 1 << _BITS
#: A uint8 value times two weights of so many bits, added four times, is exact in float32.
_EXACT_BITS = 8


@dataclass(frozen=True)
class _Axis:
    """For each place of a result's axis: the input's two neighbours and the weight of the upper one, int32."""

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray

    @property
    def table(self) -> np.ndarray:
        """All three: int32 [3, size]."""
        return np.stack([self.lower, self.upper, self.weight]).astype(np.int32)


def _in_fixed_point(size: int, result: int, corners: bool, half_pixels: bool) -> _Axis:
    over, under = (size - 1, result - 1) if corners and result > 1 else (size, result)
    scale = (_ONE * over + under // 2) // under
    place = np.arange(result, dtype=np.int64) * scale
    if half_pixels:
        place += scale // 2 - (_ONE >> 1)
    # Beyond the last place, where the rounded scale can lead, is the last place.
    lower = np.minimum(np.maximum(place >> _BITS, 0), size - 1)
    return _Axis(lower, np.minimum((place + _ONE - 1) >> _BITS, size - 1), place - (lower << _BITS))


def _in_float(size: int, result: int, corners: bool, half_pixels: bool) -> _Axis | None:
    """Return the places that float32 arithmetic finds, or None if it is not exact with them."""
    over, under = (size - 1, result - 1) if corners and result > 1 else (size, result)
    scale = np.float32(over) / np.float32(under)
    place = np.arange(result, dtype=np.float32)
    place = (place + np.float32(0.5)) * scale - np.float32(0.5) if half_pixels else place * scale
    lower = np.maximum(np.floor(place), 0).astype(np.int64)
    upper = np.minimum(np.ceil(place).astype(np.int64), size - 1)
    weight = (place - lower.astype(np.float32)).astype(np.float64) * _ONE
    if np.any(np.mod(weight, _ONE >> _EXACT_BITS)) or np.any(lower >= size):
        return None
    return _Axis(lower, upper, weight.astype(np.int64))


@handles("RESIZE_BILINEAR")
def _resize_bilinear(converter: TfliteConverter, operator: Operator) -> Expr:
    source, size = converter.get_input_tensors(operator)
    dtype = storage_type(source)
    shape = converter.shape_of(source)
    if len(shape) != 4:
        raise UnsupportedError("RESIZE_BILINEAR is of images", found=f"{len(shape)} dimensions", allowed="4")
    if not dtype:
        return converter.convert_map["RESIZE_BILINEAR"](op=operator)
    options = converter.options(operator, "ResizeBilinearOptions")
    wanted = [int(dim) for dim in converter.constant(size, "size").reshape(-1)]
    if len(wanted) != 2 or min(wanted) < 1:
        raise UnsupportedError("a resize has this size", found=str(wanted), allowed="two positive numbers")
    find = _in_float if dtype == "uint8" else _in_fixed_point
    axes = [
        find(size, result, options.AlignCorners(), options.HalfPixelCenters())
        for size, result in zip(shape[1:3], wanted, strict=True)
    ]
    if None in axes:
        return converter.convert_map["RESIZE_BILINEAR"](op=operator)
    tables = [converter.constant_weight(axis.table) for axis in axes if axis is not None]
    result = (shape[0], *wanted, shape[3])
    return converter.bb.call_te(
        lambda x, rows, columns: _interpolated(x, rows, columns, result, dtype),
        converter.get_tensor_expr(source),
        *tables,
        primfunc_name_hint="resize_integers",
    )


def _interpolated(x: Any, rows: Any, columns: Any, shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ANN401 - TE
    from tvm import te, tirx

    kind = "int64" if dtype == "int16" else "int32"  # 16 bits times two weights need more than 32
    one, half = tirx.const(_ONE, kind), tirx.const(1 << (2 * _BITS - 1), kind)

    def at(n: Any, p: Any, q: Any, c: Any) -> Any:  # noqa: ANN401
        below, right = rows[2, p].astype(kind), columns[2, q].astype(kind)
        total = tirx.const(0, kind)
        for row, down in ((0, one - below), (1, below)):
            for column, across in ((0, one - right), (1, right)):
                total = total + x(n, rows[row, p], columns[column, q], c).astype(kind) * (down * across)
        sign = tirx.shift_right(total, tirx.const(63 if kind == "int64" else 31, kind))
        return tirx.shift_right(total + half + sign, tirx.const(2 * _BITS, kind)).astype(dtype)

    return te.compute(shape, at, name="resize")
