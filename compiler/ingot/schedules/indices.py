"""Positions in order, and indices in a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def unravel(row: Any, shape: Sequence[int]) -> list[Any]:  # noqa: ANN401 - TE expressions
    """Return the index in `shape` of a position in order."""
    index: list[Any] = []
    for size in reversed(shape[1:]):
        index.insert(0, row % size)
        row = row // size
    return [row, *index]


def ravel(index: Sequence[Any], shape: Sequence[int]) -> Any:  # noqa: ANN401 - TE expressions
    """Return the position in order of an index in `shape`."""
    row = index[0]
    for i, size in zip(index[1:], shape[1:], strict=True):
        row = row * size + i
    return row
