"""Turn transposes of matrices into PrimFuncs that move squares of registers, and phases of an image into pixels."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from ingot.passes.picks import ELEMENTWISE
from ingot.passes.rewriter import Rewriter, bindings_of, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import INJECTIVE, call_function, call_template
from ingot.schedules import transpose
from ingot.schedules.vector import lanes_for, registers


def select_transposes(state: State) -> State:
    """Turn transposes of matrices into PrimFuncs that move squares of registers, and phases of an image into pixels.

    Case 1: permute_dims in float32 that swaps two neighbouring groups of axes, the last ones: `schedules.transpose`.
    Case 2: [N, H, W, S, T * C] to [N, H, S, W, T * C] seen as the image [N, H * S, W * T, C], in float32 (how
            `conv_transpose` puts its phases together), where elementwise operators follow and C fills vectors: one
            PrimFunc, with which they become one kernel. A reshape would keep them apart.
    Others keep their operator: what does not move the last axis is a copy of rows, and few columns are no squares.
    It comes after the passes that read through a transpose.
    """
    target, images = state.target, _before_elementwise(state)

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        name = op_name(call)
        if state.precision != "fp32" or name not in ("relax.reshape", "relax.permute_dims"):
            return None
        if dtype_of(call) != "float32":
            return None
        if name == "relax.reshape":
            if call not in images:
                return None
            wide = lanes_for(target, "float32", shape_of(call)[-1]) == registers(target).lanes
            return _pixels(rewriter, call, args[0]) if wide else None
        shape = shape_of(args[0])
        workload = transpose.workload_of(shape, _order(call))
        config = transpose.default_config(workload, target) if workload is not None else None
        if workload is None or config is None:
            return None
        return call_function(rewriter, "transpose", transpose.primitive(workload, config), [args[0]], call.ty)

    return rewrite(state, visit)


def _before_elementwise(state: State) -> set[Any]:
    """Return the 4-D reshapes that an elementwise operator reads, directly or after a slice."""
    found: set[Any] = set()
    made: dict[Any, Any] = {}
    for binding in bindings_of(state.module["main"]):
        call = binding.value
        name = op_name(call)
        if name == "relax.reshape" and len(shape_of(call)) == 4:
            made[binding.var] = call
        elif name == "relax.strided_slice" and call.args[0] in made:
            made[binding.var] = made[call.args[0]]
        elif name in ELEMENTWISE:
            found |= {made[arg] for arg in call.args if arg in made}
    return found


def _order(call: Any) -> list[int]:  # noqa: ANN401
    rank, axes = len(shape_of(call)), call.attrs.axes
    return [int(a) % rank for a in axes] if axes is not None else list(reversed(range(rank)))


def _pixels(rewriter: Rewriter, call: Any, arg: Any) -> Any:  # noqa: ANN401
    """Case 2."""
    moved, out = rewriter.value_of(arg), shape_of(call)
    if op_name(moved) != "relax.permute_dims" or len(out) != 4 or _order(moved) != [0, 1, 3, 2, 4]:
        return None
    batch, height, width, steps, row = shape_of(moved.args[0])
    across = row // out[3]
    if out != (batch, height * steps, width * across, out[3]) or across * out[3] != row:
        return None
    cells = te.placeholder((batch, height, width, steps, row), "float32", "cells")

    def pixel(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401
        div, mod = tirx.floordiv, tirx.floormod
        return cells[n, div(y, steps), div(x, across), mod(y, steps), mod(x, across) * out[3] + c]

    image = te.compute(out, pixel, name="pixels")
    return call_template(rewriter, "pixels", [cells, image], [moved.args[0]], call.ty, INJECTIVE)
