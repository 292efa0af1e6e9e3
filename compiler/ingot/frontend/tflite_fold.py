"""TFLite operators on constants, computed at import: the arithmetic on shapes that exporters leave in a model.

What decides a shape (of RESHAPE, STRIDED_SLICE, FILL, ...) must be a constant here; TFLite computes it at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.frontend.tvm_types import Operator, TfliteConverter

#: Larger values are weights: they stay operators, which later passes fold with a budget.
_MOST_ELEMENTS = 4096
_DTYPES = frozenset(("int32", "int64", "bool", "float32"))

#: Operators whose results need the results of others, and so on.
_MAX_CHAIN = 64
#: These read the size of their input, not its elements.
_ON_SHAPES = frozenset(("SHAPE", "RANK"))

Values = list[np.ndarray]
#: (converter, operator, values of its inputs) -> those of its outputs.
Compute = Callable[[TfliteConverter, Operator, Values], Values]
_TABLE: dict[str, Compute] = {}
_BINARY: dict[str, Callable[..., Any]] = {
    "ADD": np.add, "EQUAL": np.equal, "FLOOR_DIV": np.floor_divide, "FLOOR_MOD": np.mod, "GREATER": np.greater,
    "GREATER_EQUAL": np.greater_equal, "LESS": np.less, "LESS_EQUAL": np.less_equal, "LOGICAL_AND": np.logical_and,
    "LOGICAL_OR": np.logical_or, "MAXIMUM": np.maximum, "MINIMUM": np.minimum, "MUL": np.multiply,
    "NOT_EQUAL": np.not_equal, "SUB": np.subtract,
}  # fmt: skip
_UNARY: dict[str, Callable[..., Any]] = {
    "ABS": np.abs, "CEIL": np.ceil, "FLOOR": np.floor, "LOGICAL_NOT": np.logical_not, "NEG": np.negative,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "REDUCE_ALL": np.all, "REDUCE_ANY": np.any, "REDUCE_MAX": np.max, "REDUCE_MIN": np.min, "REDUCE_PROD": np.prod,
    "SUM": np.sum,
}  # fmt: skip
#: The options of operators that may have an activation inside.
_ACTIVATED = {"ADD": "AddOptions", "MUL": "MulOptions", "SUB": "SubOptions"}


def fold(converter: TfliteConverter, operator: Operator) -> Values | None:
    """The values of an operator's outputs if they are known at import; None if it stays an operator."""
    name = str(converter.name_of(operator))
    if name not in _TABLE and name not in _ON_SHAPES:
        return None
    inputs = converter.get_input_tensors(operator)
    ends = [*inputs, *converter.get_output_tensors(operator)]
    dtypes = [str(converter.get_tensor_type_str(item.tensor.Type())) for item in ends]
    if name in _ON_SHAPES:
        shape = np.array(converter.shape_of(inputs[0]))
        return [(shape if name == "SHAPE" else np.array(shape.size)).astype(np.dtype(dtypes[-1]))]
    if any(item.qnn_params is not None for item in ends) or not _DTYPES.issuperset(dtypes):
        return None
    values = [_held(converter, int(item.tensor_idx)) for item in inputs]
    known = [value for value in values if value is not None and value.size <= _MOST_ELEMENTS]
    # What is wrong is left to the operator's converter, which says so.
    if len(known) < len(values):
        return None
    try:
        found = _TABLE[name](converter, operator, known)
    except (ValueError, IndexError):
        return None
    results = [np.dtype(dtype) for dtype in dtypes[len(inputs) :]]
    if sum(value.size for value in found) > _MOST_ELEMENTS or len(found) != len(results):
        return None
    return [np.asarray(value).astype(dtype) for value, dtype in zip(found, results, strict=True)]


def value_of(converter: TfliteConverter, index: int, depth: int = 0) -> np.ndarray | None:
    """The value of a tensor, computed from operators that are not converted yet; None if it is not known at import."""
    found = _held(converter, index)
    if found is not None or index < 0 or depth >= _MAX_CHAIN or converter.has_expr(index):
        return found
    graph = converter.subgraph
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        outputs = [int(operator.Outputs(place)) for place in range(operator.OutputsLength())]
        if index not in outputs:
            continue
        inputs = [int(operator.Inputs(place)) for place in range(operator.InputsLength())]
        name = str(converter.name_of(operator))
        if name in _ON_SHAPES:
            ready = converter.has_expr(inputs[0])
        else:
            ready = name in _TABLE and all(value_of(converter, place, depth + 1) is not None for place in inputs)
        if not ready:
            return None
        values = fold(converter, operator)
        converter.given.update(zip(outputs, values or (), strict=False))
        return None if values is None else values[outputs.index(index)]
    return None


def _held(converter: TfliteConverter, index: int) -> np.ndarray | None:
    """The value of a constant of plain numbers, None of another tensor."""
    if index < 0:
        return None
    tensor = converter.get_tensors([index])[0]
    if tensor.qnn_params is not None:
        return None
    if index in converter.given:
        return np.asarray(converter.given[index])
    if tensor.buffer.DataLength():
        return np.asarray(converter.get_tensor_value(tensor))
    shape = tuple(int(tensor.tensor.Shape(axis)) for axis in range(tensor.tensor.ShapeLength()))
    if converter.has_expr(index) or 0 not in shape:
        return None
    return np.zeros(shape, np.dtype(converter.get_tensor_type_str(tensor.tensor.Type())))


