"""Turn matrix products of two computed matrices into register tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from ingot.passes.matrix_views import view_of
from ingot.passes.rewriter import Rewriter, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import call_template
from ingot.schedules import batch_matmul, rows
from ingot.schedules.batch_matmul import BatchMatmulWorkload
from ingot.schedules.views import View


def select_products(state: State) -> State:
    """Turn matrix products of two computed matrices into register tiles.

    Case 1: matmul in float32 of operands of two or more dimensions: `schedules.batch_matmul`; operands that are
            transposes, repeat heads or broadcast are read where they lie.
    Case 2: where that does not fit, few rows times columns that lie contiguous, or rows times one column: dot products
            (`schedules.rows`).
    Others, and shapes that the template does not fit, keep their operator.
    """
    target = state.target

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        if op_name(call) != "relax.matmul" or any(dtype_of(x) != "float32" for x in (call, *args)):
            return None
        shape = shape_of(call)
        if any(len(shape_of(x)) < 2 for x in args) or 0 in (*shape, shape_of(args[0])[-1]):
            return None
        stored, views = zip(*(view_of(rewriter, x) for x in args), strict=True)
        *batch, row, column, depth = (tirx.Var("i", "int64") for _ in (*shape, 0))
        a_last, b_last = _innermost(views[0], [*batch, row, depth]), _innermost(views[1], [*batch, depth, column])
        workload = BatchMatmulWorkload(
            batch=shape[:-2],
            m=shape[-2],
            k=shape_of(args[0])[-1],
            n=shape[-1],
            contiguous=b_last.same_as(column),
        )
        config = batch_matmul.default_config(workload, target)
        if config is not None:
            tensors = batch_matmul.compute(workload, config, views)
        elif a_last.same_as(depth) and b_last.same_as(depth):
            along = rows.default_config(workload.k, "float32", target, single=True)
            tensors = rows.compute_dots(workload, views, along)
        else:
            return None
        return call_template(rewriter, "matmul", tensors, list(stored), call.ty)

    return rewrite(state, visit)


def _innermost(view: View, place: Sequence[Any]) -> Any:  # noqa: ANN401 - a TIR expression
    """Return the index along which the stored tensor is contiguous: that of its last dimension larger than 1."""
    index = view.index(place)
    return next((at for at, size in zip(reversed(index), reversed(view.shape), strict=True) if size > 1), index[-1])
