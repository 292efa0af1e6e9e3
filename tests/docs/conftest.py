"""What the documentation tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import train_digits


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained digits.onnx."""
    x, y, _, _ = train_digits.load()
    *_, (_, _, network) = train_digits.train(x, y, epochs=4)
    path = tmp_path_factory.mktemp("digits") / "digits.onnx"
    train_digits.save_onnx(network, path)
    return path


@pytest.fixture(scope="session")
def shell(repo: Path) -> dict[str, str]:
    """The environment of a user who activated .venv: `python` and `ingot` are those that run this test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(repo / "compiler"), "COLUMNS": "120"}
