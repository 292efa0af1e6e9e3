"""StableHLO operators in TFLite files (https://openxla.org/stablehlo/spec), those that run no other graph.

Most are an ONNX or TFLite operator under another name; shapes come from the options, or from the stored output where
StableHLO has them in the result's type alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_borrow import onnx_operator
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, Options, TfliteConverter

#: By StableHLO's name, without its prefix: the ONNX operator that computes the same on the same inputs.
_SAME = {
    "ADD": "Add", "MAXIMUM": "Max", "MINIMUM": "Min", "MULTIPLY": "Mul", "POWER": "Pow", "SHIFT_LEFT": "BitShift",
    "SUBTRACT": "Sub",
}  # fmt: skip
_UNARY = {
    "ABS": "abs", "COSINE": "cos", "EXPONENTIAL": "exp", "FLOOR": "floor", "LOG": "log", "LOGISTIC": "sigmoid",
    "NEGATE": "negative", "RSQRT": "rsqrt", "TANH": "tanh",
}  # fmt: skip
#: In the order of the schema's StablehloComparisonDirection.
_COMPARISONS = ("equal", "not_equal", "greater_equal", "greater", "less_equal", "less")


def _names(*operators: str) -> tuple[str, ...]:
    return tuple(f"STABLEHLO_{name}" for name in operators)


def _short(converter: TfliteConverter, operator: Operator) -> str:
    return str(converter.name_of(operator)).removeprefix("STABLEHLO_")


def _inputs(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    return [converter.get_tensor_expr(item) for item in converter.get_input_tensors(operator)]


def _result(converter: TfliteConverter, operator: Operator) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the first output, as stored."""
    output = converter.get_output_tensors(operator)[0]
    return converter.shape_of(output), str(converter.get_tensor_type_str(output.tensor.Type()))


def _shape(value: Expr) -> tuple[int, ...]:
    return tuple(int(dim) for dim in value.ty.shape)


def _dtype(value: Expr) -> str:
    return str(value.ty.dtype.dtype)


def _numbers(options: Options, field: str) -> list[int]:
    """A vector of the options, empty where it is left out."""
    return [int(getattr(options, field)(index)) for index in range(getattr(options, f"{field}Length")())]


def _axes(options: Options, field: str, rank: int) -> list[int]:
    """Axes of the options, all different and within the rank."""
    axes = _numbers(options, field)
    if len(set(axes)) != len(axes) or any(not 0 <= axis < rank for axis in axes):
        raise UnsupportedError(f"{field} are no axes", found=str(axes), allowed=f"different ones, 0 to {rank - 1}")
    return axes


def _for_each_axis(options: Options, fields: Sequence[str], rank: int) -> list[list[int]]:
    """Vectors of the options that have one entry for each axis."""
    found = [_numbers(options, field) for field in fields]
    for field, values in zip(fields, found, strict=True):
        if len(values) != rank:
            raise UnsupportedError(f"{field} does not fit the tensor", found=str(values), allowed=f"{rank} numbers")
    return found


