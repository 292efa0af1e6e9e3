"""An ONNX model of static shapes as a PyTorch module, so that PyTorch's compiler can be timed on it.

It knows the operators of common image networks and encoders, and says which one it lacks. Constants that are
arguments in PyTorch (shapes, axes, bounds) stay Python numbers, so that nothing in the graph depends on data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from onnx import helper, numpy_helper

Tensor = Any  # torch.Tensor; PyTorch is not in the environment that types are checked in
Value = Any  # an attribute, or a constant as Python numbers
#: Computes a node from its inputs (None where one is left out) and its attributes.
Operator = Callable[..., Any]


class UntranslatedError(Exception):
    """An operator of the model, or its form, has no translation here."""


def _numbers(value: Value) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]


def _padded(x: Tensor, attributes: dict[str, Value], value: float) -> tuple[Tensor, list[int]]:
    """The pads that PyTorch's own operators take; those that differ at the two ends are put around the data first."""
    rank = x.dim() - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UntranslatedError("no translation of auto_pad")
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    around = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[rank + axis])]
    return F.pad(x, around, value=value), [0] * rank


def _conv(x: Tensor, w: Tensor, b: Tensor | None = None, **a: Value) -> Tensor:
    x, pads = _padded(x, a, 0.0)
    ones = [1] * len(pads)
    operator = (F.conv1d, F.conv2d, F.conv3d)[len(pads) - 1]
    return operator(x, w, b, a.get("strides", ones), pads, a.get("dilations", ones), a.get("group", 1))


def _max_pool(x: Tensor, **a: Value) -> Tensor:
    x, pads = _padded(x, a, float("-inf"))
    ones = [1] * len(pads)
    operator = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(pads) - 1]
    ceil = bool(a.get("ceil_mode", 0))
    return operator(x, a["kernel_shape"], a.get("strides", ones), pads, a.get("dilations", ones), ceil_mode=ceil)


def _average_pool(x: Tensor, **a: Value) -> Tensor:
    rank = x.dim() - 2
    if any(a.get("pads", [])) or a.get("ceil_mode") or a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UntranslatedError("no translation of AveragePool with pads")
    operator = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    return operator(x, a["kernel_shape"], a.get("strides", [1] * rank))


def _gemm(x: Tensor, w: Tensor, b: Tensor | None = None, **a: Value) -> Tensor:
    x = x.t() if a.get("transA") else x
    w = w if a.get("transB") else w.t()
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if alpha == beta == 1.0 and (b is None or b.dim() == 1):
        return F.linear(x, w, b)
    product = alpha * F.linear(x, w)
    return product if b is None else product + beta * b


def _reshape(x: Tensor, shape: Value, **a: Value) -> Tensor:
    sizes = _numbers(shape)
    return x.reshape([x.shape[i] if v == 0 and not a.get("allowzero") else v for i, v in enumerate(sizes)])


def _reduce(operator: Callable[..., Tensor]) -> Operator:
    def run(x: Tensor, axes: Value = None, **a: Value) -> Tensor:
        axes = axes if axes is not None else a.get("axes", list(range(x.dim())))
        return operator(x, dim=_numbers(axes), keepdim=bool(a.get("keepdims", 1)))

    return run


def _gather(x: Tensor, index: Value, **a: Value) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    places = index if isinstance(index, torch.Tensor) else torch.tensor(index)
    places = torch.where(places < 0, places + x.shape[axis], places)
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(places, x)
    rows = torch.index_select(x, axis, places.reshape(-1))
    return rows.reshape([*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]])


def _slice(x: Tensor, *arguments: Value, **a: Value) -> Tensor:
    starts, ends, axes, steps = (*arguments, *(None,) * (4 - len(arguments))) if arguments else (None,) * 4
    starts, ends = _numbers(a["starts"] if starts is None else starts), _numbers(a["ends"] if ends is None else ends)
    axes = _numbers(a.get("axes", list(range(len(starts)))) if axes is None else axes)
    for start, end, axis, step in zip(starts, ends, axes, _numbers(steps or [1] * len(starts)), strict=True):
        if step < 1:
            raise UntranslatedError("no translation of Slice with a negative step")
        window: list[slice] = [slice(None)] * x.dim()
        window[axis] = slice(start, end, step)
        x = x[tuple(window)]
    return x


def _squeeze(x: Tensor, axes: Value = None, **a: Value) -> Tensor:
    axes = a.get("axes") if axes is None else axes
    return x.squeeze() if axes is None else x.squeeze(tuple(_numbers(axes)))


def _unsqueeze(x: Tensor, axes: Value = None, **a: Value) -> Tensor:
    axes = _numbers(a["axes"] if axes is None else axes)
    for axis in sorted(v % (x.dim() + len(axes)) for v in axes):
        x = x.unsqueeze(axis)
    return x


