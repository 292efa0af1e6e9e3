"""What the lists of TFLite cases are written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from conformance.tflite_cases import Case, Out, V

LISTED: list[Case] = []
FLOAT = ("float32",)
#: Quantised as the first input.
SAME = Out(limits=None)


def ints(*values: int, dtype: str = "int32") -> V:
    """A constant vector of whole numbers."""
    return V((len(values),), data=np.array(values, dtype))


def scalar(value: float, dtype: str = "int32") -> V:
    """A constant of one element."""
    return V((), data=np.array(value, dtype))


def add(
    operator: str,
    inputs: Sequence[V | tuple[int, ...] | None],
    outputs: Sequence[Out] | Out | None = None,
    options: str = "",
    fields: Mapping[str, float | str | np.ndarray] | None = None,
    kinds: Sequence[str] = FLOAT,
    form: str = "",
    between: Sequence[V] = (),
    **more: float,
) -> None:
    """List a case for each kind. An input may be given as its shape; the output is one on its own scale."""
    ends = (outputs or Out(),) if not isinstance(outputs, Sequence) else tuple(outputs)
    ins = tuple(V(item) if isinstance(item, tuple) else item for item in inputs)
    for kind in kinds:
        name = " ".join(part for part in (operator, kind, form) if part)
        case = Case(name, operator, kind, ins, ends, options, fields or {}, **more)  # type: ignore[arg-type]
        LISTED.append(replace(case, between=tuple(between)))
