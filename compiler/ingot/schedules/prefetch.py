"""Fetching the next block of weights while the tiles of this one are computed.

A layer whose weights exceed the second-level cache reads each block of them from far away once, in its first tile:
that tile waits for memory, all others find the block in the second-level cache. So every tile asks for its share of
the block after this one (`prefetcht0`, `prfm`): memory works all the time, and the first tile waits no more.

A step of a tile's reduction that reads some lines of weights asks for lines at the same place one block further: those
from line p * lines // P on, of the tile at position p of P, and so many that together the tiles ask for all.
Templates made of schedule primitives `mark` the loop of the reduction, and `insert` rewrites the scheduled function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from ingot.schedules import llvm_forms
from ingot.schedules.vector import DTYPE_BYTES, ceil_div
from ingot.target import Target

#: Bytes of a line of every cache we know.
LINE_BYTES = 64
_MARK = "ingot.prefetch"
_FAMILY = "prefetch"


def lines(values: int, dtype: str) -> int:
    """Return the lines that so many values take."""
    return ceil_div(values * DTYPE_BYTES[dtype], LINE_BYTES)


def ask(weight: Any, place: Sequence[Any], position: Any, positions: int, tile: int, count: int) -> list[Any]:  # noqa: ANN401
    """Return the statements of one step of the tile of `tile` positions that begins at `position` of `positions`.

    place: the indices of the first weight the step would read one block further, without the last index, 0.
    count: the lines it would read.
    """
    dtype = str(position.ty.dtype)
    line = LINE_BYTES // DTYPE_BYTES[str(weight.dtype)]
    first = tirx.floordiv(position * count, tirx.IntImm(dtype, positions))
    return [
        tirx.Evaluate(
            tirx.call_extern(
                "int32",
                llvm_forms.name_of(_FAMILY),
                tirx.address_of(tirx.BufferLoad(weight, [*place, (first + k) * line])),
            )
        )
        for k in range(ceil_div(count * tile, positions))
    ]


def mark(sch: Any, loop: Any, *, tile: int, unroll: int) -> None:  # noqa: ANN401 - a schedule
    """Mark the outer loop of a tile's reduction, `unroll` channels a step; `tile` positions are computed at once."""
    sch.annotate(loop, _MARK, [tile, unroll])


def insert(function: Any) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Return the function with the marked loops asking for the next block of weights.

    The reduction block's axes are the output's, then the reduction's; it reads last the packed weights, whose first
    dimension counts blocks and whose last two are input channels and the channels of a block.
    """

    def loop(node: Any) -> Any:  # noqa: ANN401
        if _MARK not in node.annotations:
            return node
        asks = _asks(node, *(int(v) for v in node.annotations[_MARK]))
        return tirx.For(node.loop_var, node.min, node.extent, node.kind, tirx.SeqStmt([*asks, node.body]))

    return tvm_ffi.structural_map(function, [(tirx.For, loop)])


def _asks(loop: Any, tile: int, unroll: int) -> list[Any]:  # noqa: ANN401
    """Return the statements of one step of a marked loop."""
    body, inner = loop.body, set()
    while isinstance(body, tirx.For):
        inner.add(body.loop_var)
        body = body.body
    block = body.block
    # The place of the step's first element: every loop inside at its start.
    zero = tirx.IntImm(str(loop.loop_var.ty.dtype), 0)
    begin = {
        item.var: tvm_ffi.structural_map(value, [(ir.Var, lambda var: zero if var in inner else var)])
        for item, value in zip(block.iter_vars, body.iter_values, strict=True)
    }
    weight, loads = block.reads[-1].source, []

    def load(expr: Any) -> None:  # noqa: ANN401
        if expr.source.same_as(weight):
            loads.append(expr)

    tvm_ffi.structural_walk(block.body, [(ir.TensorLoad, load)])
    place = [tvm_ffi.structural_map(i, [(ir.Var, lambda var: begin.get(var, var))]) for i in loads[0].indices[:-1]]
    position, positions = zero, 1
    for item, size in zip(block.iter_vars, block.writes[0].source.shape[:-1], strict=False):
        position, positions = position * size + begin[item.var], positions * int(size)
    count = lines(unroll * int(weight.shape[-1]), str(weight.dtype))
    return ask(weight, [place[0] + 1, *place[1:]], position, positions, tile, count)


def _text(target: Target, name: str) -> str:
    """Write the form: for reading, into all caches, data."""
    return f"""
        declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
        define i32 @{name}(ptr %p) alwaysinline {{
        call void @llvm.prefetch.p0(ptr %p, i32 0, i32 3, i32 1)
        ret i32 0
        }}"""


llvm_forms.register(_FAMILY, _text)
