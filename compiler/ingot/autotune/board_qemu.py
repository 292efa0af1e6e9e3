"""A board for tests, where there is none: qemu-user, which counts the instructions that a candidate executes.

A count says nothing about caches and pipelines; it repeats exactly, on any machine. The executable reads it like a
clock: qemu's plugin (counter.c) counts into a file, which the executable finds by the variable INGOT_COUNTER and maps.
Records of such a board carry its name and go into files of their own, see `ingot.autotune.log`.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ingot.architectures import BASELINES
from ingot.autotune.board import Outcome, Unit
from ingot.autotune.board_local import check_executable, judge
from ingot.autotune.process import Finished, run_limited
from ingot.emulator import emulator_for
from ingot.errors import BoardError, OptionError
from ingot.packager.link import build_plugin
from ingot.target import native_target

if TYPE_CHECKING:
    from ingot.target import Target

#: The variable that names the file with the count: eight bytes, in the order of this machine.
COUNTER_VARIABLE = "INGOT_COUNTER"
#: How many times longer than on a board a batch may take.
SLOWDOWN = 30
# qemu refuses plugins of versions that are too old or too new for it; ours fits all of these.
_VERSIONS = range(1, 9)


class QemuBoard:
    """An emulated board of the target's architecture. Raises as `open_board` does."""

    unit: Unit = "instructions"
    size = 1

    def __init__(self, arch: str, target: Target) -> None:
        self.name = f"qemu:{arch}"
        where = f"--board {self.name}"
        if arch not in BASELINES:
            raise OptionError("no such architecture", where=where[:90], allowed=", ".join(BASELINES))
        if arch != target.arch:
            raise BoardError("the board is not of the target's kind", where, arch, f"qemu:{target.arch}")
        self._target = target
        self._qemu = emulator_for(target)
        self._folder = tempfile.TemporaryDirectory(prefix="ingot-qemu-")
        self._version = _VERSIONS.start
        self._lock = threading.Lock()

    def probe(self) -> str:
        """The emulator in one line."""
        return f"{self._qemu.binary} -cpu {self._qemu.cpu}, which counts instructions: no times"

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        """Run it emulated, for at most SLOWDOWN times as long as a board would have. ToolchainError as `link` does."""
        try:
            wrong = check_executable(executable, self._target)
            if wrong:
                return wrong
            done = self._count([str(executable), *arguments], timeout_s * SLOWDOWN)
            while self._refuses_plugin(done) and self._version + 1 in _VERSIONS:
                self._version += 1
                done = self._count([str(executable), *arguments], timeout_s * SLOWDOWN)
        except OSError as error:
            return Outcome("refused", (), f"the emulator cannot be started: {error.strerror}")
        if self._refuses_plugin(done):
            return Outcome("refused", (), f"the emulator does not count: {done.last_error()}")
        return judge(done, timeout_s * SLOWDOWN)

    def _count(self, command: Sequence[str], timeout_s: float) -> Finished:
        plugin = self._plugin()
        qemu = self._qemu.command()
        with tempfile.NamedTemporaryFile(dir=self._folder.name) as counter:
            counter.write(bytes(8))
            counter.flush()
            environment = {COUNTER_VARIABLE: counter.name}
            return run_limited(
                [qemu[0], "-plugin", str(plugin), *qemu[1:], *command], timeout_s=timeout_s, environment=environment
            )

    def _plugin(self) -> Path:
        """The plugin of the version now tried, built once."""
        with self._lock:
            path = Path(self._folder.name) / f"counter{self._version}.so"
            if not path.exists():
                source = Path(__file__).with_name("counter.c").read_bytes()
                machine = native_target()
                data = build_plugin(
                    source, machine.zig_triple, machine.baseline(), (f"PLUGIN_VERSION={self._version}",)
                )
                path.write_bytes(data)
            return path

    @staticmethod
    def _refuses_plugin(done: Finished) -> bool:
        return done.status != 0 and not done.output and b"plugin" in done.errors.lower()
