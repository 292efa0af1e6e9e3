"""The part of a source model that computes given tensors, as a model of its own: what an interpreter can judge."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ingot.errors import ModelError, ToolchainError
from ingot.frontend.onnx_read import all_nodes, inline_functions, opsets_of


def write_part(path: Path, outputs: Sequence[str], inputs: Collection[str], result: Path) -> None:
    """Write to `result` the part of the ONNX or TFLite model at `path` that computes these outputs from these inputs.

    Raises ModelError if the model has no tensor of such a name, ToolchainError where LiteRT's schema is not installed.
    """
    data = path.read_bytes()
    if data[4:8] == b"TFL3":
        _write_tflite(data, outputs, inputs, result)
    else:
        _write_onnx(path, outputs, inputs, result)


def _missing(names: Collection[str]) -> ModelError:
    return ModelError("the model has no such tensors", found=", ".join(sorted(map(repr, names)))[:200])


def _write_onnx(path: Path, outputs: Sequence[str], inputs: Collection[str], result: Path) -> None:
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    if not set(outputs) <= {name for node in graph.node for name in node.output}:
        # The tensor lies inside a function.
        model = inline_functions(model, opsets_of(model).get("", 0))
        graph = model.graph
    wanted, kept = set(outputs), []
    for node in reversed(graph.node):
        if wanted.isdisjoint(node.output):
            continue
        kept.append(node)
        wanted.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                wanted.update(name for _, held in all_nodes(inner) for name in held.input)
    made = {name for node in kept for name in node.output} | {value.name for value in graph.input}
    if not set(outputs) <= made:
        raise _missing(set(outputs) - made)
    held = {tensor.name for tensor in graph.initializer}
    known = {value.name: value for value in graph.output}
    part = onnx.helper.make_graph(
        kept[::-1],
        "part",
        [value for value in graph.input if value.name in inputs or value.name in held],
        [known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs],
        [tensor for tensor in graph.initializer if tensor.name in wanted],
    )
    onnx.save(onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version), str(result))


def _write_tflite(data: bytes, outputs: Sequence[str], inputs: Collection[str], result: Path) -> None:
    try:
        flatbuffers = importlib.import_module("flatbuffers")  # by name: it has no type information
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        hint = "install it: pip install ai-edge-litert"
        raise ToolchainError("litert is not installed", found=str(error)[:200], hint=hint) from None
    model: Any = schema.ModelT.InitFromPackedBuf(bytearray(data), 0)
    graph = model.subgraphs[0]
    names = [tensor.name.decode("utf-8", "replace") if tensor.name else "" for tensor in graph.tensors]
    missing = [name for name in outputs if names.count(name) != 1]
    if missing:
        raise _missing(missing)
    wanted, kept = {names.index(name) for name in outputs}, []
    for operator in reversed(graph.operators):
        if not wanted.isdisjoint(operator.outputs):
            kept.append(operator)
            wanted.update(operator.inputs)
    graph.operators = kept[::-1]
    graph.inputs = [index for index in graph.inputs if names[index] in inputs]
    graph.outputs = [names.index(name) for name in outputs]
    model.signatureDefs = None
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), b"TFL3")
    result.write_bytes(bytes(builder.Output()))
