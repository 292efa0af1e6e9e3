"""How the passes that choose templates put a PrimFunc made from TE into the program."""

from __future__ import annotations

from typing import Any

from tvm import relax, te

from ingot.passes.rewriter import Rewriter

#: FuseOps' pattern kind of an operator whose output may be followed by elementwise operators in one kernel.
OUT_ELEMENTWISE_FUSABLE = 4
#: FuseOps' pattern kind of a reduction, which elementwise operators may also come before.
REDUCTION = 3
#: FuseOps' pattern kind of an operator each of whose results depends on any one element of its operands.
INJECTIVE = 2


def call_template(
    rewriter: Rewriter,
    name: str,
    tensors: list[Any],
    args: list[Any],
    ty: Any,  # noqa: ANN401
    pattern: int = OUT_ELEMENTWISE_FUSABLE,
) -> Any:  # noqa: ANN401
    """Return a call of a new PrimFunc over TE tensors [*inputs, output] on `args`, with a result of type `ty`."""
    function = te.create_prim_func(tensors, index_dtype_override="int64")
    return call_function(rewriter, name, function, args, ty, pattern)


def call_function(
    rewriter: Rewriter,
    name: str,
    function: Any,  # noqa: ANN401
    args: list[Any],
    ty: Any,  # noqa: ANN401
    pattern: int = OUT_ELEMENTWISE_FUSABLE,
) -> Any:  # noqa: ANN401
    """Return a call of a new PrimFunc on `args`, with a result of type `ty`."""
    function = function.with_attr("op_pattern", pattern).with_attr("tirx.noalias", True)
    gvar = rewriter.builder.add_func(function, name)
    return relax.call_tir(gvar, relax.Tuple(args), ty)
