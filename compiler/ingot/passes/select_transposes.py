"""Turn transposes of matrices into PrimFuncs that move squares of registers."""

from __future__ import annotations

from typing import Any

from ingot.passes.rewriter import Rewriter, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import call_function
from ingot.schedules import transpose


def select_transposes(state: State) -> State:
    """Turn transposes of matrices into PrimFuncs that move squares of registers.

    Case 1: permute_dims in float32 that swaps two neighbouring groups of axes, the last ones: `schedules.transpose`.
    Others keep their operator: what does not move the last axis is a copy of rows, and few columns are no squares.
    It comes after the passes that read through a transpose.
    """
    target = state.target

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        if op_name(call) != "relax.permute_dims" or dtype_of(call) != "float32" or state.precision != "fp32":
            return None
        shape, axes = shape_of(args[0]), call.attrs.axes
        order = [int(a) % len(shape) for a in axes] if axes is not None else list(reversed(range(len(shape))))
        workload = transpose.workload_of(shape, order)
        config = transpose.default_config(workload, target) if workload is not None else None
        if workload is None or config is None:
            return None
        return call_function(rewriter, "transpose", transpose.primitive(workload, config), [args[0]], call.ty)

    return rewrite(state, visit)