def _computes(*names: str) -> Callable[[Compute], Compute]:
    def register(function: Compute) -> Compute:
        _TABLE.update(dict.fromkeys(names, function))
        return function

    return register


def _axes(value: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis) for axis in value.reshape(-1))


@_computes(*_BINARY)
def _binary(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    name = str(converter.name_of(operator))
    if name in _ACTIVATED and converter.options(operator, _ACTIVATED[name]).FusedActivationFunction():
        raise ValueError("an activation")
    if name in ("FLOOR_DIV", "FLOOR_MOD") and not np.all(values[1]):
        raise ValueError("a division by zero")
    if math.prod(np.broadcast_shapes(*(value.shape for value in values))) > _MOST_ELEMENTS:
        raise ValueError("too large")
    with np.errstate(all="ignore"):
        return [_BINARY[name](*values)]


@_computes(*_UNARY)
def _unary(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    return [_UNARY[str(converter.name_of(operator))](*values)]


@_computes(*_REDUCTIONS)
def _reduction(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    keep = bool(converter.options(operator, "ReducerOptions").KeepDims())
    return [_REDUCTIONS[str(converter.name_of(operator))](values[0], axis=_axes(values[1]), keepdims=keep)]


@_computes("CAST", "SQUEEZE", "EXPAND_DIMS", "RESHAPE")
def _as_stored(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    """The same numbers in another shape or dtype."""
    name, value = str(converter.name_of(operator)), values[0]
    if name == "CAST" and value.dtype.kind == "f" and np.any((value != np.trunc(value)) | (np.abs(value) >= 2**31)):
        raise ValueError("where it does not fit, each machine rounds in its own way")
    if name == "SQUEEZE":
        options = converter.options(operator, "SqueezeOptions")
        axes = tuple(int(options.SqueezeDims(place)) for place in range(options.SqueezeDimsLength()))
        return [np.squeeze(value, axes or None)]
    if name == "EXPAND_DIMS":
        return [np.expand_dims(value, _axes(values[1])[0])]
    if name == "RESHAPE" and len(values) > 1:
        return [value.reshape(_axes(values[1]))]
    return [
        value.reshape(converter.shape_of(converter.get_output_tensors(operator)[0])) if name == "RESHAPE" else value
    ]


@_computes("PACK")
def _pack(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    return [np.stack(values, converter.options(operator, "PackOptions").Axis())]


@_computes("UNPACK")
def _unpack(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    return list(np.moveaxis(values[0], converter.options(operator, "UnpackOptions").Axis(), 0))


@_computes("CONCATENATION")
def _concatenation(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    return [np.concatenate(values, converter.options(operator, "ConcatenationOptions").Axis())]


@_computes("SPLIT_V")
def _split(_: TfliteConverter, __: Operator, values: Values) -> Values:
    value, sizes, axis = values[0], values[1].reshape(-1).astype(np.int64), _axes(values[2])[0]
    if np.count_nonzero(sizes < 0) == 1:
        sizes[sizes < 0] = value.shape[axis] - sizes[sizes >= 0].sum()
    if sizes.min() < 0 or sizes.sum() != value.shape[axis]:
        raise ValueError("sizes")
    return np.split(value, np.cumsum(sizes)[:-1], axis)


@_computes("GATHER")
def _gather(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    options = converter.options(operator, "GatherOptions")
    if options.BatchDims():
        raise ValueError("batches")
    value, indices = values
    if np.any(indices < 0):
        raise ValueError("an index outside")
    if value.size * indices.size > _MOST_ELEMENTS * value.shape[options.Axis()]:
        raise ValueError("too large")
    return [np.take(value, indices, options.Axis())]


@_computes("RANGE")
def _range(_: TfliteConverter, __: Operator, values: Values) -> Values:
    first, last, step = (value.reshape(-1)[0].item() for value in values)
    if not step or (last - first) / step > _MOST_ELEMENTS:
        raise ValueError("steps")
    return [np.arange(first, last, step)]


@_computes("STRIDED_SLICE")
def _strided_slice(converter: TfliteConverter, operator: Operator, values: Values) -> Values:
    options = converter.options(operator, "StridedSliceOptions")
    if options.EllipsisMask() or options.NewAxisMask() or options.Offset():
        raise ValueError("masks")
    value, parts = values[0], zip(*(_axes(item) for item in values[1:]), strict=True)
    index: list[int | slice] = []
    for place, (first, last, step) in enumerate(parts):
        begin = None if options.BeginMask() >> place & 1 else first
        end = None if options.EndMask() >> place & 1 else last
        index.append(first if options.ShrinkAxisMask() >> place & 1 else slice(begin, end, step))
    return [value[tuple(index)]]


@_computes("SLICE")
def _slice(_: TfliteConverter, __: Operator, values: Values) -> Values:
    value, ends = values[0], []
    for first, size, whole in zip(_axes(values[1]), _axes(values[2]), value.shape, strict=True):
        ends.append(slice(first, whole if size == -1 else first + size))
        if not 0 <= first <= ends[-1].stop <= whole:
            raise ValueError("a slice outside")
    return [value[tuple(ends)]]
