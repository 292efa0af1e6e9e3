"""Builders: processes that make candidates, on this machine or behind a Dask cluster, with one interface.

A call is a function of a module and arguments, both of which pickle. Its result or its exception comes back; a worker
that dies under it (a compiler that crashes, a machine that goes away) is replaced, and the call runs again elsewhere.
A call that takes down every worker it meets ends with WorkerError, and so does one that never ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from typing import Any, ParamSpec, Protocol, TypeVar

from ingot.errors import WorkerError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

#: How often a call is tried before it is given up.
ATTEMPTS = 3
_LENGTH = struct.Struct("<Q")


class Pool(Protocol):
    """Somewhere to run calls in parallel. Used as a context manager, which ends the workers."""

    @property
    def workers(self) -> int:
        """How many calls run at once."""

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run `function(*args, **kwargs)` on some worker. The future raises what it raises, or WorkerError."""

    def close(self) -> None:
        """End the workers; calls that have not begun are cancelled."""

    def __enter__(self) -> Pool:
        """The pool itself."""

    def __exit__(self, *_exception: object) -> None:
        """Close it."""


def map_unordered(pool: Pool, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[int, R | Exception]]:
    """Run `function` on each item; yield (the item's place, its result or its exception) as they come.

    Leaving the loop early cancels what has not begun.
    """
    places = {pool.submit(function, item): place for place, item in enumerate(items)}
    try:
        for future in as_completed(places):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield places[future], future.result() if error is None else error
    finally:
        for future in places:
            future.cancel()


def in_parallel(calls: Sequence[Callable[[], R]]) -> list[R]:
    """Run calls in threads of this process; return their results in order, or raise the first error.

    One call alone runs in the caller's thread. The threads end with the process, so Ctrl-C does not wait for them.
    """
    if len(calls) == 1:
        return [calls[0]()]
    futures: list[Future[R]] = [Future() for _ in calls]

    def run(call: Callable[[], R], future: Future[R]) -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    for call, future in zip(calls, futures, strict=True):
        threading.Thread(target=run, args=(call, future), daemon=True).start()
    return [future.result() for future in futures]


class LocalPool:
    """Worker processes of this machine. Each is a Python of its own, not a fork: threads and TVM stay whole."""

    def __init__(self, workers: int | None = None, timeout_s: float = 300) -> None:
        """`workers`: as many as this process may use cores, if None. `timeout_s`: of one call."""
        self._workers = workers or len(os.sched_getaffinity(0))
        self._timeout_s = timeout_s
        self._calls: queue.SimpleQueue[tuple[Future[Any], bytes] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._workers)]
        for thread in self._threads:
            thread.start()

    @property
    def workers(self) -> int:
        """How many calls run at once."""
        return self._workers

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run the call on some worker. Raises what pickle raises for arguments that cannot be sent."""
        if self._closed.is_set():
            raise WorkerError("the pool of builders is closed")
        future: Future[R] = Future()
        self._calls.put((future, pickle.dumps((function, args, kwargs))))
        return future

    def close(self) -> None:
        """End the workers; calls that have not begun are cancelled, those that run end with WorkerError."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._calls.get_nowait()
                if call is not None:
                    call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        for process in list(self._running):
            process.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> LocalPool:
        """The pool itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close it."""
        self.close()

    def _serve(self) -> None:
        """The thread of one worker: hands it calls, and starts another when it is gone."""
        process: subprocess.Popen[bytes] | None = None
        while (call := self._calls.get()) is not None:
            future, data = call
            if not future.set_running_or_notify_cancel():
                continue
            left = ATTEMPTS
            while left:
                left -= 1
                try:
                    process = process or self._start()
                    ok, value = _ask(process, data, self._timeout_s)
                    break
                except TimeoutError:
                    ok, value = False, WorkerError("a builder took too long", allowed=f"{self._timeout_s:g} s")
                    left = 0  # it would again
                except (OSError, EOFError, pickle.PickleError) as lost:
                    ok, value = False, WorkerError("a builder ended under its work", found=_how(process, lost))
                self._end(process)
                process = None
                left = 0 if self._closed.is_set() else left
            if ok:
                future.set_result(value)
            else:
                future.set_exception(value)
        self._end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        # The folders this process imports from, so that the worker finds the same functions.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.curdir for p in sys.path)}
        command = [sys.executable, "-m", "ingot.autotune.pool_worker"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._running.add(process)
        if self._closed.is_set():
            process.kill()
        try:
            receive(process.stdout)  # it is ready: its start does not count as time of its first call
        except EOFError:
            self._end(process)
            raise
        return process

    def _end(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is None:
            return
        self._running.discard(process)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()


def _how(process: subprocess.Popen[bytes] | None, error: Exception) -> str:
    if process is None:  # it ended as it was started
        return str(error) or "it does not start"
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = process.wait(1)
        return f"signal {-status}" if status < 0 else f"status {status}"
    return str(error) or type(error).__name__


def send(pipe: Any, data: bytes) -> None:  # noqa: ANN401 - a binary file
    """Write a message: its length, then itself."""
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def receive(pipe: Any) -> bytes:  # noqa: ANN401 - a binary file
    """Read a message. Raises EOFError where the other end is gone."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data: bytes = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _ask(process: subprocess.Popen[bytes], data: bytes, timeout_s: float) -> tuple[bool, Any]:
    """Give a worker a call: (True, its result) or (False, its exception). Raises TimeoutError, or as `receive`."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        send(process.stdin, data)
        answer = receive(process.stdout)
    except (OSError, EOFError):
        if expired.is_set():
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()
    ok, value = pickle.loads(answer)  # noqa: S301 - from a process that this one started
    return bool(ok), value
