"""TFLite operators that move elements without computing: they work on stored integers as they are."""

from __future__ import annotations

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend import tflite_tables as tables
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tflite_rounding import is_whole, storage
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter, Wrapper

_COMPLEX64 = 8  # as float32 with a last axis of two


def _move(converter: TfliteConverter, source: Wrapper, output: Wrapper, value: Expr) -> Expr:
    """The moved elements, requantised if the output has another scale."""
    if converter.same_scale(source, output):
        return value
    if source.qnn_params is None or output.qnn_params is None:
        raise UnsupportedError("only one end of an operator is quantised", found="mixed", allowed="both or none")
    if is_whole(source, output):
        from ingot.frontend import integer_ops

        table = tables.rescaled(storage(source), storage(output))
        return integer_ops.lookup(value, converter.constant_weight(table))
    return converter.quantize(converter.dequantize(value, source), output)


def _ends(converter: TfliteConverter, operator: Operator) -> tuple[list[Wrapper], list[Wrapper]]:
    return converter.get_input_tensors(operator), converter.get_output_tensors(operator)


@handles("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _reshape(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    shape = tuple(int(output.tensor.Shape(axis)) for axis in range(output.tensor.ShapeLength()))
    if output.tensor.Type() == _COMPLEX64:
        shape = (*shape, 2)
    count = int(np.prod(converter.shape_of(inputs[0]), dtype=np.int64))
    if int(np.prod(shape, dtype=np.int64)) != count and shape:
        # The stored shape is for the stored batch: the first dimension takes what the input really has.
        rest = int(np.prod(shape[1:], dtype=np.int64))
        if rest == 0 or count % rest:
            raise UnsupportedError(
                "a reshape does not fit its input", found=f"{count} elements", allowed=str(list(shape))
            )
        shape = (count // rest, *shape[1:])
    value = converter.get_tensor_expr(inputs[0])
    result = value if converter.shape_of(inputs[0]) == shape else relax.op.reshape(value, shape)
    return _move(converter, inputs[0], output, result)


@handles("TRANSPOSE")
def _transpose(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    order = [int(axis) for axis in converter.constant(inputs[1], "permutation")]
    value = relax.op.permute_dims(converter.get_tensor_expr(inputs[0]), order)
    return _move(converter, inputs[0], output, value)


@handles("CONCATENATION")
def _concatenation(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    options = converter.options(operator, "ConcatenationOptions")
    activation = options.FusedActivationFunction()
    rank = len(converter.shape_of(inputs[0]))
    axis = options.Axis() + rank if options.Axis() < 0 else options.Axis()
    # Each input on its own scale: requantise only those that differ from the output's.
    parts = [_move(converter, item, output, converter.get_tensor_expr(item)) for item in inputs]
    result = parts[0] if len(parts) == 1 else relax.op.concat(parts, axis=axis)
    if output.qnn_params is None:
        return converter.convert_fused_activation_function(result, activation)
    scale = float(output.qnn_params["scale"].value.numpy().reshape(-1)[0])
    zero = int(output.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
    dtype = converter.get_tensor_type_str(output.tensor.Type())
    return converter.convert_qnn_fused_activation_function(result, activation, scale, zero, dtype)


@handles("SPLIT", "SPLIT_V")
def _split(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, outputs = _ends(converter, operator)
    by_sizes = converter.name_of(operator) == "SPLIT_V"
    source = inputs[0] if by_sizes else inputs[1]
    axis = int(converter.constant(inputs[2] if by_sizes else inputs[0], "axis").reshape(-1)[0])
    shape = converter.shape_of(source)
    axis = axis + len(shape) if axis < 0 else axis
    if len(outputs) == 1:
        return [_move(converter, source, outputs[0], converter.get_tensor_expr(source))]
    if by_sizes:
        sizes = [int(size) for size in converter.constant(inputs[1], "sizes").reshape(-1)]
        if sizes.count(-1) == 1:
            sizes[sizes.index(-1)] = shape[axis] - (sum(sizes) + 1)
    else:
        sizes = [shape[axis] // len(outputs)] * len(outputs)
    parts = converter.bb.emit(
        relax.op.split(converter.get_tensor_expr(source), [int(end) for end in np.cumsum(sizes)[:-1]], axis)
    )
    return [
        _move(converter, source, output, converter.bb.emit(relax.TupleGetItem(parts, index)))
        for index, output in enumerate(outputs)
    ]


@handles("PACK")
def _pack(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    axis = converter.options(operator, "PackOptions").Axis()
    shape = converter.shape_of(inputs[0])
    axis = axis + len(shape) + 1 if axis < 0 else axis
    wider = (*shape[:axis], 1, *shape[axis:])
    parts = [
        relax.op.reshape(_move(converter, item, output, converter.get_tensor_expr(item)), wider) for item in inputs
    ]
    return parts[0] if len(parts) == 1 else relax.op.concat(parts, axis=axis)


@handles("UNPACK")
def _unpack(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source,), outputs = _ends(converter, operator)
    axis = converter.options(operator, "UnpackOptions").Axis()
    shape = converter.shape_of(source)
    axis = axis + len(shape) if axis < 0 else axis
    narrow = shape[:axis] + shape[axis + 1 :]
    value = converter.get_tensor_expr(source)
    if len(outputs) == 1:
        return [_move(converter, source, outputs[0], relax.op.reshape(value, narrow))]
    parts = converter.bb.emit(relax.op.split(value, len(outputs), axis))
    return [
        _move(converter, source, output, converter.bb.emit(relax.op.reshape(relax.TupleGetItem(parts, index), narrow)))
        for index, output in enumerate(outputs)
    ]


@handles("PAD", "PADV2")
def _pad(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    source = inputs[0]
    widths = [int(width) for width in converter.constant(inputs[1], "padding").reshape(-1)]
    value = 0.0
    if len(inputs) > 2:
        value = converter.constant(inputs[2], "pad value").reshape(-1)[0].item()
    elif source.qnn_params is not None:
        value = float(source.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
    if min(widths) < 0:
        raise UnsupportedError("a negative padding is not supported", found=str(widths))
    return _move(converter, source, output, relax.op.nn.pad(converter.get_tensor_expr(source), widths, pad_value=value))


@handles("GATHER")
def _gather(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source, indices), (output,) = _ends(converter, operator)
    options = converter.options(operator, "GatherOptions")
    if options.BatchDims() != 0:
        raise UnsupportedError(
            "GATHER with batch dimensions is not supported", found=str(options.BatchDims()), allowed="0"
        )
    shape = converter.shape_of(source)
    axis = options.Axis() + len(shape) if options.Axis() < 0 else options.Axis()
    # Indices may be user data: keep every read inside the tensor.
    value = relax.op.take(converter.get_tensor_expr(source), converter.get_tensor_expr(indices), axis, mode="clip")
    return _move(converter, source, output, value)


@handles("EMBEDDING_LOOKUP")
def _embedding(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (indices, table), (output,) = _ends(converter, operator)
    value = relax.op.take(converter.get_tensor_expr(table), converter.get_tensor_expr(indices), 0, mode="clip")
    return _move(converter, table, output, value)


@handles("GATHER_ND")
def _gather_nd(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source, indices), (output,) = _ends(converter, operator)
    depth = converter.shape_of(indices)[-1]
    kind = converter.get_tensor_type_str(indices.tensor.Type())
    last = np.array(converter.shape_of(source)[:depth], dtype=np.dtype(kind)) - 1
    places = relax.op.maximum(converter.get_tensor_expr(indices), relax.const(np.zeros_like(last)))
    places = relax.op.minimum(places, relax.const(last))
    value = relax.op.gather_nd(converter.get_tensor_expr(source), relax.op.astype(converter.bb.emit(places), "int64"))
    return _move(converter, source, output, value)


@handles("STRIDED_SLICE")
def _strided_slice(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source, begin, end, stride), (output,) = _ends(converter, operator)
    options = converter.options(operator, "StridedSliceOptions")
    if options.EllipsisMask() or options.NewAxisMask():
        raise UnsupportedError(
            "STRIDED_SLICE with ellipsis or new axes is not supported", found="a mask", allowed="none"
        )
    shape = converter.shape_of(source)
    begins, ends, strides = (
        [int(item) for item in converter.constant(tensor, what).reshape(-1)]
        for tensor, what in ((begin, "begin"), (end, "end"), (stride, "strides"))
    )
    axes, first, last, step, kept = [], [], [], [], []
    for axis, size in enumerate(shape):
        if axis >= len(begins):
            kept.append(size)
            continue
        shrink = bool(options.ShrinkAxisMask() >> axis & 1)
        start = None if options.BeginMask() >> axis & 1 else begins[axis]
        stop = None if options.EndMask() >> axis & 1 else ends[axis]
        if shrink:
            start = begins[axis] + size if begins[axis] < 0 else begins[axis]
            stop, strides[axis] = start + 1, 1
        a, b, c = slice(start, stop, strides[axis]).indices(size)
        count = len(range(a, b, c))
        if not shrink:
            kept.append(count)
        if (a, b, c) != (0, size, 1):
            axes.append(axis)
            first.append(a)
            # A negative end counts from the back for Relax: one before the front is -size - 1.
            last.append(b if b >= 0 else -size - 1)
            step.append(c)
    value = converter.get_tensor_expr(source)
    if axes:
        value = relax.op.strided_slice(value, axes, first, last, step)
    if tuple(kept) != shape:
        value = relax.op.reshape(value, kept)
    return _move(converter, source, output, value)


@handles("DEQUANTIZE")
def _dequantize(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source,), _ = _ends(converter, operator)
    value = converter.get_tensor_expr(source)
    if source.qnn_params is None:
        # float16 weights: widened here, once and for all, when they are constant.
        return relax.op.astype(value, "float32")
    return converter.dequantize(value, source)
