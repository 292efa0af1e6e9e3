"""What ONNX says of a node's outputs, given the static types of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import ModelError

if TYPE_CHECKING:
    import onnx

# Constants up to this size are shown to shape inference.
_VISIBLE_ELEMENTS = 4096


def infer_outputs(
    node: onnx.NodeProto,
    label: str,
    types: Mapping[str, tuple[int, tuple[int, ...]]],
    constants: Mapping[str, np.ndarray],
    opsets: Mapping[str, int],
    ir_version: int,
) -> dict[str, onnx.TypeProto]:
    """The types of a node's outputs by name; one that ONNX cannot tell is left out.

    types: (ONNX data type, shape) of its inputs. Raises ModelError if the inputs do not fit the operator.
    """
    import onnx

    version = opsets.get(node.domain, opsets.get("ai.onnx" if node.domain == "" else "", 0))
    schema = onnx.defs.get_schema(node.op_type, version, "" if node.domain == "ai.onnx" else node.domain)
    names = [name for name in node.input if name]
    inputs = {name: onnx.helper.make_tensor_type_proto(*types[name]) for name in names}
    small = [name for name in inputs if name in constants and constants[name].size <= _VISIBLE_ELEMENTS]
    data = {name: onnx.numpy_helper.from_array(np.asarray(constants[name], order="C"), name) for name in small}
    imports = [onnx.helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, inputs, data, opset_imports=imports, ir_version=ir_version
        )
        if schema.has_function and any(name and not _is_told(found.get(name)) for name in node.output):
            # Some schemas leave inference to their function's body, which only that of a whole model looks into.
            graph = onnx.helper.make_graph(
                [node],
                "node",
                [onnx.helper.make_value_info(name, kind) for name, kind in inputs.items()],
                [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name],
                list(data.values()),
            )
            model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
            found = {value.name: value.type for value in onnx.shape_inference.infer_shapes(model).graph.output}
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        hint = "check --shape: the model's operators do not fit together with these input shapes"
        raise ModelError("the shapes of a node contradict each other", where=label, found=text, hint=hint) from None
    return {name: kind for name, kind in found.items() if kind.WhichOneof("value")}


def _is_told(kind: onnx.TypeProto | None) -> bool:
    return kind is not None and kind.tensor_type.HasField("shape")
