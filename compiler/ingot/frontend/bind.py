"""Inputs that the user makes constants of the model: their values, held against what the model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ingot.errors import OptionError
from ingot.frontend.interface import Bound, TensorSpec
from ingot.frontend.shapes import DeclaredInput, unknown_input

#: What a value may be: an array, a number, or numbers in lists.
Bindable = Any


def bound_inputs(
    declared: Sequence[DeclaredInput],
    dtypes: Sequence[str],
    given: Mapping[str, Bindable] | None,
    shape: Mapping[str, Sequence[int]] | None,
) -> tuple[Bound, ...]:
    """The inputs of a model that are bound, in the model's order, with values of its dtypes.

    declared, dtypes: all inputs of the model. shape: what the user gives for the others.
    An array must have the input's dtype; numbers and lists take it if they can. A number fits any shape of one element.
    That the shapes fit the model is left to `resolve_shapes`. Raises ShapeError for a name that is no input,
    OptionError for a value of another dtype, or if an input has both a shape and a value.
    """
    given = given or {}
    for name in given:
        if name not in {item.name for item in declared}:
            raise unknown_input(name, declared, "a value")
        if name in (shape or {}):
            what = "an input has both a value and a shape"
            raise OptionError(what, where=f"input {name!r}", hint="leave its --shape out: the value has one")
    found = []
    for position, (item, dtype) in enumerate(zip(declared, dtypes, strict=True)):
        if item.name in given:
            value = typed_value(item, given[item.name], dtype)
            found.append(Bound(TensorSpec(item.name, dtype, value.shape), position, value))
    return tuple(found)


def typed_value(item: DeclaredInput, value: Bindable, dtype: str, what: str = "value of input") -> np.ndarray:
    """The value as a C-contiguous array of `dtype`: whole numbers exactly, others rounded. Raises OptionError."""
    import ml_dtypes

    wanted = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    where = f"{what} {item.name!r}"
    if isinstance(value, np.ndarray):
        if wanted != value.dtype and not (dtype == "bfloat16" and value.dtype in (np.dtype("V2"), np.dtype("uint16"))):
            hint = f"x.astype(np.{dtype})"
            raise OptionError("a value has the wrong dtype", where, str(value.dtype), dtype, hint)
        return np.array(value.view(wanted) if value.dtype != wanted else value, order="C")
    found, allowed = repr(value)[:80], f"numbers of dtype {dtype}"
    try:
        given = np.asarray(value)
    except (ValueError, TypeError, OverflowError):  # rows of different lengths
        given = np.empty(0, object)
    if given.dtype.kind not in "biuf":
        raise OptionError("a value is no array, number or list of numbers", where, found, allowed)
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(given.astype(wanted), order="C")
    exact = dtype == "bool" or "int" in dtype
    fits = array == given if exact else np.isfinite(array.astype(np.float64)) == np.isfinite(given)
    if not np.all(fits):
        raise OptionError("a value does not fit its input", where, found, allowed)
    if not array.ndim and all(dim == 1 or not isinstance(dim, int) for dim in item.dims):
        array = array.reshape((1,) * len(item.dims))
    return array
