"""Tables whose rows are looked up, such as a language model's embeddings, in few bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.passes.rewriter import Rewriter, rebuild
from ingot.passes.stored_weights import stored_call
from ingot.quantize.codes import encode
from ingot.quantize.graph import Expr, Graph
from ingot.quantize.search import relative_power
from ingot.schedules.stored import StoredWeight, WeightFormat

Array = np.ndarray[Any, Any]

#: A weight of fewer elements stays as it is: its scales and its decoding would cost more than it saves.
SMALLEST = 256


def tables_of(graph: Graph) -> dict[Expr, Array]:
    """Return the finite float32 tables [rows, columns] of SMALLEST elements or more, by the variable of what is read.

    They are constants; a table that several operators read is there several times.
    """
    found = {}
    for var, call, name in graph.walk():
        if name != "relax.take" or int(call.attrs.axis or 0) != 0 or str(call.attrs.mode) != "clip":
            continue
        value = graph.constant(call.args[0])
        if value is None or value.ndim != 2 or value.size < SMALLEST or value.dtype != np.float32:
            continue
        if np.isfinite(value).all():
            found[var] = value
    return found


def table_in(value: Array, form: WeightFormat) -> tuple[StoredWeight, float]:
    """Return a table in `form`, each row with its own scale, and its noise power over its power."""
    codes, scales, book, real, _ = encode(value, value.shape[1], form, None)
    return StoredWeight(form, codes, scales[:, 0], book), relative_power(value, value - real, None)


def looked_up(rewriter: Rewriter, call: Expr, args: list[Expr], weight: StoredWeight) -> Expr:
    """Return the call that reads rows of a table, reading it from the stored one instead."""
    name = str(getattr(args[0], "name", "table"))
    return rebuild(call, [rewriter.emit(stored_call(rewriter, weight, name)), *args[1:]])
