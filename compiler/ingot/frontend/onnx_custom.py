"""ONNX nodes of operators that the user registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ingot.frontend.custom import OpNode, Shapes, custom_op, inferred
from ingot.frontend.onnx_tensors import tensor_array
from ingot.frontend.tvm_types import Builder, Expr

if TYPE_CHECKING:
    import onnx

    from ingot.frontend.onnx_static import StaticGraph


def known_types(graph: StaticGraph, node: onnx.NodeProto, label: str) -> list[tuple[int, tuple[int, ...]]] | None:
    """ONNX's data type number and the shape of each output, by what tells them instead of onnx; None if nothing does.

    That is the user for an operator of theirs, or this compiler where onnx infers nothing.
    """
    import onnx

    from ingot.frontend.onnx_ops import own_types

    custom, own = custom_op(node.domain, node.op_type), own_types(node.domain, node.op_type)
    if custom is not None:
        types: Shapes = inferred(custom, op_node(graph, node, label))
    elif own is not None:
        types = own(op_node(graph, node, label))
    else:
        return None
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
