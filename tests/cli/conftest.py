"""A tiny model, compiled once, and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from cli.models import save, value

Ingot = Callable[..., Result]


@pytest.fixture
def ingot() -> Ingot:
    """`ingot("run", path, ...)`: the command in this process, without a terminal."""

    def call(*arguments: object) -> Result:
        from ingot.cli.main import cli

        return CliRunner().invoke(cli, [str(a) for a in arguments])

    return call


@pytest.fixture
def refused() -> Callable[..., None]:
    """Assert that a result is one clear error: exit code 2, no traceback, nothing on standard output."""

    def check(result: Result, *words: str) -> None:
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.output
        assert "bug" not in result.output
        assert result.stderr.lower().count("error:") == 1
        for word in words:
            assert word in result.stderr

    return check


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, ReLU, mean, matrix, softmax: x [N, 3, 8, 8] -> y [N, 5]."""
    r = np.random.default_rng(0)
    weights = {
        "w": (r.standard_normal((8, 3, 3, 3)) * 0.3).astype(np.float32),
        "d": r.standard_normal((8, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=1),
    ]
    path = tmp_path_factory.mktemp("models") / "tiny.onnx"
    return save(path, nodes, [value("x", ["N", 3, 8, 8])], [value("y", ["N", 5])], weights)


@pytest.fixture(scope="session")
def pair_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs, a float and an integer one, and two outputs, one with a name no file can have."""
    nodes = [
        helper.make_node("Relu", ["a"], ["../up"]),
        helper.make_node("Add", ["k", "k"], ["file"]),
    ]
    path = tmp_path_factory.mktemp("models") / "pair.onnx"
    inputs = [value("a", [2, 3]), value("k", [4], TensorProto.INT64)]
    outputs = [value("../up", [2, 3]), value("file", [4], TensorProto.INT64)]
    return save(path, nodes, inputs, outputs, {})


def _compiled(model: Path, target: str) -> Path:
    import ingot

    return ingot.compile(model, target=target).save(model.with_name(f"{model.stem}-{target}.so"))


@pytest.fixture(scope="session")
def tiny_so(tiny_model: Path) -> Path:
    """The tiny model for this machine."""
    return _compiled(tiny_model, "native")


@pytest.fixture(scope="session")
def pair_so(pair_model: Path) -> Path:
    """The model with two inputs for this machine."""
    return _compiled(pair_model, "native")


@pytest.fixture(scope="session")
def pi_so(tiny_model: Path) -> Path:
    """The tiny model for a Raspberry Pi 4."""
    return _compiled(tiny_model, "raspberry-pi-4")


@pytest.fixture(scope="session")
def x() -> np.ndarray:
    """An input of the tiny model."""
    return np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
