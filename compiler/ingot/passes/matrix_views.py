"""Reading the operands of matrix products where they lie: through transposes and repeated heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from ingot.passes.rewriter import Rewriter, op_name, shape_of
from ingot.schedules.views import View

Index = Callable[[Sequence[Any]], list[Any]]


def view_of(rewriter: Rewriter, expr: Any) -> tuple[Any, View]:  # noqa: ANN401
    """Return the tensor that is stored, and how to read `expr` from it: through transposes and repeats of an axis.

    Dimensions of size 1 are read at 0, and indices may be more than dimensions (the first are not used), so that the
    view also broadcasts.
    """
    zero = tirx.IntImm("int64", 0)
    sizes = shape_of(expr)

    def start(i: Sequence[Any]) -> list[Any]:
        return [zero if size == 1 else index for size, index in zip(sizes, i[len(i) - len(sizes) :], strict=True)]

    index: Index = start
    while True:
        value = rewriter.value_of(expr)
        if op_name(value) == "relax.permute_dims" and value.attrs.axes is not None:
            index = _through_transpose(index, [int(a) for a in value.attrs.axes])
        elif op_name(value) == "relax.take" and (repeats := _repeats(rewriter, value)) is not None:
            index = _through_repeat(index, *repeats)
        else:
            return expr, View(shape_of(expr), index)
        expr = value.args[0]


def _through_transpose(index: Index, axes: list[int]) -> Index:
    def read(i: Sequence[Any]) -> list[Any]:
        place = index(i)
        return [place[axes.index(axis)] for axis in range(len(axes))]

    return read


def _repeats(rewriter: Rewriter, take: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Return (axis, r) if `take` repeats each element of the axis r times in a row."""
    indices = rewriter.weight(take.args[1])
    if indices is None or indices.ndim != 1 or take.attrs.axis is None:
        return None
    axis = int(take.attrs.axis) % len(shape_of(take.args[0]))
    size = shape_of(take.args[0])[axis]
    if len(indices) % size != 0 or not np.array_equal(indices, np.arange(len(indices)) // (len(indices) // size)):
        return None
    return axis, len(indices) // size


def _through_repeat(index: Index, axis: int, times: int) -> Index:
    def read(i: Sequence[Any]) -> list[Any]:
        place = index(i)
        return [tirx.floordiv(p, tirx.IntImm("int64", times)) if a == axis else p for a, p in enumerate(place)]

    return read
