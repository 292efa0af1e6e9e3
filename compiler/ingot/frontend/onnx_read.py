"""Bytes -> a checked ONNX model: versions, sizes, operators and ONNX's own full checker, in that order."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.interface import Cut
from ingot.frontend.onnx_contrib import DOMAIN, UNDER_ONNX
from ingot.frontend.onnx_tensors import array_of_raw, external_array, tensor_array
from ingot.frontend.onnx_upgrade import upgrade_6_to_7
from ingot.frontend.onnx_wire import RawTensor, split_weights
from ingot.frontend.survey import Links, Survey, part_without

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from ingot.frontend.source import Source

OLDEST_IR, OLDEST_OPSET = 3, 7
_MAX_NODES = 1_000_000
_LISTED_NODES = 20
# What to do about operators that users of scikit-learn and ONNX Runtime meet.
_DRAW = "make the random numbers an input of the model, and draw them in the program that calls it"
_HINTS = {
    "ai.onnx.ml:ZipMap": "export without ZipMap: with skl2onnx, options={id(model): {'zipmap': False}}",
    "RandomNormalLike": _DRAW,
    "RandomUniformLike": _DRAW,
    "com.microsoft.nchwc:Conv": "let ONNX Runtime optimise up to ORT_ENABLE_EXTENDED at most",
}


@dataclass(frozen=True)
class OnnxModel:
    """A checked model: `proto` without large weights (they are in `initializers`), functions inlined.

    `numbers` are those of its nodes in the whole model, of which `cut` says what is left out.
    """

    proto: onnx.ModelProto
    opset: int
    initializers: dict[str, np.ndarray]
    numbers: tuple[int, ...]
    cut: Cut | None = None


def node_label(node: onnx.NodeProto, index: int) -> str:
    """How messages call a node: its operator with its name, or with its place and first output if it has none."""
    domain = f"{node.domain}:" if node.domain not in ("", "ai.onnx") else ""
    if node.name:
        return f"{domain}{node.op_type} {node.name!r}"
    output = next((name for name in node.output if name), "")
    return f"{domain}{node.op_type} #{index} (output {output!r})"


def read_onnx(source: Source, without: Collection[int] = (), survey: Survey | None = None) -> OnnxModel:
    """Parse, size-check, inline functions, refuse unknown operators (all of them at once), run the full checker.

    The nodes with the numbers `without`, and those that need them, are left out. With a survey, so are all nodes with
    unknown operators, which it gets to know. Raises ModelError (damaged, lying or invalid) or UnsupportedError (valid,
    but nothing this compiler can take).
    """
    import onnx

    stripped, raw = split_weights(source.data)
    try:
        proto = onnx.ModelProto.FromString(stripped)
    except _decode_errors():
        raise ModelError(
            "the file is not an ONNX model, or is damaged",
            where=str(source.path),
            found="it does not parse as protobuf",
            allowed="an ONNX ModelProto",
            hint="fetch or export the file again",
        ) from None
    _check_text(proto)
    opset = _check_versions(proto)
    _name_contrib_domain(proto, opset)
    initializers = _take_initializers(proto, source, raw)
    proto = inline_functions(proto, opset)
    numbers, cut = tuple(range(len(proto.graph.node))), None
    if survey is not None:
        without = {*without, *_survey_operators(proto, survey)}
    if without:
        numbers, cut = _leave_out(proto, without, initializers)
    _refuse_unknown_operators(proto)
    proto = _complete_outputs(proto)
    _full_check(_with_typed_outputs(proto))
    return OnnxModel(proto, opset, initializers, numbers, cut)


def _decode_errors() -> tuple[type[Exception], ...]:
    # By name, as protobuf has no type information of its own.
    return (importlib.import_module("google.protobuf.message").DecodeError, RecursionError)


def _check_text(proto: onnx.ModelProto) -> None:
    """Refuse names that are not UTF-8: protobuf hands them out as bytes, which no later step expects."""
    texts = [value.name for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer)]
    texts += [entry.domain for entry in proto.opset_import]
    for graph in (proto.graph, *proto.functions):
        for _, node in all_nodes(graph):
            texts += (node.op_type, node.domain, node.name, *node.input, *node.output)
            texts += (attribute.name for attribute in node.attribute)
    for text in texts:
        if not isinstance(text, str):
            raise ModelError("a name is not UTF-8", found=repr(text)[:80], hint="the file is damaged")


def _check_versions(proto: onnx.ModelProto) -> int:
    import onnx

    newest_ir, newest_opset = int(onnx.IR_VERSION), int(onnx.defs.onnx_opset_version())
    if not proto.HasField("ir_version") or not proto.graph.output:
        raise ModelError(
            "the file is not an ONNX model", found="no IR version or no outputs", allowed="an ONNX ModelProto"
        )
    if not OLDEST_IR <= proto.ir_version <= newest_ir:
        raise UnsupportedError(
            "the model's ONNX IR version is not supported",
            found=str(proto.ir_version),
            allowed=f"{OLDEST_IR} to {newest_ir}",
            hint="export the model again for a supported version",
        )
    opset = 0
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            opset = max(opset, entry.version)
    if opset == 0 and all(node.domain not in ("", "ai.onnx") for _, node in all_nodes(proto.graph)):
        # Of other domains alone: what their nodes become is of the newest.
        opset = newest_opset
        proto.opset_import.append(onnx.helper.make_opsetid("", opset))
    if opset == OLDEST_OPSET - 1 and len(proto.graph.node) <= _MAX_NODES:
        upgrade_6_to_7(proto)
        opset = OLDEST_OPSET
    if not OLDEST_OPSET <= opset <= newest_opset and not _unchanged_since(proto, opset):
        raise UnsupportedError(
            "the model's ONNX opset is not supported",
            found=str(opset) if opset else "no opset of ai.onnx",
            allowed=f"{OLDEST_OPSET} to {newest_opset}",
            hint="export the model again for a supported opset",
        )
    if len(proto.graph.node) > _MAX_NODES:
        raise ModelError("the graph has too many nodes", found=str(len(proto.graph.node)), allowed=str(_MAX_NODES))
    if proto.graph.sparse_initializer:
        raise UnsupportedError("sparse initializers are not supported", hint="export the model with dense weights")
    return opset


def _name_contrib_domain(proto: onnx.ModelProto, opset: int) -> None:
    """Move norms that ONNX Runtime's optimiser writes under ONNX's domain, where it has none, to com.microsoft."""
    import onnx

    moved = False
    for _, node in all_nodes(proto.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in UNDER_ONNX and not onnx.defs.has(node.op_type, opset, ""):
            node.domain, moved = DOMAIN, True
    if moved and all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _unchanged_since(proto: onnx.ModelProto, opset: int) -> bool:
    """Whether an older model uses only operators whose definition is still that of OLDEST_OPSET."""
    import onnx

    if not 1 <= opset < OLDEST_OPSET:
        return False
    for _, node in all_nodes(proto.graph):
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset, ""):
            return False
        if onnx.defs.get_schema(node.op_type, OLDEST_OPSET, "").since_version > opset:
            return False
    return True


def _take_initializers(proto: onnx.ModelProto, source: Source, raw: dict[str, RawTensor]) -> dict[str, np.ndarray]:
    """Read all initializers; remove those whose data is not in the proto, leaving typed inputs for the checker."""
    import onnx

    arrays: dict[str, np.ndarray] = {}
    kept: list[onnx.TensorProto] = []
    known_inputs = {value.name for value in proto.graph.input}
    view = memoryview(source.data)
    for tensor in proto.graph.initializer:
        where = f"initializer {tensor.name!r}"
        if not tensor.name:
            raise ModelError("an initializer has no name", found=f"shape {list(tensor.dims)}")
        if tensor.name in arrays:
            raise ModelError("two initializers have the same name", where=where)
        outside = True
        if tensor.name in raw:
            place = raw[tensor.name]
            data = view[place.offset : place.offset + place.bytes]
            arrays[tensor.name] = array_of_raw(data, tensor.data_type, tuple(tensor.dims), where)
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            arrays[tensor.name] = external_array(tensor, source.path.parent, where)
        else:
            arrays[tensor.name] = tensor_array(tensor, where)
            outside = False
        if not outside:
            kept.append(tensor)
        # Before IR version 4 every initializer is an input, which ONNX Runtime's quantiser forgets.
        if (outside or proto.ir_version < 4) and tensor.name not in known_inputs:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            proto.graph.input.append(value)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return arrays


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Every node of a graph and of the graphs inside it, with its place in its own graph."""
    for index, node in enumerate(graph.node):
        yield index, node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                yield from all_nodes(inner)


