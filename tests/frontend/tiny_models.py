"""Tiny handmade models: ONNX by its helper, TFLite by its flatbuffer builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import flatbuffers
import numpy as np
import onnx
import tflite
from onnx import helper


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[str, Sequence[int | str | None]]],
    outputs: Sequence[str],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """An ONNX model. `inputs` maps a name to (numpy dtype, dims); the outputs' types are left to inference."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(dims))
            for name, (dtype, dims) in inputs.items()
        ],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=list(functions))
    if not domains:
        inferred = onnx.shape_inference.infer_shapes(model)
        for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(
                known if known.type.WhichOneof("value") else helper.make_tensor_value_info(value.name, 1, None)
            )
    return model


@dataclass
class Sparsity:
    """A TFLite tensor's tables: levels are sizes (dense), or segments and indices (compressed)."""

    order: tuple[int, ...]
    blocks: tuple[int, ...]
    levels: tuple[int | tuple[np.ndarray, np.ndarray], ...]


@dataclass
class Tensor:
    """A TFLite tensor: constant if it has data."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    data: np.ndarray | None = None
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] | None = ()  # () stands for zeros, None for no such field
    axis: int = 0
    signature: tuple[int, ...] | None = None
    variable: bool = False
    sparsity: Sparsity | None = None


@dataclass
class Op:
    """A TFLite operator: its schema name, tensor indices, options class and its scalar fields."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: str = ""
    fields: Mapping[str, float | str | np.ndarray] = field(default_factory=dict)
    custom: str = ""
    custom_options: bytes | None = None
    intermediates: tuple[int, ...] = ()


_TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9}
_TYPES |= {"complex64": 8, "float64": 10, "uint64": 12, "resource": 13, "uint32": 15, "uint16": 16, "int4": 17}
# Operators whose first version LiteRT does not have.
_VERSIONS = {"BROADCAST_TO": 2}


def _vector(builder: flatbuffers.Builder, values: Sequence[int], prepend: str, size: int) -> int:
    builder.StartVector(size, len(values), size)
    for value in reversed(values):
        getattr(builder, prepend)(value)
    return int(builder.EndVector())


def _ints(builder: flatbuffers.Builder, values: Sequence[int]) -> int:
    return _vector(builder, values, "PrependInt32", 4)


def _offsets(builder: flatbuffers.Builder, values: Sequence[int]) -> int:
    return _vector(builder, values, "PrependUOffsetTRelative", 4)


def _indices(builder: flatbuffers.Builder, values: np.ndarray) -> tuple[int, int]:
    """A vector of a sparse level: its number in the union, and its offset."""
    number, kind = {"int32": (1, "Int32Vector"), "uint16": (2, "Uint16Vector"), "uint8": (3, "Uint8Vector")}[
        str(values.dtype)
    ]
    vector = builder.CreateNumpyVector(values)
    getattr(tflite, f"{kind}Start")(builder)
    getattr(tflite, f"{kind}AddValues")(builder, vector)
    return number, getattr(tflite, f"{kind}End")(builder)


def _sparsity(builder: flatbuffers.Builder, sparsity: Sparsity) -> int:
    levels = []
    for level in sparsity.levels:
        vectors = None if isinstance(level, int) else [_indices(builder, part) for part in level]
        tflite.DimensionMetadataStart(builder)
        tflite.DimensionMetadataAddFormat(builder, 0 if vectors is None else 1)
        if vectors is None:
            tflite.DimensionMetadataAddDenseSize(builder, level)
        else:
            for name, (number, offset) in zip(("Segments", "Indices"), vectors, strict=True):
                getattr(tflite, f"DimensionMetadataAddArray{name}Type")(builder, number)
                getattr(tflite, f"DimensionMetadataAddArray{name}")(builder, offset)
        levels.append(tflite.DimensionMetadataEnd(builder))
    parts = [_ints(builder, sparsity.order), _ints(builder, sparsity.blocks), _offsets(builder, levels)]
    tflite.SparsityParametersStart(builder)
    for name, part in zip(("TraversalOrder", "BlockMap", "DimMetadata"), parts, strict=True):
        getattr(tflite, f"SparsityParametersAdd{name}")(builder, part)
    return int(tflite.SparsityParametersEnd(builder))


