"""Writes well-known architectures as ONNX with seeded random weights, for timing and for checking values.

usage: make_models.py FOLDER [resnet50] [resnet18] [mobilenet_v2]

Input `x`, float32, 1 x 3 x 224 x 224; output `y`, float32, 1 x 1000 logits. Convolutions carry He weights and are
followed by BatchNormalization nodes, as frameworks export them. The batch norms scale the last convolution of every
residual branch down, as trained networks do, so that values keep a sane size through the depth and an error in any
layer shows at the output. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

SEED = 2024


class Builder:
    """Collects nodes and weights; every method adds layers to tensor `x` and returns the new tensor's name."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:  # noqa: ANN401 - as in onnx
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(
        self, x: str, name: str, ci: int, co: int, kernel: int, stride: int = 1, groups: int = 1, scale: float = 1.0
    ) -> str:
        """Convolution and batch norm. `scale` multiplies the batch norm's gamma."""
        fan_in = ci // groups * kernel * kernel
        w = self.rng.standard_normal((co, ci // groups, kernel, kernel)) * np.sqrt(2.0 / fan_in)
        out = self.node(
            "Conv",
            [x, self.weight(f"{name}.weight", w)],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )
        normal = f"{name}_norm"
        statistics = {
            "gamma": scale * self.rng.uniform(0.8, 1.2, co),
            "beta": 0.1 * self.rng.standard_normal(co),
            "mean": 0.1 * self.rng.standard_normal(co),
            "var": self.rng.uniform(0.8, 1.2, co),
        }
        names = [self.weight(f"{normal}.{k}", v) for k, v in statistics.items()]
        return self.node("BatchNormalization", [out, *names], normal, epsilon=1e-5)

    def relu(self, x: str, name: str) -> str:
        return self.node("Relu", [x], name)

    def relu6(self, x: str, name: str) -> str:
        if not any(w.name == "six" for w in self.weights):
            self.weight("zero", np.float32(0).reshape(()))
            self.weight("six", np.float32(6).reshape(()))
        return self.node("Clip", [x, "zero", "six"], name)

    def classifier(self, x: str, channels: int) -> str:
        pooled = self.node("GlobalAveragePool", [x], "pool")
        flat = self.node("Flatten", [pooled], "flatten", axis=1)
        w = self.weight("dense.weight", self.rng.standard_normal((1000, channels)) * np.sqrt(1.0 / channels))
        b = self.weight("dense.bias", 0.1 * self.rng.standard_normal(1000))
        return self.node("Gemm", [flat, w, b], "dense", transB=1)

    def model(self, name: str, y: str) -> onnx.ModelProto:
        self.nodes[-1].output[0] = "y"
        shape = [1, 3, 224, 224]
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def resnet(depths: tuple[int, ...], bottleneck: bool, name: str, seed: int) -> onnx.ModelProto:
    """ResNet (He et al. 2015); the stride lies in the 3x3 convolution, as in torchvision."""
    b = Builder(seed)
    x = b.relu(b.conv("x", "stem", 3, 64, 7, stride=2), "stem_relu")
    x = b.node("MaxPool", [x], "stem_pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, (mid, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True), 1):
        for block in range(depth):
            n = f"layer{stage}_{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = mid * 4 if bottleneck else mid
            if bottleneck:
                y = b.relu(b.conv(x, f"{n}_conv1", channels, mid, 1), f"{n}_relu1")
                y = b.relu(b.conv(y, f"{n}_conv2", mid, mid, 3, stride), f"{n}_relu2")
                y = b.conv(y, f"{n}_conv3", mid, out, 1, scale=0.3)
            else:
                y = b.relu(b.conv(x, f"{n}_conv1", channels, mid, 3, stride), f"{n}_relu1")
                y = b.conv(y, f"{n}_conv2", mid, out, 3, scale=0.3)
            if stride != 1 or channels != out:
                x = b.conv(x, f"{n}_skip", channels, out, 1, stride)
            x = b.relu(b.node("Add", [y, x], f"{n}_add"), f"{n}_relu")
            channels = out
    return b.model(name, b.classifier(x, channels))


def mobilenet_v2(seed: int) -> onnx.ModelProto:
    """MobileNetV2 (Sandler et al. 2018), width 1.0."""
    b = Builder(seed)
    x = b.relu6(b.conv("x", "stem", 3, 32, 3, stride=2), "stem_relu")
    channels = 32
    settings = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    for stage, (expand, out, depth, first_stride) in enumerate(settings, 1):
        for block in range(depth):
            n, stride, hidden = f"block{stage}_{block}", first_stride if block == 0 else 1, channels * expand
            y = x
            if expand != 1:
                y = b.relu6(b.conv(y, f"{n}_expand", channels, hidden, 1), f"{n}_relu1")
            y = b.relu6(b.conv(y, f"{n}_depthwise", hidden, hidden, 3, stride, groups=hidden), f"{n}_relu2")
            residual = stride == 1 and channels == out
            y = b.conv(y, f"{n}_project", hidden, out, 1, scale=0.5 if residual else 1.0)
            x = b.node("Add", [x, y], f"{n}_add") if residual else y
            channels = out
    x = b.relu6(b.conv(x, "head", channels, 1280, 1), "head_relu")
    return b.model("mobilenet_v2", b.classifier(x, 1280))


MODELS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "resnet50": lambda seed: resnet((3, 4, 6, 3), True, "resnet50", seed),
    "resnet18": lambda seed: resnet((2, 2, 2, 2), False, "resnet18", seed),
    "mobilenet_v2": mobilenet_v2,
}


def write(name: str, folder: Path, seed: int = SEED) -> Path:
    """Write MODELS[name] to folder/name.onnx and return that path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    partial = path.with_suffix(".partial")
    onnx.save(MODELS[name](seed), partial)
    partial.replace(path)
    return path


def main() -> None:
    """Write the models named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Write benchmark architectures as ONNX with seeded weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all by default")
    args = parser.parse_args()
    for name in args.names or MODELS:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(MODELS)}")
        print(write(name, args.folder))


if __name__ == "__main__":
    main()
