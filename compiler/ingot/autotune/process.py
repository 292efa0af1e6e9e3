"""A program with limits on its time and on what it may write: how every board runs something."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Literal

#: A batch writes a few hundred bytes per candidate; what writes more than this is broken.
MAX_OUTPUT_BYTES = 8 << 20
_KEPT_ERRORS = 16 << 10
_DRAIN_S = 0.5


@dataclass(frozen=True)
class Finished:
    """How a program ended. `status` is its exit status, negative for a signal, as `subprocess` tells it."""

    status: int
    output: bytes
    errors: bytes
    #: Why it was stopped, if it was: it ran too long, or wrote too much.
    stopped: Literal["", "timeout", "output"]

    def lines(self) -> tuple[str, ...]:
        """The whole lines of its output; what a crash left without an end of line is no line."""
        text, _, _ = self.output.rpartition(b"\n")
        return tuple(line.decode("utf-8", "replace") for line in text.split(b"\n")) if text else ()

    def last_error(self) -> str:
        """The last line of its standard error, at most 200 characters, safe to print."""
        lines = [line.strip() for line in self.errors.decode("utf-8", "replace").splitlines() if line.strip()]
        return "".join(c for c in lines[-1] if c.isprintable())[:200] if lines else ""


@dataclass
class _Streams:
    """What was read so far, and what is still to be written; `discard` ends the reading of output."""

    pending: memoryview
    marker: bytes
    discard: bool = False
    output: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)


def run_limited(
    command: Sequence[str],
    *,
    timeout_s: float,
    feed: bytes | None = None,
    grace_s: float = 0,
    marker: bytes = b"",
    start_s: float = 0,
    cpu_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run `command` in a process group of its own; on timeout, too much output or an exception, the group is killed.

    feed: bytes for its standard input, which then stays open to the end; None for an empty standard input.
    grace_s: after the timeout, standard input is closed first, and the program has so long to end by itself.
    marker, start_s: `timeout_s` counts from the moment this text is in its standard error; until then `start_s` counts.
    cpu_s: seconds of CPU time after which Linux ends it, even where this process was killed before.
    environment: variables set beside this process's own.
    Raises OSError where the program cannot be started.
    """
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    streams = _Streams(memoryview(feed or b""), marker)
    stopped: Literal["", "timeout", "output"] = ""
    try:
        if cpu_s is not None:
            limit = max(1, int(cpu_s) + 1)
            # It may have ended already.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (limit, limit + 5))
        if marker:
            stopped = _exchange(process, streams, time.monotonic() + start_s)
        if not stopped:
            streams.marker = b""
            stopped = _exchange(process, streams, time.monotonic() + timeout_s)
        if stopped and grace_s > 0:
            streams.pending, streams.discard = memoryview(b""), True
            _close(process.stdin)
            _exchange(process, streams, time.monotonic() + grace_s)
    finally:
        _end(process, grace_s)
    return Finished(process.returncode, bytes(streams.output), bytes(streams.errors), stopped)


def _close(pipe: IO[bytes] | None) -> None:
    # The other end may be gone.
    with contextlib.suppress(OSError):
        if pipe is not None:
            pipe.close()


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Leave nothing behind: first by closing its standard input, if it ends by that, then by a signal."""
    _close(process.stdin)
    try:
        if process.poll() is None and grace_s > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
    finally:  # the user may be impatient
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _close(process.stdout)
        _close(process.stderr)


def _exchange(process: subprocess.Popen[bytes], streams: _Streams, deadline: float) -> Literal["", "timeout", "output"]:
    """Feed and read until the program has ended or said the marker (""), or must be stopped (why)."""
    with selectors.DefaultSelector() as selector:
        for pipe, sink in ((process.stdout, streams.output), (process.stderr, streams.errors)):
            if pipe is not None and not pipe.closed:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, sink)
        if process.stdin is not None and streams.pending:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        reading, kept = 2, len(streams.output)
        ended: float | None = None
        while reading:
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            # A child of the program may keep the pipes open after its end.
            if process.poll() is not None:
                ended = now if ended is None else ended
                if now - ended > _DRAIN_S:
                    break
            for key, _ in selector.select(min(0.1, deadline - now)):
                if key.data is None:
                    _feed(selector, key.fileobj, streams)  # type: ignore[arg-type] # registered above: a pipe
                elif not _read(key.fd, key.data):
                    selector.unregister(key.fileobj)
                    reading -= 1
            if streams.discard:
                del streams.output[kept:]
            elif len(streams.output) > MAX_OUTPUT_BYTES:
                return "output"
            if streams.marker and streams.marker in streams.errors:
                return ""
            del streams.errors[:-_KEPT_ERRORS]
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return "timeout"
        time.sleep(0.005)
    return ""


def _feed(selector: selectors.BaseSelector, pipe: IO[bytes], streams: _Streams) -> None:
    try:
        streams.pending = streams.pending[os.write(pipe.fileno(), streams.pending[: 1 << 16]) :]
    except BlockingIOError:
        return
    except OSError:  # the program no longer reads; how it ended says why
        streams.pending = memoryview(b"")
    if not streams.pending:
        selector.unregister(pipe)


def _read(descriptor: int, sink: bytearray) -> bool:
    """Read what is there; False at the end."""
    try:
        data = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return True
    sink += data
    return bool(data)
