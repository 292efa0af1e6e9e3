"""ONNX nodes of operators that the user registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ingot.frontend.custom import CustomOp, OpNode, Shapes, inferred
from ingot.frontend.onnx_tensors import tensor_array
from ingot.frontend.tvm_types import Builder, Expr

if TYPE_CHECKING:
    import onnx

    from ingot.frontend.onnx_static import StaticGraph


def custom_types(op: CustomOp, node: OpNode) -> list[tuple[int, tuple[int, ...]]]:
    """ONNX's data type number and the shape of each output."""
    return elements(inferred(op, node))


def elements(types: Shapes) -> list[tuple[int, tuple[int, ...]]]:
    """Shapes and numpy dtype names as ONNX's data type numbers and shapes."""
    import onnx

    return [(int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))), tuple(shape)) for shape, dtype in types]


def op_node(
    graph: StaticGraph, node: onnx.NodeProto, label: str, inputs: Sequence[Expr] = (), builder: Builder = None
) -> OpNode:
    """What a registered operator sees of a node."""
    import onnx

    attributes = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        attributes[attribute.name] = tensor_array(value, label) if isinstance(value, onnx.TensorProto) else value
    known = [graph.types.get(name) for name in node.input]
    kinds = [(kind.elem, kind.shape) if kind is not None else (1, ()) for kind in known]
    return OpNode(
        label=label,
        inputs=tuple(inputs) or (None,) * len(kinds),
        shapes=tuple(shape for _, shape in kinds),
        dtypes=tuple(str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem)).name) for elem, _ in kinds),
        constants=tuple(graph.constants.get(name) for name in node.input),
        attributes=attributes,
        outputs=len(node.output),
        builder=builder,
    )
