"""Loading four inputs at once for FMA instructions that take one lane of a register.

NEON multiplies a vector by one lane of another (`fmla v0.4s, v1.4s, v2.s[3]`), so four neighbouring input channels are
best loaded by one instruction. LLVM does not join the four scalar loads by itself. TIR cannot express a lane by a
variable index, and indices are constants only after unrolling; so the schedule marks the loads (`mark_lanes`) and code
generation rewrites the marks once the loops are unrolled (`lower_lanes`).
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from ingot.errors import CompilerError

LANES = 4
_MARK = "ingot_lane"


def mark_lanes(function: Any, block_name: str) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Mark the loads of the reduction block `block_name` whose last index is its last reduction axis.

    That axis must be split so that groups of LANES are unrolled, and have a multiple of LANES elements.
    """

    def block(node: Any) -> Any:  # noqa: ANN401
        if str(node.name_hint) != block_name:
            return node
        axis = node.iter_vars[-1].var
        width = tirx.IntImm(str(axis.ty.dtype), LANES)

        def load(expr: Any) -> Any:  # noqa: ANN401
            if not expr.indices[-1].same_as(axis):
                return expr
            first = tirx.BufferLoad(expr.source, [*expr.indices[:-1], tirx.floordiv(axis, width) * width])
            return lane_of(first, tirx.floormod(axis, width))

        body = tvm_ffi.structural_map(node.body, [(ir.TensorLoad, load)])
        return s_tir.SBlock(
            node.iter_vars, node.reads, node.writes, node.name_hint, body, node.init, node.alloc_buffers, [], {}
        )

    return tvm_ffi.structural_map(function, [(s_tir.SBlock, block)])


def lane_of(first: Any, lane: Any) -> Any:  # noqa: ANN401 - TIR expressions
    """Mark the load of the element `lane` after `first`, the load of the first of LANES; `lane` must be unrolled."""
    return tirx.call_pure_extern("float32", _MARK, first, lane)


def lower_lanes(function: Any) -> Any:  # noqa: ANN401 - a lowered, unrolled PrimFunc
    """Replace each mark by one lane of a vector load."""

    def call(expr: Any) -> Any:  # noqa: ANN401
        if not (len(expr.args) == 3 and isinstance(expr.args[0], ir.StringImm) and expr.args[0].value == _MARK):
            return expr
        load, lane = expr.args[1], expr.args[2]
        if not isinstance(lane, tirx.IntImm):
            raise CompilerError("a marked load was not unrolled", found=str(lane), allowed="a constant lane")
        index = tirx.Ramp(load.indices[-1], tirx.IntImm(str(load.indices[-1].ty.dtype), 1), LANES)
        return tirx.Shuffle([tirx.BufferLoad(load.source, [*load.indices[:-1], index])], [lane])

    return tvm_ffi.structural_map(function, [(ir.Call, call)])
