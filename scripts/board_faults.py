"""Faults of a board behind ssh: each is provoked on a real sshd on loopback, and its kind must be reported.

usage: python scripts/board_faults.py [--rounds 20] [FAULT...]

After each round nothing may lie or run on the board. Needs OpenSSH's client and server (Debian: openssh-server).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ingot.autotune.board import Board, Outcome, open_board
from ingot.autotune.measure import Plan, measure
from ingot.packager.link import zig_path
from ingot.target import load_target
from loopback_sshd import MISSING, Sshd, sshd

TESTS = Path(__file__).resolve().parents[1] / "tests" / "autotune"
#: Stand-ins for a board's tools: a file system that tells that it is full, and one that is full before it is told.
DF = """#!/bin/sh
echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
echo "/ 99 98 1 99% /"
"""
HEAD = """#!/bin/sh
dd bs=1000 count=1 2>/dev/null
echo "head: error writing 'standard output': No space left on device" >&2
exit 1
"""


@dataclass
class Bench:
    """A folder with what the faults need: executables, and servers that are started once."""

    folder: Path
    built: dict[str, Path] = field(default_factory=dict)

    def batch(self, target_name: str = "native", name: str = "batch") -> Path:
        """tests/autotune/faults.c for a target."""
        key = f"{target_name}-{name}"
        if key not in self.built:
            target = load_target(target_name)
            out = self.folder / key
            machine = ["-target", target.zig_triple, f"-mcpu={target.baseline()}"]
            command = [str(zig_path()), "cc", *machine, "-O1", "-s", "-o", str(out), str(TESTS / "faults.c")]
            subprocess.run(command, check=True, capture_output=True)
            self.built[key] = out
        return self.built[key]

    def without_loader(self) -> Path:
        """The executable with the name of a dynamic loader that no board has."""
        data = self.batch().read_bytes()
        start = data.index(b"/ld-linux")
        end = data.index(b"\0", start)
        out = self.folder / "without-loader"
        out.write_bytes(data[: start + 1] + b"x" * (end - start - 1) + data[end:])
        out.chmod(0o755)
        return out


@contextlib.contextmanager
def path_with(server: Sshd) -> Iterator[None]:
    """PATH begins with the `ssh` that knows this server."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{server.bin}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def board_of(server: Sshd, target: str = "native") -> Board:
    """The server as a board."""
    return open_board(server.url, load_target(target))


def meanwhile(server: Sshd, act: Callable[[], None]) -> threading.Thread:
    """Do something to the board as soon as an executable runs there."""

    def wait_and_act() -> None:
        server.wait_for_run()
        time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def _refused(server: Sshd, bench: Bench) -> Outcome:
    """Nothing listens."""
    server.stop()
    try:
        return board_of(server).run(bench.batch(), [], 5)
    finally:
        server.start()


def _no_login(server: Sshd, bench: Bench) -> Outcome:
    """The key is not one the board knows."""
    server.client_config(server.stranger)
    try:
        return board_of(server).run(bench.batch(), [], 5)
    finally:
        server.client_config(server.folder / "user_key")


def _unknown_host(server: Sshd, bench: Bench) -> Outcome:
    """The board's host key is not one the user knows: never accepted for him."""
    known = server.known_hosts.read_text()
    server.known_hosts.write_text("")
    try:
        outcome = board_of(server).run(bench.batch(), [], 5)
        if server.known_hosts.read_text():
            return Outcome("ok", (), "the host key was accepted")
        return outcome
    finally:
        server.known_hosts.write_text(known)


def _reboot(server: Sshd, bench: Bench) -> Outcome:
    """Everything on the board ends at once, in the middle of a run."""
    thread = meanwhile(server, server.reboot)
    try:
        return board_of(server).run(bench.batch(), ["sleep"], 30)
    finally:
        thread.join()


def _cable(server: Sshd, bench: Bench) -> Outcome:
    """The connection ends in the middle of a run; the board itself goes on, and must clean up by itself."""
    thread = meanwhile(server, server.cut)
    try:
        return board_of(server).run(bench.batch(), ["sleep"], 30)
    finally:
        thread.join()


def _hang(server: Sshd, bench: Bench) -> Outcome:
    """A loop without end."""
    return board_of(server).run(bench.batch(), ["hang"], 0.5)


def _slow(server: Sshd, bench: Bench) -> Outcome:
    """A run that takes most of its time, behind a login that takes its time too: no fault."""
    return board_of(server).run(bench.batch(), ["sleep", "1"], 6)


