"""Turn the calls that stand for recurrent layers into PrimFuncs of one kernel each."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ingot.errors import CompilerError
from ingot.frontend.onnx_ops.recurrent import RECURRENT
from ingot.passes.rewriter import Rewriter, op_name, rewrite, shape_of
from ingot.passes.state import State
from ingot.schedules import recurrent

#: FuseOps' pattern kind of an operator that joins no other.
_OPAQUE = 8


def select_recurrent(state: State) -> State:
    """Turn the calls that stand for recurrent layers into PrimFuncs of one kernel each, with packed weights."""
    macs = 0

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        nonlocal macs
        if op_name(call) != "relax.call_dps_packed" or not str(args[0].global_symbol).startswith(RECURRENT):
            return None
        kind, way = str(args[0].global_symbol).removeprefix(RECURRENT).split(".")
        *operands, weights = args[1].fields
        steps, batch, _ = shape_of(operands[0])
        workload = recurrent.RecurrentWorkload(kind, steps, batch, shape_of(weights)[0], way == "reverse")
        value = rewriter.weight(weights)
        if value is None:
            raise CompilerError("a recurrent layer's weights are computed at run time", where=kind)
        config = recurrent.default_config(workload, state.target)
        packed = rewriter.add_weight(
            f"{getattr(weights, 'name', 'weight')}_packed", recurrent.pack_weight(value, workload, config)
        )
        function = recurrent.primitive(workload, config).with_attr("op_pattern", _OPAQUE)
        gvar = rewriter.builder.add_func(function.with_attr("tirx.noalias", True), kind.lower())
        macs += workload.macs
        types = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else call.ty
        return relax.call_tir(gvar, relax.Tuple([*operands, packed]), types)

    state = rewrite(state, visit)
    return state.having(macs=state.macs + macs)
