"""TFLite's operators on 8-bit integers, judged bit for bit by LiteRT's reference kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ingot.frontend import Imported, import_model
from ingot.frontend import tflite_tables as tables
from ingot.frontend.normal_form import check_normal_form

from .test_import_tflite import litert
from .tiny_models import Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]


@dataclass
class Branches:
    """Operators on inputs of their own as one model: one compilation judges them all."""

    dtype: str
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(11))

    @property
    def _middle(self) -> int:
        return 128 if self.dtype == "uint8" else 0

    def _add(self, tensor: Tensor) -> int:
        tensor.name = f"t{len(self.tensors)}"
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _stored(self, shape: tuple[int, ...], scale: float, zero: int) -> int:
        return self._add(Tensor("", shape, self.dtype, scale=(scale,), zero_point=(zero + self._middle,)))

    def add(
        self,
        name: str,
        sources: list[tuple[tuple[int, ...], float, int]],
        result: tuple[tuple[int, ...], float, int],
        options: str = "",
        constants: tuple[np.ndarray | Tensor, ...] = (),
        **fields: float,
    ) -> None:
        """Add an operator; a source or result is (shape, scale, zero point as int8 counts)."""
        inputs = [self._stored(*item) for item in sources]
        self.inputs += inputs
        held = [
            self._add(value if isinstance(value, Tensor) else Tensor("", value.shape, str(value.dtype), value))
            for value in constants
        ]
        self.outputs.append(self._stored(*result))
        self.ops.append(Op(name, (*inputs, *held), (self.outputs[-1],), options, dict(fields)))

    def feeds(self) -> list[np.ndarray]:
        """Random values; a row of 256 is every value once."""
        info, found = np.iinfo(self.dtype), []
        for index in self.inputs:
            shape = self.tensors[index].shape
            every = np.arange(info.min, info.max + 1)
            values = every if shape == (1, 256) else self.random.integers(info.min, info.max + 1, shape)
            found.append(values.reshape(shape).astype(self.dtype))
        return found

    def compare(self, path: Path, run_imported: Build) -> None:
        """Every output bit for bit."""
        path.write_bytes(tflite_of(self.tensors, self.ops, self.inputs, self.outputs))
        imported = import_model(path)
        check_normal_form(imported)
        feeds = self.feeds()
        wanted = litert(path, feeds)
        for op, found, want in zip(self.ops, run_imported(imported)(*feeds), wanted, strict=True):
            place = f"{op.name} {[self.tensors[i].shape for i in op.inputs]} {op.fields}"
            assert len(np.unique(want)) > 1 or want.size < 4, f"{place} saturates and judges nothing"
            np.testing.assert_array_equal(found, want, err_msg=place)


SCALES = ((0.02, 0.05, 0.06), (0.1, 0.003, 0.09), (0.05, 0.05, 0.05))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_sums_products_and_means(tmp_path: Path, run_imported: Build, dtype: str) -> None:
    branches, shape = Branches(dtype), (2, 7, 33)
    for left, right, out in SCALES:
        for name, options in (("ADD", "AddOptions"), ("SUB", "SubOptions"), ("MUL", "MulOptions")):
            result = (shape, out / 2 if name == "MUL" else out, -11)
            for activation in (0, 1):
                ends = [(shape, left, -3), (shape, right, 5)]
                branches.add(name, ends, result, options, FusedActivationFunction=activation)
        branches.add("ADD", [(shape, left, -3), ((33,), right, 5)], (shape, out, -11), "AddOptions")
    for size, axes, keep in (
        ((1, 7, 7, 64), (1, 2), 1),
        ((1, 7, 7, 64), (1, 2), 0),
        ((3, 5, 6, 40), (1, 2), 1),
        ((5, 6, 9), (2,), 1),
        ((20, 50), (1,), 0),
    ):
        kept = tuple(d if i not in axes else 1 for i, d in enumerate(size) if keep or i not in axes)
        for scale, out in ((0.05, 0.05), (0.05, 0.03), (0.02, 0.07)):
            over = np.array(axes, np.int32)
            branches.add("MEAN", [(size, scale, 7)], (kept, out, -9), "ReducerOptions", (over,), KeepDims=keep)
    branches.compare(tmp_path / "net.tflite", run_imported)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_pools_softmax_and_functions_of_one_value(tmp_path: Path, run_imported: Build, dtype: str) -> None:
    branches, row = Branches(dtype), (1, 256)
    for kernel, stride, padding in ((2, 2, 1), (3, 1, 0), (3, 2, 0), (9, 9, 1)):
        count = -(-9 // stride) if padding == 0 else (9 - kernel) // stride + 1
        for name, activation in (("AVERAGE_POOL_2D", 0), ("AVERAGE_POOL_2D", 3), ("MAX_POOL_2D", 1)):
            options = {"StrideH": stride, "StrideW": stride, "FilterHeight": kernel, "FilterWidth": kernel}
            options |= {"Padding": padding, "FusedActivationFunction": activation}
            ends = [((1, 9, 9, 12), 0.05, -4)], ((1, count, count, 12), 0.05, -4)
            branches.add(name, *ends, "Pool2DOptions", **options)
    for scale, beta in ((0.01, 1.0), (0.11, 1.0), (0.3, 0.5)):
        for size in ((3, 10), (1, 1001), (2, 3, 33)):
            branches.add("SOFTMAX", [(size, scale, 0)], (size, 1 / 256, -128), "SoftmaxOptions", Beta=beta)
    for scale in (0.02, 0.11):
        branches.add("LOGISTIC", [(row, scale, 5)], (row, 1 / 256, -128))
        branches.add("TANH", [(row, scale, -7)], (row, 1 / 128, 0))
    for scale, out in ((0.05, 0.04), (0.013, 0.029), (0.05, 0.05)):
        branches.add("LEAKY_RELU", [(row, scale, 3)], (row, out, -7), "LeakyReluOptions", Alpha=0.1)
        branches.add("HARD_SWISH", [(row, scale, 3)], (row, out, -7), "HardSwishOptions")
        for name in ("RELU", "RELU6", "RELU_N1_TO_1", "QUANTIZE"):
            branches.add(name, [(row, scale, 3)], (row, out, -7))
    if dtype == "uint8":  # signed inputs must share the result's scale
        ends = [((1, 4, 256), 0.05, -3), ((1, 4, 256), 0.02, 10)]
        branches.add("CONCATENATION", ends, ((1, 8, 256), 0.06, 1), "ConcatenationOptions", Axis=1)
    branches.compare(tmp_path / "net.tflite", run_imported)


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_slopes_below_zero(tmp_path: Path, run_imported: Build, dtype: str) -> None:
    branches, random = Branches(dtype), np.random.default_rng(5)
    kind = "int8" if dtype == "int16" else dtype
    info, zero = np.iinfo(kind), 0 if dtype == "int16" else -11
    for (source, slope, out), shape in zip(SCALES, ((1, 1, 33), (2, 7, 33), (1,)), strict=True):
        data = random.integers(info.min, info.max + 1, shape).astype(kind)
        held = Tensor("", shape, kind, data, (slope,), (int(data.mean()),))
        ends = [((2, 7, 33), source, -zero)], ((2, 7, 33), out * 1.5, zero)
        branches.add("PRELU", *ends, constants=(held,))
        if dtype == "int16":
            branches.add("LEAKY_RELU", *ends, "LeakyReluOptions", Alpha=0.3 if slope > 0.01 else -0.2)
    branches.compare(tmp_path / "net.tflite", run_imported)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_bilinear_resizes(tmp_path: Path, run_imported: Build, dtype: str) -> None:
    branches = Branches(dtype)
    # What LiteRT computes of uint8 in float is exact where no weight needs more than 8 bits.
    sizes = [((4, 5), (8, 10)), ((4, 8), (16, 2)), ((3, 3), (5, 9))] if dtype == "uint8" else []
    sizes = sizes or [((4, 5), (9, 7)), ((8, 9), (3, 4)), ((4, 4), (8, 8)), ((1, 3), (5, 1)), ((7, 2), (7, 33))]
    for before, after in sizes:
        for half, corners in ((0, 0), (1, 0), (0, 1)):
            if dtype == "uint8" and (before == (3, 3)) != bool(corners):
                continue
            ends = [((2, *before, 5), 0.05, 0)], ((2, *after, 5), 0.05, 0)
            fields = {"AlignCorners": corners, "HalfPixelCenters": half}
            branches.add("RESIZE_BILINEAR", *ends, "ResizeBilinearOptions", (np.array(after, np.int32),), **fields)
    branches.compare(tmp_path / "net.tflite", run_imported)


def test_requantisation_to_and_from_sixteen_bits(tmp_path: Path, run_imported: Build) -> None:
    tensors, ops, feeds = [], [], []
    for source, result in (("int8", "int16"), ("int16", "int8"), ("int16", "int16")):
        for scale, out in ((0.05, 0.0007), (0.0011, 0.03), (0.02, 0.02)):
            first, shape = len(tensors), (1, 999)
            tensors.append(Tensor(f"x{first}", shape, source, scale=(scale,), zero_point=(3 * (source == "int8"),)))
            tensors.append(Tensor(f"y{first}", shape, result, scale=(out,), zero_point=(-5 * (result == "int8"),)))
            ops.append(Op("QUANTIZE", (first,), (first + 1,), "QuantizeOptions"))
            info = np.iinfo(source)
            feeds.append(np.linspace(info.min, info.max, 999).astype(source)[None])
    path = tmp_path / "net.tflite"
    path.write_bytes(tflite_of(tensors, ops, list(range(0, len(tensors), 2)), list(range(1, len(tensors), 2))))
    imported = import_model(path)
    for op, found, want in zip(ops, run_imported(imported)(*feeds), litert(path, feeds), strict=True):
        np.testing.assert_array_equal(found, want, err_msg=str(op))


def test_exponentials_are_near_the_function() -> None:
    for scale, beta in ((0.01, 1.0), (0.1, 1.0), (0.5, 2.0)):
        found = tables.exponentials(scale, beta) / 2.0**31
        wanted = np.exp(-beta * scale * np.arange(256))
        assert np.abs(found - wanted).max() < 1e-6
        assert found[0] > 1 - 1e-9 and np.all(np.diff(found) <= 0)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_hard_swish_over_many_scales(write: Write, dtype: str) -> None:
    random = np.random.default_rng(2)
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1).astype(dtype)[None]
    for _ in range(12):
        scale, out = (float(np.float32(v)) for v in np.exp(random.uniform(-6, -1, 2)))
        zero, out_zero = (int(v) + int(info.max + info.min + 1) // 2 for v in random.integers(-60, 60, 2))
        tensors = [
            Tensor("x", (1, 256), dtype, scale=(scale,), zero_point=(zero,)),
            Tensor("y", (1, 256), dtype, scale=(out,), zero_point=(out_zero,)),
        ]
        path = write(tflite_of(tensors, [Op("HARD_SWISH", (0,), (1,), "HardSwishOptions")], [0], [1]), "net.tflite")
        found = tables.hard_swish(tables.Scale(scale, zero, dtype), tables.Scale(out, out_zero, dtype))
        np.testing.assert_array_equal(found, litert(path, [every])[0][0])
