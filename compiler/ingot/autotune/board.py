"""Boards: where candidates are measured. This machine, a machine behind ssh, or an emulator that counts instructions.

A board takes one executable, runs it, and gives back the lines it wrote and how it ended. It never raises for what
the executable or the board does: a crash, a hang, a full disk or a lost connection is a kind of outcome, which the
tuner records. Lines come from a machine that may be broken, and are to be checked like any input.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from ingot.errors import OptionError

if TYPE_CHECKING:
    from ingot.target import Target

#: How a batch ended.
#:   ok          by itself, with status 0
#:   crash       by a signal or another status, or it wrote without end
#:   timeout     stopped after its time; nothing of it is left on the board
#:   lost        the connection ended in the middle: a reboot, a cable
#:   refused     the board did not take it: no route, no login, unknown host key, no folder to write in
#:   disk_full   the board has no room for the executable
#:   wrong_arch  the board cannot run executables of this kind
Kind = Literal["ok", "crash", "timeout", "lost", "refused", "disk_full", "wrong_arch"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: What the numbers of a board are: nanoseconds, or executed instructions of an emulator (never mixed with the former).
Unit = Literal["ns", "instructions"]

FORMS = "local, ssh://[user@]host[:port], qemu:ARCH"
# No part may start with a hyphen (ssh would take it for an option) or hold what a shell or ssh's %-words could read.
_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,252})|\[(?P<ipv6>[0-9A-Fa-f:.]{2,45})\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)


@dataclass(frozen=True)
class Outcome:
    """How a batch ended, the lines it wrote until then, and one line of detail for people.

    `board` is the name of the board that ran it, where a pool chose one.
    """

    kind: Kind
    lines: tuple[str, ...]
    detail: str
    board: str = ""


class Board(Protocol):
    """A place where executables run."""

    @property
    def name(self) -> str:
        """What records say of it: `local`, `ssh://pi@10.0.0.7`, `qemu:aarch64`."""

    @property
    def unit(self) -> Unit:
        """What its measurements are in."""

    @property
    def size(self) -> int:
        """How many batches it runs at once, on machines of their own."""

    def probe(self) -> str:
        """One line about the machine, once it is known to be reachable and of the target's kind.

        Raises BoardError otherwise.
        """

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        """Run an executable of the target once, with these arguments, for at most `timeout_s` seconds.

        Copying it to the board is not part of that time. Safe to call from several threads; measurements then disturb
        each other, so a board is best given one batch at a time.
        """


def open_board(text: str, target: Target) -> Board:
    """The board that `text` names: `local`, `ssh://[user@]host[:port]` or `qemu:ARCH`. Connects to nothing yet.

    Raises OptionError for a text of another form, BoardError for a board that cannot be of the target's kind, and
    ToolchainError where the emulator or ssh is not installed.
    """
    if text == "local":
        from ingot.autotune.board_local import LocalBoard

        return LocalBoard(target)
    if text.startswith("qemu:"):
        from ingot.autotune.board_qemu import QemuBoard

        return QemuBoard(text.removeprefix("qemu:"), target)
    if match := _SSH.fullmatch(text):
        from ingot.autotune.board_ssh import SshBoard

        port = int(match["port"] or 22)
        if not 1 <= port <= 65535:
            raise OptionError("no such port", where=f"--board {text[:80]}", found=str(port), allowed="1 to 65535")
        return SshBoard(match["host"] or match["ipv6"], match["user"], match["port"] and port, target)
    raise OptionError("no board of this form", where="--board", found=repr(text[:80]), allowed=FORMS)
