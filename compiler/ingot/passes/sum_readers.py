"""What a model does with the sums of a quantised layer, as far as an integer kernel can do it itself.

Two forms, each a chain of calls of which every one is the only reader of the one before:

- astype(int32) of the sums, or of the sums plus a constant bias: TFLite layers, whose requantisation follows.
- quantize of the sums times a constant ratio, perhaps plus a constant bias, perhaps limited: ONNX layers between
  DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from ingot.frontend import fixed_point
from ingot.passes.rewriter import bindings_of, dtype_of, op_name, shape_of, uses_of
from ingot.passes.state import State

_LINEAR = ("relax.nn.conv2d", "relax.matmul")
#: A bias that leaves int32 room for the sums.
_MAX_BIAS = 1 << 29


@dataclass(frozen=True)
class Quantized:
    """The second form's end: sums (bias included) times `ratio`, one or one for each channel, as `dtype`."""

    ratio: np.ndarray
    zero_point: int
    limits: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class SumReaders:
    """The calls a layer absorbs, its bias in whole numbers, and what ends the second form."""

    absorbed: tuple[Any, ...]
    bias: np.ndarray | None
    quantized: Quantized | None = None


def sum_readers(state: State) -> dict[Any, SumReaders]:
    """Return what follows each convolution and matrix product of `main`, by their calls."""
    function = state.module["main"]
    uses = uses_of(function)
    reader: dict[Any, Any] = {}  # variable with one reader -> that reader's binding
    for binding in bindings_of(function):
        for arg in binding.value.args if isinstance(binding.value, relax.Call) else ():
            if isinstance(arg, relax.Var) and uses.get(arg) == 1:
                reader[arg] = binding

    def constant(expr: Any) -> np.ndarray | None:  # noqa: ANN401
        if isinstance(expr, GenericConst):
            return np.asarray(expr.value.numpy())
        return state.weights.get(str(expr.name)) if isinstance(expr, relax.Var) else None

    found: dict[Any, SumReaders] = {}
    for binding in bindings_of(function):
        if op_name(binding.value) in _LINEAR:
            chain = _Chain(binding, reader, constant)
            readers = chain.whole() or chain.quantized()
            if readers is not None:
                found[binding.value] = readers
    return found


class _Chain:
    """The calls after a layer, one after the other."""

    def __init__(self, layer: Any, reader: dict[Any, Any], constant: Callable[[Any], np.ndarray | None]) -> None:  # noqa: ANN401
        self.layer, self.reader, self.constant = layer, reader, constant

    def _after(self) -> Iterator[Any]:
        binding = self.reader.get(self.layer.var)
        while binding is not None:
            yield binding
            binding = self.reader.get(binding.var)

    def _operand(self, call: Any) -> np.ndarray | None:  # noqa: ANN401
        """Return the constant operand of a call with the sums' shape, if it is one number or one for each channel."""
        values = [value for value in map(self.constant, call.args) if value is not None]
        shape = shape_of(self.layer.var)
        if len(values) != 1 or shape_of(call) != shape:
            return None
        per_channel = values[0].size == shape[-1] and values[0].shape[-1:] == shape[-1:]
        return values[0].reshape(-1) if values[0].size == 1 or per_channel else None

    def whole(self) -> SumReaders | None:
        """Return the first form."""
        bias, absorbed = None, []
        for binding in self._after():
            call = binding.value
            absorbed.append(call)
            if op_name(call) == "relax.astype" and dtype_of(call) == "int32":
                return SumReaders(tuple(absorbed), bias)
            bias = self._operand(call)
            if op_name(call) != "relax.add" or bias is None or len(absorbed) > 1:
                return None
            bias = np.broadcast_to(bias, shape_of(call)[-1:])
        return None

    def quantized(self) -> SumReaders | None:
        """Return the second form."""
        ratio, shift, absorbed = None, np.zeros(1), []
        low, high = -np.inf, np.inf
        for binding in self._after():
            call, name = binding.value, op_name(binding.value)
            absorbed.append(call)
            if ratio is None:
                ratio = self._operand(call) if name == "relax.multiply" else None
                if ratio is None:
                    return None
            elif name == "relax.add" and np.isinf(low) and np.isinf(high):
                added = self._operand(call)
                if added is None:
                    return None
                shift = shift + added.astype(np.float64)
            elif name in ("relax.nn.relu", "relax.nn.relu6", "relax.clip"):
                least, most = _bounds(call)
                low, high = min(max(low, least), most), max(min(high, most), least)
            elif name == "relax.quantize":
                return self._quantized(call, ratio.astype(np.float64), shift, (low, high), tuple(absorbed))
            else:
                return None
        return None

    def _quantized(
        self,
        call: Any,  # noqa: ANN401
        ratio: np.ndarray,
        shift: np.ndarray,
        bounds: tuple[float, float],
        absorbed: tuple[Any, ...],
    ) -> SumReaders | None:
        scale, zero = self.constant(call.args[1]), self.constant(call.args[2])
        dtype = dtype_of(call)
        if scale is None or zero is None or scale.size != 1 or zero.size != 1 or dtype not in ("int8", "uint8"):
            return None
        channels = shape_of(self.layer.var)[-1]
        if np.any(ratio <= 0) or float(scale.reshape(-1)[0]) <= 0:
            return None
        bias = np.rint(np.broadcast_to(shift / ratio, (channels,)))
        whole_ratio = ratio / np.float64(scale.reshape(-1)[0])
        if np.any(np.abs(bias) > _MAX_BIAS) or not fixed_point.is_simple(whole_ratio, away=False):
            return None
        zero_point, info = int(zero.reshape(-1)[0]), np.iinfo(dtype)
        limits = [info.min, info.max]
        for i, bound in enumerate(bounds):
            if np.isfinite(bound):
                stored = int(np.rint(bound / np.float64(scale.reshape(-1)[0]))) + zero_point
                limits[i] = min(max(stored, info.min), info.max)
        end = Quantized(whole_ratio, zero_point, (limits[0], limits[1]), dtype)
        return SumReaders(absorbed, bias.astype(np.int64), end)


def _bounds(call: Any) -> tuple[float, float]:  # noqa: ANN401
    """Return the limits an activation sets."""
    if op_name(call) == "relax.clip":
        return float(call.args[1].value), float(call.args[2].value)
    return 0.0, 6.0 if op_name(call) == "relax.nn.relu6" else np.inf
