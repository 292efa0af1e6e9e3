"""What a converter sees of the node it converts, and the table it registers in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.tvm_types import Expr, Value

if TYPE_CHECKING:
    import onnx
    from tvm import relax

    from ingot.frontend.onnx_static import TensorType

Converter = Callable[["Context"], Expr]
TABLE: dict[tuple[str, str], Converter] = {}
# Shapes and dtypes of the outputs of operators for which the onnx package infers none.
TYPES: dict[tuple[str, str], Callable[[OpNode], Shapes]] = {}


def converts(
    *operators: str, domain: str = "", types: Callable[[OpNode], Shapes] | None = None
) -> Callable[[Converter], Converter]:
    """Register a function as the converter of these operators; `types` tells their outputs where onnx does not.

    It returns one Relax expression, or a list of them for several outputs (None for an output it does not make).
    NotImplemented hands the node, with the inputs as the converter left them, on to TVM's converter.
    """

    def register(function: Converter) -> Converter:
        for operator in operators:
            TABLE[(domain, operator)] = function
            if types is not None:
                TYPES[(domain, operator)] = types
        return function

    return register


@dataclass
class Context:
    """One node with its inputs as Relax expressions. All shapes are static; `opset` is the model's ai.onnx opset."""

    bb: relax.BlockBuilder
    node: onnx.NodeProto
    label: str
    opset: int
    inputs: list[Expr]
    types: dict[str, TensorType]
    constants: dict[str, np.ndarray]
    make_weight: Callable[[str, np.ndarray], Expr]
    #: Types of outputs that nobody reads: they are not in `types`.
    unread: Mapping[str, TensorType] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        """Whether input `index` is given (optional inputs may be missing or empty)."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> np.ndarray | None:
        """The numpy value of input `index` if it is a constant, else None."""
        if not self.has(index):
            return None
        return self.constants.get(self.node.input[index])

    def need(self, index: int, meaning: str) -> np.ndarray:
        """The value of input `index`; UnsupportedError if it is not constant."""
        value = self.value(index)
        if value is None:
            found = f"{meaning} is computed at run time" if self.has(index) else f"{meaning} is missing"
            raise self.unsupported(found, f"a constant {meaning}")
        return value

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Static shape of input `index`."""
        return self.types[self.node.input[index]].shape

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """Static shape of output `index`."""
        return self._output(index).shape

    def dtype(self, index: int = 0) -> str:
        """Numpy dtype name of input `index`."""
        return dtype_name(self.types[self.node.input[index]].elem)

    def out_dtype(self, index: int = 0) -> str:
        """Numpy dtype name of output `index`."""
        return dtype_name(self._output(index).elem)

    def _output(self, index: int) -> TensorType:
        name = self.node.output[index]
        return self.types[name] if name in self.types else self.unread[name]

    def is_read(self, index: int) -> bool:
        """Whether output `index` is declared, and something reads it."""
        return index < len(self.node.output) and self.node.output[index] in self.types

    def attr(self, name: str, default: Value = None) -> Value:
        """Value of an attribute (int, float, str, list of them, or TensorProto), or `default`."""
        import onnx

        for attribute in self.node.attribute:
            if attribute.name == name:
                value = onnx.helper.get_attribute_value(attribute)
                if isinstance(value, bytes):
                    return value.decode("utf-8", "replace")
                return list(value) if attribute.type in (6, 7, 8) else value
        return default

    def ints(self, name: str, index: int) -> list[int] | None:
        """Integers that older opsets give as attribute `name` and newer ones as constant input `index`."""
        found = self.attr(name)
        if found is None and self.has(index):
            found = self.need(index, name).reshape(-1).tolist()
        return None if found is None else [int(value) for value in found]

    def const(self, value: float, dtype: str | None = None) -> Expr:
        """A scalar constant of `dtype` (default: that of input 0)."""
        from tvm import relax

        return relax.const(np.array(value, dtype=np.dtype(dtype or self.dtype())), dtype or self.dtype())

    def array(self, suffix: str, value: np.ndarray) -> Expr:
        """`value` as a constant or, if larger, as a weight named after this node's output."""
        return self.make_weight(f"{self.node.output[0]}_{suffix}", value)

    def emit(self, expr: Expr) -> Expr:
        """Bind an intermediate expression so that its type is known."""
        return self.bb.emit(expr)

    def unsupported(self, found: str, allowed: str, hint: str = "") -> UnsupportedError:
        """An UnsupportedError about this node."""
        what = f"this form of {self.node.op_type} is not supported"
        return UnsupportedError(what, where=self.label, found=found, allowed=allowed, hint=hint)


def dtype_name(elem: int) -> str:
    """The numpy name of an ONNX data type number."""
    import onnx

    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem)).name)


def normal_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front."""
    return axis + rank if axis < 0 else axis


def spread(values: Sequence[int] | None, count: int, default: int) -> list[int]:
    """`values`, or `count` times the default if the attribute is missing."""
    return list(values) if values else [default] * count
