"""TFLite convolutions, dense layers and pools."""

from __future__ import annotations

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, Options, TfliteConverter, Wrapper

_INT8, _UINT8 = 9, 3


def _padding(options: Options, sizes: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """[top, left, bottom, right] for SAME (0) and VALID (1)."""
    if options.Padding() == 1:
        return [0, 0, 0, 0]
    begins, ends = [], []
    for size, width, stride, spread in zip(
        sizes, kernel, (options.StrideH(), options.StrideW()), dilation, strict=True
    ):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * spread + 1 - size, 0)
        begins.append(total // 2)
        ends.append(total - total // 2)
    return begins + ends


def _weight(
    converter: TfliteConverter, tensor: Wrapper, shape: tuple[int, ...], order: tuple[int, ...], axis: int, exact: bool
) -> Expr:
    """Weights reshaped, then transposed; widened to float along `axis` of the result if they are stored as integers."""
    from tvm import relax

    index = int(tensor.tensor_idx)
    if converter.has_expr(index) and not tensor.buffer.DataLength():
        value = relax.op.permute_dims(relax.op.reshape(converter.get_expr(index), shape), order)
    else:
        array = converter.get_tensor_value(tensor).reshape(shape).transpose(order)
        dtype = converter.get_tensor_type_str(tensor.tensor.Type())
        value = converter.exp_tab.new_const(array, dtype=dtype, source_name=tensor.tensor.Name())
    if tensor.qnn_params is None:
        return value
    scale = relax.const(1.0, "float32") if exact else tensor.qnn_params["scale"]
    return relax.op.dequantize(value, scale, tensor.qnn_params["zero_point"], axis=axis)


def _bias(converter: TfliteConverter, source: Wrapper, weight: Wrapper, bias: Wrapper, exact: bool) -> Expr:
    """The bias as float; a stored integer bias has the scale input * weight."""
    from tvm import relax

    value = converter.get_tensor_expr(bias)
    if source.qnn_params is None:
        return value
    scale = np.float32(1.0)
    if not exact:
        scale = source.qnn_params["scale"].value.numpy() * weight.qnn_params["scale"].value.numpy()
    return relax.op.dequantize(value, relax.const(scale), relax.const(0, "int32"), axis=0)


def _real(converter: TfliteConverter, tensor: Wrapper, exact: bool) -> Expr:
    from tvm import relax

    value = converter.get_tensor_expr(tensor)
    if exact:
        return relax.op.dequantize(value, relax.const(1.0, "float32"), tensor.qnn_params["zero_point"], axis=0)
    return value if tensor.qnn_params is None else converter.dequantize(value, tensor)


def _is_exact(source: Wrapper, weight: Wrapper, output: Wrapper) -> bool:
    """Whether a layer is computed on whole numbers: 8-bit activations and weights on both ends."""
    parts = (source, weight, output)
    return all(item.qnn_params is not None and item.tensor.Type() in (_INT8, _UINT8) for item in parts)


def _finish(
    converter: TfliteConverter,
    sums: Expr,
    parts: tuple[Wrapper, Wrapper, Wrapper],
    activation: int,
    exact: bool,
    away: bool = False,
) -> Expr:
    """A layer's output from its sums: scaled, rounded as TFLite rounds, limited by the activation.

    TFLite multiplies the whole-number sum by a 31-bit fraction f and rounds, then divides by 2**s and rounds again
    (halves upward, in depthwise layers away from zero), f * 2**-s being the ratio of scales.
    Rounding once instead is off by one in about one element of
    2**(s+1), which is enough to change a classifier's answer: so this does the same two steps.
    """

    output = parts[2]
    if not exact:
        return converter.finish(sums, output, activation)
    scales = [np.float64(item.qnn_params["scale"].value.numpy()) for item in parts]
    limits = _limits(converter, output, activation)
    return _requantize(converter, sums, np.atleast_1d(scales[0] * scales[1] / scales[2]), output, limits, away=away)


def _requantize(
    converter: TfliteConverter, sums: Expr, ratio: np.ndarray, output: Wrapper, limits: tuple[int, int], away: bool
) -> Expr:
    """Whole numbers (as float) times `ratio` (one, or one for each last index), rounded twice, plus the zero point.

    TFLite's second rounding takes halves upward in its matrix kernels and away from zero everywhere else.
    """
    from tvm import relax

    from ingot.frontend import fixed_point

    if not np.all(np.isfinite(ratio)) or np.any(ratio < 0):
        raise UnsupportedError("a layer's scales are not usable", found=str(ratio[:4]), allowed="positive numbers")
    zero = int(output.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
    dtype = converter.get_tensor_type_str(output.tensor.Type())

    def constant(array: np.ndarray, dtype: str) -> Expr:
        same = array.size == 1 or bool(np.all(array == array[0]))
        value = np.asarray(array[0] if same else array).astype(dtype)
        return converter.exp_tab.new_const(value, dtype=dtype, source_name=b"requantize")

    if fixed_point.is_simple(ratio, away):
        numbers = tuple(constant(item, "int32") for item in fixed_point.constants(ratio, zero))
        return fixed_point.requantize(relax.op.astype(sums, "int32"), numbers, limits, dtype, away)
    multiplier, exponent = fixed_point.decompose(ratio)
    shift = np.clip(-exponent, 0, 31).astype(np.int32)
    # Multiplied by the 31-bit fraction in 64 bits and rounded, halves upward; a ratio of 1 or more shifts left first.
    factor = multiplier << np.clip(exponent, 0, 31).astype(np.int64)
    product = relax.op.multiply(relax.op.astype(relax.op.astype(sums, "int32"), "int64"), constant(factor, "int64"))
    rounded = relax.op.add(product, relax.const(1 << 30, "int64"))
    whole = converter.bb.emit(relax.op.astype(relax.op.right_shift(rounded, relax.const(31, "int64")), "int32"))
    if np.any(shift > 0):
        middle: Expr = constant(np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0).astype(np.int32), "int32")
        if away:
            # One less for negative numbers: -1.5 becomes -2, not -1.
            sign = relax.op.right_shift(whole, relax.const(31, "int32"))
            used = constant(np.where(shift > 0, -1, 0).astype(np.int32), "int32")
            middle = relax.op.add(middle, relax.op.bitwise_and(sign, used))
        whole = relax.op.right_shift(relax.op.add(whole, middle), constant(shift, "int32"))
    shifted = relax.op.add(whole, relax.const(zero, "int32"))
    limited = relax.op.maximum(shifted, relax.const(limits[0], "int32"))
    limited = relax.op.minimum(limited, relax.const(limits[1], "int32"))
    return relax.op.astype(limited, dtype)


def _limits(converter: TfliteConverter, output: Wrapper, activation: int) -> tuple[int, int]:
    """Smallest and largest stored value of an output after its activation (NONE, RELU, RELU_N1_TO_1, RELU6)."""
    low, high = (-128, 127) if output.tensor.Type() == _INT8 else (0, 255)
    scale = output.qnn_params["scale"].value.numpy().reshape(-1)[0]
    zero = int(output.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
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


def _inputs(converter: TfliteConverter, operator: Operator) -> tuple[Wrapper, Wrapper, Wrapper]:
    tensors = list(converter.get_input_tensors(operator))
    if len(tensors) not in (2, 3):
        raise UnsupportedError("a layer has an unexpected number of inputs", found=str(len(tensors)), allowed="2 or 3")
    bias = tensors[2] if len(tensors) == 3 and tensors[2].tensor_idx >= 0 else None
    return tensors[0], tensors[1], bias


@handles("CONV_2D", "DEPTHWISE_CONV_2D")
def _conv(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, weight, bias = _inputs(converter, operator)
    output = converter.get_output_tensors(operator)[0]
    exact = _is_exact(source, weight, output)
    depthwise = converter.name_of(operator) == "DEPTHWISE_CONV_2D"
    options = converter.options(operator, "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions")
    _, height, width, channels = converter.shape_of(source)
    first, rows, columns, last = converter.shape_of(weight)
    if depthwise:
        # Stored as [1, KH, KW, C * multiplier]: one output channel after the other, which is groups in HWOI.
        groups = channels
        kernel = _weight(converter, weight, (rows, columns, last, 1), (0, 1, 2, 3), 2, exact)
        layout = "HWOI"
    else:
        if last == 0 or channels % last:
            raise UnsupportedError(
                "input channels do not fit the weights", found=str(channels), allowed=f"times {last}"
            )
        groups = channels // last
        kernel = _weight(converter, weight, (first, rows, columns, last), (1, 2, 3, 0), 3, exact)
        layout = "HWIO"
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    result = relax.op.nn.conv2d(
        _real(converter, source, exact),
        kernel,
        strides=[options.StrideH(), options.StrideW()],
        padding=_padding(options, (height, width), (rows, columns), dilation),
        dilation=list(dilation),
        groups=groups,
        data_layout="NHWC",
        kernel_layout=layout,
    )
    if bias is not None:
        result = relax.op.add(result, _bias(converter, source, weight, bias, exact))
    parts = (source, weight, output)
    return _finish(converter, result, parts, options.FusedActivationFunction(), exact, away=depthwise)


@handles("FULLY_CONNECTED")
def _dense(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, weight, bias = _inputs(converter, operator)
    output = converter.get_output_tensors(operator)[0]
    options = converter.options(operator, "FullyConnectedOptions")
    if options.WeightsFormat() != 0:
        raise UnsupportedError("shuffled weights are not supported", found=str(options.WeightsFormat()), allowed="0")
    units, depth = converter.shape_of(weight)
    shape = converter.shape_of(source)
    exact = _is_exact(source, weight, output)
    value = _real(converter, source, exact)
    if (not options.KeepNumDims() and len(shape) != 2) or shape[-1] != depth:
        shape = (int(np.prod(shape)) // depth, depth)
        value = relax.op.reshape(value, shape)
    result = relax.op.matmul(value, _weight(converter, weight, (units, depth), (1, 0), 1, exact))
    if bias is not None:
        result = relax.op.add(result, _bias(converter, source, weight, bias, exact))
    return _finish(converter, result, (source, weight, output), options.FusedActivationFunction(), exact)


@handles("AVERAGE_POOL_2D", "MAX_POOL_2D")
def _pool(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source = converter.get_input_tensors(operator)[0]
    output = converter.get_output_tensors(operator)[0]
    options = converter.options(operator, "Pool2DOptions")
    _, height, width, _ = converter.shape_of(source)
    kernel = (options.FilterHeight(), options.FilterWidth())
    common = {
        "pool_size": kernel,
        "strides": (options.StrideH(), options.StrideW()),
        "padding": _padding(options, (height, width), kernel, (1, 1)),
        "layout": "NHWC",
    }
    value = converter.get_tensor_expr(source)
    activation = options.FusedActivationFunction()
    if not converter.same_scale(source, output):
        raise UnsupportedError("a quantised pool changes its scale", found="two scales", allowed="one")
    average = converter.name_of(operator) == "AVERAGE_POOL_2D"
    operate = relax.op.nn.avg_pool2d if average else relax.op.nn.max_pool2d
    if source.qnn_params is None:
        return converter.convert_fused_activation_function(operate(value, **common), activation)
    dtype = converter.get_tensor_type_str(output.tensor.Type())
    if average:
        # Averages of integers in float are exact up to one rounding; TFLite rounds halves away from zero.
        mean = relax.op.nn.avg_pool2d(relax.op.astype(value, "float32"), **common)
        half = relax.op.multiply(relax.op.sign(mean), relax.const(0.5, "float32"))
        result = relax.op.astype(relax.op.trunc(relax.op.add(mean, half)), dtype)
    else:
        result = operate(value, **common)
    scale = float(output.qnn_params["scale"].value.numpy().reshape(-1)[0])
    zero = int(output.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
    return converter.convert_qnn_fused_activation_function(result, activation, scale, zero, dtype)


@handles("QUANTIZE")
def _quantize(converter: TfliteConverter, operator: Operator) -> Expr:
    source = converter.get_input_tensors(operator)[0]
    output = converter.get_output_tensors(operator)[0]
    if output.qnn_params is None:
        raise UnsupportedError("QUANTIZE has no output scale", found="none", allowed="a scale")
    value = converter.get_tensor_expr(source)
    if source.qnn_params is None:
        return converter.quantize(value, output)
    if source.tensor.Type() not in (_INT8, _UINT8) or output.tensor.Type() not in (_INT8, _UINT8):
        return converter.quantize(converter.dequantize(value, source), output)
    ratio = np.float64(source.qnn_params["scale"].value.numpy()) / np.float64(output.qnn_params["scale"].value.numpy())
    whole = _real(converter, source, True)
    return _requantize(converter, whole, np.atleast_1d(ratio), output, _limits(converter, output, 0), away=True)


@handles("SOFTMAX")
def _softmax(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source = converter.get_input_tensors(operator)[0]
    output = converter.get_output_tensors(operator)[0]
    beta = float(converter.options(operator, "SoftmaxOptions").Beta())
    value = _real(converter, source, False)
    if beta != 1.0:
        value = relax.op.multiply(value, relax.const(beta, "float32"))
    result = relax.op.nn.softmax(value, axis=-1)
    return result if output.qnn_params is None else converter.quantize(result, output)
