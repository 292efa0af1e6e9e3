"""TFLite models of one integer LSTM, with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from frontend.tiny_models import Op, Tensor, tflite_of


@dataclass(frozen=True)
class IntegerLstm:
    """An LSTM of 8-bit activations and a 16-bit cell state; `single` is the operator of one step."""

    batch: int = 2
    steps: int = 4
    width: int = 5
    units: int = 6
    outputs: int = 0  # 0: no projection
    cifg: bool = False
    peephole: bool = False
    norm: bool = False
    time_major: bool = False
    single: bool = False
    cell_clip: float = 0.0
    projection_clip: float = 0.0
    projection_bias: bool = False
    cell_scale: float = 2.0**-11
    seed: int = 0

    @property
    def operator(self) -> str:
        """The operator's name in the schema."""
        return "LSTM" if self.single else "UNIDIRECTIONAL_SEQUENCE_LSTM"

    @property
    def shape(self) -> tuple[int, ...]:
        """The input's shape."""
        if self.single:
            return self.batch, self.width
        return (self.steps, self.batch, self.width) if self.time_major else (self.batch, self.steps, self.width)

    def feed(self, seed: int = 0) -> np.ndarray:
        """Random input."""
        return np.random.default_rng(seed).integers(-128, 128, self.shape).astype(np.int8)

    def parts(self) -> tuple[list[Tensor], Op]:
        """The tensors (the first is the input, the last the output) and the operator."""
        random = np.random.default_rng(self.seed)
        tensors: list[Tensor] = []
        out = self.outputs or self.units

        def add(tensor: Tensor) -> int:
            tensors.append(replace(tensor, name=f"t{len(tensors)}"))
            return len(tensors) - 1

        def whole(shape: tuple[int, ...], dtype: str, most: int, scale: float) -> int:
            data = random.integers(-most, most + 1, shape).astype(dtype)
            return add(Tensor("", shape, dtype, data, (scale,)))

        def four(shape: tuple[int, ...], dtype: str, most: int, low: float, high: float) -> list[int]:
            scales = random.uniform(low, high, 4)
            return [
                -1 if self.cifg and place == 0 else whole(shape, dtype, most, float(scales[place]))
                for place in range(4)
            ]

        x = add(Tensor("", self.shape, "int8", None, (0.02,), (int(random.integers(-20, 20)),)))
        weights = four((self.units, self.width), "int8", 127, 0.002, 0.01)
        recurrent = four((self.units, out), "int8", 127, 0.002, 0.01)
        peepholes = [-1] * 3
        if self.peephole:
            peepholes = [
                -1 if self.cifg and place == 0 else whole((self.units,), "int16", 32767, 2e-5) for place in range(3)
            ]
        biases = four((self.units,), "int32", 3000, 1e-4, 1e-4)
        projection = [-1, -1]
        if self.outputs:
            projection[0] = whole((out, self.units), "int8", 127, 0.01)
            if self.projection_bias:
                projection[1] = whole((out,), "int32", 2000, 1e-4)
        zero = int(random.integers(-30, 30))
        h = add(Tensor("", (self.batch, out), "int8", None, (0.0078,), (zero,), variable=True))
        c = add(Tensor("", (self.batch, self.units), "int16", None, (self.cell_scale,), variable=True))
        norms = four((self.units,), "int16", 32767, 2e-5, 5e-5) if self.norm else []
        between = [
            add(Tensor("", (0,), "int16", None, (float(random.uniform(0.0002, 0.0006)),), (0,))) for _ in range(4)
        ]
        between.append(add(Tensor("", (0,), "int8", None, (0.0075,), (int(random.integers(-30, 30)),))))
        last = (*self.shape[:-1], out)
        y = add(Tensor("", last, "int8", None, (0.0078,), (zero,)))
        fields = {"FusedActivationFunction": 4, "CellClip": self.cell_clip, "ProjClip": self.projection_clip}
        if not self.single:
            fields["TimeMajor"] = int(self.time_major)
        inputs = (x, *weights, *recurrent, *peepholes, *biases, *projection, h, c, *norms)
        options = "LSTMOptions" if self.single else "UnidirectionalSequenceLSTMOptions"
        return tensors, Op(self.operator, inputs, (y,), options, fields, intermediates=tuple(between))

    def model(self) -> bytes:
        """The file."""
        tensors, op = self.parts()
        return tflite_of(tensors, [op], [0], [len(tensors) - 1])
