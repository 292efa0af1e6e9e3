"""Asks a module of this package in a process of its own: a crash or a hang costs an answer, not the compilation."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TIME_LIMIT_S = 180


class Question:
    """`python -m module arguments`, at work while this process goes on; `close` ends it, answered or not.

    Its standard input is the request as JSON. answer: the .npz file that the module writes; its folder holds what the
    module reads and what it says. Raises OSError where it cannot be started.
    """

    def __init__(self, module: str, request: Mapping[str, Any], *arguments: Path, answer: Path) -> None:
        self._answer, self._errors = answer, answer.with_suffix(".errors")
        package_root = str(Path(__file__).resolve().parent.parent.parent)
        python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        question = answer.with_suffix(".request")
        question.write_text(json.dumps(request), encoding="utf-8")
        with question.open("rb") as stdin, self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": python_path},
            )
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of `answer`.

        Raises ValueError with the module's last word where it fails, subprocess.TimeoutExpired after TIME_LIMIT_S,
        OSError.
        """
        status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        if status != 0 or not self._answer.exists():
            said = self._errors.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [line.strip() for line in said if line.strip()]
            raise ValueError(lines[-1][:200] if lines else f"it ended with status {status}")
        with np.load(self._answer, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def close(self) -> None:
        """End the process, if it still runs."""
        self._process.kill()
        self._process.wait()


def ask(module: str, request: Mapping[str, Any], *arguments: Path, answer: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Ask and wait; see `Question`."""
    with contextlib.closing(Question(module, request, *arguments, answer=answer)) as question:
        return question.arrays()
