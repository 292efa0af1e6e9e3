"""Building TIR statement by statement, for loop nests that schedule primitives cannot make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import ir, s_tir, tirx

Expr = Any  # TVM ships no types: an expression, a statement or a buffer
Stmt = Any
Body = Callable[..., Stmt]


def integer(value: int) -> Expr:
    """Return a constant index."""
    return tirx.const(value, "int64")


def loop_over(extent: int, body: Body, name: str, kind: Any = tirx.ForKind.SERIAL) -> Stmt:  # noqa: ANN401
    """Return a loop over what `body` makes of its variable; of one iteration, the iteration alone."""
    if extent == 1 and kind != tirx.ForKind.PARALLEL:
        return body(integer(0))
    var = tirx.Var(name, "int64")
    return tirx.For(var, integer(0), integer(extent), kind, body(var))


def unrolled(extent: int, body: Body, name: str) -> Stmt:
    """Return a loop that is written out."""
    return loop_over(extent, body, name, tirx.ForKind.UNROLLED)


def lanes_of(count: int, body: Body) -> Stmt:
    """Return a loop whose iterations are the lanes of one vector."""
    return loop_over(count, body, "lane", tirx.ForKind.VECTORIZED)


def named(values: Mapping[str, Expr], body: Body) -> Stmt:
    """Return the statement `body` makes of the values bound to names: what is made of short names simplifies fast."""
    names = [tirx.Var(name, "int64") for name in values]
    return tirx.SeqStmt([*(tirx.Bind(n, v) for n, v in zip(names, values.values(), strict=True)), body(*names)])


def with_buffers(buffers: list[Expr], body: Stmt, name: str) -> Stmt:
    """Return `body` with buffers of its own."""
    return realized(s_tir.SBlock([], [], [], name, body, None, buffers))


def realized(block: Stmt) -> Stmt:
    """Return the statement that runs a block which has no iteration variables."""
    return s_tir.SBlockRealize([], tirx.const(True, "bool"), block)


def buffer(shape: Sequence[int], name: str, dtype: str) -> Expr:
    """Return a buffer."""
    return tirx.decl_buffer([integer(d) for d in shape], dtype, name, layout=None)


def float_buffer(shape: Sequence[int], name: str) -> Expr:
    """Return a float32 buffer."""
    return buffer(shape, name, "float32")


def whole(source: Expr) -> Expr:
    """Return the region that is all of a buffer."""
    return tirx.BufferRegion(source, [ir.Range.from_min_extent(integer(0), d) for d in source.shape])
