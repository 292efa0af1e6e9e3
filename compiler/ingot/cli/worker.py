"""The process of one engine: `python -m ingot.cli.worker ENGINE MODEL THREADS INPUTS.npz`.

It answers one JSON line per line on standard input: {"run": n} measures n runs, {"inputs": "F.npz"} reads other
inputs, {"outputs": "F.npz"} stores the outputs. Its first line says that the model is loaded, or {"error": ...}
that it is not. An engine that crashes takes only this process with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ingot.cli.engines import Engine


def _rss() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _die_with_parent() -> None:
    """Ask Linux to end this process with its parent, however that ends: a stopped process would stay for ever."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _read(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _measure(run: Any, count: int) -> list[float]:  # noqa: ANN401 - a Runner of engines.py
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def serve(engines: Mapping[str, Engine]) -> int:
    """Load the model that the command line names with one of the engines, and answer until standard input ends."""
    _die_with_parent()
    # Engines print what they like to standard output, so it becomes standard error, and a copy carries the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:  # noqa: ANN401 - whatever JSON takes
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    engine, model, threads, feeds = sys.argv[1:]
    try:
        inputs = _read(feeds)
        before = _rss()
        create = engines[engine](Path(model), int(threads), inputs)
        start = time.perf_counter()
        run = create()
        load = time.perf_counter() - start
        outputs, latest = run(), True  # whether they are what a run would give now
        say(ready=True, load_s=load, rss=_rss() - before)
        for line in sys.stdin:
            request = json.loads(line)
            if "run" in request:
                seconds, latest = _measure(run, int(request["run"])), False
                say(seconds=seconds, rss=_rss() - before)
            elif "inputs" in request:
                inputs.update(_read(request["inputs"]))
                latest = False
                say(done=True)
            else:
                # A model that keeps variables must not run more often than it is asked.
                outputs, latest = outputs if latest else run(), True
                # By place, and bfloat16 as its bits: np.savez has no name for it.
                plain = [a.view(np.uint16) if a.dtype.name == "bfloat16" else a for a in outputs]
                np.savez(request["outputs"], *plain)
                say(done=True)
    except ImportError as error:
        say(error=str(error), missing=True)
    except Exception as error:  # an engine raises what it likes; the parent tells the user
        say(error=str(error) or type(error).__name__)
    return 0


if __name__ == "__main__":
    from ingot.cli.engines import ENGINES

    sys.exit(serve(ENGINES))
