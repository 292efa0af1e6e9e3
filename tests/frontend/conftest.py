"""Helpers of the frontend's tests: tiny models, and TVM's own virtual machine as judge of what was imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from ingot.frontend import Imported

Runner = Callable[..., list[np.ndarray]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a model (or bytes) in a fresh folder and returns its path."""

    def save(model: onnx.ModelProto | bytes, name: str = "model.onnx") -> Path:
        path = tmp_path / name
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    return save


@pytest.fixture(scope="session")
def run_imported() -> Callable[[Imported], Runner]:
    """A function that builds an imported module with TVM's own lowering, and returns a callable of its inputs."""

    def build(imported: Imported) -> Runner:
        import tvm
        from tvm import relax

        target = tvm.target.Target("llvm")
        machine = relax.VirtualMachine(tvm.compile(imported.module, target=target), tvm.cpu())
        weights = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in imported.weights.values()]

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            inputs = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in arrays]
            return [output.numpy() for output in machine["main"](*inputs, *weights)]

        return run

    return build
