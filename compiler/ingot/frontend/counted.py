"""The types of operators that choose how many results they have, without computing them: upper bounds and counters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx

_OPERATORS = frozenset(("NonZero", "Compress", "Unique", "NonMaxSuppression"))


def is_counted(node: onnx.NodeProto, constants: Collection[str]) -> bool:
    """Whether an operator of ONNX has a number of results of its own; TopK only where its k is no constant."""
    if node.op_type == "TopK":
        return len(node.input) > 1 and node.input[1] not in constants
    return node.op_type in _OPERATORS


@dataclass(frozen=True)
class Bounds:
    """For each output its largest shape and the axis that depends on data (None: its size is known).

    `integers`: which outputs are int64; the others have the dtype of input 0. `exact`: nothing depends on data.
    """

    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int | None, ...]
    integers: tuple[bool, ...]
    exact: bool = False


def bounds(
    node: onnx.NodeProto, shapes: Sequence[tuple[int, ...]], values: Sequence[np.ndarray | None], label: str
) -> Bounds:
    """The largest results of a counted operator on inputs of these shapes; `values` are those that are constant.

    An input that is left out has the shape () and no value. Raises UnsupportedError if a limit is not constant.
    """
    shape, size = shapes[0], int(np.prod(shapes[0], dtype=np.int64))
    found = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
    axis = None if found is None else int(found) % max(len(shape), 1)
    if node.op_type == "TopK":
        axis = len(shape) - 1 if found is None else axis
        return Bounds((shape, shape), (axis, axis), (False, True))
    if node.op_type == "NonZero":
        if not shape:
            raise UnsupportedError(
                "NonZero of a scalar is not supported", where=label, allowed="at least one dimension"
            )
        return Bounds(((len(shape), size),), (1,), (True,))
    if node.op_type == "Unique":
        entries = size if axis is None else shape[axis]
        one = (entries,)
        return Bounds(
            (shape if axis is not None else one, one, one, one), (axis or 0, 0, None, 0), (False, *[True] * 3)
        )
    if node.op_type == "Compress":
        most, condition = min(shapes[1][0], size if axis is None else shape[axis]), values[1]
        if condition is not None:
            most = int(np.count_nonzero(condition[:most]))
        result = (most,) if axis is None else (*shape[:axis], most, *shape[axis + 1 :])
        return Bounds((result,), (axis or 0,), (False,), exact=condition is not None)
    limit = values[2] if len(values) > 2 else np.zeros(1)
    if len(node.input) > 2 and node.input[2] and limit is None:
        raise UnsupportedError(
            "the largest number of boxes is computed at run time",
            where=label,
            found=repr(node.input[2]),
            allowed="a constant",
            hint=f"if it is an input: --bind {node.input[2]}=NUMBER",
        )
    most = 0 if limit is None else max(int(limit.reshape(-1)[0]), 0)
    bound = shapes[0][0] * shapes[1][1] * min(most, shapes[0][1])
    return Bounds(((bound, 3),), (0,), (True,), exact=bound == 0)
