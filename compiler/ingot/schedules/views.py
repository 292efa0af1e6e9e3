"""Reading a tensor through transposes and repeats, where it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class View:
    """Element i of a matrix is at `index(i)` of the stored tensor of `shape`; both are sequences of TE expressions."""

    shape: tuple[int, ...]
    index: Callable[[Sequence[Any]], list[Any]]


def reader(tensor: Any, view: View) -> Callable[..., Any]:  # noqa: ANN401 - a TE tensor
    """Return what loads element (*batch, i, j) of the matrix."""

    def read(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        return tensor(*view.index(i))

    return read