@handles(*_names(*_UNARY))
def _unary(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (value,) = _inputs(converter, operator)
    return getattr(relax.op, _UNARY[_short(converter, operator)])(value)


@handles(*_names(*_SAME))
def _same(converter: TfliteConverter, operator: Operator) -> Expr:
    name = _SAME[_short(converter, operator)]
    values = _inputs(converter, operator)
    attributes = {"direction": "LEFT"} if name == "BitShift" else {}
    ends = [(max((_shape(value) for value in values), key=len), _dtype(values[-1]))]
    return onnx_operator(converter, name, values, ends, attributes)[0]


@handles(*_names("DIVIDE", "REMAINDER"))
def _quotient(converter: TfliteConverter, operator: Operator) -> Expr:
    """Of whole numbers: rounded towards 0, and what that leaves. Division by 0 gives what StableHLO says: -1 and x."""
    from tvm import relax

    op = relax.op
    left, right = _inputs(converter, operator)
    dtype, divides = _dtype(left), _short(converter, operator) == "DIVIDE"
    if np.dtype(dtype).kind == "f":
        return op.divide(left, right) if divides else op.mod(left, right)
    none = converter.bb.emit(op.equal(right, relax.const(0, dtype)))
    safe = converter.bb.emit(op.where(none, relax.const(1, dtype), right))
    quotient = converter.bb.emit(op.divide(left, safe))
    if divides:
        return op.where(none, relax.const(np.array(-1).astype(dtype), dtype), quotient)
    return op.where(none, left, op.subtract(left, op.multiply(quotient, safe)))


@handles(*_names("CBRT"))
def _cube_root(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (value,) = _inputs(converter, operator)
    root = relax.op.power(relax.op.abs(value), relax.const(1 / 3, _dtype(value)))
    return relax.op.multiply(relax.op.sign(value), root)


@handles(*_names("AND", "OR"))
def _bits(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    left, right = _inputs(converter, operator)
    kind = "logical" if _dtype(left) == "bool" else "bitwise"
    return getattr(relax.op, f"{kind}_{_short(converter, operator).lower()}")(left, right)


@handles(*_names("CONVERT"))
def _convert(converter: TfliteConverter, operator: Operator) -> Expr:
    (value,) = _inputs(converter, operator)
    _, dtype = _result(converter, operator)
    return onnx_operator(converter, "Cast", [value], [(_shape(value), dtype)])[0]


@handles(*_names("SELECT"))
def _select(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    return relax.op.where(*_inputs(converter, operator))


@handles(*_names("CLAMP"))
def _clamp(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    least, value, most = _inputs(converter, operator)
    return relax.op.minimum(relax.op.maximum(value, least), most)


@handles(*_names("COMPARE"))
def _compare(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    direction = int(converter.options(operator, "StablehloCompareOptions").ComparisonDirection())
    if not 0 <= direction < len(_COMPARISONS):
        raise UnsupportedError("no such comparison", found=str(direction), allowed=f"0 to {len(_COMPARISONS) - 1}")
    sides = _inputs(converter, operator)
    if _dtype(sides[0]) == "bool":  # LLVM code for a vector of bools compared is not valid
        sides = [relax.op.astype(side, "int8") for side in sides]
    return getattr(relax.op, _COMPARISONS[direction])(*sides)


@handles(*_names("RESHAPE"))
def _reshape(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    value, (shape, _) = _inputs(converter, operator)[0], _result(converter, operator)
    if np.prod(shape, dtype=np.int64) != np.prod(_shape(value), dtype=np.int64):
        raise UnsupportedError("a shape has other elements", found=str(list(shape)), allowed=str(list(_shape(value))))
    return relax.op.reshape(value, shape)


@handles(*_names("TRANSPOSE"))
def _transpose(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (value,) = _inputs(converter, operator)
    options, rank = converter.options(operator, "StablehloTransposeOptions"), len(_shape(value))
    _for_each_axis(options, ("Permutation",), rank)
    return relax.op.permute_dims(value, _axes(options, "Permutation", rank))


@handles(*_names("CONCATENATE"))
def _concatenate(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    axis = int(converter.options(operator, "StablehloConcatenateOptions").Dimension())
    return relax.op.concat(_inputs(converter, operator), axis)


@handles(*_names("BROADCAST_IN_DIM"))
def _broadcast(converter: TfliteConverter, operator: Operator) -> Expr:
    """The input's axes are these of the result; along all others, and where the input has size 1, it is repeated."""
    from tvm import relax

    value, *axes = converter.get_input_tensors(operator)
    expr, (shape, _) = converter.get_tensor_expr(value), _result(converter, operator)
    if axes:  # LiteRT's form has them as an input
        along = [int(axis) for axis in converter.constant(axes[0], "axes").reshape(-1)]
    else:
        along = _axes(converter.options(operator, "StablehloBroadcastInDimOptions"), "BroadcastDimensions", len(shape))
    source = _shape(expr)
    between = [1] * len(shape)
    for axis, size in zip(along, source, strict=True):
        between[axis] = size
    order = sorted(range(len(along)), key=lambda place: along[place])
    turned = relax.op.permute_dims(expr, order) if order != list(range(len(order))) else expr
    return relax.op.broadcast_to(relax.op.reshape(turned, between), shape)


@handles(*_names("SLICE"))
def _slice(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (value,) = _inputs(converter, operator)
    shape, options = _shape(value), converter.options(operator, "StablehloSliceOptions")
    first, last, steps = _for_each_axis(options, ("StartIndices", "LimitIndices", "Strides"), len(shape))
    for begin, end, step, size in zip(first, last, steps, shape, strict=True):
        if not (0 <= begin <= end <= size and step > 0):
            raise UnsupportedError("a slice is outside its tensor", found=f"{begin}:{end}:{step}", allowed=f"0:{size}")
    return relax.op.strided_slice(value, list(range(len(shape))), first, last, steps)


@handles(*_names("DYNAMIC_SLICE"))
def _dynamic_slice(converter: TfliteConverter, operator: Operator) -> Expr:
    """A window of fixed size that begins where scalars say, moved to lie inside."""
    from tvm import te

    value, *starts = _inputs(converter, operator)
    shape = _shape(value)
    (sizes,) = _for_each_axis(converter.options(operator, "StablehloDynamicSliceOptions"), ("SliceSizes",), len(shape))
    if any(not 0 < part <= whole for part, whole in zip(sizes, shape, strict=True)):
        raise UnsupportedError("a slice is outside its tensor", found=str(sizes), allowed=f"up to {list(shape)}")

    def define(x: Any, *first: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            ends = zip(first, shape, sizes, index, strict=True)
            return x(*(_inside(at(), whole - part) + place for at, whole, part, place in ends))

        return te.compute(sizes, element, name="dynamic_slice")

    return converter.bb.call_te(define, value, *starts, primfunc_name_hint="dynamic_slice")


def _inside(place: Any, last: int) -> Any:  # noqa: ANN401 - TIR expressions
    """A computed place, kept within 0 to last."""
    from tvm import tirx

    return tirx.max(tirx.min(place.astype("int64"), tirx.const(last, "int64")), tirx.const(0, "int64"))


@handles(*_names("DYNAMIC_UPDATE_SLICE"))
def _dynamic_update(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import te, tirx

    value, update, *starts = _inputs(converter, operator)
    shape, window = _shape(value), _shape(update)
    if any(part > whole for part, whole in zip(window, shape, strict=True)):
        raise UnsupportedError("an update is larger than its tensor", found=str(window), allowed=str(shape))

    def define(x: Any, new: Any, *first: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            places = [
                i - _inside(at(), whole - part) for i, at, whole, part in zip(index, first, shape, window, strict=True)
            ]
            inside = [test for i, part in zip(places, window, strict=True) for test in (i >= 0, i < part)]
            kept = [_inside(i, part - 1) for i, part in zip(places, window, strict=True)]
            return tirx.if_then_else(tirx.all(*inside), new(*kept), x(*index))

        return te.compute(shape, element, name="dynamic_update_slice")

    return converter.bb.call_te(define, value, update, *starts, primfunc_name_hint="dynamic_update_slice")


@handles(*_names("PAD"))
def _pad(converter: TfliteConverter, operator: Operator) -> Expr:
    """Elements before, after and between; negative numbers take away at the edges."""
    from tvm import te, tirx

    value, fill = _inputs(converter, operator)
    shape, options = _shape(value), converter.options(operator, "StablehloPadOptions")
    fields = ("EdgePaddingLow", "EdgePaddingHigh", "InteriorPadding")
    before, after, between = _for_each_axis(options, fields, len(shape))
    spread = [max(size + (size - 1) * gap, 0) for size, gap in zip(shape, between, strict=True)]
    result = tuple(low + size + high for low, size, high in zip(before, spread, after, strict=True))
    if any(gap < 0 for gap in between) or any(size < 0 for size in result):
        raise UnsupportedError("this padding leaves no tensor", found=f"{before} {after} {between}")

    def define(x: Any, other: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            tests, places = [], []
            for i, low, size, gap, whole in zip(index, before, shape, between, spread, strict=True):
                place = i - low
                tests += [place >= 0, place < whole]
                if gap:
                    tests.append(tirx.floormod(place, gap + 1).equal(0))
                    place = tirx.floordiv(place, gap + 1)
                places.append(_inside(place, size - 1))
            return tirx.if_then_else(tirx.all(*tests), x(*places), other())

        return te.compute(result, element, name="pad")

    return converter.bb.call_te(define, value, fill, primfunc_name_hint="pad")


@handles(*_names("IOTA"))
def _iota(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    (shape, dtype), options = _result(converter, operator), converter.options(operator, "StablehloIotaOptions")
    axis = int(options.IotaDimension())
    if not 0 <= axis < len(shape):
        raise UnsupportedError("an axis is outside the tensor", found=str(axis), allowed=f"below {len(shape)}")
    line = converter.constant_weight(np.arange(shape[axis]).astype(dtype))
    return relax.op.broadcast_to(relax.op.reshape(line, [-1 if i == axis else 1 for i in range(len(shape))]), shape)


@handles(*_names("DOT_GENERAL"))
def _dot(converter: TfliteConverter, operator: Operator) -> Expr:
    """Batched matrix product: axes of both are batch, summed, or of one side; the result has them in that order."""
    from tvm import relax

    left, right = _inputs(converter, operator)
    options = converter.options(operator, "StablehloDotGeneralOptions")
    shapes, sides, kept = (_shape(left), _shape(right)), [], []
    for side, (name, value) in enumerate((("Lhs", left), ("Rhs", right))):
        rank = len(shapes[side])
        batch = _axes(options, f"{name}BatchingDimensions", rank)
        summed = _axes(options, f"{name}ContractingDimensions", rank)
        own = [axis for axis in range(rank) if axis not in (*batch, *summed)]
        sizes = [[shapes[side][axis] for axis in group] for group in (batch, own, summed)]
        order = (*batch, *own, *summed) if side == 0 else (*batch, *summed, *own)
        inner = [int(np.prod(sizes[1])), int(np.prod(sizes[2]))]
        whole = (*sizes[0], *(inner if side == 0 else reversed(inner)))
        sides.append(converter.bb.emit(relax.op.reshape(relax.op.permute_dims(value, order), whole)))
        kept.append(sizes)
    if kept[0][0] != kept[1][0] or kept[0][2] != kept[1][2]:
        found = f"{list(shapes[0])} and {list(shapes[1])}"
        raise UnsupportedError("the axes of a product do not fit together", found=found)
    _, dtype = _result(converter, operator)
    product = relax.op.matmul(*sides, out_dtype=dtype)
    return relax.op.reshape(product, (*kept[0][0], *kept[0][1], *kept[1][1]))


@handles(*_names("GATHER"))
def _gather(converter: TfliteConverter, operator: Operator) -> Expr:
    """Windows of one size, each beginning where a vector of indices says, moved to lie inside."""
    from tvm import te, tirx

    value, indices = _inputs(converter, operator)
    options = converter.options(operator, "StablehloGatherOptions")
    shape, places, (result, _) = _shape(value), _shape(indices), _result(converter, operator)
    (sizes,) = _for_each_axis(options, ("SliceSizes",), len(shape))
    offsets = _axes(options, "OffsetDims", len(result))
    dropped, mapped = (_axes(options, name, len(shape)) for name in ("CollapsedSliceDims", "StartIndexMap"))
    across = int(options.IndexVectorDim())
    windows = [axis for axis in range(len(shape)) if axis not in dropped]
    batch = [axis for axis in range(len(result)) if axis not in offsets]
    fits = (
        len(windows) == len(offsets)
        and len(batch) == len(places) - (across < len(places))
        and all(0 < part <= whole for part, whole in zip(sizes, shape, strict=True))
        and len(mapped) == (places[across] if across < len(places) else 1)
    )
    if not fits:
        raise UnsupportedError("the windows do not fit the tensor", found=str(sizes), allowed=f"up to {list(shape)}")

    def define(x: Any, where: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            at = [index[axis] for axis in batch]
            point: list[Any] = [tirx.const(0, "int64")] * len(shape)
            for part, axis in enumerate(mapped):
                vector = (*at[:across], part, *at[across:]) if across < len(places) else tuple(at)
                point[axis] = _inside(where(*vector), shape[axis] - sizes[axis])
            for axis, offset in zip(windows, offsets, strict=True):
                point[axis] = point[axis] + index[offset]
            return x(*point)

        return te.compute(result, element, name="gather")

    return converter.bb.call_te(define, value, indices, primfunc_name_hint="gather")


@handles(*_names("CONVOLUTION"))
def _convolution(converter: TfliteConverter, operator: Operator) -> Expr:
    """In two dimensions, with axes in any order."""
    from tvm import relax

    value, weight = _inputs(converter, operator)
    options = converter.options(operator, "StablehloConvolutionOptions")
    if len(_shape(value)) != 4:
        raise UnsupportedError("only images are convolved", found=f"rank {len(_shape(value))}", allowed="rank 4")
    strides, dilation, spread = (_numbers(options, f) for f in ("WindowStrides", "RhsDilation", "LhsDilation"))
    reversal = [bool(options.WindowReversal(index)) for index in range(options.WindowReversalLength())]
    if set(spread) - {1} or any(reversal) or options.BatchGroupCount() > 1:
        found = f"input dilation {spread}, reversal {reversal}, batch groups {options.BatchGroupCount()}"
        raise UnsupportedError("this form of convolution is not supported", found=found, allowed="none of them")
    padding = np.array(_numbers(options, "Padding") or [0] * 4).reshape(2, 2)
    if padding.min() < 0:
        raise UnsupportedError("a convolution takes away edges", found=str(padding.tolist()), allowed="0 or more")
    inside = [
        options.InputBatchDimension(),
        *_numbers(options, "InputSpatialDimensions"),
        options.InputFeatureDimension(),
    ]
    kernel = [*_numbers(options, "KernelSpatialDimensions"), options.KernelInputFeatureDimension()]
    kernel.append(options.KernelOutputFeatureDimension())
    outside = [options.OutputBatchDimension(), *_numbers(options, "OutputSpatialDimensions")]
    outside.append(options.OutputFeatureDimension())
    for order in (inside, kernel, outside):
        if sorted(order) != [0, 1, 2, 3]:
            raise UnsupportedError("the axes of a convolution are not all there", found=str(order), allowed="0 to 3")
    _, dtype = _result(converter, operator)
    result = relax.op.nn.conv2d(
        relax.op.permute_dims(value, inside),
        relax.op.permute_dims(weight, kernel),
        strides=strides or [1, 1],
        padding=[*map(int, padding[:, 0]), *map(int, padding[:, 1])],
        dilation=dilation or [1, 1],
        groups=int(options.FeatureGroupCount()),
        data_layout="NHWC",
        kernel_layout="HWIO",
        out_dtype=dtype,
    )
    return relax.op.permute_dims(result, [outside.index(axis) for axis in range(4)])
