"""Writing at indices: one loop over the updates, in their order, so that the last of two for one place wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.frontend.loops import call_loops
from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.onnx_ops.index import bounded_indices
from ingot.frontend.tvm_types import Expr

Place = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]


def scatter(
    ctx: Context, data: Expr, indices: Expr, updates: Expr, grid: tuple[int, ...], place: Place, update: Place
) -> Expr:
    """`data` with updates written in.

    For each point of `grid`, place(indices, point) is where an element goes and update(updates, point) which one it is.
    Indices must lie inside `data`.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    shape, dtype = ctx.shape(), ctx.dtype()
    kind = ctx.attr("reduction", "none")
    combine: dict[str, Callable[[Any, Any], Any]] = {
        "none": lambda _, new: new,
        "add": lambda old, new: old + new,
        "mul": lambda old, new: old * new,
        "max": tirx.max,
        "min": tirx.min,
    }
    if kind not in combine:
        raise ctx.unsupported(f"reduction {kind!r}", ", ".join(combine))
    if dtype == "bool" and kind != "none":
        raise ctx.unsupported("a reduction of bool", "numbers")

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        values, where, new = ins
        (out,) = outs
        with T.grid(*shape) as point:
            at = tuple(point) if len(shape) > 1 else (point,)
            out[at] = values[at]
        with T.grid(*grid) as point:
            at = tuple(point) if len(grid) > 1 else (point,)
            target = place(where, at)
            out[target] = combine[kind](out[target], new[update(new, at)])

    return call_loops(ctx.bb, "scatter", [data, indices, updates], [(shape, dtype)], body)[0]


@converts("Scatter", "ScatterElements")
def _scatter_elements(ctx: Context) -> Expr:
    from tvm import relax

    shape, places = ctx.shape(), ctx.shape(1)
    if any(places[i] > size for i, size in enumerate(shape) if i != normal_axis(ctx.attr("axis", 0), len(shape))):
        raise ctx.unsupported(f"updates of {list(places)} for {list(shape)}", "updates that fit the data")
    axis = normal_axis(ctx.attr("axis", 0), len(shape))
    indices = ctx.emit(relax.op.astype(ctx.emit(bounded_indices(ctx, 1, (shape[axis],))), "int64"))

    def place(where: Any, point: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        return (*point[:axis], where[point], *point[axis + 1 :])

    return scatter(ctx, ctx.inputs[0], indices, ctx.inputs[2], places, place, lambda _, point: point)


@converts("ScatterND")
def _scatter_nd(ctx: Context) -> Expr:
    from tvm import relax

    shape, places = ctx.shape(), ctx.shape(1)
    depth, count = places[-1], int(np.prod(places[:-1], dtype=np.int64))
    bounded = ctx.emit(relax.op.astype(ctx.emit(bounded_indices(ctx, 1, shape[:depth])), "int64"))
    indices = ctx.emit(relax.op.reshape(bounded, (count, depth)))
    updates = ctx.emit(relax.op.reshape(ctx.inputs[2], (count, *shape[depth:])))

    def place(where: Any, point: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        return (*(where[point[0], i] for i in range(depth)), *point[1:])

    return scatter(ctx, ctx.inputs[0], indices, updates, (count, *shape[depth:]), place, lambda _, point: point)
