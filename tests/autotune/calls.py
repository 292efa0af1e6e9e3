"""Functions that pools run in their workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def square(x: int) -> int:
    return x * x


def fail(text: str) -> None:
    raise ValueError(text)


class UnpicklableError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


def fail_oddly() -> None:
    raise UnpicklableError(1, 2)


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def die_once(flag: str, x: int) -> int:
    """End the worker the first time, as a machine that goes away does."""
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def doze(seconds: float, x: int) -> int:
    time.sleep(seconds)
    return x


def chatter(x: int) -> int:
    """Print where the answers would be."""
    print("hello from a library", flush=True)
    os.write(1, b"and from its C part\n")
    return x