def _tensor(builder: flatbuffers.Builder, tensor: Tensor, buffer: int) -> int:
    name = builder.CreateString(tensor.name)
    shape = _ints(builder, tensor.shape)
    signature = _ints(builder, tensor.signature) if tensor.signature is not None else None
    sparsity = _sparsity(builder, tensor.sparsity) if tensor.sparsity is not None else None
    quantization = None
    if tensor.scale:
        scales = _vector(builder, tensor.scale, "PrependFloat32", 4)  # type: ignore[arg-type]
        zeros = None
        if tensor.zero_point is not None:
            zeros = _vector(builder, tensor.zero_point or (0,) * len(tensor.scale), "PrependInt64", 8)
        tflite.QuantizationParametersStart(builder)
        tflite.QuantizationParametersAddScale(builder, scales)
        if zeros is not None:
            tflite.QuantizationParametersAddZeroPoint(builder, zeros)
        tflite.QuantizationParametersAddQuantizedDimension(builder, tensor.axis)
        quantization = tflite.QuantizationParametersEnd(builder)
    tflite.TensorStart(builder)
    tflite.TensorAddShape(builder, shape)
    tflite.TensorAddType(builder, _TYPES[tensor.dtype])
    tflite.TensorAddBuffer(builder, buffer)
    tflite.TensorAddName(builder, name)
    tflite.TensorAddIsVariable(builder, tensor.variable)
    if signature is not None:
        tflite.TensorAddShapeSignature(builder, signature)
    if sparsity is not None:
        tflite.TensorAddSparsity(builder, sparsity)
    if quantization is not None:
        tflite.TensorAddQuantization(builder, quantization)
    return int(tflite.TensorEnd(builder))


def _field(builder: flatbuffers.Builder, value: float | str | np.ndarray) -> float:
    """An option as it is, or the offset of a text or a vector."""
    if isinstance(value, np.ndarray):
        return int(builder.CreateNumpyVector(value))
    return int(builder.CreateString(value)) if isinstance(value, str) else value


def _operator(builder: flatbuffers.Builder, op: Op, code: int) -> int:
    options = None
    if op.options:
        values = {k: _field(builder, v) for k, v in op.fields.items()}
        getattr(tflite, f"{op.options}Start")(builder)
        for key, value in values.items():
            getattr(tflite, f"{op.options}Add{key}")(builder, value)
        options = getattr(tflite, f"{op.options}End")(builder)
    inputs, outputs = _ints(builder, op.inputs), _ints(builder, op.outputs)
    custom = builder.CreateByteVector(op.custom_options) if op.custom_options is not None else None
    intermediates = _ints(builder, op.intermediates) if op.intermediates else None
    tflite.OperatorStart(builder)
    if intermediates is not None:
        tflite.OperatorAddIntermediates(builder, intermediates)
    if custom is not None:
        tflite.OperatorAddCustomOptions(builder, custom)
    tflite.OperatorAddOpcodeIndex(builder, code)
    tflite.OperatorAddInputs(builder, inputs)
    tflite.OperatorAddOutputs(builder, outputs)
    if options is not None:
        second = "2" if hasattr(tflite.BuiltinOptions2, op.options) else ""
        number = getattr(getattr(tflite, f"BuiltinOptions{second}"), op.options)
        getattr(tflite, f"OperatorAddBuiltinOptions{second}Type")(builder, number)
        getattr(tflite, f"OperatorAddBuiltinOptions{second}")(builder, options)
    return int(tflite.OperatorEnd(builder))


@dataclass
class Graph:
    """A TFLite graph beside the main one."""

    tensors: Sequence[Tensor]
    ops: Sequence[Op]
    name: str = "once"
    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()


def _graph(builder: flatbuffers.Builder, graph: Graph, vectors: Sequence[Sequence[int]], first: int) -> int:
    """A graph whose buffers begin with number `first`; `vectors` are its inputs, outputs and its operators' codes."""
    inputs, outputs, codes = vectors
    name = builder.CreateString(graph.name)
    tensors = [_tensor(builder, tensor, first + index) for index, tensor in enumerate(graph.tensors)]
    operators = [_operator(builder, op, code) for op, code in zip(graph.ops, codes, strict=True)]
    parts = [_offsets(builder, tensors), _ints(builder, inputs), _ints(builder, outputs), _offsets(builder, operators)]
    tflite.SubGraphStart(builder)
    for add, part in zip(("Tensors", "Inputs", "Outputs", "Operators"), parts, strict=True):
        getattr(tflite, f"SubGraphAdd{add}")(builder, part)
    tflite.SubGraphAddName(builder, name)
    return int(tflite.SubGraphEnd(builder))


