"""What stands for a node of ONNX Runtime's domain: the builder of its body, and the table of bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tvm_types import Value

if TYPE_CHECKING:
    import onnx

    from ingot.frontend.onnx_static import TensorType

Expansion = Callable[["Body"], None]
TABLE: dict[str, Expansion] = {}


def expands(*operators: str) -> Callable[[Expansion], Expansion]:
    """Register a function that writes these operators of com.microsoft out in ONNX's."""

    def register(function: Expansion) -> Expansion:
        for operator in operators:
            TABLE[operator] = function
        return function

    return register


@dataclass
class Body:
    """One node of com.microsoft with static input types, and the nodes of ONNX (of the model's opset) that replace it.

    Tensors are names. 16-bit floats are computed in float32: `real` gives an input so, and `result` rounds it back.
    """

    node: onnx.NodeProto
    label: str
    prefix: str
    opset: int
    types: Mapping[str, TensorType]
    constants: Mapping[str, np.ndarray]
    make_constant: Callable[[str, np.ndarray], None]
    nodes: list[tuple[onnx.NodeProto, str]] = field(default_factory=list)
    _made: int = 0

    # The node.

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def wants(self, index: int) -> bool:
        """Whether output `index` has a name."""
        return index < len(self.node.output) and bool(self.node.output[index])

    def input(self, index: int) -> str:
        """Input `index`; "" if it is left out."""
        return str(self.node.input[index]) if self.has(index) else ""

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of input `index`."""
        return self.types[self.node.input[index]].shape

    def dtype(self, index: int = 0) -> str:
        """Numpy dtype name of input `index`."""
        import onnx

        elem = self.types[self.node.input[index]].elem
        return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem)).name)

    def value(self, index: int) -> np.ndarray | None:
        """The value of input `index` if it is a constant."""
        return self.constants.get(self.input(index))

    def need(self, index: int, meaning: str) -> np.ndarray:
        """The value of input `index`; UnsupportedError if it is computed at run time or missing."""
        value = self.value(index)
        if value is None:
            found = f"{meaning} is computed at run time" if self.has(index) else f"{meaning} is missing"
            hint = f"if it is an input of the model: --bind {self.input(index)}=VALUE" if self.has(index) else ""
            raise self.unsupported(found, f"a constant {meaning}", hint)
        return value

    def attr(self, name: str, default: Value = None) -> Value:
        """Value of an attribute, or `default`."""
        import onnx

        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return default

    def attributes(self, *without: str) -> dict[str, Value]:
        """All attributes but these."""
        return {item.name: self.attr(item.name) for item in self.node.attribute if item.name not in without}

    def unsupported(self, found: str, allowed: str, hint: str = "") -> UnsupportedError:
        """An UnsupportedError about this node."""
        what = f"this form of {self.node.op_type} is not supported"
        return UnsupportedError(what, where=self.label, found=found, allowed=allowed, hint=hint)

    # Its body.

    def op(self, kind: str, *inputs: str, **attributes: Value) -> str:
        """One node of ONNX with one output, whose name is returned."""
        import onnx

        name = self._name(kind)
        self.nodes.append((onnx.helper.make_node(kind, list(inputs), [name], **attributes), self.label))
        return name

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Value) -> list[str]:
        """One node of ONNX with several outputs."""
        import onnx

        names = [self._name(kind) for _ in range(outputs)]
        self.nodes.append((onnx.helper.make_node(kind, list(inputs), names, **attributes), self.label))
        return names

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{self.prefix}{kind}{self._made}"

    def constant(self, value: np.ndarray) -> str:
        """A constant tensor."""
        name = self._name("constant")
        self.make_constant(name, np.asarray(value))
        return name

    def scalar(self, value: float) -> str:
        """A number in the type that this body computes in."""
        return self.constant(np.array(value, dtype=self.kind))

    @property
    def kind(self) -> str:
        """The float type that the body of a node on floats computes in: float64 if its first input has it."""
        return "float64" if self.dtype() == "float64" else "float32"

    def real(self, index: int) -> str:
        """Input `index`, a float tensor, in `kind`; "" if it is left out."""
        if not self.has(index):
            return ""
        return self.node.input[index] if self.dtype(index) == self.kind else self.cast(self.input(index), self.kind)

    def cast(self, tensor: str, dtype: str) -> str:
        """A tensor as another type."""
        import onnx

        return self.op("Cast", tensor, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def result(self, index: int, tensor: str, dtype: str = "") -> None:
        """Make a tensor output `index`, as `dtype` if one is given."""
        import onnx

        if not self.wants(index):
            return
        if dtype:
            tensor = self.cast(tensor, dtype)
        self.nodes.append((onnx.helper.make_node("Identity", [tensor], [self.node.output[index]]), self.label))

    def real_result(self, index: int, tensor: str) -> None:
        """Make a float tensor output `index`, in the type of input 0 if that is a float."""
        self.result(index, tensor, self.dtype() if self.dtype() in ("float16", "bfloat16") else "")

    # Operators that are written in another way in older opsets.

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        """A tensor in another shape."""
        return self.op("Reshape", tensor, self.constant(np.array(shape, dtype=np.int64)))

    def transpose(self, tensor: str, axes: Sequence[int]) -> str:
        """A tensor with its axes in another order."""
        return self.op("Transpose", tensor, perm=list(axes))

    def slice(self, tensor: str, axis: int, start: int, stop: int) -> str:
        """Entries `start` to `stop` along an axis, counted from the front."""
        if self.opset < 10:
            return self.op("Slice", tensor, axes=[axis], starts=[start], ends=[stop])
        bounds = [self.constant(np.array([value], dtype=np.int64)) for value in (start, stop, axis)]
        return self.op("Slice", tensor, *bounds)

    def mean(self, tensor: str, axes: Sequence[int]) -> str:
        """The mean over some axes, which are kept."""
        if self.opset < 18:
            return self.op("ReduceMean", tensor, axes=list(axes), keepdims=1)
        return self.op("ReduceMean", tensor, self.constant(np.array(axes, dtype=np.int64)), keepdims=1)

    def clip(self, tensor: str, low: float, high: float) -> str:
        """A tensor within bounds."""
        if self.opset < 11:
            return self.op("Clip", tensor, min=low, max=high)
        return self.op("Clip", tensor, self.scalar(low), self.scalar(high))

    def softmax(self, tensor: str, rank: int) -> str:
        """Softmax over the last of `rank` axes."""
        return self.op("Softmax", tensor, axis=rank - 1)
