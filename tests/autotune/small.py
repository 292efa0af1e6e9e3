"""A small model whose kernels have choices, and its program for a target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import helper

from ingot.autotune.task import prepared
from ingot.frontend import import_model
from ingot.passes.state import State
from ingot.target import load_target
from passes.build import onnx_bytes


def small_model() -> bytes:
    """Convolutions with what follows them in one kernel: a rectifier, x * sigmoid(x), a bias and a sum; a matrix."""
    r = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (r.standard_normal(shape) * 0.3).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "d"], ["c"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["t"]),
        helper.make_node("Conv", ["t", "e", "v"], ["f"]),
        helper.make_node("Add", ["f", "b"], ["g"]),
        helper.make_node("Conv", ["g", "d2"], ["h"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("Sigmoid", ["h"], ["s2"]),
        helper.make_node("Mul", ["h", "s2"], ["i"]),
        helper.make_node("GlobalAveragePool", ["i"], ["p"]),
        helper.make_node("Flatten", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "m"], ["y"]),
    ]
    weights = {
        "w": weight(16, 8, 3, 3),
        "d": weight(16, 1, 3, 3),
        "d2": weight(16, 1, 3, 3),
        "e": weight(16, 16, 1, 1),
        "v": weight(16),
        "m": weight(16, 24),
    }
    return onnx_bytes(nodes, {"x": (1, 8, 12, 12)}, ["y"], weights)


def small_state(folder: Path, target: str = "native") -> State:
    """The model as tasks are cut from it."""
    path = folder / "small.onnx"
    path.write_bytes(small_model())
    imported = import_model(path)
    return prepared(State(imported.module, imported.weights, imported, load_target(target)))
