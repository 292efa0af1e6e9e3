"""Measuring: every candidate gets a time or the right kind of failure, whatever the board does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ingot.autotune.board import Outcome
from ingot.autotune.measure import Plan, measure
from ingot.errors import BoardError

PLAN = Plan([[1, 2, 3], [4, 5]])


class Scripted:
    """A board that runs a function of the ids it is asked for."""

    name, unit, size = "local", "ns", 1

    def __init__(self, answer: Callable[[list[int]], Outcome]) -> None:
        self.answer = answer
        self.asked: list[list[int]] = []

    def probe(self) -> str:
        return "a script"

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        self.asked.append([int(a) for a in arguments[4:]])
        return self.answer(self.asked[-1])


def line(id: int, ns: Sequence[float] = (100.0, 110.0, 90.0), error: float = 0.0) -> str:
    return json.dumps({"candidate": id, "error": error, "noise": 0.01, "ns": list(ns)})


def begin(id: int) -> str:
    return json.dumps({"begin": id})


def good(ids: Sequence[int]) -> tuple[str, ...]:
    return (*map(begin, ids), *(line(i, [100.0 * i] * 3) for i in ids))


def run(board: Scripted) -> dict[int, str]:
    return {id: m.status for id, m in measure(board, Path("x"), PLAN).items()}


def test_times_are_ratios_of_the_same_round() -> None:
    def answer(ids: list[int]) -> Outcome:
        lines = [line(1, [100, 200, 400]), line(2, [50, 100, 200]), line(3, [150, 300, 700]), *good([4, 5])]
        return Outcome("ok", tuple(lines), "")

    found = measure(Scripted(answer), Path("x"), PLAN)
    assert found[2].ratio == 0.5
    assert found[2].noise == 0.0
    assert found[3].ratio == 1.5
    assert found[5].ratio == 1.25
    assert found[1].ns == 200


def test_several_processes_count_with_their_median_and_their_range() -> None:
    """Where a process's memory lies changes times for as long as it lives."""
    slow = iter([(100, 120), (100, 90), (200, 180)])

    def answer(ids: list[int]) -> Outcome:
        one, two = next(slow)
        return Outcome("ok", (line(1, [one] * 3), line(2, [two] * 3), *good([3, 4, 5])), "")

    found = measure(Scripted(answer), Path("x"), replace(PLAN, processes=3))
    assert found[2].processes == (1.2, 0.9, 0.9)
    assert found[2].ratio == 0.9
    assert found[2].noise == pytest.approx(0.15 / 0.9)
    assert found[2].ns == 120


def test_what_fails_in_one_process_of_several_failed() -> None:
    errors = iter([0.0, 1.0])

    def answer(ids: list[int]) -> Outcome:
        return Outcome("ok", (line(1), line(2, error=next(errors)), *good([3, 4, 5])), "")

    assert measure(Scripted(answer), Path("x"), replace(PLAN, processes=2))[2].status == "wrong_answer"


@pytest.mark.parametrize("kind", ["crash", "timeout"])
def test_a_crash_costs_the_candidate_that_was_begun(kind: str) -> None:
    def answer(ids: list[int]) -> Outcome:
        if 2 in ids:
            return Outcome(kind, (begin(1), begin(2)), "SIGSEGV")  # type: ignore[arg-type]
        return Outcome("ok", good(ids), "")

    board = Scripted(answer)
    assert run(board) == {1: "ok", 2: kind, 3: "ok", 4: "ok", 5: "ok"}
    assert board.asked == [[1, 2, 3, 4, 5], [1, 3, 4, 5]]


def test_a_task_is_lost_with_its_reference_and_no_other() -> None:
    def answer(ids: list[int]) -> Outcome:
        if 4 in ids:
            return Outcome("crash", (*good([1, 2, 3]), begin(4)), "SIGILL")
        return Outcome("ok", good(ids), "")

    assert run(Scripted(answer)) == {1: "ok", 2: "ok", 3: "ok", 4: "crash", 5: "crash"}


@pytest.mark.parametrize("error", [0.5, 1e30, float("nan"), float("inf")])
def test_a_wrong_answer_has_no_time(error: float) -> None:
    def answer(ids: list[int]) -> Outcome:
        return Outcome("ok", (*good([1, 3, 4, 5]), line(2, error=error)), "")

    found = measure(Scripted(answer), Path("x"), PLAN)[2]
    assert (found.status, found.ns, found.ratio) == ("wrong_answer", None, None)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [("refused", (begin(1),)), ("disk_full", ()), ("wrong_arch", ()), ("lost", ()), ("lost", (begin(1), line(1)))],
)
def test_a_failing_board_is_not_the_candidates_fault(kind: str, lines: tuple[str, ...]) -> None:
    with pytest.raises(BoardError, match=kind):
        run(Scripted(lambda _: Outcome(kind, lines, "gone")))  # type: ignore[arg-type]


def test_a_candidate_that_takes_boards_down_is_a_failure_and_the_rest_goes_on() -> None:
    def answer(ids: list[int]) -> Outcome:
        if 2 in ids:
            return Outcome("lost", (begin(1), begin(2)), "the connection ended")
        return Outcome("ok", good(ids), "")

    assert run(Scripted(answer)) == {1: "ok", 2: "lost", 3: "ok", 4: "ok", 5: "ok"}


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("", "{", "[]", "null", '{"begin": "1"}', '{"candidate": true}', '{"begin": 77}', "9" * 5000),
        ('{"candidate": 99, "error": 0, "ns": [1]}',),
    ],
)
def test_nonsense_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(BoardError, match="make no sense"):
        run(Scripted(lambda _: Outcome("ok", lines, "")))


@pytest.mark.parametrize("ns", [[], [0], [-1], ["a"], [1e300], None, 7])
def test_times_that_cannot_be_are_no_times(ns: object) -> None:
    def answer(ids: list[int]) -> Outcome:
        strange = json.dumps({"candidate": 2, "error": 0, "ns": ns})
        return Outcome("ok", (*good([1, 3, 4, 5]), strange), "")

    assert run(Scripted(answer))[2] == "crash"


def test_a_batch_that_always_crashes_ends() -> None:
    board = Scripted(lambda ids: Outcome("crash", (begin(ids[0]),), "SIGSEGV"))
    assert set(run(board).values()) == {"crash"}
    assert len(board.asked) <= 5
