"""The arithmetic that ends TFLite's quantised operators: whole numbers to stored ones, as its reference kernels do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend import tflite_tables as tables
from ingot.frontend.tvm_types import Expr, TfliteConverter, Wrapper

if TYPE_CHECKING:
    from ingot.frontend.fixed_point import Ratio

_INT16 = 7
_EIGHT_BITS = {9: "int8", 3: "uint8"}


def real_scale(tensor: Wrapper) -> float:
    """The scale of a tensor that has one scale."""
    return float(tensor.qnn_params["scale"].value.numpy().reshape(-1)[0])


def zero_of(tensor: Wrapper) -> int:
    """The zero point of a tensor."""
    return int(tensor.qnn_params["zero_point"].value.numpy().reshape(-1)[0])


def centred(converter: TfliteConverter, tensor: Wrapper) -> Expr:
    """A stored tensor minus its zero point, in int32."""
    from tvm import relax

    whole = relax.op.astype(converter.get_tensor_expr(tensor), "int32")
    zero = zero_of(tensor)
    return whole if zero == 0 else relax.op.subtract(whole, relax.const(zero, "int32"))


def is_whole(*tensors: Wrapper) -> bool:
    """Whether all tensors are stored in 8 bits with one scale each."""
    return all(
        item.qnn_params is not None
        and item.tensor.Type() in _EIGHT_BITS
        and item.qnn_params["scale"].value.numpy().size == 1
        for item in tensors
    )


def storage_type(tensor: Wrapper) -> str:
    """The dtype of a tensor stored in 8 or 16 bits with one scale; empty for others."""
    kinds = {**_EIGHT_BITS, _INT16: "int16"}
    whole = tensor.qnn_params is not None and tensor.qnn_params["scale"].value.numpy().size == 1
    return kinds.get(tensor.tensor.Type(), "") if whole else ""


def storage(tensor: Wrapper) -> tables.Scale:
    """How an 8-bit tensor stores its values."""
    return tables.Scale(real_scale(tensor), zero_of(tensor), _EIGHT_BITS[tensor.tensor.Type()])


def ratio_of(*scales: float) -> Ratio:
    """The first scale over the product of the others."""
    return multiplier_of(np.atleast_1d(np.float64(scales[0]) / np.prod(np.asarray(scales[1:], np.float64))))


def multiplier_of(ratio: np.ndarray) -> Ratio:
    """Positive numbers, one or one for each last index, as TFLite quantises multipliers."""
    from ingot.frontend import fixed_point

    if not np.all(np.isfinite(ratio)) or np.any(ratio < 0):
        raise UnsupportedError("a layer's scales are not usable", found=str(ratio[:4]), allowed="positive numbers")
    return fixed_point.decompose(ratio)


def requantized(
    converter: TfliteConverter,
    sums: Expr,
    ratio: Ratio,
    output: Wrapper,
    limits: tuple[int, int],
    rounding: str = "away",
) -> Expr:
    """Whole numbers times `ratio`, plus the zero point, as the output stores them.

    TFLite multiplies by a 31-bit fraction f and rounds, then divides by 2**s and rounds again, halves away from zero,
    f * 2**-s being the ratio. Rounding once instead, as it does in dense layers only, is off by one in about one
    element of 2**(s+1), which is enough to change a classifier's answer. Where everything below the zero point becomes
    the zero point, as after a relu, it does not matter where negative halves go.
    """
    zero, dtype = zero_of(output), converter.get_tensor_type_str(output.tensor.Type())
    if rounding == "away" and limits[0] >= zero:
        rounding = "up"
    return scaled(converter, sums, ratio, zero, limits, dtype, rounding)


def scaled(
    converter: TfliteConverter,
    sums: Expr,
    ratio: Ratio,
    zero: int,
    limits: tuple[int, int],
    dtype: str,
    rounding: str = "away",
) -> Expr:
    """`requantized` for any result: whole numbers times `ratio`, plus `zero`, within `limits`."""
    from tvm import relax

    from ingot.frontend import fixed_point

    multiplier, exponent = ratio

    def constant(array: np.ndarray, dtype: str) -> Expr:
        same = array.size == 1 or bool(np.all(array == array[0]))
        value = np.asarray(array[0] if same else array).astype(dtype)
        return converter.exp_tab.new_const(value, dtype=dtype, source_name=b"requantize")

    if np.all((multiplier == 1 << 30) & (exponent == 1)):  # times one
        whole = relax.op.astype(sums, "int32")
        whole = whole if zero == 0 else relax.op.add(whole, relax.const(zero, "int32"))
        return relax.op.astype(limited(whole, limits, "int32"), dtype)
    if rounding == "away" and np.all(exponent == 0):
        rounding = "up"  # there is no second rounding
    if fixed_point.is_simple(exponent, rounding):
        found = fixed_point.constants(ratio, zero, rounding)
        m, t, s = (constant(item, "int32") for item in found.arrays)
        return fixed_point.requantize(relax.op.astype(sums, "int32"), (m, t, s), limits, dtype, rounding, found.after)
    if rounding == "once":
        raise UnsupportedError("a layer's scales are not usable", found=str(exponent[:4]), allowed="2^-32 to 2^23")
    shift = np.clip(-exponent, 0, 31).astype(np.int32)
    # Multiplied by the 31-bit fraction in 64 bits and rounded, halves upward; a ratio of 1 or more shifts left first.
    factor = multiplier << np.clip(exponent, 0, 31).astype(np.int64)
    product = relax.op.multiply(relax.op.astype(relax.op.astype(sums, "int32"), "int64"), constant(factor, "int64"))
    rounded = relax.op.add(product, relax.const(1 << 30, "int64"))
    whole = converter.bb.emit(relax.op.astype(relax.op.right_shift(rounded, relax.const(31, "int64")), "int32"))
    if np.any(shift > 0):
        middle: Expr = constant(np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0).astype(np.int32), "int32")
        if rounding == "away":
            # One less for negative numbers: -1.5 becomes -2, not -1.
            sign = relax.op.right_shift(whole, relax.const(31, "int32"))
            used = constant(np.where(shift > 0, -1, 0).astype(np.int32), "int32")
            middle = relax.op.add(middle, relax.op.bitwise_and(sign, used))
        whole = relax.op.right_shift(relax.op.add(whole, middle), constant(shift, "int32"))
    whole = relax.op.add(whole, relax.const(zero, "int32"))
    return relax.op.astype(limited(whole, limits, "int32"), dtype)


def limited(value: Expr, limits: tuple[int, int], dtype: str) -> Expr:
    """Stored values of `dtype` within limits."""
    from tvm import relax

    info = np.iinfo(dtype)
    if limits[0] > info.min:
        value = relax.op.maximum(value, relax.const(limits[0], dtype))
    return relax.op.minimum(value, relax.const(limits[1], dtype)) if limits[1] < info.max else value


def limits_of(converter: TfliteConverter, output: Wrapper, activation: int) -> tuple[int, int]:
    """Smallest and largest stored value of an output after its activation (NONE, RELU, RELU_N1_TO_1, RELU6)."""
    info = np.iinfo(converter.get_tensor_type_str(output.tensor.Type()))
    low, high = int(info.min), int(info.max)
    scale, zero = real_scale(output), zero_of(output)
    bounds = {0: (None, None), 1: (0.0, None), 2: (-1.0, 1.0), 3: (0.0, 6.0)}
    if activation not in bounds:
        name = str(converter.activation_fn_type.get(activation, activation))
        raise UnsupportedError(
            "a quantised layer has this activation", found=name, allowed="none, relu, relu6 or relu1"
        )

    def stored(value: float) -> int:
        exact = np.float64(value) / np.float64(scale)
        return zero + int(np.trunc(exact + np.copysign(0.5, exact)))

    least, most = bounds[activation]
    low = low if least is None else max(low, stored(least))
    high = high if most is None else min(high, stored(most))
    return low, high
