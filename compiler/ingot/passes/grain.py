"""How much of a kernel is worth a thread: a rough count of cycles, made from its loops."""

from __future__ import annotations

from typing import Any

from tvm import ir, s_tir, tirx

from ingot.schedules import amx
from ingot.schedules.vector import ceil_div, registers
from ingot.target import Target

#: A thread is woken for at least this many cycles of work: about 3 microseconds, several times what waking it and
#: waiting for it cost.
CYCLES_PER_THREAD = 10_000

#: What the parts of an expression cost, in quarters of a cycle, a vector at a time: a core does two fused multiply-adds
#: a cycle; a store that only moves data is bound by the second-level cache.
_OPERATION, _DIVISION, _FUNCTION, _MOVE = 1, 12, 60, 8
_FUNCTIONS = frozenset(
    ("exp", "exp2", "log", "log2", "tanh", "erf", "sigmoid", "pow", "sin", "cos", "tan", "atan", "acos")
)
#: Iterations of a loop whose extent is not constant: the rows of a window at the border of an image.
_UNKNOWN_EXTENT = 3


def grain(function: Any, extent: int, target: Target) -> int:  # noqa: ANN401 - a raw PrimFunc
    """Return the fewest parallel iterations worth giving to a thread, between 1 and `extent`."""
    if extent < 2:
        return 1
    total = cycles(function, target)
    if total < 2 * CYCLES_PER_THREAD:
        return extent
    return max(1, min(extent, ceil_div(CYCLES_PER_THREAD * extent, total)))


def cycles(function: Any, target: Target) -> int:  # noqa: ANN401 - a raw PrimFunc
    """Return a rough number of cycles that the whole range of a kernel takes."""
    return _of_statement(function.body, registers(target).lanes) // 4


def _of_statement(statement: Any, lanes: int) -> int:  # noqa: ANN401 - a TIR statement
    """Return the quarters of a cycle; a vectorised loop does `lanes` values at a time."""
    if isinstance(statement, tirx.For):
        inner = _of_statement(statement.body, lanes)
        extent = int(statement.extent) if isinstance(statement.extent, tirx.IntImm) else _UNKNOWN_EXTENT
        return inner * (ceil_div(extent, lanes) if statement.kind == tirx.ForKind.VECTORIZED else extent)
    if isinstance(statement, tirx.SeqStmt):
        return sum(_of_statement(item, lanes) for item in statement.seq)
    if isinstance(statement, s_tir.SBlockRealize):
        return _of_statement(statement.block.body, lanes)
    if isinstance(statement, tirx.IfThenElse):
        other = _of_statement(statement.else_case, lanes) if statement.else_case is not None else 0
        return max(_of_statement(statement.then_case, lanes), other)
    if isinstance(statement, tirx.AttrStmt):
        return _of_statement(statement.body, lanes)
    if isinstance(statement, tirx.BufferStore):
        return _of_value(statement.value) or _MOVE
    if isinstance(statement, tirx.Evaluate):
        return 4 * amx.cycles_of(statement.value)
    return 0


def _of_value(value: Any) -> int:  # noqa: ANN401 - a TIR expression
    """Return the quarters of a cycle of computing a value; what a load's indices cost is hidden by the rest."""
    if isinstance(value, tirx.Div):
        return _DIVISION + _of_value(value.a) + _of_value(value.b)
    if isinstance(value, tirx.Select):
        return _OPERATION + sum(_of_value(v) for v in (value.condition, value.true_value, value.false_value))
    if isinstance(value, ir.Call):
        name = str(getattr(value.op, "name", "")).rpartition(".")[2]
        return (_FUNCTION if name in _FUNCTIONS else _OPERATION) + sum(_of_value(v) for v in value.args)
    if isinstance(value, tirx.Cast):
        return _OPERATION + _of_value(value.value)
    if isinstance(value, tirx.Let):
        return _of_value(value.value) + _of_value(value.body)
    if hasattr(value, "a") and hasattr(value, "b"):
        return _OPERATION + _of_value(value.a) + _of_value(value.b)
    return 0
