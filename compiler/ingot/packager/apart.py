"""Asks a module of this package in a process of its own: a crash or a hang costs an answer, not the compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TIME_LIMIT_S = 180


def ask(module: str, request: Mapping[str, Any], *arguments: Path, answer: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Run `python -m module arguments` with the request as JSON on its standard input; return the arrays of `answer`.

    answer: the .npz file that the module writes. Raises ValueError with the module's last word where it fails,
    subprocess.TimeoutExpired after TIME_LIMIT_S, OSError.
    """
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        input=json.dumps(request),
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode != 0 or not answer.exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(lines[-1][:200] if lines else f"it ended with status {done.returncode}")
    with np.load(answer, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
