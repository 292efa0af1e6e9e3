"""Values of TFLite tensors that are known before the model runs: constants, bound inputs, simple arithmetic on them.

It follows the counters and conditions of loops and branches. Only small tensors of plain numbers are followed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ingot.frontend.tvm_types import Operator, TfliteConverter

_MOST_ELEMENTS = 64
#: Operators whose results need the results of others, and so on.
_MAX_CHAIN = 64
_OPTIONS = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions"}
_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "ADD": np.add,
    "SUB": np.subtract,
    "MUL": np.multiply,
    "MAXIMUM": np.maximum,
    "MINIMUM": np.minimum,
    "NEG": np.negative,
    "EQUAL": np.equal,
    "NOT_EQUAL": np.not_equal,
    "LESS": np.less,
    "LESS_EQUAL": np.less_equal,
    "GREATER": np.greater,
    "GREATER_EQUAL": np.greater_equal,
    "LOGICAL_AND": np.logical_and,
    "LOGICAL_OR": np.logical_or,
    "LOGICAL_NOT": np.logical_not,
}
#: These keep their first input's elements, as the first output's shape and type say.
_KEEPERS = frozenset(("CAST", "RESHAPE", "SQUEEZE", "EXPAND_DIMS"))


def value_of(converter: TfliteConverter, index: int, depth: int = 0) -> np.ndarray | None:
    """The value of a tensor of the converter's graph, None if it is not known or large."""
    found = _held(converter, index)
    if found is not None or index < 0 or depth >= _MAX_CHAIN:
        return found
    graph = converter.subgraph
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        outputs = [int(operator.Outputs(place)) for place in range(operator.OutputsLength())]
        if index in outputs:
            if converter.name_of(operator) not in {*_FUNCTIONS, *_KEEPERS}:
                return None
            inputs = [int(operator.Inputs(place)) for place in range(operator.InputsLength())]
            if any(value_of(converter, place, depth + 1) is None for place in inputs):
                return None
            values = known_results(converter, operator)
            if values is not None:
                converter.given[index] = values[0]
            return None if values is None else values[0]
    return None


def _held(converter: TfliteConverter, index: int) -> np.ndarray | None:
    """The value of a small constant of plain numbers."""
    if index < 0 or (converter.has_expr(index) and index not in converter.given and not _is_constant(converter, index)):
        return None
    tensor = converter.get_tensors([index])[0]
    if tensor.qnn_params is not None or not tensor.buffer.DataLength():
        return None
    if int(np.prod(converter.shape_of(tensor), dtype=np.int64)) > _MOST_ELEMENTS:
        return None
    return np.asarray(converter.get_tensor_value(tensor))


def _is_constant(converter: TfliteConverter, index: int) -> bool:
    return bool(converter.model.Buffers(converter.subgraph.Tensors(index).Buffer()).DataLength())


def known_results(converter: TfliteConverter, operator: Operator) -> list[np.ndarray] | None:
    """The results of an operator on values that are known, None if it or they are not."""
    name = converter.name_of(operator)
    if name not in _FUNCTIONS and name not in _KEEPERS:
        return None
    inputs = [_held(converter, int(operator.Inputs(place))) for place in range(operator.InputsLength())]
    if not inputs or any(value is None for value in inputs) or operator.OutputsLength() != 1:
        return None
    output = converter.subgraph.Tensors(operator.Outputs(0))
    if name in _OPTIONS and converter.options(operator, _OPTIONS[name]).FusedActivationFunction():
        return None
    dtype = converter.get_tensor_type_str(output.Type())
    values = [value for value in inputs if value is not None]
    with np.errstate(all="ignore"):
        if name in _FUNCTIONS:
            result = np.asarray(_FUNCTIONS[name](*values))
        else:
            shape = tuple(int(output.Shape(axis)) for axis in range(output.ShapeLength()))
            if int(np.prod(shape, dtype=np.int64)) != values[0].size:
                return None
            result = values[0].reshape(values[0].shape if name == "CAST" else shape)
    if name != "CAST" and result.dtype.name != dtype:
        return None
    if name == "CAST" and values[0].dtype.kind == "f":
        return None  # where it does not fit, each machine rounds in its own way
    return [result.astype(dtype)] if result.size <= _MOST_ELEMENTS else None
