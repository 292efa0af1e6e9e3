"""TFLite operators that move elements without computing: they work on stored integers as they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend import tflite_tables as tables
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tflite_rounding import is_whole, storage
from ingot.frontend.tvm_types import Expr, Operator, Options, TfliteConverter, Wrapper

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


def _reshaped(converter: TfliteConverter, operator: Operator) -> tuple[int, ...]:
    """The shape that RESHAPE, SQUEEZE or EXPAND_DIMS gives: as stored, unless sizes differ from those of the file."""
    inputs, (output,) = _ends(converter, operator)
    source = converter.shape_of(inputs[0])
    stored = tuple(int(output.tensor.Shape(axis)) for axis in range(output.tensor.ShapeLength()))
    parts = (2,) if output.tensor.Type() == _COMPLEX64 else ()
    count = int(np.prod(source, dtype=np.int64))
    if int(np.prod(stored + parts, dtype=np.int64)) == count:
        return stored + parts
    name = converter.name_of(operator)
    whole = np.broadcast_to(False, source[: len(source) - len(parts)])
    if name == "EXPAND_DIMS":
        axis = int(converter.constant(inputs[1], "axis").reshape(-1)[0])
        return np.expand_dims(whole, axis).shape + parts
    if name == "SQUEEZE":
        options = converter.options(operator, "SqueezeOptions")
        axes = tuple(int(options.SqueezeDims(place)) for place in range(options.SqueezeDimsLength()))
        return np.squeeze(whole, axes or None).shape + parts
    if len(inputs) > 1 and inputs[1].buffer.DataLength():
        wanted = [int(size) for size in converter.constant(inputs[1], "shape").reshape(-1)]
        rest = -int(np.prod(wanted + list(parts), dtype=np.int64))
        if wanted.count(-1) == 1 and rest > 0 and count % rest == 0:
            wanted[wanted.index(-1)] = count // rest
        if int(np.prod(wanted + list(parts), dtype=np.int64)) == count:
            return (*wanted, *parts)
    # The stored shape is for the stored batch: the first dimension takes what the input really has.
    rest = int(np.prod(stored[1:] + parts, dtype=np.int64))
    if not stored or rest == 0 or count % rest:
        found, allowed = f"{count} elements", str(list(stored))
        raise UnsupportedError("a reshape does not fit its input", found=found, allowed=allowed)
    return (count // rest, *stored[1:], *parts)


@handles("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
def _reshape(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    shape = _reshaped(converter, operator)
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


def _pad_with(converter: TfliteConverter, source: Wrapper, fill: Wrapper, widths: list[int]) -> Expr:
    """Padding with a computed value."""
    from tvm import te, tirx

    shape = converter.shape_of(source)

    def define(x: Any, value: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            places = [place - before for place, before in zip(index, widths[::2], strict=True)]
            inside = [part for place, size in zip(places, shape, strict=True) for part in (place >= 0, place < size)]
            return tirx.if_then_else(tirx.all(*inside), x(*places), value(*(0 for _ in value.shape)))

        result = [size + sum(widths[2 * axis : 2 * axis + 2]) for axis, size in enumerate(shape)]
        return te.compute(result, element, name="pad")

    values = (converter.get_tensor_expr(item) for item in (source, fill))
    return converter.bb.call_te(define, *values, primfunc_name_hint="pad")


@handles("PAD", "PADV2")
def _pad(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    inputs, (output,) = _ends(converter, operator)
    source = inputs[0]
    widths = [int(width) for width in converter.constant(inputs[1], "padding").reshape(-1)]
    value = 0.0
    if min(widths) < 0:
        raise UnsupportedError("a negative padding is not supported", found=str(widths))
    if len(inputs) > 2 and not inputs[2].buffer.DataLength():
        return _pad_with(converter, source, inputs[2], widths)
    if len(inputs) > 2:
        value = converter.constant(inputs[2], "pad value").reshape(-1)[0].item()
    elif source.qnn_params is not None:
        value = float(source.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
    return _move(converter, source, output, relax.op.nn.pad(converter.get_tensor_expr(source), widths, pad_value=value))


def _slice_axes(options: Options, rank: int, length: int) -> list[int | None]:
    """For each of the `length` entries of a slice its axis: an axis of the input, None for a new one, -1 to drop it.

    The ellipsis stands for as many axes as are left over.
    """
    new = [bool(options.NewAxisMask() >> place & 1) for place in range(length)]
    dots = [bool(options.EllipsisMask() >> place & 1) for place in range(length)]
    used = sum(not (a or b) for a, b in zip(new, dots, strict=True))
    axes: list[int | None] = []
    axis = 0
    for place in range(length):
        if dots[place]:
            axes.append(-1)
            axis += rank - used
        elif new[place]:
            axes.append(None)
        else:
            axes.append(axis)
            axis += 1
    if sum(dots) > 1 or used > rank:
        raise UnsupportedError("a slice does not fit its tensor", found=f"{length} entries", allowed=f"{rank} axes")
    return axes


@handles("STRIDED_SLICE")
def _strided_slice(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source, begin, end, stride), (output,) = _ends(converter, operator)
    options = converter.options(operator, "StridedSliceOptions")
    shape = converter.shape_of(source)
    begins, ends, strides = (
        [int(item) for item in converter.constant(tensor, what).reshape(-1)]
        for tensor, what in ((begin, "begin"), (end, "end"), (stride, "strides"))
    )
    if not len(begins) == len(ends) == len(strides) or 0 in strides:
        raise UnsupportedError("a slice does not fit its tensor", found=f"{begins}, {ends}, {strides}")
    entries = _slice_axes(options, len(shape), len(begins))
    ranges = {axis: (0, size, 1) for axis, size in enumerate(shape)}
    kept: list[int | None] = []  # the axes of the result: of the input, or None for one of size 1
    seen = -1
    for place, axis in enumerate(entries):
        if axis is None:
            kept.append(None)
            continue
        if axis == -1:
            following = next((item for item in entries[place + 1 :] if item is not None), len(shape))
            kept += range(seen + 1, following)
            seen = following - 1
            continue
        size, step = shape[axis], strides[place]
        first = None if options.BeginMask() >> place & 1 else begins[place]
        last = None if options.EndMask() >> place & 1 else ends[place]
        if options.Offset() and first is not None and last is not None:
            last = first + last
        if options.ShrinkAxisMask() >> place & 1:
            start = begins[place] + size if begins[place] < 0 else begins[place]
            if not 0 <= start < size:
                raise UnsupportedError("a slice begins outside its tensor", found=str(begins[place]), allowed=str(size))
            ranges[axis] = (start, start + 1, 1)
        else:
            ranges[axis] = slice(first, last, step).indices(size)
            kept.append(axis)
        seen = axis
    kept += range(seen + 1, len(shape))
    cut = [axis for axis, size in enumerate(shape) if ranges[axis] != (0, size, 1)]
    value = converter.get_tensor_expr(source)
    if cut:
        firsts, lasts, steps = ([ranges[axis][part] for axis in cut] for part in range(3))
        # A negative end counts from the back for Relax: one before the front is -size - 1.
        lasts = [stop if stop >= 0 else -shape[axis] - 1 for axis, stop in zip(cut, lasts, strict=True)]
        value = relax.op.strided_slice(value, cut, firsts, lasts, steps)
    result = tuple(1 if axis is None else len(range(*ranges[axis])) for axis in kept)
    if kept != list(range(len(shape))):
        value = relax.op.reshape(value, result)
    return _move(converter, source, output, value)


@handles("MIRROR_PAD")
def _mirror_pad(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import te, tirx

    (source, padding), _ = _ends(converter, operator)
    edge = converter.options(operator, "MirrorPadOptions").Mode()  # 1: the edge itself is repeated
    widths = converter.constant(padding, "padding").reshape(-1, 2).tolist()
    shape = converter.shape_of(source)
    if any(not 0 <= width <= size - 1 + edge for pair, size in zip(widths, shape, strict=True) for width in pair):
        raise UnsupportedError("a mirror is wider than its tensor", found=str(widths), allowed=f"below {list(shape)}")

    def define(x: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            places = []
            for place, (before, _), size in zip(index, widths, shape, strict=True):
                inner = place - before
                left = tirx.Select(inner < 0, -inner - edge, inner)
                places.append(tirx.Select(left >= size, 2 * size - 2 + edge - left, left))
            return x(*places)

        result = [before + size + after for (before, after), size in zip(widths, shape, strict=True)]
        return te.compute(result, element, name="mirror_pad")

    return converter.bb.call_te(define, converter.get_tensor_expr(source), primfunc_name_hint="mirror_pad")


@handles("DEPTH_TO_SPACE", "SPACE_TO_DEPTH")
def _depth(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source,), _ = _ends(converter, operator)
    to_space = converter.name_of(operator) == "DEPTH_TO_SPACE"
    block = converter.options(operator, "DepthToSpaceOptions" if to_space else "SpaceToDepthOptions").BlockSize()
    batch, height, width, channels = converter.shape_of(source)
    if block < 1 or (channels % (block * block) if to_space else height % block or width % block):
        raise UnsupportedError("blocks do not fit the tensor", found=str(block), allowed="a divisor of its sizes")
    value = converter.get_tensor_expr(source)
    if to_space:
        parts, result = (batch, height, width, block, block, channels // block**2), (height * block, width * block)
        depth = channels // block**2
    else:
        parts = (batch, height // block, block, width // block, block, channels)
        result, depth = (height // block, width // block), channels * block**2
    order = [0, 1, 3, 2, 4, 5]
    return relax.op.reshape(relax.op.permute_dims(relax.op.reshape(value, parts), order), (batch, *result, depth))


@handles("DEQUANTIZE")
def _dequantize(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (source,), _ = _ends(converter, operator)
    value = converter.get_tensor_expr(source)
    if source.qnn_params is None:
        # float16 weights: widened here, once and for all, when they are constant.
        return relax.op.astype(value, "float32")
    return converter.dequantize(value, source)
