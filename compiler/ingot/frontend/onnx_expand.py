"""Nodes that hold other nodes, written out: function bodies that ONNX defines, Scan and Loop with known trip counts.

Each function returns nodes to visit in place of the one given, renamed so that no two tensors clash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.onnx_read import node_label

if TYPE_CHECKING:
    import onnx

Labelled = tuple["onnx.NodeProto", str]
# Steps of one Scan or Loop, and nodes that all of them together may become.
MAX_STEPS = 1024
MAX_EXPANDED_NODES = 200_000


def rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Rename the tensors of a node, also inside the graphs it holds."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            for inner in graph.node:
                rename(inner, names)
            for result in graph.output:
                result.name = names.get(result.name, result.name)


def copy_nodes(nodes: Sequence[onnx.NodeProto], names: dict[str, str], prefix: str, label: str) -> list[Labelled]:
    """Copies of `nodes`; tensors they make get `prefix` unless `names` says otherwise, which is filled in."""
    import onnx

    for inner in nodes:
        names.update((name, prefix + name) for name in inner.output if name and name not in names)
    copies = []
    for index, inner in enumerate(nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        rename(copy, names)
        copies.append((copy, f"{label}, its {node_label(inner, index)}"))
    return copies


def function_body(
    node: onnx.NodeProto, opset: int, types: Sequence[onnx.TypeProto], label: str, prefix: str
) -> list[Labelled] | None:
    """The nodes of the body that ONNX defines for this node with these input types; None if it defines none."""
    import onnx

    if not onnx.defs.has(node.op_type, opset, node.domain):
        return None
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    plain, dependent = schema.function_opset_versions, schema.context_dependent_function_opset_versions
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.name:
            node.attribute.append(attribute.default_value)
            given[name] = attribute.default_value
    body = onnx.FunctionProto()
    try:
        if dependent:
            version = max((v for v in dependent if v <= opset), default=min(dependent))
            raw = schema.get_context_dependent_function_with_opset_version(
                version, node.SerializeToString(), [kind.SerializeToString() for kind in types]
            )
        elif plain:
            raw = schema.get_function_with_opset_version(max((v for v in plain if v <= opset), default=min(plain)))
        else:
            return None
        body.ParseFromString(raw)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        found = " ".join(str(error).split())[:200]
        raise UnsupportedError("a function of ONNX cannot be expanded", where=label, found=found) from None
    if not body.node:
        return None
    names = {"": ""}
    for index, name in enumerate(body.input):
        names[name] = node.input[index] if index < len(node.input) else ""
    for index, name in enumerate(body.output):
        if index < len(node.output) and node.output[index]:
            names[name] = node.output[index]
    copies = copy_nodes(body.node, names, prefix, label)
    for copy, _ in copies:
        _bind_attributes(copy, given)
    # An output may be one of the inputs, which no inner node makes.
    return copies


def _bind_attributes(node: onnx.NodeProto, given: dict[str, onnx.AttributeProto]) -> None:
    """Replace references to the function's attributes by their values; without a value the attribute is left out."""
    import onnx

    kept = []
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            kept.append(attribute)
        elif attribute.ref_attr_name in given:
            copy = onnx.AttributeProto()
            copy.CopyFrom(given[attribute.ref_attr_name])
            copy.name = attribute.name
            kept.append(copy)
    kept = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend(kept)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            for inner in graph.node:
                _bind_attributes(inner, given)