def _crash(server: Sshd, bench: Bench) -> Outcome:
    """The executable ends by a signal."""
    return board_of(server).run(bench.batch(), ["crash"], 5)


@dataclass
class _Told:
    """A board whose executable is told how to behave, in place of what to measure."""

    board: Board
    how: str

    def __getattr__(self, name: str) -> object:
        return getattr(self.board, name)

    def run(self, executable: Path, _arguments: Sequence[str], timeout_s: float) -> Outcome:
        return self.board.run(executable, [self.how], timeout_s)


def _wrong_answer(server: Sshd, bench: Bench) -> Outcome:
    """The fastest candidate of all computes something else: no time may be kept of it."""
    found = measure(_Told(board_of(server), "wrong"), bench.batch(), Plan([[0, 1]]))  # type: ignore[arg-type]
    if found[0].ns != 100 or found[1].ns is not None:
        return Outcome("ok", (), "a wrong time was kept, or a right one was not")
    return Outcome(found[1].status, (), found[1].detail)  # type: ignore[arg-type]


def _wrong_arch(server: Sshd, bench: Bench) -> Outcome:
    """The board is another machine than the target."""
    other = "visionfive-2" if load_target("native").arch != "riscv64" else "raspberry-pi-4"
    return board_of(server, other).run(bench.batch(other), [], 5)


def _no_loader(server: Sshd, bench: Bench) -> Outcome:
    """The board's C library is another one: the executable's dynamic loader is not there."""
    return board_of(server).run(bench.without_loader(), [], 5)


def _disk_full(server: Sshd, bench: Bench) -> Outcome:
    """No room: writing the executable fails in the middle, or df tells before."""
    return board_of(server).run(bench.batch(), [], 5)


#: Fault -> what provokes it, and the kind that must be reported.
FAULTS: dict[str, tuple[Callable[[Sshd, Bench], Outcome], str]] = {
    "refused": (_refused, "refused"),
    "no login": (_no_login, "refused"),
    "unknown host key": (_unknown_host, "refused"),
    "reboot in mid-run": (_reboot, "lost"),
    "cable pulled in mid-run": (_cable, "lost"),
    "hang": (_hang, "timeout"),
    "slow": (_slow, "ok"),
    "crash": (_crash, "crash"),
    "wrong answer": (_wrong_answer, "wrong_answer"),
    "wrong architecture": (_wrong_arch, "wrong_arch"),
    "no loader": (_no_loader, "wrong_arch"),
    "disk full": (_disk_full, "disk_full"),
    "disk full, told before": (_disk_full, "disk_full"),
}


def environment_of(fault: str, bench: Bench) -> dict[str, str]:
    """What the board's logins find in their environment for a fault."""
    stand_ins = {"disk full": ("head", HEAD), "disk full, told before": ("df", DF)}
    if fault not in stand_ins:
        return {}
    name, text = stand_ins[fault]
    tools = bench.folder / f"tools-{name}"
    tools.mkdir()
    tool = tools / name
    tool.write_text(text)
    tool.chmod(0o755)
    return {"PATH": f"{tools}:/usr/bin:/bin"}


def provoke(fault: str, rounds: int, bench: Bench) -> list[str]:
    """Provoke a fault `rounds` times; what went wrong, in words."""
    act, wanted = FAULTS[fault]
    complaints = []
    folder = bench.folder / f"sshd-{fault.replace(' ', '-').replace(',', '')}"
    with sshd(folder, environment_of(fault, bench)) as server, path_with(server):
        for _ in range(rounds):
            outcome = act(server, bench)
            if outcome.kind != wanted:
                complaints.append(f"{fault}: {outcome.kind} ({outcome.detail}), not {wanted}")
            if left := server.left_over():
                complaints.append(f"{fault}: left on the board: {', '.join(left)}")
    return complaints


def main() -> int:
    """Provoke all, print a line per fault, end with 1 if any was told wrongly."""
    parser = argparse.ArgumentParser(description="Faults of a board behind ssh.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    options = parser.parse_args()
    if MISSING:
        sys.exit(MISSING)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="ingot-faults-") as name:
        bench = Bench(Path(name))
        for fault in options.faults or FAULTS:
            start = time.monotonic()
            complaints = provoke(fault, options.rounds, bench)
            seconds = time.monotonic() - start
            right = options.rounds - len(complaints)
            print(f"{fault:25} {right} of {options.rounds} told as {FAULTS[fault][1]}, {seconds:.0f} s", flush=True)
            for complaint in complaints:
                print(f"  {complaint}", flush=True)
            bad += len(complaints)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
