"""Quantised layers of odd sizes as one TFLite model with many branches, and what they must answer, in int64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frontend.tiny_models import Op, Tensor, tflite_of
from ingot.frontend import import_model

Array = np.ndarray


def requantized(sums: Array, ratio: Array, zero_point: int, dtype: str, once: bool) -> Array:
    """Int64 sums times ratio (one for each last index) and the zero point, rounded twice or `once`, as TFLite does."""
    fraction, exponent = np.frexp(np.broadcast_to(ratio, sums.shape[-1:]))
    multiplier, exponent = np.rint(fraction * 2.0**31).astype(np.int64), exponent.astype(np.int64)
    if once:
        whole = (sums * multiplier + (1 << (30 - exponent))) >> (31 - exponent)
    else:
        # A ratio of 1 or more shifts left first.
        high = (sums * (multiplier << np.maximum(exponent, 0)) + (1 << 30)) >> 31
        shift = np.maximum(-exponent, 0)
        half = np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0)
        whole = (high + half - ((high < 0) & (shift > 0))) >> shift
    info = np.iinfo(dtype)
    return np.clip(whole + zero_point, info.min, info.max).astype(dtype)


@dataclass
class Layers:
    """A model of independent quantised layers. Data and weights hold the extreme values of their types."""

    dtype: str
    per_channel: bool = True
    #: Weights whose neighbours fit the instruction that sums two products in 16 bits; of int8 layers.
    pairs: bool = False
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    feeds: list[Array] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    wanted: list[Array] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def _values(self, shape: Sequence[int], dtype: str, least: int | None = None) -> Array:
        """Random values, one in four of them an extreme of the type."""
        info = np.iinfo(dtype)
        low = info.min if least is None else least
        values = self.random.integers(low, info.max + 1, shape)
        extreme = self.random.choice([low, info.max], shape)
        return np.where(self.random.random(shape) < 0.25, extreme, values).astype(dtype)

    def _tensor(self, tensor: Tensor) -> int:
        tensor.name += str(len(self.tensors))
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _layer(
        self, kind: str, x: Array, weight: Array, sums: Array, axis: int, options: tuple[str, dict], faint: float = 1.0
    ) -> None:
        """Add a layer whose sums, without bias, are known; every third channel's scale is multiplied by `faint`."""
        channels, once = sums.shape[-1], kind == "FULLY_CONNECTED"
        count = channels if self.per_channel else 1
        bias = self.random.integers(-3000, 3000, channels).astype(np.int32)
        sums = sums + bias
        data_zero, out_zero = self._zeros()
        scales = self.random.uniform(0.5, 1.5, count).astype(np.float32)
        scales[1::3] *= faint
        out_scale = np.float32(max(1.0, float(np.abs(sums).max()) / 100))
        data_scale = np.float32(0.5)
        if axis == 3 or self.dtype == "int8":
            weight_zero = (0,) * count if self.dtype == "int8" else (self.weight_zero,)
        else:
            weight_zero = (self.weight_zero,)
        source = self._tensor(Tensor("x", x.shape, self.dtype, scale=(float(data_scale),), zero_point=(data_zero,)))
        w = self._tensor(
            Tensor("w", weight.shape, self.dtype, weight, tuple(float(s) for s in scales), weight_zero, axis)
        )
        b = self._tensor(
            Tensor("b", (channels,), "int32", bias, tuple(float(data_scale * s) for s in scales), (0,) * count)
        )
        y = self._tensor(Tensor("y", sums.shape, self.dtype, scale=(float(out_scale),), zero_point=(out_zero,)))
        self.ops.append(Op(kind, (source, w, b), (y,), *options))
        self.inputs.append(source)
        self.outputs.append(y)
        self.feeds.append(x)
        ratio = np.float64(data_scale) * scales.astype(np.float64) / np.float64(out_scale)  # data_scale is a power of 2
        self.wanted.append(requantized(sums, ratio, out_zero, self.dtype, once))

    def _zeros(self) -> tuple[int, int]:
        return (-5, 3) if self.dtype == "int8" else (120, 131)

    @property
    def weight_zero(self) -> int:
        """The zero point of unsigned weights, which makes them nine bits wide."""
        return 121

    def _weights(self, shape: Sequence[int], least: int | None) -> tuple[Array, Array]:
        stored = self._values(shape, self.dtype, least)
        if self.pairs:  # +-64 in every other output channel, changing signs in the rest
            rows = stored.reshape(len(stored), -1)
            rows[::2] = np.clip(rows[::2], -64, 64)
            rows[1::2, ::2], rows[1::2, 1::2] = abs(rows[1::2, ::2]), -abs(rows[1::2, 1::2])
        return stored, stored.astype(np.int64) - (0 if self.dtype == "int8" else self.weight_zero)

    def conv(
        self,
        channels: int,
        out_channels: int,
        size: tuple[int, int] = (5, 9),
        kernel: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        same: bool = True,
        depthwise: bool = False,
        least: int | None = -127,
        faint: float = 1.0,
        groups: int = 1,
    ) -> None:
        """Add a convolution, or a depthwise one (`out_channels` is then a multiple of `channels`)."""
        x = self._values((1, *size, channels), self.dtype)
        shape = (1, *kernel, out_channels) if depthwise else (out_channels, *kernel, channels // groups)
        stored, weight = self._weights(shape, least if self.dtype == "int8" else None)
        centred = x.astype(np.int64) - self._zeros()[0]
        spatial, before = [], []
        for i in range(2):
            span = (kernel[i] - 1) * dilation[i] + 1
            count = -(-size[i] // strides[i]) if same else (size[i] - span) // strides[i] + 1
            total = max((count - 1) * strides[i] + span - size[i], 0) if same else 0
            spatial.append(count)
            before.append(total // 2)
        room = [before[i] + size[i] + kernel[i] * dilation[i] + strides[i] for i in range(2)]
        padded = np.zeros((1, *room, channels), np.int64)
        padded[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]] = centred
        sums = np.zeros((1, *spatial, out_channels), np.int64)
        for ky in range(kernel[0]):
            for kx in range(kernel[1]):
                top, left = ky * dilation[0], kx * dilation[1]
                window = padded[
                    :,
                    top : top + spatial[0] * strides[0] : strides[0],
                    left : left + spatial[1] * strides[1] : strides[1],
                ]
                if depthwise:
                    sums += np.repeat(window, out_channels // channels, 3) * weight[0, ky, kx]
                else:
                    parts = zip(np.split(window, groups, 3), np.split(weight[:, ky, kx], groups), strict=True)
                    sums += np.concatenate([np.einsum("nyxi,oi->nyxo", *part) for part in parts], 3)
        options = {"StrideH": strides[0], "StrideW": strides[1], "Padding": 0 if same else 1}
        options |= {"DilationHFactor": dilation[0], "DilationWFactor": dilation[1]}
        if depthwise:
            kind, table = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
            options["DepthMultiplier"] = out_channels // channels
        else:
            kind, table = "CONV_2D", "Conv2DOptions"
        self._layer(kind, x, stored, sums, 3 if depthwise else 0, (table, options), faint)

    def dense(self, rows: int, k: int, n: int, least: int | None = -127) -> None:
        """Add a product with a constant matrix."""
        x = self._values((rows, k), self.dtype)
        stored, weight = self._weights((n, k), least if self.dtype == "int8" else None)
        sums = (x.astype(np.int64) - self._zeros()[0]) @ weight.T
        self._layer("FULLY_CONNECTED", x, stored, sums, 0, ("FullyConnectedOptions", {}))

    def save(self, folder: Path) -> Path:
        """Write the model."""
        path = folder / "layers.tflite"
        path.write_bytes(tflite_of(self.tensors, self.ops, self.inputs, self.outputs))
        return path

    def imported(self, folder: Path):
        """Write and read the model."""
        return import_model(self.save(folder))

    def compare(self, got: Sequence[Array]) -> None:
        """Every output bit for bit."""
        assert len(got) == len(self.wanted)
        for op, found, wanted in zip(self.ops, got, self.wanted, strict=True):
            shapes = [self.tensors[i].shape for i in op.inputs[:2]]
            assert len(np.unique(wanted)) > 1 or wanted.size < 9, "the case saturates and judges nothing"
            np.testing.assert_array_equal(found, wanted, err_msg=f"{op.name} {shapes} {op.fields}")


#: Sizes around the widths of registers and groups.
SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


def convolutions(dtype: str, per_channel: bool = True, sizes: Sequence[int] = SIZES, pairs: bool = False) -> Layers:
    """Convolutions of many sizes, and dense layers."""
    layers = Layers(dtype, per_channel, pairs)
    for i, c in enumerate(sizes):
        layers.conv(c, sizes[-1 - i])
        layers.conv(sizes[-1 - i], c, kernel=(1, 1), same=False)
        layers.dense((1, 2, 7)[i % 3], c, sizes[(i * 5 + 3) % len(sizes)])
    layers.conv(8, 24, (9, 13), strides=(2, 2))
    layers.conv(4, 8, (5, 6))
    layers.conv(5, 10, (12, 12), dilation=(2, 2), same=False)
    layers.conv(3, 8, (17, 16), kernel=(5, 3), strides=(2, 1))
    layers.conv(1, 20, (9, 21), kernel=(6, 4), strides=(1, 2), dilation=(2, 1))
    layers.conv(16, 16, (4, 4), kernel=(4, 4), same=False)
    layers.conv(16, 9, (3, 7), least=-128)
    layers.conv(8, 16, (3, 7), faint=2.0**-16)  # ratios below 2^-22: the zero point is added last
    layers.conv(8, 16, (3, 7), faint=2.0**-30)
    layers.dense(1, 640, 128)
    layers.dense(3, 33, 10, least=-128)
    return layers


def depthwise(dtype: str, per_channel: bool = True, sizes: Sequence[int] = SIZES) -> Layers:
    """Depthwise convolutions of many sizes; the window's corners lie outside the image."""
    layers = Layers(dtype, per_channel)
    for i, c in enumerate(sizes):
        layers.conv(c, c, (5, (7, 8, 15, 17)[i % 4]), depthwise=True, strides=((1, 1), (2, 2))[i % 2])
    layers.conv(16, 16, (9, 9), kernel=(5, 5), depthwise=True)
    layers.conv(8, 8, (9, 9), kernel=(3, 2), dilation=(2, 2), depthwise=True)
    layers.conv(24, 24, (4, 4), kernel=(4, 4), same=False, depthwise=True)
    layers.conv(32, 32, (5, 6), depthwise=True, least=-128)
    layers.conv(16, 16, (6, 5), kernel=(2, 3), dilation=(1, 2), same=False, depthwise=True)
    layers.conv(3, 12, (5, 6), depthwise=True)
    return layers


def in_groups(dtype: str, per_channel: bool = True, sizes: Sequence[int] = SIZES, pairs: bool = False) -> Layers:
    """Convolutions of several groups of many sizes; also depthwise ones of several results a channel."""
    layers = Layers(dtype, per_channel, pairs)
    for i, c in enumerate(sizes):
        count, other = (2, 3, 4, 5)[i % 4], sizes[-1 - i]
        layers.conv(count * c, count * other, (4, 9), groups=count)
        layers.conv(count * other, count * c, kernel=(1, 1), same=False, groups=count)
    layers.conv(64, 64, (7, 8), groups=16)
    layers.conv(16, 48, (9, 13), strides=(2, 2), groups=2)
    layers.conv(15, 30, (12, 12), dilation=(2, 2), same=False, groups=3)
    layers.conv(6, 16, (17, 16), kernel=(5, 3), strides=(2, 1), groups=2)
    layers.conv(96, 24, (6, 5), kernel=(1, 1), strides=(2, 2), groups=12)
    layers.conv(48, 48, (1, 1), kernel=(1, 1), groups=6)
    layers.conv(32, 18, (3, 7), least=-128, groups=2)
    layers.conv(3, 12, (5, 6), depthwise=True)
    layers.conv(8, 64, (7, 9), strides=(2, 2), depthwise=True)
    return layers