def _clip(x: Tensor, low: Value = None, high: Value = None, **a: Value) -> Tensor:
    return torch.clamp(x, a.get("min") if low is None else low, a.get("max") if high is None else high)


def _resize(x: Tensor, _roi: Value = None, scales: Value = None, sizes: Value = None, **a: Value) -> Tensor:
    wanted = sizes or [int(n * s) for n, s in zip(x.shape, scales, strict=True)]
    whole = all(w % n == 0 for w, n in zip(wanted, x.shape, strict=True))
    if a.get("mode", b"nearest") != b"nearest" or not whole or list(wanted[:2]) != list(x.shape[:2]):
        raise UntranslatedError("no translation of Resize other than nearest by whole factors")
    return F.interpolate(x, size=wanted[2:], mode="nearest")


def _split(x: Tensor, sizes: Value = None, **a: Value) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    sizes = a.get("split") if sizes is None else sizes
    if sizes is None:
        raise UntranslatedError("no translation of Split without sizes")
    return tuple(torch.split(x, _numbers(sizes), axis))


def _layer_norm(x: Tensor, scale: Tensor, b: Tensor | None = None, **a: Value) -> Tensor:
    return F.layer_norm(x, x.shape[a.get("axis", -1) % x.dim() :], scale, b, a.get("epsilon", 1e-5))


OPERATORS: dict[str, Operator] = {
    "Add": lambda x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": lambda x, s, b, m, v, **a: F.batch_norm(x, m, v, s, b, eps=a.get("epsilon", 1e-5)),
    "Clip": _clip,
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Conv": _conv,
    "Div": lambda x, y: x / y,
    "Dropout": lambda x, *_, **__: x,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Flatten": lambda x, axis=1: x.flatten(axis) if axis == 1 else x.reshape([int(np.prod(x.shape[:axis])), -1]),
    "Gather": _gather,
    "Gelu": lambda x, approximate=b"none": F.gelu(x, approximate=approximate.decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.dim())), keepdim=True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(x * alpha + beta, 0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Mul": lambda x, y: x * y,
    "Pow": lambda x, y: x**y,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": F.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: F.softmax(x, axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": lambda x, y: x - y,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}
#: Operators whose inputs after the first are numbers in PyTorch.
NUMBERS = {"Clip", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Unsqueeze"}


class OnnxModule(torch.nn.Module):  # type: ignore[misc]
    """The model's first graph; `forward` takes its inputs in order and returns its outputs in order.

    Raises UntranslatedError for an operator or a form of one that is not here, and for arguments that are computed
    where PyTorch needs numbers.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        lacking = {node.op_type for node in graph.node} - set(OPERATORS) - {"Constant"}
        if lacking:
            raise UntranslatedError("no translation of " + ", ".join(sorted(lacking)))
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                held[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.inputs = [value.name for value in graph.input if value.name not in held]
        self.outputs = [value.name for value in graph.output]
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        self.steps: list[tuple[Operator, list[Any], list[str], dict[str, Any]]] = []
        for node in graph.node:
            if node.op_type == "Constant":
                continue
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Softmax" and opset < 13:
                attributes.setdefault("axis", 1)  # over all axes from there on: the same where the others are 1
            arguments: list[Any] = []
            for place, name in enumerate(node.input):
                if not name or (place and node.op_type in NUMBERS):
                    if name and name not in held:
                        raise UntranslatedError(f"no translation of {node.op_type} with a computed {name!r}")
                    arguments.append(held[name].tolist() if name else None)
                    continue
                arguments.append(name)
                if name in held:
                    self.hold(name, torch.from_numpy(np.array(held[name])))
            self.steps.append((OPERATORS[node.op_type], arguments, list(node.output), attributes))

    def hold(self, name: str, tensor: Tensor) -> None:
        """Keep a weight under its ONNX name."""
        key = self.key(name)
        if tensor.is_floating_point():
            self.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(key, tensor)

    @staticmethod
    def key(name: str) -> str:
        """The attribute of a weight: PyTorch allows no dot in it."""
        return "weight " + name.replace(".", "/")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the nodes in their order."""
        values: dict[str, Tensor] = dict(zip(self.inputs, inputs, strict=True))
        for operator, arguments, names, attributes in self.steps:
            given = [
                (values[v] if v in values else getattr(self, self.key(v))) if isinstance(v, str) else v
                for v in arguments
            ]
            result = operator(*given, **attributes)
            values.update(zip(names, result if isinstance(result, tuple) else (result,), strict=False))
        return tuple(values[name] for name in self.outputs)
