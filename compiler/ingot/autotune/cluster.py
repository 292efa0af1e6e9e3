"""Builders and boards on other machines, behind a Dask cluster (`distributed`, the optional extra `ingot[cluster]`).

Every worker of the cluster builds. A worker that says `--resources "raspberry-pi-4=1"` also measures for that target,
one batch at a time: on its own machine, or on the board its environment variable INGOT_BOARD names (`ssh://...`). Dask
gives the work of a lost worker to another. Its messages are not authenticated unless the cluster uses tls://: whoever
reaches the scheduler can run code on every worker, so a cluster belongs into a network of its own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ingot.autotune.board import Outcome, Unit, open_board
from ingot.errors import BoardError, OptionError, ToolchainError, WorkerError

if TYPE_CHECKING:
    from ingot.target import Target

P = ParamSpec("P")
R = TypeVar("R")

#: The environment variable of a worker that names the board it measures on; its own machine if not set.
BOARD_VARIABLE = "INGOT_BOARD"
_ADDRESS = re.compile(r"(?:tcp|tls)://(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_CONNECT_S = 20
#: How long a batch waits for any worker with the board, after the last one went away.
_PATIENCE_S = 120.0


@functools.cache
def source_digest() -> str:
    """What tells one version of ingot from another: SHA-256 of the package's files."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for suffix in ("py", "c", "h") for p in package.rglob(f"*.{suffix}")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class DaskPool:
    """The builders of a cluster, as a `Pool`. Raises OptionError, ToolchainError without `distributed`, BoardError."""

    def __init__(self, address: str) -> None:
        where = f"--cluster {address[:80]}"
        if not _ADDRESS.fullmatch(address):
            allowed = "tcp://host:port or tls://host:port"
            raise OptionError("no address of a cluster", where="--cluster", found=repr(address[:80]), allowed=allowed)
        try:
            import distributed
        except ImportError:
            hint = "pip install 'ingot[cluster]'"
            raise ToolchainError("Dask is not installed", "Python package distributed", hint=hint) from None
        try:
            self._client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            hint = "start one: dask scheduler, and on each machine: dask worker tcp://host:8786 --nthreads 1"
            raise BoardError("no cluster answers", where, str(error)[:200], hint=hint) from None
        self.address = address
        self._executor = self._client.get_executor(pure=False)
        try:
            self._check_workers(where)
        except BaseException:
            self.close()
            raise

    def _check_workers(self, where: str) -> None:
        digests = self._client.run(source_digest, on_error="return")
        if not digests:
            hint = "on each machine: dask worker tcp://host:8786 --nthreads 1"
            raise BoardError("the cluster has no workers", where, hint=hint)
        wrong = sorted(name for name, digest in digests.items() if digest != source_digest())
        if wrong:
            hint = "install the same version of ingot there"
            raise BoardError(
                "workers of the cluster have another ingot, or none", where, ", ".join(wrong[:5]), hint=hint
            )

    @property
    def workers(self) -> int:
        """How many calls run at once."""
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run the call on some worker; on another one if that is lost. WorkerError where it takes down several."""
        return self.submit_with({}, function, *args, **kwargs)

    def submit_with(
        self, resources: dict[str, float], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """The same, on a worker that has these resources free."""
        import distributed

        inner = self._executor.submit(function, *args, resources=resources or None, **kwargs)
        outer: Future[R] = Future()

        def finish(done: Future[R]) -> None:
            if done.cancelled() or not outer.set_running_or_notify_cancel():
                outer.cancel()
                return
            error = done.exception()
            if isinstance(error, distributed.KilledWorker):
                error = WorkerError("a builder ended under its work", where=self.address, found=str(error)[:200])
            if error is None:
                outer.set_result(done.result())
            else:
                outer.set_exception(error)

        inner.add_done_callback(finish)
        outer.add_done_callback(lambda done: inner.cancel() if done.cancelled() else None)
        return outer

    def count(self, resource: str) -> int:
        """How many workers have a resource."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return sum(bool(worker.get("resources", {}).get(resource)) for worker in workers)

    def close(self) -> None:
        """Leave the cluster, which goes on; calls that have not ended are cancelled."""
        self._executor.shutdown(wait=False)
        self._client.close()

    def __enter__(self) -> DaskPool:
        """The pool itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self.close()


def _measure(data: bytes, arguments: tuple[str, ...], timeout_s: float, fields: dict[str, Any]) -> Outcome:
    """On a worker: run an executable on the worker's board."""
    from dataclasses import replace

    from ingot.target import Target

    board = open_board(os.environ.get(BOARD_VARIABLE, "local"), Target.model_validate(fields))
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        executable = Path(folder) / "run"
        executable.write_bytes(data)
        executable.chmod(0o700)
        outcome = board.run(executable, arguments, timeout_s)
    return replace(outcome, board=f"{board.name} of {os.uname().nodename}")


def _probe(fields: dict[str, Any]) -> str:
    """On a worker: look at the worker's board."""
    from ingot.target import Target

    return open_board(os.environ.get(BOARD_VARIABLE, "local"), Target.model_validate(fields)).probe()


class ClusterBoard:
    """The boards of a target behind a cluster, as one: workers with the target's name as a resource."""

    unit: Unit = "ns"

    def __init__(self, pool: DaskPool, target: Target) -> None:
        self._pool = pool
        self._resources = {target.name: 1.0}
        self._fields = target.model_dump()
        self._target = target
        self.name = f"{pool.address} {target.name}"

    @property
    def size(self) -> int:
        """How many batches run at once."""
        return max(1, self._pool.count(self._target.name))

    def probe(self) -> str:
        """Look at one of the boards. Raises BoardError where no worker has one."""
        where = f"--cluster {self._pool.address}"
        count = self._pool.count(self._target.name)
        if not count:
            hint = f'on the machine next to the board: dask worker ... --nthreads 1 --resources "{self._target.name}=1"'
            raise BoardError(f"no worker of the cluster has a board of {self._target.name}", where, hint=hint)
        text = self._pool.submit_with(self._resources, _probe, self._fields).result()
        return f"{count} behind {self._pool.address}: {text}"

    def run(self, executable: Path, arguments: Sequence[str], timeout_s: float) -> Outcome:
        """Run it on a board that is free; waits while all are busy, and for `_PATIENCE_S` while there is none."""
        call = (executable.read_bytes(), tuple(arguments), timeout_s, self._fields)
        future = self._pool.submit_with(self._resources, _measure, *call)
        seen = time.monotonic()
        while True:
            try:
                return future.result(timeout=2)
            except FutureTimeoutError:
                now = time.monotonic()
                seen = now if self._pool.count(self._target.name) else seen
                if now - seen > _PATIENCE_S:
                    future.cancel()
                    return Outcome("lost", (), "no worker of the cluster has such a board any more")
            except WorkerError as error:
                return Outcome("lost", (), str(error.found or error.what))
