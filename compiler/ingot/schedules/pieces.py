"""Loops along a row of any length as vectors: groups of registers, then what is left by ever shorter vectors.

A schedule splits a loop by a number that divides it, or guards every element. Here a loop is marked, and rewritten once
the schedule is done: the groups are a loop, what a row has beyond them is written out. LLVM, left to itself, would
finish a row one element at a time, and would not let neighbouring registers take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

#: The annotation of a marked loop: lanes of a register, registers of a group, whether the last register may overlap.
PIECES = "ingot.pieces"


def mark(sch: Any, loop: Any, lanes: int, registers: int, *, overlap: bool = False) -> None:  # noqa: ANN401
    """Mark a loop for `rewrite`; nothing but its own iterations may write what they read.

    overlap: the last elements may be computed twice, which is one vector then instead of several. Only where they are
    made of nothing that was stored over.
    """
    sch.annotate(loop, PIECES, [lanes, registers, int(overlap)])


def rewrite(function: Any) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Return the function with its marked loops in pieces."""

    def visit(loop: Any) -> Any:  # noqa: ANN401
        return _pieces(loop) if PIECES in loop.annotations else loop

    return tvm_ffi.structural_map(function, [(tirx.For, visit)])


def spans(length: int, lanes: int, registers: int, *, overlap: bool) -> list[tuple[int, int]]:
    """Return (begin, lanes) of the vectors after the whole groups of a row; lanes = 1 for an element by itself."""
    begin = length // (lanes * registers) * lanes * registers
    found: list[tuple[int, int]] = []
    wide = lanes * registers
    while begin < length:
        if overlap and begin + lanes > length >= lanes:
            return [*found, (length - lanes, lanes)]
        # Of two elements: a vector of them is no faster than each by itself.
        while wide > length - begin or wide == 2:
            wide //= 2
        found.append((begin, wide))
        begin += wide
    return found


def _pieces(loop: Any) -> Any:  # noqa: ANN401
    """Return the statements that a marked loop comes to."""
    lanes, registers, overlap = (int(v) for v in loop.annotations[PIECES])
    length, dtype = int(loop.extent), str(loop.loop_var.ty.dtype)
    group = lanes * registers

    def vector(begin: Any, width: int) -> Any:  # noqa: ANN401
        if width == 1:
            return _copied(loop, begin)
        lane = tirx.Var("lane", dtype)
        zero, extent = tirx.IntImm(dtype, 0), tirx.IntImm(dtype, width)
        return tirx.For(lane, zero, extent, tirx.ForKind.VECTORIZED, _copied(loop, begin + lane))

    parts = [
        vector(tirx.IntImm(dtype, begin), width)
        for begin, width in spans(length, lanes, registers, overlap=bool(overlap))
    ]
    if length >= group:
        parts.insert(0, _groups(dtype, length // group, lambda index: vector(index * group, group)))
    return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]


def _groups(dtype: str, count: int, body: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    if count == 1:
        return body(tirx.IntImm(dtype, 0))
    index = tirx.Var("group", dtype)
    return tirx.For(index, tirx.IntImm(dtype, 0), tirx.IntImm(dtype, count), tirx.ForKind.SERIAL, body(index))


def _copied(loop: Any, value: Any) -> Any:  # noqa: ANN401
    """Return the loop's body for one value of its variable, with variables of its own: TIR defines each once."""
    fresh: dict[Any, Any] = {loop.loop_var: value}

    def define(node: Any) -> None:  # noqa: ANN401
        for item in [node.loop_var] if isinstance(node, tirx.For) else [item.var for item in node.iter_vars]:
            fresh[item] = tirx.Var(str(item.name), str(item.ty.dtype))

    tvm_ffi.structural_walk(loop.body, [((tirx.For, s_tir.SBlock), define)])
    return tvm_ffi.structural_map(loop.body, [(ir.Var, lambda var: fresh.get(var, var))])
