"""TFLite convolutions, dense layers and pools."""

from __future__ import annotations

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tflite_rounding import (
    centred,
    limited,
    limits_of,
    multiplier_of,
    ratio_of,
    real_scale,
    requantized,
    storage_type,
    zero_of,
)
from ingot.frontend.tvm_types import Expr, Operator, Options, TfliteConverter, Wrapper

_INT8, _UINT8 = 9, 3
#: Requantisation takes zero points of 8 bits; in 16 bits zero is stored as 0.
_MOST_ZERO = 255


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


def weight_of(
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


def bias_of(converter: TfliteConverter, source: Wrapper, weight: Wrapper, bias: Wrapper, exact: bool) -> Expr:
    """The bias as float; a stored integer bias has the scale input * weight."""
    from tvm import relax

    if source.qnn_params is None:
        return converter.get_tensor_expr(bias)
    if bias.buffer.DataLength() and not exact:
        # Beside 16-bit activations it has 64 bits, which Relax does not dequantise.
        stored, scale = converter.get_tensor_value(bias), source.qnn_params["scale"].value.numpy()
        real = stored.astype(np.float64) * np.float64(scale) * weight.qnn_params["scale"].value.numpy()
        name = bias.tensor.Name()
        return converter.exp_tab.new_const(real.astype(np.float32), dtype="float32", source_name=name)
    value = converter.get_tensor_expr(bias)
    scale = np.float32(1.0)
    if not exact:
        scale = source.qnn_params["scale"].value.numpy() * weight.qnn_params["scale"].value.numpy()
    return relax.op.dequantize(value, relax.const(scale), relax.const(0, "int32"), axis=0)


def real_value(converter: TfliteConverter, tensor: Wrapper, exact: bool) -> Expr:
    """A tensor as float: the real numbers, or (exact) the stored ones without their zero point."""
    from tvm import relax

    value = converter.get_tensor_expr(tensor)
    if exact:
        return relax.op.dequantize(value, relax.const(1.0, "float32"), tensor.qnn_params["zero_point"], axis=0)
    return value if tensor.qnn_params is None else converter.dequantize(value, tensor)


def is_exact(source: Wrapper, weight: Wrapper, output: Wrapper) -> bool:
    """Whether a layer is computed on whole numbers: 8-bit activations and weights on both ends."""
    parts = (source, weight, output)
    return all(item.qnn_params is not None and item.tensor.Type() in (_INT8, _UINT8) for item in parts)


def finish(
    converter: TfliteConverter, sums: Expr, parts: tuple[Wrapper, Wrapper, Wrapper], activation: int, exact: bool
) -> Expr:
    """A layer's output from its sums: scaled, rounded as TFLite rounds, limited by the activation."""
    output = parts[2]
    if not exact:
        return converter.finish(sums, output, activation)
    limits = limits_of(converter, output, activation)
    rounding = "once" if len(converter.shape_of(parts[1])) == 2 else "away"
    return requantized(converter, sums, multiplier_of(_ratio(converter, *parts)), output, limits, rounding)


def _ratio(converter: TfliteConverter, source: Wrapper, weight: Wrapper, output: Wrapper) -> np.ndarray:
    """The scale of a layer's sums over that of its output, as TFLite computes it.

    With one scale for all weights the product of scales is rounded to float32, except in int8 convolutions.
    """
    scale = weight.qnn_params["scale"].value.numpy().reshape(-1)
    single = scale.size == 1 and (weight.tensor.Type() == _UINT8 or len(converter.shape_of(weight)) == 2)
    kind = np.float32 if single else np.float64
    product = kind(real_scale(source)) * scale.astype(kind)
    return np.asarray(np.asarray(product, np.float64) / np.float64(real_scale(output)))


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
    exact = is_exact(source, weight, output)
    depthwise = converter.name_of(operator) == "DEPTHWISE_CONV_2D"
    options = converter.options(operator, "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions")
    _, height, width, channels = converter.shape_of(source)
    first, rows, columns, last = converter.shape_of(weight)
    if depthwise:
        # Stored as [1, KH, KW, C * multiplier]: one output channel after the other, which is groups in HWOI.
        groups = channels
        kernel = weight_of(converter, weight, (rows, columns, last, 1), (0, 1, 2, 3), 2, exact)
        layout = "HWOI"
    else:
        if last == 0 or channels % last:
            raise UnsupportedError(
                "input channels do not fit the weights", found=str(channels), allowed=f"times {last}"
            )
        groups = channels // last
        kernel = weight_of(converter, weight, (first, rows, columns, last), (1, 2, 3, 0), 3, exact)
        layout = "HWIO"
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    result = relax.op.nn.conv2d(
        real_value(converter, source, exact),
        kernel,
        strides=[options.StrideH(), options.StrideW()],
        padding=_padding(options, (height, width), (rows, columns), dilation),
        dilation=list(dilation),
        groups=groups,
        data_layout="NHWC",
        kernel_layout=layout,
    )
    if bias is not None:
        result = relax.op.add(result, bias_of(converter, source, weight, bias, exact))
    parts = (source, weight, output)
    return finish(converter, result, parts, options.FusedActivationFunction(), exact)


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
    exact = is_exact(source, weight, output)
    value = real_value(converter, source, exact)
    if (not options.KeepNumDims() and len(shape) != 2) or shape[-1] != depth:
        shape = (int(np.prod(shape)) // depth, depth)
        value = relax.op.reshape(value, shape)
    result = relax.op.matmul(value, weight_of(converter, weight, (units, depth), (1, 0), 1, exact))
    if bias is not None:
        result = relax.op.add(result, bias_of(converter, source, weight, bias, exact))
    return finish(converter, result, (source, weight, output), options.FusedActivationFunction(), exact)


@handles("AVERAGE_POOL_2D", "MAX_POOL_2D")
def _pool(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    from ingot.frontend import integer_ops

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
    limits = limits_of(converter, output, activation)
    if average:
        return integer_ops.average_pool(value, kernel, common["strides"], common["padding"], limits)
    dtype = converter.get_tensor_type_str(output.tensor.Type())
    return limited(operate(value, **common), limits, dtype)


@handles("QUANTIZE")
def _quantize(converter: TfliteConverter, operator: Operator) -> Expr:
    source = converter.get_input_tensors(operator)[0]
    output = converter.get_output_tensors(operator)[0]
    if output.qnn_params is None:
        raise UnsupportedError("QUANTIZE has no output scale", found="none", allowed="a scale")
    value = converter.get_tensor_expr(source)
    if source.qnn_params is None:
        return converter.quantize(value, output)
    if not storage_type(source) or not storage_type(output) or abs(zero_of(output)) > _MOST_ZERO:
        return converter.quantize(converter.dequantize(value, source), output)
    ratio = ratio_of(real_scale(source), real_scale(output))
    return requantized(converter, centred(converter, source), ratio, output, limits_of(converter, output, 0))
