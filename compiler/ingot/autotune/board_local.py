"""The board that is this machine."""

from __future__ import annotations

import errno
import os
import platform
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.autotune.board import Outcome, Unit
from ingot.autotune.process import MAX_OUTPUT_BYTES, Finished, run_limited
from ingot.errors import BoardError

if TYPE_CHECKING:
    from ingot.target import Target


def elf_fits(header: bytes, target: Target) -> bool:
    """Whether the first bytes of a file (at least 20) are an ELF file for the target's architecture."""
    machine = int.from_bytes(header[18:20], "little")
    return header[:4] == b"\x7fELF" and header[4] == target.elf_class and machine == target.elf_machine


def check_executable(executable: Path, target: Target) -> Outcome | None:
    """The outcome for a file that is no executable of the target; None where it is one."""
    with executable.open("rb") as file:
        header = file.read(20)
    if elf_fits(header, target):
        return None
    return Outcome("wrong_arch", (), f"the executable is not for {target.arch}")


def judge(done: Finished, timeout_s: float) -> Outcome:
    """How a program ended that ran under `run_limited` on the board itself."""
    lines = done.lines()
    if done.stopped == "timeout" or done.status == -signal.SIGXCPU:
        return Outcome("timeout", lines, f"stopped after {timeout_s:g} s")
    if done.stopped == "output":
        return Outcome("crash", lines, f"stopped: it wrote more than {MAX_OUTPUT_BYTES >> 20} MiB")
    if done.status == 0:
        return Outcome("ok", lines, "")
    return Outcome("crash", lines, describe_status(done.status, done.last_error()))


def describe_status(status: int, error: str) -> str:
    """A program's end in words: its signal (negative status) or its status, and the last line it complained with."""
    if status < 0:
        try:
            text = signal.Signals(-status).name
        except ValueError:
            text = f"signal {-status}"
        if -status == signal.SIGILL:
            text += ", an instruction that this CPU does not have"
    else:
        text = f"status {status}"
    return f"{text} ({error})" if error else text


class LocalBoard:
    """This machine. Raises BoardError where it cannot run what is compiled for `target`."""

    name = "local"
    unit: Unit = "ns"
    size = 1

    def __init__(self, target: Target) -> None:
        from ingot.target import native_target

        self._target = target
        native = native_target()
        where = f"--board local, target {target.name}"
        hint = "name the board that is such a machine: --board ssh://user@host"
        if native.arch != target.arch:
            raise BoardError("this machine is not of the target's kind", where, native.arch, target.arch, hint)
        missing = [feature for feature in target.features if feature not in native.features]
        if missing:
            found = "no " + ", ".join(missing)
            raise BoardError("this machine's CPU lacks features of the target", where, found, hint=hint)

    def probe(self) -> str:
        """The machine in one line."""
        return f"this machine, {platform.machine()}, {os.cpu_count()} cores"

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        """Run it here, in a process group of its own, with a limit on its CPU time too."""
        try:
            wrong = check_executable(executable, self._target)
            if wrong:
                return wrong
            cpu_s = timeout_s * (os.cpu_count() or 1) + 10
            done = run_limited([str(executable), *arguments], timeout_s=timeout_s, cpu_s=cpu_s)
        except OSError as error:
            # No such file, though it is there: its loader (ld-linux) is not.
            if error.errno in (errno.ENOEXEC, errno.ELIBBAD) or (error.errno == errno.ENOENT and executable.exists()):
                return Outcome("wrong_arch", (), f"this machine cannot run it: {error.strerror}")
            return Outcome("refused", (), f"it cannot be started: {error.strerror}")
        return judge(done, timeout_s)