def tflite_of(
    tensors: Sequence[Tensor],
    ops: Sequence[Op],
    inputs: Sequence[int],
    outputs: Sequence[int],
    others: Sequence[Graph] = (),
) -> bytes:
    """A TFLite file with one graph, and perhaps others."""
    builder = flatbuffers.Builder(1024)
    graphs = [Graph(tensors, ops, "main"), *others]
    buffer_offsets = []
    every = [tensor.data for graph in graphs for tensor in graph.tensors]
    for data in (b"", *(b"" if value is None else value.tobytes() for value in every)):
        content = builder.CreateByteVector(data) if data else None
        tflite.BufferStart(builder)
        if content is not None:
            tflite.BufferAddData(builder, content)
        buffer_offsets.append(tflite.BufferEnd(builder))
    codes = []
    for op in (op for graph in graphs for op in graph.ops):
        custom = builder.CreateString(op.custom) if op.custom else None
        number = getattr(tflite.BuiltinOperator, "CUSTOM" if op.custom else op.name)
        tflite.OperatorCodeStart(builder)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, min(number, 127))
        tflite.OperatorCodeAddBuiltinCode(builder, number)
        tflite.OperatorCodeAddVersion(builder, _VERSIONS.get(op.name, 1))
        if custom is not None:
            tflite.OperatorCodeAddCustomCode(builder, custom)
        codes.append(tflite.OperatorCodeEnd(builder))
    offsets, buffer, code = [], 1, 0
    for number, graph in enumerate(graphs):
        ends = (inputs, outputs) if number == 0 else (graph.inputs, graph.outputs)
        offsets.append(_graph(builder, graph, (*ends, range(code, code + len(graph.ops))), buffer))
        buffer, code = buffer + len(graph.tensors), code + len(graph.ops)
    graph_vector, code_vector = _offsets(builder, offsets), _offsets(builder, codes)
    buffer_vector = _offsets(builder, buffer_offsets)
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddOperatorCodes(builder, code_vector)
    tflite.ModelAddSubgraphs(builder, graph_vector)
    tflite.ModelAddBuffers(builder, buffer_vector)
    builder.Finish(tflite.ModelEnd(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def small_tflite() -> bytes:
    """A convolution, a dense layer and a softmax, all float: 8x8x3 -> 5 classes."""
    random = np.random.default_rng(3)

    def weights(name: str, *shape: int) -> Tensor:
        return Tensor(name, shape, data=random.standard_normal(shape).astype(np.float32))

    tensors = [
        Tensor("x", (1, 8, 8, 3), signature=(-1, 8, 8, 3)),
        weights("kernel", 4, 3, 3, 3),
        weights("bias", 4),
        Tensor("conv", (1, 4, 4, 4)),
        weights("dense", 5, 64),
        Tensor("flat", (1, 64)),
        Tensor("logits", (1, 5)),
        Tensor("y", (1, 5), signature=(-1, 5)),
        Tensor("shape", (2,), "int32", np.array([-1, 64], np.int32)),
    ]
    ops = [
        Op("CONV_2D", (0, 1, 2), (3,), "Conv2DOptions",
           {"StrideH": 2, "StrideW": 2, "FusedActivationFunction": 1, "DilationHFactor": 1, "DilationWFactor": 1}),
        Op("RESHAPE", (3, 8), (5,)),
        Op("FULLY_CONNECTED", (5, 4), (6,), "FullyConnectedOptions", {"FusedActivationFunction": 0}),
        Op("SOFTMAX", (6,), (7,), "SoftmaxOptions", {"Beta": 0.1}),
    ]  # fmt: skip
    return tflite_of(tensors, ops, [0], [7])


def small_onnx() -> onnx.ModelProto:
    """A convolution, batch normalisation, clip, pooling and dense layer: [N, 3, 8, 8] -> [N, 5]."""
    random = np.random.default_rng(3)

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["conv"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "g", "b", "mean", "variance"], ["norm"], name="norm"),
        helper.make_node("Clip", ["norm", "low", "high"], ["clip"], name="relu6"),
        helper.make_node("GlobalAveragePool", ["clip"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "dense", "offset"], ["y"], name="dense", transB=1),
    ]
    values = {
        "kernel": weights(16, 3, 3, 3), "bias": weights(16), "g": weights(16), "b": weights(16), "mean": weights(16),
        "variance": np.abs(weights(16)) + np.float32(0.5), "low": np.float32(0), "high": np.float32(6),
        "dense": weights(5, 16), "offset": weights(5),
    }  # fmt: skip
    return model_of(nodes, {"x": ("float32", ("N", 3, 8, 8))}, ["y"], values)
