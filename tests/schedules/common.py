"""Layers of odd sizes as ONNX models with many branches, compiled for a target and compared with ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from onnx import helper

from passes.build import close, finish, normal, onnx_bytes, onnx_state, onnxruntime_outputs
from passes.execute import Executable

#: What this machine can run: its own features, and two older levels of its architecture.
TARGETS = ("native", "x86-64-v3", "x86-64-v2")

#: Sizes around the widths of vector registers (4, 8, 16 floats) and register tiles.
CHANNELS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
WIDTHS = (1, 2, 7, 13, 14, 15, 27, 28, 55, 112)
KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (5, 1), (2, 3), (3, 7))

EPILOGUES = ("none", "bias", "relu", "residual", "clip", "sigmoid", "two-readers", "silu", "gate")

#: Cases per property; INGOT_EXAMPLES asks for more, and then for others each time.
EXAMPLES = int(os.environ.get("INGOT_EXAMPLES", "12"))
property_settings = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="INGOT_EXAMPLES" not in os.environ, print_blob=True
)


@dataclass
class Branches:
    """A model of independent layers, one output each."""

    nodes: list[Any] = field(default_factory=list)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def _name(self, kind: str) -> str:
        return f"{kind}{len(self.outputs)}_{len(self.nodes)}"

    def input(self, shape: Sequence[int]) -> str:
        """Add an input of the model."""
        name = self._name(f"in{len(self.inputs)}_")
        self.inputs[name] = tuple(shape)
        return name

    def weight(self, value: np.ndarray) -> str:
        """Add a constant of the model."""
        name = self._name(f"w{len(self.weights)}_")
        self.weights[name] = value
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node and return its result's name."""
        name = self._name("v")
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def output(self, name: str) -> None:
        """Make a value an output."""
        self.outputs.append(name)

    def finish_with(self, value: str, shape: Sequence[int], epilogue: str) -> None:
        """Add what follows a layer with the result `value` of `shape` (NCHW or [..., N])."""
        channels = shape[1] if len(shape) == 4 else shape[-1]
        vector = (1, channels, 1, 1) if len(shape) == 4 else (channels,)
        if epilogue in ("bias", "relu", "sigmoid"):
            value = self.node("Add", [value, self.weight(normal(vector, 77))])
        if epilogue == "relu":
            value = self.node("Relu", [value])
        if epilogue == "sigmoid":
            value = self.node("Sigmoid", [value])
        if epilogue in (
            "silu",
            "gate",
        ):  # several read the layer's result; of "gate", also what is dear to compute twice
            gate = self.node("Sigmoid", [value])
            value = self.node("Mul", [value, gate])
            value = self.node("Add", [value, gate]) if epilogue == "gate" else value
        if epilogue == "clip":
            value = self.node("Clip", [value, self.weight(np.float32(-0.5)), self.weight(np.float32(0.75))])
        if epilogue == "residual":
            value = self.node("Relu", [self.node("Add", [value, self.input(shape)])])
        if epilogue == "two-readers":
            self.output(self.node("Relu", [value]))
            value = self.node("Mul", [value, self.weight(np.float32(-2))])
        self.output(value)

    def conv(
        self,
        batch: int,
        channels: int,
        out_channels: int,
        size: tuple[int, int],
        kernel: tuple[int, int],
        strides: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilations: tuple[int, int] = (1, 1),
        group: int = 1,
        epilogue: str = "none",
        nhwc: bool = True,
    ) -> None:
        """Add a convolution; `pads` is top, left, bottom, right. nhwc: its input is, so the layer works there."""
        if nhwc:
            x = self.node("Transpose", [self.input((batch, *size, channels))], perm=[0, 3, 1, 2])
        else:
            x = self.input((batch, channels, *size))
        w = self.weight(normal((out_channels, channels // group, *kernel), len(self.weights)) / np.float32(kernel[0]))
        options = {"strides": list(strides), "pads": list(pads), "dilations": list(dilations), "group": group}
        spatial = [
            (size[i] + pads[i] + pads[i + 2] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(2)
        ]
        assert min(spatial) > 0
        self.finish_with(self.node("Conv", [x, w], **options), (batch, out_channels, *spatial), epilogue)

    def matmul(self, lead: Sequence[int], k: int, n: int, epilogue: str = "none") -> None:
        """Add a product with a constant matrix."""
        x = self.input((*lead, k))
        w = self.weight(normal((k, n), len(self.weights)))
        self.finish_with(self.node("MatMul", [x, w]), (*lead, n), epilogue)

    def bytes(self) -> bytes:
        """The ONNX model."""
        return onnx_bytes(self.nodes, self.inputs, self.outputs, self.weights)

    def feeds(self) -> dict[str, np.ndarray]:
        """Seeded inputs."""
        return {name: normal(shape, i) for i, (name, shape) in enumerate(self.inputs.items())}


def check(branches: Branches, folder: Path, target: str = "native", pieces: Sequence[int] = (1,)) -> None:
    """Compile the model for `target` and compare it with ONNX Runtime; every split of the work gives the same bits."""
    model, feeds = branches.bytes(), branches.feeds()
    program = Executable(finish(onnx_state(model, folder, target)), folder)
    compare(program.run(list(feeds.values())), onnxruntime_outputs(model, feeds), branches.outputs)
    first = program.run(list(feeds.values()))
    for count in pieces:
        for a, b in zip(first, program.run(list(feeds.values()), count), strict=True):
            assert a.tobytes() == b.tobytes(), f"{count} pieces give other numbers than one"


def compare(got: Sequence[np.ndarray], want: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Compare output by output."""
    assert len(got) == len(want)
    wrong: Mapping[str, str] = {}
    for name, mine, reference in zip(names, got, want, strict=True):
        try:
            close(mine, reference, 2e-5)
        except AssertionError as failure:
            wrong = {**wrong, name: str(failure)[:200]}
    assert not wrong, wrong
