"""Loading several inputs at once for instructions that take one lane of a register.

NEON multiplies a vector by one lane of another (`fmla v0.4s, v1.4s, v2.s[3]`, `sdot v0.4s, v1.16b, v2.4b[3]`) or
copies a lane to all (`dup`), so neighbouring input channels are best loaded by one instruction; a load that fills all
lanes takes another for its address each time. LLVM does not join the small loads by itself. TIR cannot express a lane
by a variable index, and indices are constants only after unrolling; so the schedule marks the loads (`mark_lanes`,
`spread`) and code generation rewrites the marks once the loops are unrolled (`lower_lanes`).
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx

from ingot.errors import CompilerError
from ingot.schedules.padding import ROWS

LANES = 4
_MARK = "ingot_lane"
_SPREAD = "ingot_spread"
#: Bytes of a NEON register.
_REGISTER = 16


def mark_lanes(function: Any, block_name: str) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Mark the float32 loads of the reduction block `block_name` whose last index is its last reduction axis.

    That axis must be split so that groups of LANES are unrolled, and have a multiple of LANES elements.
    """

    def block(node: Any) -> Any:  # noqa: ANN401
        if str(node.name_hint) != block_name:
            return node
        axis = node.iter_vars[-1].var
        width = tirx.IntImm(str(axis.ty.dtype), LANES)

        def load(expr: Any) -> Any:  # noqa: ANN401
            if not expr.indices[-1].same_as(axis) or str(expr.source.dtype) != "float32":
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


def spread(load: Any, lanes: int) -> Any:  # noqa: ANN401 - TIR expressions
    """Mark the load of a few 8-bit integers that together fill each of `lanes` integers of their joint width."""
    return tirx.call_pure_extern(f"int{8 * int(load.ty.dtype.lanes)}x{lanes}", _SPREAD, load)


def _spread(expr: Any) -> Any:  # noqa: ANN401
    """Return one lane of a register's load, copied, where the unrolled index says which it is; else a small load."""
    load, lanes = expr.args[1], int(expr.ty.dtype.lanes)
    count, index = int(load.ty.dtype.lanes), load.indices[-1]
    # A buffer that is written and read in whole groups alone is one of vectors by now, and the index is no ramp.
    found = _register_of(index.base, count, load.source) if isinstance(index, tirx.Ramp) else None
    if found is None:
        return tirx.Broadcast(tirx.reinterpret(f"int{8 * count}", load), lanes)
    size, lane = found
    whole = tirx.Ramp(index.base - lane, index.stride, size)
    joined = tirx.reinterpret(f"int{8 * count}x{size // count}", tirx.BufferLoad(load.source, [whole]))
    # A shuffle has as many lanes as its operands together, at most.
    return tirx.Shuffle([joined] * (_REGISTER // size), [tirx.IntImm("int32", lane // count)] * lanes)


def _register_of(first: Any, count: int, source: Any) -> tuple[int, int] | None:  # noqa: ANN401
    """Return the bytes of a load that holds `count` bytes from `first` on, a lane, and where in it they are.

    Case 1: positions are whole registers, or halves of one: the load is aligned as the buffer is, and stays within it.
    Case 2: copied rows, behind which more may be read: the load begins where the index without its constant part does,
    or some registers later.
    """
    kind, analyzer = str(first.ty.dtype), sym.Analyzer()
    for size in (_REGISTER, _REGISTER // 2):
        lane = analyzer.simplify(tirx.floormod(first, tirx.IntImm(kind, size)))
        if isinstance(lane, tirx.IntImm) and int(lane) % count == 0 and int(source.shape[-1]) % size == 0:
            return size, int(lane)  # buffers are flat by now
    if not str(source.name).startswith(ROWS):
        return None
    constant = first.b if isinstance(first, tirx.Add) else first
    place = int(constant) if isinstance(constant, tirx.IntImm) and int(constant) >= 0 else 0
    return _REGISTER, place % _REGISTER // count * count


def lower_lanes(function: Any) -> Any:  # noqa: ANN401 - a lowered, unrolled PrimFunc
    """Replace each mark by one lane of a vector load."""

    def call(expr: Any) -> Any:  # noqa: ANN401
        if len(expr.args) == 2 and isinstance(expr.args[0], ir.StringImm) and expr.args[0].value == _SPREAD:
            return _spread(expr)
        if not (len(expr.args) == 3 and isinstance(expr.args[0], ir.StringImm) and expr.args[0].value == _MARK):
            return expr
        load, lane = expr.args[1], expr.args[2]
        if not isinstance(lane, tirx.IntImm):
            raise CompilerError("a marked load was not unrolled", found=str(lane), allowed="a constant lane")
        index = tirx.Ramp(load.indices[-1], tirx.IntImm(str(load.indices[-1].ty.dtype), 1), LANES)
        return tirx.Shuffle([tirx.BufferLoad(load.source, [*load.indices[:-1], index])], [lane])

    return tvm_ffi.structural_map(function, [(ir.Call, call)])
