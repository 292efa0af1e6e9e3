"""What a model file holds, read without compiling it: also of models that cannot be compiled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingot.errors import IngotError, ModelError, ShapeError
from ingot.frontend.shapes import DeclaredInput, Dim, resolve_shapes

if TYPE_CHECKING:
    import onnx
    import tflite

    from ingot.frontend.onnx_static import StaticGraph
    from ingot.frontend.source import Source


@dataclass(frozen=True)
class Tensor:
    """An input or output as declared: a dimension is a size, a name, or None where it is open."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class ModelFacts:
    """The answers of `ingot inspect` about a model.

    `weights` and `weights_bytes` count the stored constants; `macs` the multiply-adds of convolutions and matrix
    products for the default shapes, None where these are not known.
    """

    source_format: str
    version: str
    producer: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: dict[str, int]
    weights: int
    weights_bytes: int
    macs: int | None


def read_facts(source: Source) -> ModelFacts:
    """Read a model. Raises ModelError where the file is damaged, UnsupportedError for a version nobody can read."""
    return _tflite_facts(source) if source.format == "tflite" else _onnx_facts(source)


def shape_question(inputs: Sequence[Tensor]) -> tuple[str, ...]:
    """What compiling will say about open dimensions: the notices, or the error if --shape is needed."""
    try:
        _, notices, _ = resolve_shapes([DeclaredInput(t.name, t.dims) for t in inputs], None)
    except ShapeError as error:
        return (error.what, *([error.hint] if error.hint else []))
    return notices


# --------------------------------------------------------------------------------------------------------------- ONNX


def _onnx_facts(source: Source) -> ModelFacts:
    import onnx
    from google.protobuf.message import DecodeError

    from ingot.frontend.onnx_read import all_nodes
    from ingot.frontend.onnx_tensors import checked_count, element_bits
    from ingot.frontend.onnx_wire import split_weights

    stripped, _ = split_weights(source.data)
    try:
        proto = onnx.ModelProto.FromString(stripped)
    except (DecodeError, RecursionError):
        proto = onnx.ModelProto()
    if not proto.ir_version or not proto.graph.output:
        raise ModelError("the file is not an ONNX model, or is damaged", where=str(source.path))
    sizes = []
    for tensor in proto.graph.initializer:
        where = f"initializer {tensor.name!r}"
        bits = element_bits(tensor.data_type, where)
        sizes.append((checked_count(tuple(tensor.dims), bits, where), bits))
    held = {tensor.name for tensor in proto.graph.initializer}
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import)
    names = (
        f"{node.domain}:{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for _, node in all_nodes(proto.graph)
    )
    return ModelFacts(
        source_format="onnx",
        version=f"IR {proto.ir_version}, opset {opsets}",
        producer=" ".join(filter(None, (proto.producer_name, proto.producer_version))),
        inputs=tuple(_onnx_tensor(value) for value in proto.graph.input if value.name not in held),
        outputs=tuple(_onnx_tensor(value) for value in proto.graph.output),
        operators=dict(Counter(names).most_common()),
        weights=sum(count for count, _ in sizes),
        weights_bytes=sum((count * bits + 7) // 8 for count, bits in sizes),
        macs=_onnx_macs(source),
    )


def _onnx_tensor(value: onnx.ValueInfoProto) -> Tensor:
    import onnx

    kind = value.type.tensor_type
    dims: list[Dim] = []
    for dim in kind.shape.dim:
        if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0:
            dims.append(int(dim.dim_value))
        else:
            dims.append(dim.dim_param if dim.dim_param not in ("", "?", "None") else None)
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
    except (KeyError, ValueError, TypeError):
        dtype = "unknown"
    return Tensor(value.name, dtype, tuple(dims))


def _onnx_macs(source: Source) -> int | None:
    """Multiply-adds for the default shapes; None where the model is refused or its shapes are open."""
    from ingot.frontend.onnx_read import read_onnx
    from ingot.frontend.onnx_static import TensorType, make_static

    try:
        model = read_onnx(source)
        values = [value for value in model.proto.graph.input if value.name not in model.initializers]
        declared = [DeclaredInput(value.name, _onnx_tensor(value).dims) for value in values]
        shapes, _, sizes = resolve_shapes(declared, None)
        elems = {value.name: int(value.type.tensor_type.elem_type) for value in values}
        graph = make_static(model, {name: TensorType(elems[name], dims) for name, dims in shapes.items()}, sizes)
    except IngotError:
        return None
    return sum(_node_macs(node, graph) for node, _ in graph.nodes)


#: Operator -> which input holds the weights of a convolution, or the left matrix of a product.
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
_PRODUCTS = {"MatMul": 0, "MatMulInteger": 0, "QLinearMatMul": 0}


def _node_macs(node: onnx.NodeProto, graph: StaticGraph) -> int:
    def shape(name: str) -> tuple[int, ...]:
        return graph.types[name].shape if name in graph.types else ()

    kind = node.op_type
    if kind in _CONVOLUTIONS and len(node.input) > _CONVOLUTIONS[kind]:
        weights = shape(node.input[_CONVOLUTIONS[kind]])
        return math.prod(shape(node.output[0])) * math.prod(weights[1:]) if weights else 0
    if kind == "ConvTranspose":
        return math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])
    if kind in _PRODUCTS:
        left = shape(node.input[_PRODUCTS[kind]])
        return math.prod(shape(node.output[0])) * left[-1] if left else 0
    if kind == "Gemm":
        left = shape(node.input[0])
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(shape(node.output[0])) * left[0 if transposed else -1] if left else 0
    return 0


