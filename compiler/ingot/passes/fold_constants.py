"""Evaluate at compile time whatever depends on weights alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.passes.constant_eval import evaluate
from ingot.passes.rewriter import Rewriter, is_tensor, op_name, rebuild, rewrite, shape_of
from ingot.passes.state import State

# A folded value may be this much larger than what it is made from, plus a floor: a broadcast of a scalar to an image
# must not end in the artifact.
GROWTH = 8
FLOOR_BYTES = 1 << 20

# A view costs nothing at run time; folding it would store a weight twice if both forms are used.
_SKIPPED = frozenset({"relax.call_tir", "relax.builtin.stop_lift_params"})


def fold_constants(state: State) -> State:
    """Evaluate at compile time whatever depends on weights alone.

    Case 1: every argument of a call is a weight or a constant: the call becomes a weight.
    Case 2: `shape_of` a static tensor: the call becomes a constant.
    A result more than GROWTH times its operands (and over FLOOR_BYTES) is left to run time.
    """

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        name = op_name(call)
        if not name or name in _SKIPPED:
            return None
        if name == "relax.shape_to_tensor":  # case 2
            shape = rewriter.value_of(args[0])
            if op_name(shape) == "relax.shape_of":
                return rewriter.constant(np.asarray(shape_of(shape.args[0]), np.int64), "shape")
            return None
        if not is_tensor(call):
            return None
        values: list[np.ndarray] = []
        for arg in args:
            if not is_tensor(arg):
                if hasattr(arg, "fields"):
                    items = [rewriter.weight(item) for item in arg.fields if is_tensor(item)]
                    if len(items) != 0:
                        return None  # concat of weights: rare, and TVM evaluates tuples poorly
                continue
            value = rewriter.weight(arg)
            if value is None:
                return None
            values.append(value)
        if not values:
            return None
        out_bytes = int(np.prod(shape_of(call), dtype=np.int64)) * 8
        if out_bytes > FLOOR_BYTES and out_bytes > GROWTH * sum(v.size * 8 for v in values):
            return None
        folded = rewriter.builder.normalize(rebuild(call, args))
        return rewriter.constant(evaluate(folded, values), _name(rewriter, args))

    return rewrite(state, visit)


def _name(rewriter: Rewriter, args: list[Any]) -> str:
    """Name a folded weight after the first weight it is made from."""
    for arg in args:
        if hasattr(arg, "name"):
            return str(arg.name)
    return "folded"
