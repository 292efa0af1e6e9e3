"""Each shared model is compiled once a session, and each file of stored data is read once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ingot
from frontend.shared_cases import CASES, Case


class _Stored(dict):
    """The arrays of an .npz file, as `numpy.load` gives them, in memory."""

    def __enter__(self) -> _Stored:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def _files() -> dict[str, Any]:
    return {}


@pytest.fixture(autouse=True)
def read_files_once(monkeypatch: pytest.MonkeyPatch, shared_models: Path, _files: dict[str, Any]) -> None:
    """The cases open their .npz for every run: 5,000 times for the digits."""
    load = np.load

    def load_once(path: Any, *args: Any, **options: Any) -> Any:
        if not str(path).startswith(str(shared_models)) or Path(path).suffix != ".npz":
            return load(path, *args, **options)
        key = str(path)
        if key not in _files:
            with load(path, *args, **options) as data:
                _files[key] = _Stored(data)
        return _files[key]

    monkeypatch.setattr(np, "load", load_once)


@dataclass(frozen=True)
class Built:
    """A compiled model: where it is, what it says about itself, and how its compilation went."""

    case: Case
    path: Path
    metadata: dict[str, Any]
    seconds: float
    transposes: int
    library: bytes

    @property
    def ratio(self) -> float:
        """Arena over the lower bound on the source graph (1 where neither needs a byte)."""
        return self.metadata["arena_bytes"] / max(1, self.metadata["source"]["peak_bytes"])


Build = Callable[..., Built]


def case_of(name: str) -> Case:
    """The case whose file's name contains `name`."""
    (case,) = [case for case in CASES if name in case.file]
    return case


@pytest.fixture(scope="session")
def build(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A function (case, target="native") -> Built."""
    cache: dict[tuple[str, str], Built] = {}

    def get(case: Case, target: str = "native") -> Built:
        key = (case.file, target)
        if key not in cache:
            texts: dict[str, str] = {}
            start = time.perf_counter()
            artifact = ingot.compile(
                shared_models / case.file,
                target=target,
                shape=case.shape,
                selftest=False,
                print_ir_after=["fold_layout"],
                show_ir=texts.__setitem__,
            )
            seconds = time.perf_counter() - start
            path = artifact.save(tmp_path_factory.mktemp("model") / f"{artifact.name}.so")
            # What puts the phases of a transposed convolution together moves whole rows, and belongs to its result.
            phases = texts["fold_layout"].count("axes=[0, 1, 3, 2, 4])")
            transposes = texts["fold_layout"].count("R.permute_dims(") - phases
            cache[key] = Built(case, path, artifact.metadata, seconds, transposes, artifact.library)
        return cache[key]

    return get


def run(model: ingot.Model, feeds: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs as a list, whether the model has one or several."""
    out = model(*feeds)
    return list(out) if isinstance(out, tuple) else [out]


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Return max|error| / max|reference|, shapes joined: the files store some outputs without their ones."""
    assert got.size == want.size
    assert np.isfinite(got.astype(np.float64)).all()
    difference = got.astype(np.float64).reshape(want.shape) - want.astype(np.float64)
    return float(np.abs(difference).max() / np.abs(want.astype(np.float64)).max())
