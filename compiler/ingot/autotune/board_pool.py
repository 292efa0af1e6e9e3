"""Several boards of one kind that share the work, as one board."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ingot.autotune.board import Board, Kind, Outcome, Unit
from ingot.errors import BoardError

#: Ends that are the board's fault, not the batch's: another board, or the same one later, may do better.
_FAULTS: tuple[Kind, ...] = ("lost", "refused", "disk_full")
#: A batch that loses this many boards in a row is taken for the reason.
_MAX_LOST = 2


class BoardPool:
    """Hands each batch to a board that is free. A board that fails is asked again later, less and less often.

    patience_s: how long no board at all may be reachable before `run` gives up; a board that reboots is back by then.
    Raises BoardError for boards whose numbers are not of one unit.
    """

    def __init__(self, boards: Sequence[Board], patience_s: float = 120) -> None:
        units = {board.unit for board in boards}
        if len(units) != 1:
            names = ", ".join(board.name for board in boards)
            raise BoardError("these boards cannot share the work", "--board", names, "boards that all tell time")
        self.boards = tuple(boards)
        self.unit: Unit = next(iter(units))
        self._patience_s = patience_s
        self._free = list(boards)
        self._failures: dict[int, int] = {}
        self._not_before: dict[int, float] = {}
        self._none_since: float | None = None  # since when every board has failed
        self._last_fault = ""
        self._changed = threading.Condition()

    @property
    def name(self) -> str:
        """The first one's name, and how many more there are."""
        more = len(self.boards) - 1
        return f"{self.boards[0].name} and {more} more" if more else self.boards[0].name

    @property
    def size(self) -> int:
        """How many batches run at once."""
        return len(self.boards)

    def probe(self) -> str:
        """Look at every board. Raises BoardError for the first that does not answer."""
        if len(self.boards) == 1:
            return self.boards[0].probe()
        return "; ".join([f"{board.name}: {board.probe()}" for board in self.boards])

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        """Run the batch on a free board, on another one where that fails; waits while all are busy.

        The outcome says which board it was. Raises BoardError where none could be reached for `patience_s`.
        """
        lost = 0
        while True:
            board = self._take()
            # Whatever happens here, Ctrl-C too: the board is free again.
            kind: Kind = "ok"
            try:
                outcome = board.run(executable, arguments, timeout_s)
                kind = outcome.kind
            finally:
                self._give_back(board, kind)
            lost += kind == "lost"
            if kind not in _FAULTS or lost >= _MAX_LOST:
                return replace(outcome, board=board.name)
            with self._changed:
                self._last_fault = f"{board.name}: {kind.replace('_', ' ')}: {outcome.detail}"

    def _take(self) -> Board:
        with self._changed:
            while True:
                now = time.monotonic()
                ready = [b for b in self._free if self._not_before.get(id(b), 0) <= now]
                if ready:
                    board = min(ready, key=lambda b: self._failures.get(id(b), 0))
                    self._free.remove(board)
                    return board
                if self._none_since is not None and now - self._none_since > self._patience_s:
                    where = "--board " + " --board ".join(b.name for b in self.boards)
                    found = self._last_fault or "no answer"
                    hint = "see to the board and run the same command again: what was measured is kept"
                    raise BoardError("no board can be reached any more", where, found, hint=hint)
                waits = [self._not_before[id(b)] - now for b in self._free]
                self._changed.wait(max(0.01, min(waits)) if waits else None)

    def _give_back(self, board: Board, kind: Kind) -> None:
        with self._changed:
            now = time.monotonic()
            if kind in _FAULTS:
                count = self._failures[id(board)] = self._failures.get(id(board), 0) + 1
                self._not_before[id(board)] = now + min(30.0, 0.5 * 2**count)
                if self._none_since is None and len(self._failures) == len(self.boards):
                    self._none_since = now
            else:
                self._failures.pop(id(board), None)
                self._not_before.pop(id(board), None)
                self._none_since = None
            self._free.append(board)
            self._changed.notify_all()
