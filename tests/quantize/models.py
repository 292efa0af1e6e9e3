"""A small network with a residual, a depthwise layer, a concatenation and a dense end, and samples for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from frontend.tiny_models import model_of


def small_net(path: Path, seed: int = 0) -> Path:
    """Write `x` [1, 3, 16, 16] -> `y` [1, 5] and return the path."""
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:]))
        spread = random.uniform(0.3, 3.0, (shape[0], *[1] * (len(shape) - 1)))
        return (random.standard_normal(shape) * spread / np.sqrt(fan_in)).astype(np.float32)

    weights = {
        "w1": weight(16, 3, 3, 3),
        "b1": random.standard_normal(16).astype(np.float32),
        "w2": weight(16, 1, 3, 3),
        "b2": random.standard_normal(16).astype(np.float32),
        "w3": weight(16, 16, 1, 1),
        "w4": weight(8, 16, 1, 1),
        "w5": weight(5, 24).T.copy(),
        "b5": random.standard_normal(5).astype(np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1], group=16),
        node("Relu", ["c2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"], "conv3"),
        node("Add", ["c3", "r1"], ["s"]),
        node("Conv", ["s", "w4"], ["c4"], "conv4"),
        node("MaxPool", ["s"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        node("MaxPool", ["c4"], ["p2"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Concat", ["p1", "p2"], ["cat"], axis=1),
        node("GlobalAveragePool", ["cat"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "w5"], ["m"]),
        node("Add", ["m", "b5"], ["y"]),
    ]
    onnx.save(model_of(nodes, {"x": ("float32", (1, 3, 16, 16))}, ["y"], weights), path)
    return path


def small_samples(count: int, seed: int = 1) -> np.ndarray:
    """Samples [count, 3, 16, 16]: smooth random pictures."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, 3, 4, 4))
    return np.kron(coarse, np.ones((4, 4))).astype(np.float32)


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantisation noise in decibels."""
    wanted = reference.astype(np.float64)
    return float(10 * np.log10((wanted**2).sum() / ((wanted - other) ** 2).sum()))