def inline_functions(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Replace calls to model-local functions, and operators this compiler lacks but ONNX defines by others."""
    import onnx
    import onnx.inliner

    from ingot.frontend.onnx_ops import is_supported

    for _, node in all_nodes(proto.graph):
        if node.op_type == "STFT" and node.domain in ("", "ai.onnx"):
            # ONNX's inference takes a missing `onesided` for 0, its definition for 1.
            _write_defaults(node, onnx.defs.get_schema("STFT", opset, ""))
    try:
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        wanted = set()
        for _, node in all_nodes(proto.graph):
            if not is_supported(node.domain, node.op_type) and onnx.defs.has(node.op_type, opset, node.domain):
                schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
                if schema.has_function and not schema.has_context_dependent_function:
                    wanted.add((node.domain, node.op_type))
                    _write_defaults(node, schema)
        if wanted:
            proto = onnx.inliner.inline_selected_functions(proto, sorted(wanted), False, True)
    except (RuntimeError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedError(
            "a function of the model cannot be expanded",
            found=_condense(str(error)),
            hint="export the model without functions, or for an older opset",
        ) from None
    return proto


def _write_defaults(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> None:
    """Write out a node's default attributes: function bodies refer to them, and the inliner does not know them."""
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.name:
            node.attribute.append(attribute.default_value)


def _refuse_unknown_operators(proto: onnx.ModelProto) -> None:
    from ingot.frontend.onnx_ops import is_supported

    opsets = opsets_of(proto)
    refused: dict[str, list[str]] = {}
    for index, node in all_nodes(proto.graph):
        # Bodies that depend on input types are written out later, when every type is known.
        if not is_supported(node.domain, node.op_type) and not _has_body(node, opsets):
            domain = f"{node.domain}:" if node.domain not in ("", "ai.onnx") else ""
            name = node.name or f"#{index} -> {next((out for out in node.output if out), '')}"
            refused.setdefault(domain + node.op_type, []).append(name)
    refuse_operators(refused)


def _survey_operators(proto: onnx.ModelProto, survey: Survey) -> list[int]:
    """Tell a survey of all nodes and of those with operators that are not supported, whose numbers are returned."""
    from ingot.frontend.onnx_ops import is_supported, why_refused

    opsets = opsets_of(proto)
    for number, node in enumerate(proto.graph.node):
        survey.labels[number] = node_label(node, number)
        for place, inner in [(number, node), *_inner_nodes(node)]:
            if not is_supported(inner.domain, inner.op_type) and not _has_body(inner, opsets):
                why = why_refused(inner.op_type)
                found = f"{inner.op_type}, which {why}" if why else None
                error = UnsupportedError("the operator is not supported", node_label(inner, place), found)
                survey.fail(number, error, node.output)
    return list(survey.failures)


def _inner_nodes(node: onnx.NodeProto) -> Iterator[tuple[int, onnx.NodeProto]]:
    """The nodes of the graphs that a node holds."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            yield from all_nodes(inner)


def _leave_out(
    proto: onnx.ModelProto, without: Collection[int], initializers: Collection[str]
) -> tuple[tuple[int, ...], Cut]:
    """Remove nodes, and what needs their results; the tensors they would have read become outputs."""
    import onnx

    graph = proto.graph
    links = [
        Links(
            frozenset(name for held in (node, *(n for _, n in _inner_nodes(node))) for name in held.input if name),
            tuple(name for name in node.output if name),
        )
        for node in graph.node
    ]
    inputs = [value.name for value in graph.input if value.name not in initializers]
    part = part_without(links, without, inputs, [value.name for value in graph.output])
    known = {value.name: value for value in graph.output}
    nodes = [graph.node[number] for number in part.kept]
    outputs = [known.get(name) or onnx.ValueInfoProto(name=name) for name in part.outputs]
    gone = set(inputs) - set(part.inputs)
    left = [value for value in graph.input if value.name not in gone]
    cut = Cut(len(links), len(links) - len(nodes), part.outputs, part.opened)
    for field, values in ((graph.node, nodes), (graph.output, outputs), (graph.input, left)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    return part.kept, cut


def _has_body(node: onnx.NodeProto, opsets: dict[str, int]) -> bool:
    import onnx

    domain = "" if node.domain == "ai.onnx" else node.domain
    opset = opsets.get(domain, 0)
    if not onnx.defs.has(node.op_type, opset, domain):
        return False
    return bool(onnx.defs.get_schema(node.op_type, opset, domain).has_context_dependent_function)


def opsets_of(proto: onnx.ModelProto) -> dict[str, int]:
    """The version of each operator set that a model imports; ONNX's own is ""."""
    return {"" if entry.domain == "ai.onnx" else entry.domain: int(entry.version) for entry in proto.opset_import}


def refuse_operators(refused: dict[str, list[str]]) -> None:
    """Raise one UnsupportedError that lists every operator of `refused` with the nodes that use it, if any."""
    if not refused:
        return
    from ingot.frontend.onnx_ops import why_refused

    listed = []
    for operator in sorted(refused):
        names = [name if len(name) <= 60 else f"{name[:57]}..." for name in refused[operator]]
        more = f" and {len(names) - _LISTED_NODES} more" if len(names) > _LISTED_NODES else ""
        why = why_refused(operator)
        listed.append(f"{operator}{why and f', which {why}'} ({', '.join(names[:_LISTED_NODES])}{more})")
    hints = list(dict.fromkeys(_HINTS[operator] for operator in sorted(refused) if operator in _HINTS))
    raise UnsupportedError(
        "the model uses operators that are not supported",
        where=f"{sum(map(len, refused.values()))} nodes",
        found="; ".join(listed),
        hint="; ".join(hints)
        or "replace these operators before exporting the model, or teach them with ingot.register_op",
    )


def _complete_outputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fill in the types of outputs that exporters left out: every runtime infers them, only the checker insists."""
    import onnx

    if all(value.type.tensor_type.HasField("shape") for value in proto.graph.output):
        return proto
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return proto
    for value, found in zip(proto.graph.output, inferred.graph.output, strict=True):
        if not value.type.tensor_type.HasField("shape"):
            value.CopyFrom(found)
    return proto


def _with_typed_outputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model for the checker, which takes no output without a rank: one that depends on values has none yet."""
    import onnx

    if all(value.type.tensor_type.HasField("shape") for value in proto.graph.output):
        return proto
    checked = onnx.ModelProto()
    checked.CopyFrom(proto)
    del checked.graph.output[:]
    checked.graph.output.extend(v for v in proto.graph.output if v.type.tensor_type.HasField("shape"))
    return checked


def _full_check(proto: onnx.ModelProto) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            "the model fails ONNX's own check",
            found=_condense(str(error)),
            hint="the exporter wrote an invalid model: export it again, or report it to the exporter",
        ) from None
    except (RuntimeError, ValueError, TypeError, OverflowError, UnicodeError) as error:
        raise ModelError("the model cannot be checked", found=_condense(str(error))) from None


def _condense(message: str) -> str:
    """ONNX's checker message without its dump of the whole node: what, and which node."""
    text = re.sub(r"\s*==> Context:.*?(?=\n|$)", "", message)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^\[[A-Za-z]*Error\]\s*", "", text)
    return text if len(text) <= 400 else text[:397] + "..."
