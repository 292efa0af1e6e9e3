"""Engines side by side, each in a process of its own, asked in turn.

Those whose turn it is not are stopped: idle threads of one engine may spin for a while, on cores the next one needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.cli.engines import PACKAGES
from ingot.errors import InputError, RunError, ToolchainError

Array = np.ndarray[Any, Any]
#: The command of an engine's process.
WORKER = (sys.executable, "-m", "ingot.cli.worker")
#: Seconds an engine has for one answer.
PATIENCE_S = 300.0
_TURN_S = 0.1
_WARM_UP_S = 0.3
_MIN_ROUNDS = 3


class Peer:
    """One engine's process, with a model loaded. `seconds` collects its measured runs, `rss` bytes its growth.

    `worker` is the command that starts the process, without its arguments: `ingot.cli.worker`, or one like it.
    Raises RunError where the engine cannot load the model, ToolchainError where it is not installed.
    """

    def __init__(
        self, engine: str, model: Path, threads: int, feeds: Path, log: Path, worker: Sequence[str] = WORKER
    ) -> None:
        self.engine, self.model = engine, model
        self.seconds: list[float] = []
        self._rest = b""
        package_root = str(Path(__file__).resolve().parents[2])
        python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*worker, engine, str(model), str(threads), str(feeds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": python_path},
                bufsize=0,
            )
        try:
            facts = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_s: float = facts["load_s"]
        self.rss: int = facts["rss"]

    def turn(self, on: bool) -> None:
        """Let the process run, or stop it where it is."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT if on else signal.SIGSTOP)

    def measure(self, count: int) -> list[float]:
        """Seconds of `count` runs, one after the other."""
        answer = self._ask(run=count)
        self.rss = max(self.rss, answer["rss"])
        return list(answer["seconds"])

    def feed(self, inputs: dict[str, Array]) -> None:
        """Change the inputs, which keep their names, dtypes and shapes."""
        from ingot.arrays import npz_bytes

        with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
            path = Path(folder) / "inputs.npz"
            path.write_bytes(npz_bytes(inputs))
            self._ask(inputs=str(path))

    def outputs(self) -> list[Array]:
        """The outputs, in the model's order."""
        with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
            path = Path(folder) / "outputs.npz"
            self._ask(outputs=str(path))
            with np.load(path, allow_pickle=False) as archive:
                return [archive[f"arr_{i}"] for i in range(len(archive.files))]

    def close(self) -> None:
        """End the process; stopped ones too."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, **request: object) -> dict[str, Any]:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # the answer says what happened
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        end = time.monotonic() + PATIENCE_S
        while stdout is not None and b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise self._failed(f"no answer within {PATIENCE_S:g} s")
            data = os.read(stdout.fileno(), 1 << 20)
            if not data:
                raise self._failed(self._death())
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("missing") and self.engine in PACKAGES:
            raise ToolchainError(
                f"{self.engine} is not installed",
                found=str(answer["error"])[:200],
                hint=f"install it: pip install {PACKAGES[self.engine]}",
            )
        if "error" in answer:
            raise self._failed(str(answer["error"]))
        return answer

    def _failed(self, why: str) -> RunError:
        return RunError(f"{self.engine} failed", where=str(self.model), found=" ".join(why.split())[:500])

    def _death(self) -> str:
        status = self._process.wait()
        if status < 0:
            return f"it ended by {signal.Signals(-status).name}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), f"it ended with status {status}")


@contextlib.contextmanager
def peers(
    contestants: Sequence[tuple[str, Path]],
    threads: int,
    inputs: Sequence[dict[str, Array]],
    worker: Sequence[str] = WORKER,
) -> Iterator[list[Peer]]:
    """Load each (engine, model) with its inputs in a process of its own, one after the other; all are stopped then."""
    from ingot.arrays import npz_bytes

    running: list[Peer] = []
    with tempfile.TemporaryDirectory(prefix="ingot-") as name:
        try:
            for i, ((engine, model), feeds) in enumerate(zip(contestants, inputs, strict=True)):
                path = Path(name) / f"inputs{i}.npz"
                path.write_bytes(npz_bytes(feeds))
                running.append(Peer(engine, model, threads, path, Path(name) / f"log{i}", worker))
                running[-1].turn(False)
            yield running
        finally:
            for peer in running:
                peer.close()


def interleave(running: Sequence[Peer], seconds: float) -> None:
    """Measure all peers in turn, A B A B ..., about `seconds` for each, into their `seconds` lists."""
    counts = []
    for peer in running:
        peer.turn(True)
        counts.append(_runs_per_turn(peer))
        peer.turn(False)
    end = time.monotonic() + seconds * len(running)
    rounds = 0
    while rounds < _MIN_ROUNDS or time.monotonic() < end:
        for peer, count in zip(running, counts, strict=True):
            peer.turn(True)
            peer.measure(1)  # warms the caches that the others used
            peer.seconds += peer.measure(count)
            peer.turn(False)
        rounds += 1


def _runs_per_turn(peer: Peer) -> int:
    """Warm up, then say how many runs fill a turn."""
    best, end = float("inf"), time.monotonic() + _WARM_UP_S
    while time.monotonic() < end or best == float("inf"):
        best = min(best, *peer.measure(3))
    return max(1, min(1000, int(_TURN_S / max(best, 1e-9))))


def random_feeds(specs: Sequence[Any], seed: int) -> dict[str, Array]:
    """Seeded inputs by name, as the selftest makes them, for a model's `inputs`. Raises InputError if too large."""
    from ingot.frontend.interface import TensorSpec
    from ingot.packager.selftest import random_inputs

    total = sum(spec.nbytes for spec in specs)
    if total > 8 << 30:
        raise InputError("the model's inputs are too large to make up", found=f"{total} bytes", allowed="8 GiB")
    return random_inputs([TensorSpec(spec.name, spec.type, spec.shape) for spec in specs], seed)


def distance(found: Array, wanted: Array) -> float:
    """max|found - wanted| / max|wanted|; equal NaNs and infinities count as equal, others as infinitely far."""
    if found.shape != wanted.shape:
        return float("inf")
    if not found.size:
        return 0.0
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        return float("inf")
    error = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    scale = float(np.max(np.abs(b[finite]), initial=0.0))
    return error / scale if scale else (0.0 if error == 0 else float("inf"))
