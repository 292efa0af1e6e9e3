"""TFLite's products beside plain convolutions and dense layers: transposed, in three dimensions, of two batches."""

from __future__ import annotations

import struct

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_layers import bias_of, finish, is_exact, real_value, weight_of
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter, Wrapper

_SAME = 0
_MAX_STRIDE = 64


def _borders(out: int, window: int, stride: int, size: int, same: bool) -> tuple[int, int, int]:
    """What a transposed window along one axis is cut by at the beginning and the end, and what is missing there."""
    steps = -(-out // stride) if same else (out - window + stride) // stride
    first = max((steps - 1) * stride + window - out, 0) // 2
    last = (size - 1) * stride + window - first - out
    return first, max(last, 0), max(-last, 0)


@handles("TRANSPOSE_CONV")
def _transpose_conv(converter: TfliteConverter, operator: Operator) -> Expr:
    size, weight, source, *more = converter.get_input_tensors(operator)
    options = converter.options(operator, "TransposeConvOptions")
    _, height, width, _ = (int(dim) for dim in converter.constant(size, "output shape").reshape(-1))
    bias = more[0] if more and more[0].tensor_idx >= 0 else None
    parts = (source, weight, bias, converter.get_output_tensors(operator)[0])
    strides, same = (options.StrideH(), options.StrideW()), options.Padding() == _SAME
    return _transposed(converter, parts, (height, width), strides, same, options.FusedActivationFunction())


@handles("custom Convolution2DTransposeBias")
def _transpose_conv_bias(converter: TfliteConverter, operator: Operator) -> Expr:
    """MediaPipe's own: its options are three 32-bit integers, of TFLite's TfLiteTransposeConvParams."""
    source, weight, bias = converter.get_input_tensors(operator)
    output = converter.get_output_tensors(operator)[0]
    raw = bytes(operator.CustomOptionsAsNumpy()) if operator.CustomOptionsLength() else b""
    shape = converter.shape_of(output)
    padding, *strides = struct.unpack("<3i", raw[:12]) if len(raw) >= 12 else (0, 0, 0)  # width first
    if padding not in (1, 2) or not all(0 < stride <= _MAX_STRIDE for stride in strides) or len(shape) != 4:
        found = f"padding {padding}, strides {strides}, output {list(shape)}"
        allowed = f"padding 1 (SAME) or 2 (VALID), strides of 1 to {_MAX_STRIDE}, an image"
        raise UnsupportedError("an operator's options cannot be used", found=found, allowed=allowed)
    parts = (source, weight, bias, output)
    return _transposed(converter, parts, shape[1:3], (strides[1], strides[0]), padding == 1, 0)


def _transposed(
    converter: TfliteConverter,
    parts: tuple[Wrapper, Wrapper, Wrapper | None, Wrapper],
    size: tuple[int, ...],
    strides: tuple[int, int],
    same: bool,
    activation: int,
) -> Expr:
    """The transposed convolution to an image of `size` of (source, weights, bias, output)."""
    from tvm import relax

    source, weight, bias, output = parts
    filters, rows, columns, depth = converter.shape_of(weight)
    _, have_y, have_x, channels = converter.shape_of(source)
    if channels != depth:
        raise UnsupportedError("input channels do not fit the weights", found=str(channels), allowed=str(depth))
    top, bottom, more_y = _borders(size[0], rows, strides[0], have_y, same)
    left, right, more_x = _borders(size[1], columns, strides[1], have_x, same)
    exact = is_exact(source, weight, output)
    result = relax.op.nn.conv2d_transpose(
        real_value(converter, source, exact),
        weight_of(converter, weight, (filters, rows, columns, depth), (3, 0, 1, 2), 1, exact),
        strides=strides,
        padding=(top, left, bottom, right),
        data_layout="NHWC",
        kernel_layout="IOHW",
        out_dtype="float32",
    )
    if more_y or more_x:
        result = relax.op.nn.pad(result, [0, 0, 0, more_y, 0, more_x, 0, 0])
    if bias is not None:
        result = relax.op.add(result, bias_of(converter, source, weight, bias, exact))
    return finish(converter, result, (source, weight, output), activation, exact)


def _padding(
    padding: int, sizes: tuple[int, ...], windows: tuple[int, ...], steps: list[int], spread: list[int]
) -> list[int]:
    """Begins, then ends, along three axes."""
    if padding != _SAME:
        return [0] * 6
    totals = [
        max((-(-size // step) - 1) * step + (window - 1) * wide + 1 - size, 0)
        for size, window, step, wide in zip(sizes, windows, steps, spread, strict=True)
    ]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


@handles("CONV_3D")
def _conv3d(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, weight, *more = converter.get_input_tensors(operator)
    options = converter.options(operator, "Conv3DOptions")
    steps = [options.StrideD(), options.StrideH(), options.StrideW()]
    spread = [options.DilationDFactor(), options.DilationHFactor(), options.DilationWFactor()]
    sizes, windows = converter.shape_of(source)[1:4], converter.shape_of(weight)[:3]
    result = relax.op.nn.conv3d(
        converter.get_tensor_expr(source),
        converter.get_tensor_expr(weight),
        strides=steps,
        padding=_padding(options.Padding(), sizes, windows, steps, spread),
        dilation=spread,
        data_layout="NDHWC",
        kernel_layout="DHWIO",
    )
    if more and more[0].tensor_idx >= 0:
        result = relax.op.add(result, converter.get_tensor_expr(more[0]))
    return converter.convert_fused_activation_function(result, options.FusedActivationFunction())


@handles("CONV_3D_TRANSPOSE")
def _conv3d_transpose(converter: TfliteConverter, operator: Operator) -> Expr:
    """A convolution with the window turned around, of the input with zeros between its elements."""
    from tvm import relax

    size, weight, source, *more = converter.get_input_tensors(operator)
    options = converter.options(operator, "Conv3DOptions")
    steps = [options.StrideD(), options.StrideH(), options.StrideW()]
    if [options.DilationDFactor(), options.DilationHFactor(), options.DilationWFactor()] != [1, 1, 1]:
        raise UnsupportedError("a transposed convolution with dilation is not supported", found="CONV_3D_TRANSPOSE")
    result = [int(dim) for dim in converter.constant(size, "output shape").reshape(-1)][1:4]
    windows, shape = converter.shape_of(weight)[:3], converter.shape_of(source)
    bb, op = converter.bb, relax.op
    value = converter.get_tensor_expr(source)
    if max(steps) > 1:
        # Each element at the beginning of a cell of zeros.
        cells = [shape[0], *(part for dim in shape[1:4] for part in (dim, 1)), shape[4]]
        widths = [0, 0, *(part for step in steps for part in (0, 0, 0, step - 1)), 0, 0]
        value = op.nn.pad(bb.emit(op.reshape(value, cells)), widths)
        wide = [dim * step for dim, step in zip(shape[1:4], steps, strict=True)]
        value = bb.emit(op.reshape(bb.emit(value), (shape[0], *wide, shape[4])))
    before, after, begins, ends = [], [], [], []
    for dim, step, window, out in zip(shape[1:4], steps, windows, result, strict=True):
        first = window - 1 - _borders(out, window, step, dim, options.Padding() == _SAME)[0]
        last = out + window - 1 - dim * step - first
        before.append(max(first, 0))
        after.append(max(last, 0))
        begins.append(max(-first, 0))
        ends.append(dim * step + min(last, 0))
    value = bb.emit(op.strided_slice(value, [1, 2, 3], begins, ends, [1, 1, 1]))
    turned = converter.real(weight)[::-1, ::-1, ::-1].transpose(0, 1, 2, 4, 3)
    kernel = converter.exp_tab.new_const(np.ascontiguousarray(turned), source_name=weight.tensor.Name())
    total = op.nn.conv3d(value, kernel, padding=[*before, *after], data_layout="NDHWC", kernel_layout="DHWIO")
    if more and more[0].tensor_idx >= 0:
        total = op.add(total, converter.get_tensor_expr(more[0]))
    return converter.convert_fused_activation_function(total, options.FusedActivationFunction())


@handles("BATCH_MATMUL")
def _batch_matmul(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    options = converter.options(operator, "BatchMatMulOptions")
    sides = []
    for tensor, turned in zip(converter.get_input_tensors(operator), (options.AdjX(), options.AdjY()), strict=True):
        value, rank = converter.get_tensor_expr(tensor), len(converter.shape_of(tensor))
        order = [*range(rank - 2), rank - 1, rank - 2]
        sides.append(relax.op.permute_dims(value, order) if turned else value)
    return relax.op.matmul(*sides)
