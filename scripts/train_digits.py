"""Trains a small convolutional network on scikit-learn's bundled digits, in seconds, with numpy alone.

usage: train_digits.py FOLDER      writes digits.onnx and heldout.npz (x, y) there

The 1,797 images are 8 x 8 pixels, grey, 0 to 16. A fifth of them is held out and never trained on. The network:
conv 3x3 (16) - relu - max pool 2x2 - conv 3x3 (32) - relu - dense (10). Its input is `image`, float32, 1 x 1 x 8 x 8,
pixels divided by 16; its output is `scores`, float32, 1 x 10, the logits of the ten digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
SEED = 7
HELD_OUT = 360
EPOCHS = 15
BATCH = 64


def load(seed: int = SEED) -> tuple[Array, Labels, Array, Labels]:
    """Return (train images, train labels, held-out images, held-out labels); images are N x 1 x 8 x 8 in [0, 1]."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = (data[order].reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)
    y = labels[order].astype(np.int64)
    return x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT]


def patches(x: Array) -> Array:
    """Return the 3x3 neighbourhoods, zero padded, of N x C x H x W: (N, H, W, C * 9). (im2col)"""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    view = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.ascontiguousarray(view.transpose(0, 2, 3, 1, 4, 5)).reshape(n, h, w, c * 9)


def unpatch(columns: Array, channels: int) -> Array:
    """Add neighbourhoods back to where they came from: the transpose of `patches`. (col2im)"""
    n, h, w, _ = columns.shape
    parts = columns.reshape(n, h, w, channels, 3, 3)
    padded = np.zeros((n, channels, h + 2, w + 2), np.float32)
    for i in range(3):
        for j in range(3):
            padded[:, :, i : i + h, j : j + w] += parts[..., i, j].transpose(0, 3, 1, 2)
    inner: Array = padded[:, :, 1:-1, 1:-1]
    return inner