class Unroller:
    """Writes out the steps of Scan and Loop. `constant(name, array)` makes a constant tensor of that name."""

    def __init__(self, opset: int, constant: Callable[[str, np.ndarray], None]) -> None:
        self.opset = opset
        self.constant = constant
        self.count = 0

    def step(self, body: onnx.GraphProto, inputs: Sequence[str], label: str) -> tuple[list[Labelled], list[str]]:
        """One run of a body on these tensors: its nodes and the names of its results."""
        from ingot.frontend.onnx_tensors import tensor_array

        self.count += 1
        prefix = f"step{self.count}/"
        if len(inputs) != len(body.input):
            raise ModelError("a body does not take what its node gives it", where=label, found=f"{len(inputs)} inputs")
        names = {"": ""}
        names.update((value.name, name) for value, name in zip(body.input, inputs, strict=True))
        for tensor in body.initializer:
            names[tensor.name] = prefix + tensor.name
            self.constant(prefix + tensor.name, tensor_array(tensor, f"{label}, initializer {tensor.name!r}"))
        nodes = copy_nodes(body.node, names, prefix, label)
        return nodes, [names.get(value.name, value.name) for value in body.output]

    def element(self, source: str, index: int, axis: int, label: str) -> tuple[Labelled, str]:
        """Entry `index` along `axis` of a tensor, without that axis."""
        import onnx

        self.count += 1
        name = f"step{self.count}/element"
        self.constant(f"{name}_index", np.array(index, dtype=np.int64))
        return (onnx.helper.make_node("Gather", [source, f"{name}_index"], [name], axis=axis), label), name

    def stacked(self, parts: Sequence[str], axis: int, result: str, label: str) -> list[Labelled]:
        """The parts, joined along a new axis."""
        import onnx

        nodes: list[Labelled] = []
        lifted = []
        for part in parts:
            self.count += 1
            name = f"step{self.count}/lifted"
            if self.opset >= 13:
                self.constant(f"{name}_axes", np.array([axis], dtype=np.int64))
                nodes.append((onnx.helper.make_node("Unsqueeze", [part, f"{name}_axes"], [name]), label))
            else:
                nodes.append((onnx.helper.make_node("Unsqueeze", [part], [name], axes=[axis]), label))
            lifted.append(name)
        return [*nodes, (onnx.helper.make_node("Concat", lifted, [result], axis=axis), label)]

    def scan(self, node: onnx.NodeProto, shapes: Sequence[tuple[int, ...]], label: str) -> list[Labelled]:
        """All steps of a Scan; `shapes` are those of its inputs."""

        if self.opset < 9:
            return self._batched_scan(node, shapes, label)
        return self._scan(node, shapes, label)

    def _batched_scan(self, node: onnx.NodeProto, shapes: Sequence[tuple[int, ...]], label: str) -> list[Labelled]:
        """A Scan of opset 8: one of opset 9 for each entry of the first axis, which all inputs and outputs have."""
        import onnx

        if node.input[0]:
            raise UnsupportedError(
                "a Scan with lengths of its sequences is not supported",
                where=label,
                found=repr(node.input[0]),
                allowed="sequences of one length",
                hint="export the model for opset 9 or newer",
            )
        names, shapes = node.input[1:], shapes[1:]
        nodes: list[Labelled] = []
        collected: list[list[str]] = [[] for _ in node.output]
        for entry in range(check_steps(shapes[0][0], label)):
            one = onnx.NodeProto()
            one.CopyFrom(node)
            del one.input[:], one.output[:]
            for name in names:
                cut, inner = self.element(name, entry, 0, label)
                nodes.append(cut)
                one.input.append(inner)
            for place, name in enumerate(node.output):
                self.count += 1
                one.output.append(f"step{self.count}/entry" if name else "")
                collected[place].append(one.output[place])
            for attribute in one.attribute:
                if attribute.name == "directions":
                    attribute.name = "scan_input_directions"
            nodes += self._scan(one, [shape[1:] for shape in shapes], label)
        for parts, name in zip(collected, node.output, strict=True):
            if name:
                nodes.extend(self.stacked(parts, 0, name, label))
        return nodes

    def _scan(self, node: onnx.NodeProto, shapes: Sequence[tuple[int, ...]], label: str) -> list[Labelled]:
        """A Scan of opset 9."""
        import onnx

        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        body, count = attributes["body"], int(attributes["num_scan_inputs"])
        states = list(node.input[: len(node.input) - count])
        scanned = list(node.input[len(node.input) - count :])
        results = len(node.output) - len(states)
        in_axes = list(attributes.get("scan_input_axes", [0] * count))
        out_axes = list(attributes.get("scan_output_axes", [0] * results))
        backwards = list(attributes.get("scan_input_directions", [0] * count))
        prepended = list(attributes.get("scan_output_directions", [0] * results))
        lengths = {shape[axis] for shape, axis in zip(shapes[len(states) :], in_axes, strict=True)}
        steps = check_steps(lengths.pop() if len(lengths) == 1 else 0, label)
        nodes: list[Labelled] = []
        collected: list[list[str]] = [[] for _ in range(results)]
        for step in range(steps):
            pieces = []
            for source, axis, back in zip(scanned, in_axes, backwards, strict=True):
                cut, name = self.element(source, steps - 1 - step if back else step, axis, label)
                nodes.append(cut)
                pieces.append(name)
            inner, outputs = self.step(body, [*states, *pieces], label)
            nodes.extend(inner)
            states = outputs[: len(states)]
            for place, name in enumerate(outputs[len(states) :]):
                collected[place].append(name)
        for final, name in zip(states, node.output, strict=False):
            if name:
                nodes.append((onnx.helper.make_node("Identity", [final], [name]), label))
        for place, parts in enumerate(collected):
            name = node.output[len(states) + place]
            if name:
                ordered = parts[::-1] if prepended[place] else parts
                nodes.extend(self.stacked(ordered, out_axes[place], name, label))
        return nodes


def check_steps(steps: int, label: str) -> int:
    """`steps`, if that many can be written out; UnsupportedError otherwise."""
    if not 1 <= steps <= MAX_STEPS:
        raise UnsupportedError(
            "a loop of this many steps is not supported", where=label, found=str(steps), allowed=f"1 to {MAX_STEPS}"
        )
    return steps
