"""The process of one builder: `python -m ingot.autotune.pool_worker`, started by `ingot.autotune.pool.LocalPool`.

It reads calls from standard input and writes each result to what was standard output, until its parent is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import traceback

from ingot.autotune.pool import receive, send
from ingot.errors import WorkerError


def _die_with_parent() -> None:
    """Ask Linux to end this process with its parent, in the middle of a call too."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _answer(data: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(data)  # noqa: S301 - from the parent, which is the same user's
        return pickle.dumps((True, function(*args, **kwargs)))
    except Exception as error:
        try:
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # noqa: S301 - an exception may pickle and yet not unpickle
        except Exception:
            last = traceback.format_exception_only(error)[-1].strip()[:300]
            return pickle.dumps((False, WorkerError("a builder failed", found=last)))
        return answer


def main() -> int:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the answers
    try:
        send(answers, b"")  # ready
        while True:
            send(answers, _answer(receive(sys.stdin.buffer)))
    except (EOFError, BrokenPipeError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
