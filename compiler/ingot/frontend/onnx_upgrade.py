"""Models of opset 6 -> opset 7, in place: what changed is how the second operand is broadcast, and training flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingot.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx

_BINARY = frozenset(("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor"))
# Attributes that newer forms do not have, and that say nothing about inference.
_DROPPED = {
    "AveragePool": ("consumed_inputs",),
    "BatchNormalization": ("is_test", "consumed_inputs"),
    "Dropout": ("is_test", "consumed_inputs"),
    "Gemm": ("broadcast",),
    "GRU": ("output_sequence",),
    "LSTM": ("output_sequence",),
    "RNN": ("output_sequence",),
    **dict.fromkeys(_BINARY, ("broadcast", "axis", "consumed_inputs")),
}


def upgrade_6_to_7(proto: onnx.ModelProto) -> None:
    """Rewrite a model of opset 6. Raises UnsupportedError for a form that newer opsets cannot say."""
    import onnx

    ranks = _ranks(proto)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for index, node in enumerate(nodes):
        label = f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} #{index}"
        given = {item.name: item for item in node.attribute}
        if node.op_type in ("BatchNormalization", "Dropout") and not ("is_test" in given and given["is_test"].i):
            raise _refused("training mode", label)
        if node.op_type == "Upsample":
            raise _refused("Upsample of opset 6", label)
        behind = 0
        if node.op_type in _BINARY and "axis" in given:
            left, right = (_rank(ranks, name, label) for name in node.input)
            behind = left - given["axis"].i % max(left, 1) - right
        elif node.op_type == "PRelu" and _rank(ranks, node.input[1], label) == 1:
            # One slope for each channel, which is the second axis; a single one fits everywhere.
            behind = max(_rank(ranks, node.input[0], label) - 2, 0)
        if behind > 0:
            name, rank = f"{node.input[1]}/behind{index}", _rank(ranks, node.input[1], label)
            axes = list(range(rank, rank + behind))
            proto.graph.node.append(onnx.helper.make_node("Unsqueeze", [node.input[1]], [name], axes=axes))
            node.input[1] = name
        kept = [item for item in node.attribute if item.name not in _DROPPED.get(node.op_type, ())]
        del node.attribute[:]
        node.attribute.extend(kept)
        proto.graph.node.append(node)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = 7


def _refused(found: str, label: str) -> UnsupportedError:
    hint = "export the model again for a newer opset, in evaluation mode"
    return UnsupportedError(
        "a form of an operator of opset 6 is not supported", where=label, found=found, allowed="inference", hint=hint
    )


def _rank(ranks: dict[str, int], name: str, label: str) -> int:
    if name not in ranks:
        raise _refused(f"a tensor {name!r} of unknown rank", label)
    return ranks[name]


def _ranks(proto: onnx.ModelProto) -> dict[str, int]:
    """The ranks of all tensors that onnx can tell."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        graph = proto.graph
    ranks = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            ranks[value.name] = len(value.type.tensor_type.shape.dim)
    ranks.update((tensor.name, len(tensor.dims)) for tensor in proto.graph.initializer)
    return ranks
