"""TFLite's arithmetic on 8-bit integers: sums, products, means and functions of one value, as its reference kernels do.

What is not stored in 8 bits goes to TVM's converters. `docs/quantisation.md` lists where LiteRT's kernels differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend import tflite_tables as tables
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tflite_rounding import (
    centred,
    is_whole,
    limits_of,
    ratio_of,
    real_scale,
    requantized,
    scaled,
    storage,
    storage_type,
    zero_of,
)
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter, Wrapper

#: Bits by which sums are shifted left before they are scaled.
_SUM_SHIFT = 20
_INT32 = (-(1 << 31), (1 << 31) - 1)


def _others(converter: TfliteConverter, operator: Operator) -> Expr:
    return converter.convert_map[converter.name_of(operator)](op=operator)


@handles("ADD", "SUB")
def _sum(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    left, right = converter.get_input_tensors(operator)
    output = converter.get_output_tensors(operator)[0]
    if not is_whole(left, right, output):
        return _others(converter, operator)
    name = converter.name_of(operator)
    options = converter.options(operator, "AddOptions" if name == "ADD" else "SubOptions")
    limits = limits_of(converter, output, options.FusedActivationFunction())
    # Both on a common scale, twice the larger one, with 20 bits to spare.
    common = 2.0 * max(real_scale(left), real_scale(right))
    parts = [
        scaled(
            converter,
            relax.op.left_shift(centred(converter, item), relax.const(_SUM_SHIFT, "int32")),
            ratio_of(real_scale(item), common),
            0,
            _INT32,
            "int32",
        )
        for item in (left, right)
    ]
    total = relax.op.add(*parts) if name == "ADD" else relax.op.subtract(*parts)
    return requantized(converter, total, ratio_of(common, 1 << _SUM_SHIFT, real_scale(output)), output, limits)


@handles("MUL")
def _product(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    left, right = converter.get_input_tensors(operator)
    output = converter.get_output_tensors(operator)[0]
    if not is_whole(left, right, output):
        return _others(converter, operator)
    limits = limits_of(converter, output, converter.options(operator, "MulOptions").FusedActivationFunction())
    whole = relax.op.multiply(centred(converter, left), centred(converter, right))
    product = np.float32(real_scale(left)) * np.float32(real_scale(right))
    return requantized(converter, whole, ratio_of(float(product), real_scale(output)), output, limits)


@handles("MEAN")
def _mean(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax, te, tirx

    source, over = converter.get_input_tensors(operator)
    output = converter.get_output_tensors(operator)[0]
    dtype = converter.get_tensor_type_str(source.tensor.Type())
    plain = source.qnn_params is None and not dtype.startswith("float")
    if not is_whole(source, output) and not plain:
        return _others(converter, operator)
    shape = converter.shape_of(source)
    axes = sorted({int(axis) % len(shape) for axis in converter.constant(over, "axes").reshape(-1)})
    keep = bool(converter.options(operator, "ReducerOptions").KeepDims())
    count = math.prod(shape[axis] for axis in axes)
    if plain:
        return converter.bb.call_te(
            lambda x: te.compute(x.shape, lambda *i: tirx.truncdiv(x(*i), tirx.const(count, dtype)), name="mean"),
            converter.bb.emit(relax.op.sum(converter.get_tensor_expr(source), axes, keepdims=keep)),
            primfunc_name_hint="mean",
        )
    total = relax.op.sum(relax.op.astype(converter.get_tensor_expr(source), "int32"), axes, keepdims=keep)
    total = relax.op.subtract(total, relax.const(zero_of(source) * count, "int32"))
    # The multiplier is divided by the count, with as many bits more as the count has.
    multiplier, exponent = ratio_of(real_scale(source), real_scale(output))
    more = min(count.bit_length() - 1, 32, 31 + int(exponent[0]))
    ratio = (multiplier << more) // count, exponent - more
    return requantized(converter, total, ratio, output, limits_of(converter, output, 0))


def _table(converter: TfliteConverter, operator: Operator, make: Callable[[tables.Scale, tables.Scale], Expr]) -> Expr:
    """A function of one 8-bit value: `make` gives its table from how input and output are stored."""
    from ingot.frontend import integer_ops

    source, output = converter.get_input_tensors(operator)[0], converter.get_output_tensors(operator)[0]
    if not is_whole(source, output):
        return _others(converter, operator)
    return integer_ops.lookup(
        converter.get_tensor_expr(source), converter.constant_weight(make(storage(source), storage(output)))
    )


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "LOGISTIC": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "EXP": np.exp,
}


@handles(*_FUNCTIONS)
def _function(converter: TfliteConverter, operator: Operator) -> Expr:
    function = _FUNCTIONS[converter.name_of(operator)]
    return _table(converter, operator, lambda source, result: tables.by_float(source, result, function))


@handles("HARD_SWISH")
def _hard_swish(converter: TfliteConverter, operator: Operator) -> Expr:
    return _table(converter, operator, tables.hard_swish)


@handles("LEAKY_RELU")
def _leaky_relu(converter: TfliteConverter, operator: Operator) -> Expr:
    alpha = float(converter.options(operator, "LeakyReluOptions").Alpha())
    source, output = converter.get_input_tensors(operator)[0], converter.get_output_tensors(operator)[0]
    if storage_type(source) == storage_type(output) == "int16":
        x, scales = converter.bb.emit(centred(converter, source)), [np.float32(real_scale(t)) for t in (source, output)]
        return _sloped(converter, (x, x), (scales[0] / scales[1], scales[0] * np.float32(alpha) / scales[1]), output)
    return _table(converter, operator, lambda source, result: tables.leaky_relu(source, result, alpha))


@handles("PRELU")
def _prelu(converter: TfliteConverter, operator: Operator) -> Expr:
    """x where it is not negative, else x times a slope; the two have a multiplier each."""
    from tvm import relax

    source, slope = converter.get_input_tensors(operator)
    output = converter.get_output_tensors(operator)[0]
    dtype = storage_type(source)
    if source.qnn_params is None:
        return _others(converter, operator)
    if not dtype or not storage_type(slope) or storage_type(output) != dtype:
        raise UnsupportedError("PRELU on these integers is not supported", allowed="one scale for each tensor")
    scales = [np.float32(real_scale(item)) for item in (source, slope, output)]
    x = converter.bb.emit(centred(converter, source))
    below = relax.op.multiply(x, centred(converter, slope))
    return _sloped(converter, (x, below), (scales[0] / scales[2], scales[0] * scales[1] / scales[2]), output)


def _sloped(
    converter: TfliteConverter, values: tuple[Expr, Expr], ratios: tuple[np.float32, np.float32], output: Wrapper
) -> Expr:
    """The first value where it is not negative, else the second, each with a multiplier of its own, as stored."""
    from tvm import relax

    op, dtype = relax.op, storage_type(output)
    kept, bent = (
        converter.bb.emit(scaled(converter, value, ratio_of(float(abs(ratio))), 0, _INT32, "int32"))
        for value, ratio in zip(values, ratios, strict=True)
    )
    bent = op.negative(bent) if ratios[1] < 0 else bent
    chosen = op.where(op.greater_equal(values[0], relax.const(0, "int32")), kept, bent)
    whole = op.add(chosen, relax.const(zero_of(output), "int32"))
    info = np.iinfo(dtype)
    least, most = relax.const(int(info.min), "int32"), relax.const(int(info.max), "int32")
    return op.astype(op.minimum(op.maximum(whole, least), most), dtype)


#: The numbers by which the schema knows the activations that are operators too.
_LIMITS = {"RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}


@handles(*_LIMITS)
def _relu(converter: TfliteConverter, operator: Operator) -> Expr:
    output = converter.get_output_tensors(operator)[0]
    activation = _LIMITS[converter.name_of(operator)]
    return _table(
        converter,
        operator,
        lambda source, result: tables.clamp(source, result, *limits_of(converter, output, activation)),
    )


@handles("SOFTMAX")
def _softmax(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    from ingot.frontend import integer_ops

    source, output = converter.get_input_tensors(operator)[0], converter.get_output_tensors(operator)[0]
    beta = float(converter.options(operator, "SoftmaxOptions").Beta())
    value = converter.get_tensor_expr(source)
    if is_whole(source, output) and storage(source).dtype == storage(output).dtype:
        least = int(np.iinfo(storage(output).dtype).min)
        if abs(real_scale(output) * 256 - 1) < 1e-3 and zero_of(output) == least:
            table = tables.exponentials(real_scale(source), beta)
            return integer_ops.softmax(value, converter.constant_weight(table))
    value = value if source.qnn_params is None else converter.dequantize(value, source)
    if beta != 1.0:
        value = relax.op.multiply(value, relax.const(beta, "float32"))
    result = relax.op.nn.softmax(value, axis=-1)
    return result if output.qnn_params is None else converter.quantize(result, output)
