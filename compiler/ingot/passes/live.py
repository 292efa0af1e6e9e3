"""How much of the arena is free while an operator runs."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ingot.passes.rewriter import bindings_of, is_tensor, op_name, outputs_of, shape_of
from ingot.passes.state import State
from ingot.schedules.vector import DTYPE_BYTES

Expr = Any  # TVM ships no types; a Relax expression


def spare_bytes(state: State) -> dict[Expr, int]:
    """Return, for each operator call of `main`, the bytes a kernel may use there for itself.

    That is how far the tensors live at the call are below the peak of the source graph: within it, a workspace leaves
    the promise about the size of the arena as it is. The model's inputs, outputs and weights lie elsewhere.
    """
    main = state.module["main"]
    bindings = bindings_of(main)
    storage: dict[Expr, Expr] = {}  # a variable -> the one whose memory it is
    for binding in bindings:
        view = op_name(binding.value) == "relax.reshape"
        source = binding.value.args[0] if view else binding.value
        storage[binding.var] = storage.get(source, source) if isinstance(source, relax.Var) else binding.var
    elsewhere = {*main.params, *(storage.get(out, out) for out in outputs_of(main))}
    first: dict[Expr, int] = {}
    last: dict[Expr, int] = {}
    for step, binding in enumerate(bindings):
        for var in (binding.var, *_read(binding.value)):
            place = storage.get(var, var)
            if place not in elsewhere:
                first.setdefault(place, step)
                last[place] = step
    change = [0] * (len(bindings) + 1)
    for var, step in first.items():
        change[step] += _bytes(var)
        change[last[var] + 1] -= _bytes(var)
    spare: dict[Expr, int] = {}
    live = 0
    for step, binding in enumerate(bindings):
        live += change[step]
        if isinstance(binding.value, relax.Call):
            spare[binding.value] = max(0, state.imported.source_peak_bytes - live)
    return spare


def _read(value: Expr) -> list[Expr]:
    """Return the variables an expression reads."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.TupleGetItem):
        return _read(value.tuple_value)
    if isinstance(value, relax.Call | relax.Tuple):
        parts = value.args if isinstance(value, relax.Call) else value.fields
        return [var for part in parts for var in _read(part)]
    return []


def _bytes(var: Expr) -> int:
    """Return the size of a tensor; the items of a tuple have sizes of their own, and so it counts nothing."""
    if not is_tensor(var):
        return 0
    size = DTYPE_BYTES[str(var.ty.dtype.dtype)]
    for dim in shape_of(var):
        size *= dim
    return size
