"""Boards of one kind share the work; a board that fails loses its batch to another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from board_faults import board_of
from ingot.autotune.board import Kind, Outcome, Unit, open_board
from ingot.autotune.board_pool import BoardPool
from ingot.errors import BoardError
from ingot.target import load_target
from loopback_sshd import Sshd


@dataclass(eq=False)
class Scripted:
    """A board that ends its runs as told, then well."""

    name: str
    kinds: list[Kind] = field(default_factory=list)
    always: Kind | None = None
    seconds: float = 0.0
    unit: Unit = "ns"
    size: int = 1
    ran: list[str] = field(default_factory=list)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def probe(self) -> str:
        if self.always:
            raise BoardError("the board refuses the connection", self.name)
        return self.name

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        assert self.busy.acquire(blocking=False), "two batches at once on one board"
        try:
            time.sleep(self.seconds)
            self.ran.append(arguments[0])
            kind = self.always or (self.kinds.pop(0) if self.kinds else "ok")
            return Outcome(kind, (arguments[0],), "why")
        finally:
            self.busy.release()


def run_all(pool: BoardPool, count: int) -> list[Outcome]:
    with ThreadPoolExecutor(pool.size) as threads:
        return list(threads.map(lambda i: pool.run(Path("batch"), [str(i)], 1), range(count)))


def test_boards_share_the_work() -> None:
    a, b = Scripted("a", seconds=0.02), Scripted("b", seconds=0.02)
    outcomes = run_all(BoardPool([a, b]), 20)
    assert [o.lines for o in outcomes] == [(str(i),) for i in range(20)]
    assert {o.board for o in outcomes} == {"a", "b"}
    assert sorted(a.ran + b.ran, key=int) == [str(i) for i in range(20)]
    assert min(len(a.ran), len(b.ran)) >= 5


@pytest.mark.parametrize("kind", ["lost", "refused", "disk_full"])
def test_the_batch_of_a_lost_board_goes_to_another(kind: Kind) -> None:
    good, bad = Scripted("good", seconds=0.01), Scripted("bad", always=kind)
    outcomes = run_all(BoardPool([bad, good]), 10)
    assert {(o.kind, o.board) for o in outcomes} == {("ok", "good")}
    assert bad.ran
    assert sorted(good.ran, key=int) == [str(i) for i in range(10)]


@pytest.mark.parametrize("kind", ["crash", "timeout", "wrong_arch"])
def test_what_is_the_batchs_own_fault_is_told_at_once(kind: Kind) -> None:
    board = Scripted("a", kinds=[kind])
    assert BoardPool([board]).run(Path("batch"), ["0"], 1) == Outcome(kind, ("0",), "why", "a")
    assert board.ran == ["0"]


def test_a_board_that_reboots_is_waited_for() -> None:
    board = Scripted("a", kinds=["lost", "refused"])
    outcome = BoardPool([board]).run(Path("batch"), ["0"], 1)
    assert (outcome.kind, board.ran) == ("ok", ["0"] * 3)


def test_a_batch_that_takes_boards_down_is_told_as_lost() -> None:
    a, b = Scripted("a", kinds=["lost"]), Scripted("b", kinds=["lost"])
    pool = BoardPool([a, b])
    assert pool.run(Path("batch"), ["0"], 1).kind == "lost"
    assert pool.run(Path("batch"), ["1"], 1).kind == "ok"


def test_no_board_left_is_a_clear_error() -> None:
    pool = BoardPool([Scripted("a", always="refused"), Scripted("b", always="lost")], patience_s=0.5)
    start = time.monotonic()
    with pytest.raises(BoardError, match="no board can be reached") as caught:
        while True:
            pool.run(Path("batch"), ["0"], 1)
    assert "why" in str(caught.value)
    assert time.monotonic() - start < 30


def test_times_and_counts_do_not_share() -> None:
    with pytest.raises(BoardError, match="cannot share"):
        BoardPool([Scripted("a"), Scripted("b", unit="instructions")])


def test_every_board_is_looked_at() -> None:
    assert BoardPool([Scripted("a"), Scripted("b")]).probe() == "a: a; b: b"
    with pytest.raises(BoardError, match="refuses"):
        BoardPool([Scripted("a"), Scripted("b", always="refused")]).probe()


def test_two_real_boards_of_which_one_is_off(board: Sshd, batch: Callable[..., Path]) -> None:
    off = open_board("ssh://127.0.0.1:1", load_target("native"))
    pool = BoardPool([off, board_of(board)])
    outcomes = [pool.run(batch(), [], 5) for _ in range(3)]
    assert {(o.kind, o.board) for o in outcomes} == {("ok", board.url)}
