"""Artifacts as files, fresh for each test: a loaded file must not be written to again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ingot.runtime.loader import Model, load
from loader.artifacts import library, write


@pytest.fixture
def demo_so(tmp_path: Path) -> Path:
    """The hand-made model as a file of this test's own."""
    return write(tmp_path / "demo.so", library())


@pytest.fixture
def demo(demo_so: Path) -> Model:
    """The hand-made model, loaded, on one thread."""
    return load(demo_so, threads=1)


@pytest.fixture
def x() -> np.ndarray:
    """Its first input."""
    return np.random.default_rng(5).standard_normal((97, 33)).astype(np.float32)


@pytest.fixture
def k() -> np.ndarray:
    """Its second input."""
    return np.array([10, 20, 30], np.int64)
