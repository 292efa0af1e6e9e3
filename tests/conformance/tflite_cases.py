"""Cases for every TFLite operator: one tiny model each, in every dtype that the operator might have.

A case says what goes in; LiteRT says what is valid, which shapes come out, and the values. `cases()` lists them all.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from frontend.tiny_models import Graph, Op, Tensor, tflite_of

QUANTISED = ("int8", "uint8", "int16")
#: float32 activations with int8 weights.
HYBRID = "hybrid"
KINDS = ("float32", *QUANTISED)
ALL = (*KINDS, "int32", "int64", "bool")
NUMBERS = (*KINDS, "int32", "int64")


@dataclass(frozen=True)
class V:
    """A tensor: an input, a constant (`data`, or `constant` for random values) or a state that the operator keeps.

    dtype: "" is the case's own kind. limits: range of real values, from which the quantisation follows. Weights are
    stored symmetrically; `axis` is that of a scale for each index.
    """

    shape: tuple[int, ...]
    dtype: str = ""
    data: np.ndarray | None = None
    constant: bool = False
    limits: tuple[float, float] = (-4.0, 4.0)
    axis: int | None = None
    state: bool = False
    weights: bool = False
    bias: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class Out:
    """An output: its dtype ("" is the case's own kind) and range of real values (None: quantised as input 0)."""

    dtype: str = ""
    limits: tuple[float, float] | None = (-6.0, 6.0)
    scale: float | None = None
    zero: int = 0


@dataclass(frozen=True)
class Case:
    """One operator with its inputs. alone: it cannot share a model with other cases.

    between: tensors that only tell the scales of what the operator computes inside.
    """

    name: str
    operator: str
    kind: str
    inputs: tuple[V | None, ...]
    outputs: tuple[Out, ...]
    options: str = ""
    fields: Mapping[str, float | str | np.ndarray] = field(default_factory=dict)
    alone: bool = False
    rtol: float = 2e-5
    atol: float = 1e-5
    custom: bytes | None = None
    graphs: tuple[Graph, ...] = ()
    ends: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    between: tuple[V, ...] = ()

    def parts(self, real: bool = False) -> tuple[list[Tensor], Op, list[int]]:
        """The tensors, the operator on them, and which of them are inputs of the model. Outputs have no shape yet.

        real: hybrid weights are the real numbers that they stand for.
        """
        random = np.random.default_rng(zlib.crc32(self.name.encode()))
        tensors: list[Tensor] = []
        places, feeds = [], []
        for given in self.inputs:
            if given is None:
                places.append(-1)
                continue
            places.append(len(tensors))
            if not (given.constant or given.state or given.data is not None):
                feeds.append(len(tensors))
            tensor = self._tensor(given, f"{self.name}/{len(tensors)}", random, tensors)
            if real and self.kind == HYBRID and tensor.scale and tensor.data is not None:
                shape = [1] * len(tensor.shape)
                shape[tensor.axis] = len(tensor.scale)
                numbers = tensor.data.astype(np.float32) * np.array(tensor.scale, np.float32).reshape(shape)
                tensor = Tensor(tensor.name, tensor.shape, "float32", numbers)
            tensors.append(tensor)
        ends = []
        for out in self.outputs:
            ends.append(len(tensors))
            tensors.append(self._output(out, f"{self.name}:{len(ends) - 1}", tensors))
        inside = [len(tensors) + place for place in range(len(self.between))]
        for item in self.between:
            tensors.append(self._tensor(item, f"{self.name}/{len(tensors)}", random, tensors))
        custom = self.operator.removeprefix("custom ") if self.operator.startswith("custom ") else ""
        name = "CUSTOM" if custom else self.operator
        op = Op(name, tuple(places), tuple(ends), self.options, dict(self.fields), custom, self.custom, tuple(inside))
        return tensors, op, feeds

    def is_quantised(self, output: int) -> bool:
        """Whether an output stands for real numbers on a scale."""
        tensors, op, _ = self.parts()
        return bool(tensors[op.outputs[output]].scale)

    def _tensor(self, given: V, name: str, random: np.random.Generator, before: Sequence[Tensor]) -> Tensor:
        if given.data is not None:
            return Tensor(name, given.data.shape, str(given.data.dtype), given.data)
        dtype = given.dtype or ("float32" if self.kind == HYBRID else self.kind)
        if given.weights and self.kind in (HYBRID, "int16"):
            dtype = "int8"
        if given.bias and self.kind in QUANTISED:
            return self._bias(given, name, random, before)
        tensor = Tensor(name, given.shape, dtype, variable=given.state)
        quantised = not given.dtype or given.scale is not None
        if dtype in QUANTISED and quantised:
            tensor = replace(tensor, **self._quantisation(given, dtype))
        if given.constant:
            tensor.data = self.values(given, tensor, random)
        return tensor

    def _bias(self, given: V, name: str, random: np.random.Generator, before: Sequence[Tensor]) -> Tensor:
        dtype = "int64" if self.kind == "int16" else "int32"
        layers = [item for item in before if item.scale]
        scale = tuple(float(np.float32(layers[0].scale[0]) * np.float32(s)) for s in layers[1].scale)
        data = random.integers(-400, 400, given.shape).astype(dtype)
        return Tensor(name, given.shape, dtype, data, scale, (0,) * len(scale))

    def _quantisation(self, given: V, dtype: str) -> dict[str, object]:
        low, high = given.limits
        if given.scale is not None:
            return {"scale": (given.scale,), "zero_point": (0,)}
        if given.weights and dtype == "int8":
            count = given.shape[given.axis] if given.axis is not None else 1
            spread = 1 + np.arange(count) / max(count, 1)
            scales = tuple(float(s) for s in spread * max(abs(low), abs(high)) / 254)
            return {"scale": scales, "zero_point": (0,) * count, "axis": given.axis or 0}
        scale, zero = affine(low, high, dtype)
        return {"scale": (scale,), "zero_point": (zero,)}

    def _output(self, out: Out, name: str, before: Sequence[Tensor]) -> Tensor:
        dtype = out.dtype or ("float32" if self.kind == HYBRID else self.kind)
        tensor = Tensor(name, (), dtype)
        if dtype not in QUANTISED or (out.dtype and out.scale is None):
            return tensor
        if out.scale is not None:
            return replace(tensor, scale=(out.scale,), zero_point=(out.zero,))
        if out.limits is None:
            first = next(item for item in before if item.scale and item.dtype == dtype)
            return replace(tensor, scale=first.scale, zero_point=first.zero_point)
        scale, zero = affine(*out.limits, dtype)
        return replace(tensor, scale=(scale,), zero_point=(zero,))

    def values(self, given: V, tensor: Tensor, random: np.random.Generator) -> np.ndarray:
        """Random values for a tensor of the case."""
        if tensor.dtype in ("float32", "float16"):
            return random.uniform(*given.limits, given.shape).astype(tensor.dtype)
        if tensor.dtype == "bool":
            return random.integers(0, 2, given.shape).astype(bool)
        low, high = given.limits
        if tensor.scale:
            info, zero = np.iinfo(tensor.dtype), (tensor.zero_point or (0,))[0]
            least, most = (round(limit / tensor.scale[0]) + zero for limit in given.limits)
            if given.weights:
                least, most = -127, 127
            return random.integers(max(least, info.min), min(most, info.max) + 1, given.shape).astype(tensor.dtype)
        return random.integers(int(low), int(high) + 1, given.shape).astype(tensor.dtype)

    def feeds(self, seed: int = 0) -> list[np.ndarray]:
        """Values for the model's inputs."""
        random = np.random.default_rng(zlib.crc32(f"{self.name} {seed}".encode()))
        tensors, _, places = self.parts()
        given = [item for item in self.inputs if item is not None]
        return [self.values(given[place], tensors[place], random) for place in places]

    def model(self, shapes: Sequence[tuple[int, ...]] | None = None, real: bool = False) -> bytes:
        """The case alone as a model; `shapes` are the outputs'. real: as in `parts`."""
        return model_of([self], [shapes or [()] * len(self.outputs)], real)


def affine(low: float, high: float, dtype: str) -> tuple[float, int]:
    """Scale and zero point of a quantised dtype for a range of real values."""
    if dtype == "int16":
        return max(abs(low), abs(high)) / 32768, 0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return scale, zero - 128 if dtype == "int8" else zero


def model_of(cases: Sequence[Case], shapes: Sequence[Sequence[tuple[int, ...]]], real: bool = False) -> bytes:
    """One model with these cases side by side; `shapes` are their outputs'. Only one of them may have other graphs."""
    tensors: list[Tensor] = []
    ops, inputs, outputs = [], [], []
    graphs: tuple[Graph, ...] = ()
    for case, ends in zip(cases, shapes, strict=True):
        mine, op, feeds = case.parts(real)
        first = len(tensors)
        for index, shape in zip(op.outputs, ends, strict=True):
            mine[index].shape = tuple(shape)
        move = {index: (index + first if index >= 0 else -1) for index in (-1, *range(len(mine)))}
        ins, outs, inside = (tuple(move[i] for i in places) for places in (op.inputs, op.outputs, op.intermediates))
        ops.append(replace(op, inputs=ins, outputs=outs, intermediates=inside))
        inputs += [move[i] for i in feeds]
        outputs += [move[i] for i in op.outputs]
        tensors += mine
        graphs = graphs or case.graphs
    return tflite_of(tensors, ops, inputs, outputs, graphs)
