"""Running a batch on a board until every candidate has a time or a reason why it has none.

The executable says what it is about to do before it does it (`runner.c`), so a crash or a hang belongs to the last
candidate it named; the rest go on in another run. What a board writes is checked like any input.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ingot.errors import BoardError

if TYPE_CHECKING:
    from ingot.autotune.board import Board

#: max|difference| / max|reference| above which an answer is wrong: several times what Winograd's rounding gives.
ERROR_LIMIT: Final = 1e-3
ROUNDS: Final = 5
#: Microseconds each candidate is run for in one round.
MICROSECONDS: Final = 3000
#: Seconds one run of a batch may take, and in addition for each candidate.
BASE_LIMIT_S, CANDIDATE_LIMIT_S = 20.0, 4.0
#: Runs of one batch after which a board counts as broken.
_MOST_RUNS = 40
#: Outcomes that say nothing about the candidates.
_BOARD_FAILURES = frozenset({"refused", "disk_full", "wrong_arch"})


@dataclass(frozen=True)
class Measured:
    """What is known of one candidate. status: "ok" or a kind of failure.

    ns: median time of one run. ratio: median over the rounds of its time by that of the reference in the same round.
    noise: the relative spread of that ratio. error: against the reference. processes: the ratio in each process.
    """

    status: str
    ns: float | None = None
    ratio: float | None = None
    noise: float = 0.0
    error: float = 0.0
    board: str = "local"
    detail: str = ""
    processes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to run: the ids of each task, the reference first, and how; `limit_s` in place of the usual time limit.

    processes: where a process's memory lies makes one kernel or the other up to 5 % faster for as long as it lives, so
    what is close is measured in several.
    """

    groups: Sequence[Sequence[int]]
    threads: int = 1
    rounds: int = ROUNDS
    microseconds: int = MICROSECONDS
    error_limit: float = ERROR_LIMIT
    limit_s: float | None = None
    processes: int = 1


def measure(board: Board, executable: Path, plan: Plan) -> dict[int, Measured]:
    """Return what became of every candidate: the median over the processes, or the first failure in any.

    A candidate under which a board was lost (a pool then tried another one) failed: its status is "lost". Raises
    BoardError where the board is at fault: it refuses the connection, its disk is full, it is another architecture.
    """
    found = [_measure_once(board, executable, plan) for _ in range(plan.processes)]
    return {id: _median([results[id] for results in found]) for id in found[0]}


def _median(results: Sequence[Measured]) -> Measured:
    """Return one candidate's result of several processes; its noise is at least half the range of their ratios."""
    bad = next((m for m in results if m.status != "ok" or m.ns is None or m.ratio is None), None)
    if bad is not None:
        return bad
    ratios = tuple(m.ratio for m in results if m.ratio is not None)
    ratio = statistics.median(ratios)
    noise = max(statistics.median(m.noise for m in results), (max(ratios) - min(ratios)) / (2 * ratio))
    ns = statistics.median(m.ns for m in results if m.ns is not None)
    return replace(results[0], ns=ns, ratio=ratio, noise=noise, error=max(m.error for m in results), processes=ratios)


def _measure_once(board: Board, executable: Path, plan: Plan) -> dict[int, Measured]:
    """Return what became of every candidate in one process, or in several where it crashed."""
    results: dict[int, Measured] = {}
    times: dict[int, list[float]] = {}
    task_of = {id: group for group in plan.groups for id in group}
    waiting = [id for group in plan.groups for id in group]
    for _ in range(_MOST_RUNS):
        if not waiting:
            break
        limit = plan.limit_s or BASE_LIMIT_S + CANDIDATE_LIMIT_S * len(waiting)
        words = [
            str(plan.threads),
            str(plan.rounds),
            str(plan.microseconds),
            repr(plan.error_limit),
            *map(str, waiting),
        ]
        outcome = board.run(executable, words, limit)
        name = outcome.board or board.name
        last = None
        for line in outcome.lines:
            event = _event(line)
            if "begin" in event and event["begin"] in task_of:
                last = event["begin"]
            elif "candidate" in event and event["candidate"] in task_of:
                id = event["candidate"]
                results[id], times[id] = _result(event, times.get(task_of[id][0]), name, plan.error_limit)
        waiting = [id for id in waiting if id not in results]
        idle = last is None or last in results
        if outcome.kind in _BOARD_FAILURES or (outcome.kind == "lost" and idle):
            raise BoardError("the board failed", where=f"--board {name}", found=f"{outcome.kind}: {outcome.detail}")
        if outcome.kind == "ok" and not waiting:
            break
        if last is None or (outcome.kind == "ok" and last in results):
            raise BoardError("the board's answers make no sense", where=f"--board {name}", found=outcome.detail[:200])
        status = outcome.kind if outcome.kind != "ok" else "crash"
        failed = task_of[last] if last == task_of[last][0] else [last]  # without its reference a task has no measure
        for id in failed:
            results.setdefault(id, Measured(status, detail=outcome.detail, board=name))
        waiting = [id for id in waiting if id not in results]
    for id in waiting:
        results[id] = Measured("crash", detail="its batch crashed too often")
    return results


def _event(line: str) -> dict[str, Any]:
    """Return a line's JSON object, {} for anything else."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(event, dict):
        return {}
    for name in ("begin", "candidate"):
        if name in event and type(event[name]) is not int:
            return {}
    return event


def _result(
    event: dict[str, Any], reference: list[float] | None, board: str, limit: float
) -> tuple[Measured, list[float]]:
    """Return what a result line says, and the times of its rounds; the reference's line comes first."""
    found, ns = event.get("error"), event.get("ns", [])
    error = float(found) if isinstance(found, int | float) and math.isfinite(found) else 1e30
    if error > limit:
        return Measured("wrong_answer", error=error, board=board), []
    if not isinstance(ns, list) or not ns or not all(isinstance(t, int | float) and 0 < t < 1e15 for t in ns):
        return Measured("crash", detail="no times", board=board), []
    times = [float(t) for t in ns]
    base = reference or times
    ratios = [t / b for t, b in zip(times, base, strict=False)]
    ratio = statistics.median(ratios)
    noise = statistics.median(abs(r - ratio) for r in ratios) / ratio
    return Measured("ok", statistics.median(times), ratio, noise, error, board), times
