"""Reductions; the axes are an attribute in old opsets and an input in new ones."""

from __future__ import annotations

from collections.abc import Callable

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


def _reduce(
    before: Callable[[Expr, Expr], Expr], kind: str, after: Callable[[Expr, Expr], Expr]
) -> Callable[[Context], Expr]:
    def convert(ctx: Context) -> Expr:
        from tvm import relax

        axes = ctx.ints("axes", 1)
        if not axes and ctx.attr("noop_with_empty_axes", 0):
            return after(relax.op, before(relax.op, ctx.inputs[0]))
        chosen = [normal_axis(axis, len(ctx.shape())) for axis in axes] if axes else None
        operator = getattr(relax.op, kind)
        if ctx.dtype() == "bool":
            number = relax.op.astype(ctx.inputs[0], "int8")
            return relax.op.astype(operator(number, chosen, bool(ctx.attr("keepdims", 1))), "bool")
        return after(relax.op, operator(before(relax.op, ctx.inputs[0]), chosen, bool(ctx.attr("keepdims", 1))))

    return convert


def _same(op: Expr, x: Expr) -> Expr:
    return x


for _name, _before, _kind, _after in (
    ("ReduceMean", _same, "mean", _same),
    ("ReduceSum", _same, "sum", _same),
    ("ReduceMax", _same, "max", _same),
    ("ReduceMin", _same, "min", _same),
    ("ReduceProd", _same, "prod", _same),
    ("ReduceL1", lambda op, x: op.abs(x), "sum", _same),
    ("ReduceL2", lambda op, x: op.multiply(x, x), "sum", lambda op, x: op.sqrt(x)),
    ("ReduceSumSquare", lambda op, x: op.multiply(x, x), "sum", _same),
    ("ReduceLogSum", _same, "sum", lambda op, x: op.log(x)),
):
    converts(_name)(_reduce(_before, _kind, _after))