class Network:
    """The network, its gradients and its Adam state."""

    def __init__(self, rng: np.random.Generator) -> None:
        def he(*shape: int) -> Array:
            w: Array = (rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
            return w

        self.weights: dict[str, Array] = {
            "conv1.weight": he(16, 1, 3, 3),
            "conv1.bias": np.zeros(16, np.float32),
            "conv2.weight": he(32, 16, 3, 3),
            "conv2.bias": np.zeros(32, np.float32),
            "dense.weight": he(10, 32 * 4 * 4),
            "dense.bias": np.zeros(10, np.float32),
        }
        self._first = {k: np.zeros_like(v) for k, v in self.weights.items()}
        self._second = {k: np.zeros_like(v) for k, v in self.weights.items()}
        self._step = 0

    def _conv(self, name: str, columns: Array) -> Array:
        w = self.weights[f"{name}.weight"]
        out: Array = columns @ w.reshape(len(w), -1).T + self.weights[f"{name}.bias"]
        moved: Array = out.transpose(0, 3, 1, 2)
        return moved

    def forward(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """Return the logits (N x 10) and what the backward step needs."""
        n = len(x)
        columns1 = patches(x)
        a1 = np.maximum(self._conv("conv1", columns1), 0)
        quads = a1.reshape(n, 16, 4, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, 16, 4, 4, 4)
        pooled = quads.max(-1)
        columns2 = patches(pooled)
        a2 = np.maximum(self._conv("conv2", columns2), 0)
        flat = a2.reshape(n, -1)
        logits: Array = flat @ self.weights["dense.weight"].T + self.weights["dense.bias"]
        return logits, {"columns1": columns1, "a1": a1, "quads": quads, "columns2": columns2, "a2": a2, "flat": flat}

    def gradients(self, x: Array, y: Labels) -> tuple[float, dict[str, Array]]:
        """Return the mean cross entropy of a batch and its gradient for every weight."""
        n = len(x)
        logits, seen = self.forward(x)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        loss = float(-np.log(p[np.arange(n), y] + 1e-12).mean())
        d_logits = p
        d_logits[np.arange(n), y] -= 1
        d_logits /= n
        g: dict[str, Array] = {"dense.weight": d_logits.T @ seen["flat"], "dense.bias": d_logits.sum(0)}
        d2 = (d_logits @ self.weights["dense.weight"]).reshape(seen["a2"].shape) * (seen["a2"] > 0)
        d_columns2 = self._conv_gradients("conv2", d2, seen["columns2"], g)
        d_pooled = unpatch(d_columns2, 16)
        # The gradient goes to the largest of each 2x2 square, shared where several are equal.
        largest = seen["quads"] == seen["quads"].max(-1, keepdims=True)
        d_quads = d_pooled[..., None] * largest / largest.sum(-1, keepdims=True)
        d1 = d_quads.reshape(n, 16, 4, 4, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, 16, 8, 8)
        self._conv_gradients("conv1", d1 * (seen["a1"] > 0), seen["columns1"], g)
        return loss, g

    def _conv_gradients(self, name: str, d: Array, columns: Array, g: dict[str, Array]) -> Array:
        w = self.weights[f"{name}.weight"]
        rows = d.transpose(0, 2, 3, 1)
        flat = rows.reshape(-1, rows.shape[-1])
        g[f"{name}.weight"] = (flat.T @ columns.reshape(len(flat), -1)).reshape(w.shape)
        g[f"{name}.bias"] = flat.sum(0)
        back: Array = rows @ w.reshape(len(w), -1)
        return back

    def adam(self, g: dict[str, Array], rate: float) -> None:
        """One step of the Adam optimiser."""
        self._step += 1
        for k, w in self.weights.items():
            self._first[k] = 0.9 * self._first[k] + 0.1 * g[k]
            self._second[k] = 0.999 * self._second[k] + 0.001 * g[k] ** 2
            first = self._first[k] / (1 - 0.9**self._step)
            second = self._second[k] / (1 - 0.999**self._step)
            w -= (rate * first / (np.sqrt(second) + 1e-8)).astype(np.float32)


def train(x: Array, y: Labels, seed: int = SEED, epochs: int = EPOCHS) -> Iterator[tuple[int, float, Network]]:
    """Train from scratch; yield (epoch from 1, mean loss of it, the network) after each epoch."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    rng = np.random.default_rng(seed)
    network = Network(rng)
    for epoch in range(1, epochs + 1):
        rate = 0.004 * (1 - (epoch - 1) / epochs)
        losses = []
        order = rng.permutation(len(x))
        for start in range(0, len(x), BATCH):
            batch = order[start : start + BATCH]
            # The matrices are small: more threads would spend their time waiting for each other.
            with threadpool_limits(1):
                loss, g = network.gradients(x[batch], y[batch])
            network.adam(g, rate)
            losses.append(loss)
        yield epoch, float(np.mean(losses)), network


def save_onnx(network: Network, path: Path) -> None:
    """Write the network as ONNX, opset 17."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["image", "conv1.weight", "conv1.bias"], ["c1"], name="conv1", **conv),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("MaxPool", ["r1"], ["p1"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", "conv2.weight", "conv2.bias"], ["c2"], name="conv2", **conv),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Flatten", ["r2"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "dense.weight", "dense.bias"], ["scores"], name="dense", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(v, k) for k, v in network.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def main() -> None:
    """Train, save, and print the accuracy on the held-out digits."""
    parser = argparse.ArgumentParser(description="Train a digits classifier with numpy; write digits.onnx")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    x, y, held_x, held_y = load()
    for epoch, loss, network in train(x, y):
        right = network.forward(held_x)[0].argmax(1) == held_y
        print(f"epoch {epoch:2d}  loss {loss:.4f}  held-out accuracy {right.mean():.1%}")
    save_onnx(network, folder / "digits.onnx")
    np.savez(folder / "heldout.npz", x=held_x, y=held_y)


if __name__ == "__main__":
    main()