# ------------------------------------------------------------------------------------------------------------- TFLite

_TFLITE_DTYPES = {
    **{0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 5: "string", 6: "bool", 7: "int16", 9: "int8"},
    **{10: "float64", 12: "uint64", 15: "uint32", 16: "uint16", 17: "int4"},
}


def _tflite_facts(source: Source) -> ModelFacts:
    from ingot.frontend.tflite_verify import verified_model

    model = verified_model(source.data, str(source.path))
    graph = model.Subgraphs(0)
    buffers = {graph.Tensors(i).Buffer() for i in range(graph.TensorsLength())}
    constants = {i: int(model.Buffers(i).DataLength()) for i in buffers if i < model.BuffersLength()}
    stored = {i: size for i, size in constants.items() if size}
    owners = {graph.Tensors(i).Buffer(): i for i in range(graph.TensorsLength())}
    description = model.Description()
    numbers = range(graph.OperatorsLength())
    return ModelFacts(
        source_format="tflite",
        version=f"schema {model.Version()}",
        producer=description.decode("utf-8", "replace") if description else "",
        inputs=tuple(_tflite_tensor(graph, int(graph.Inputs(i))) for i in range(graph.InputsLength())),
        outputs=tuple(_tflite_tensor(graph, int(graph.Outputs(i))) for i in range(graph.OutputsLength())),
        operators=dict(Counter(_operator_name(model, graph.Operators(i)) for i in numbers).most_common()),
        weights=sum(math.prod(_stored_shape(graph, owners[i])) for i in stored),
        weights_bytes=sum(stored.values()),
        macs=sum(_operator_macs(model, graph, graph.Operators(i)) for i in numbers),
    )


def _stored_shape(graph: tflite.SubGraph, index: int) -> tuple[int, ...]:
    tensor = graph.Tensors(index)
    return tuple(int(tensor.Shape(axis)) for axis in range(tensor.ShapeLength()))


def _tflite_tensor(graph: tflite.SubGraph, index: int) -> Tensor:
    from ingot.frontend.tflite_verify import tensor_name

    tensor, dims = graph.Tensors(index), _stored_shape(graph, index)
    signature = [int(tensor.ShapeSignature(axis)) for axis in range(tensor.ShapeSignatureLength())]
    declared: tuple[Dim, ...] = dims
    if len(signature) == len(dims):
        declared = tuple(None if open_ == -1 else size for open_, size in zip(signature, dims, strict=True))
    return Tensor(tensor_name(graph, index), _TFLITE_DTYPES.get(tensor.Type(), "unknown"), declared)


def _operator_name(model: tflite.Model, operator: tflite.Operator) -> str:
    import tflite

    code = model.OperatorCodes(operator.OpcodeIndex())
    number = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())
    known = {value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)}
    if known.get(number) == "CUSTOM":
        custom = code.CustomCode()
        return f"custom:{custom.decode('utf-8', 'replace') if custom else ''}"
    return str(known.get(number, f"operator {number}"))


def _operator_macs(model: tflite.Model, graph: tflite.SubGraph, operator: tflite.Operator) -> int:
    """Multiply-adds of one operator, for the shapes stored in the file."""
    inputs = [int(operator.Inputs(i)) for i in range(operator.InputsLength())]
    shapes = [_stored_shape(graph, i) if i >= 0 else () for i in inputs]
    out = math.prod(_stored_shape(graph, int(operator.Outputs(0)))) if operator.OutputsLength() else 0
    name = _operator_name(model, operator)
    if name in ("CONV_2D", "FULLY_CONNECTED", "CONV_3D") and len(shapes) > 1:
        return out * math.prod(shapes[1][1:])
    if name == "DEPTHWISE_CONV_2D" and len(shapes) > 1:
        return out * math.prod(shapes[1][1:3])
    if name == "TRANSPOSE_CONV" and len(shapes) > 2:
        return math.prod(shapes[2]) * math.prod(shapes[1][:3])
    if name == "BATCH_MATMUL" and shapes and shapes[0]:
        return out * shapes[0][-1]
    return 0
