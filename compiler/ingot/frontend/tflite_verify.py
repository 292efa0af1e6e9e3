"""TFLite files: the part of the schema that is read, and the checks that make reading it safe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.flatbuffer import FieldType, Verifier
from ingot.frontend.onnx_tensors import checked_count

if TYPE_CHECKING:
    import tflite


def _fields(**fields: str) -> dict[int, FieldType]:
    """Fields in order of their ids; `_5="..."` style names skip none: every id up to the last used one is listed."""
    return {index: FieldType(name, kind) for index, (name, kind) in enumerate(fields.items())}


def _union(last: int, **members: int) -> str:
    """A union of `last` members of which only these have more than numbers in them."""
    names = {number: name for name, number in members.items()}
    return "|" + ",".join(names.get(number, "") for number in range(1, last + 1))


_OPTIONS = _union(
    126, ReshapeOptions=17, SqueezeOptions=30, HashtableOptions=107, VarHandleOptions=111, BucketizeOptions=115
)
_OPTIONS_2 = _union(
    22, StablehloBroadcastInDimOptions=2, StablehloSliceOptions=3, StablehloConvolutionOptions=4,
    StablehloDynamicSliceOptions=9, StablehloPadOptions=10, StablehloDotGeneralOptions=12, StablehloGatherOptions=16,
    StablehloTransposeOptions=17,
)  # fmt: skip
_INDICES = "|Int32Vector,Uint16Vector,Uint8Vector"
SCHEMA = {
    "Model": _fields(
        version="u32",
        operator_codes="[OperatorCode]",
        subgraphs="[SubGraph]",
        description="string",
        buffers="[Buffer]",
        metadata_buffer="[i32]",
        metadata="[Metadata]",
        signature_defs="[SignatureDef]",
    ),
    "OperatorCode": _fields(deprecated_builtin_code="i8", custom_code="string", version="i32", builtin_code="i32"),
    "SubGraph": _fields(tensors="[Tensor]", inputs="[i32]", outputs="[i32]", operators="[Operator]", name="string"),
    "Tensor": _fields(
        shape="[i32]",
        type="i8",
        buffer="u32",
        name="string",
        quantization="QuantizationParameters",
        is_variable="bool",
        sparsity="SparsityParameters",
        shape_signature="[i32]",
        has_rank="bool",
    ),
    "QuantizationParameters": _fields(
        min="[f32]",
        max="[f32]",
        scale="[f32]",
        zero_point="[i64]",
        details_type="u8",
        details="?",
        quantized_dimension="i32",
    ),
    "SparsityParameters": _fields(traversal_order="[i32]", block_map="[i32]", dim_metadata="[DimensionMetadata]"),
    "DimensionMetadata": _fields(
        format="i8",
        dense_size="i32",
        array_segments_type="u8",
        array_segments=_INDICES,
        array_indices_type="u8",
        array_indices=_INDICES,
    ),
    "Int32Vector": _fields(values="[i32]"),
    "Uint16Vector": _fields(values="[u16]"),
    "Uint8Vector": _fields(values="[u8]"),
    "ReshapeOptions": _fields(new_shape="[i32]"),
    "SqueezeOptions": _fields(squeeze_dims="[i32]"),
    "HashtableOptions": _fields(table_id="i32", key_dtype="i8", value_dtype="i8"),
    "VarHandleOptions": _fields(container="string", shared_name="string"),
    "BucketizeOptions": _fields(boundaries="[f32]"),
    "StablehloBroadcastInDimOptions": _fields(broadcast_dimensions="[i64]"),
    "StablehloSliceOptions": _fields(start_indices="[i64]", limit_indices="[i64]", strides="[i64]"),
    "StablehloConvolutionOptions": _fields(
        window_strides="[i64]",
        padding="[i64]",
        lhs_dilation="[i64]",
        rhs_dilation="[i64]",
        window_reversal="[bool]",
        input_batch_dimension="i64",
        input_feature_dimension="i64",
        input_spatial_dimensions="[i64]",
        kernel_input_feature_dimension="i64",
        kernel_output_feature_dimension="i64",
        kernel_spatial_dimensions="[i64]",
        output_batch_dimension="i64",
        output_feature_dimension="i64",
        output_spatial_dimensions="[i64]",
        feature_group_count="i64",
        batch_group_count="i64",
        precision_config="[i32]",
    ),
    "StablehloDynamicSliceOptions": _fields(slice_sizes="[i64]"),
    "StablehloPadOptions": _fields(edge_padding_low="[i64]", edge_padding_high="[i64]", interior_padding="[i64]"),
    "StablehloDotGeneralOptions": _fields(
        lhs_batching_dimensions="[i64]",
        rhs_batching_dimensions="[i64]",
        lhs_contracting_dimensions="[i64]",
        rhs_contracting_dimensions="[i64]",
        precision_config="[i32]",
    ),
    "StablehloGatherOptions": _fields(
        offset_dims="[i64]",
        collapsed_slice_dims="[i64]",
        start_index_map="[i64]",
        index_vector_dim="i64",
        slice_sizes="[i64]",
        indices_are_sorted="bool",
    ),
    "StablehloTransposeOptions": _fields(permutation="[i64]"),
    "Operator": _fields(
        opcode_index="u32",
        inputs="[i32]",
        outputs="[i32]",
        builtin_options_type="u8",
        builtin_options=_OPTIONS,
        custom_options="[u8]",
        custom_options_format="i8",
        mutating_variable_inputs="[bool]",
        intermediates="[i32]",
        large_custom_options_offset="u64",
        large_custom_options_size="u64",
        builtin_options_2_type="u8",
        builtin_options_2=_OPTIONS_2,
    ),
    "Buffer": _fields(data="[u8]", offset="u64", size="u64"),
    "Metadata": _fields(name="string", buffer="u32"),
    "SignatureDef": _fields(),
}

_ITEM_BITS = {
    0: 32,
    1: 16,
    2: 32,
    3: 8,
    4: 64,
    6: 8,
    7: 16,
    8: 64,
    9: 8,
    10: 64,
    11: 128,
    12: 64,
    15: 32,
    16: 16,
    17: 4,
}
_STRING = 5
_MAX_OPERATORS = 1_000_000


def verified_model(data: bytes, where: str) -> tflite.Model:
    """The model in `data`, after every offset, index and size in it was checked.

    Raises ModelError (damaged or lying) or UnsupportedError (valid, but nothing this compiler takes).
    """
    Verifier(data, SCHEMA).verify("Model")
    import tflite

    model = tflite.Model.GetRootAs(data, 0)
    if model.Version() != 3:
        found = str(model.Version())
        raise UnsupportedError("the TFLite schema version is not supported", where=where, found=found, allowed="3")
    if model.SubgraphsLength() < 1:
        raise ModelError("the model has no graph", where=where)
    check_graph(model, model.Subgraphs(0))
    if model.Subgraphs(0).OutputsLength() == 0:
        raise ModelError("the model has no outputs")
    return model


def check_graph(model: tflite.Model, graph: tflite.SubGraph) -> None:
    """Check every size and index of one graph. Raises as `verified_model`."""
    _check_tensors(model, graph)
    _check_operators(model, graph)


def tensor_name(graph: tflite.SubGraph, index: int) -> str:
    """A tensor's name, or `#index` if it has none."""
    raw = graph.Tensors(index).Name()
    return raw.decode("utf-8", "replace") if raw else f"#{index}"


def _check_tensors(model: tflite.Model, graph: tflite.SubGraph) -> None:
    buffers = model.BuffersLength()
    for index in range(graph.TensorsLength()):
        tensor = graph.Tensors(index)
        name = tensor_name(graph, index)
        where = f"tensor {index} {name if len(name) <= 80 else name[:77] + '...'!r}"
        if not 0 <= tensor.Buffer() < max(buffers, 1):
            raise ModelError("a tensor's buffer does not exist", where=where, found=str(tensor.Buffer()))
        dims = tuple(int(tensor.Shape(axis)) for axis in range(tensor.ShapeLength()))
        bits = _ITEM_BITS.get(tensor.Type())
        count = checked_count(dims, bits or 8, where)
        _check_quantization(tensor, dims, where)
        buffer = model.Buffers(tensor.Buffer()) if buffers else None
        if buffer is None:
            continue
        if buffer.Offset() > 1 or buffer.Size() > 1:
            raise UnsupportedError("weights outside the flatbuffer are not supported", where=where)
        held = buffer.DataLength()
        if held == 0 or bits is None or tensor.Type() == _STRING or tensor.Sparsity() is not None:
            continue
        wanted = (count * bits + 7) // 8
        if held != wanted:
            raise ModelError(
                "a tensor's data does not fit its shape",
                where=where,
                found=f"{held} bytes",
                allowed=f"{wanted} bytes for shape {list(dims)}",
                hint="the file is damaged, or lies about its sizes",
            )


def _check_quantization(tensor: tflite.Tensor, dims: tuple[int, ...], where: str) -> None:
    quantization = tensor.Quantization()
    if quantization is None or quantization.ScaleLength() == 0:
        return
    scales = np.asarray(quantization.ScaleAsNumpy())
    if not np.all(np.isfinite(scales)) or np.any(scales < 0):
        raise ModelError("a quantisation scale is not a positive number", where=where, found=str(scales[:4]))
    zeros = quantization.ZeroPointLength()
    if zeros not in (0, 1, len(scales)):
        found = f"{len(scales)} scales, {zeros} zero points"
        raise ModelError("quantisation scales and zero points do not fit together", where=where, found=found)
    low, high = {3: (0, 255), 9: (-128, 127), 7: (-(2**15), 2**15 - 1)}.get(tensor.Type(), (-(2**31), 2**31 - 1))
    if any(not low <= quantization.ZeroPoint(index) <= high for index in range(zeros)):
        raise ModelError("a zero point is outside its tensor's type", where=where, allowed=f"{low} to {high}")
    if len(scales) > 1 and any(quantization.ZeroPoint(index) for index in range(zeros)):
        found = "a zero point that is not 0"
        raise UnsupportedError("per-axis quantisation must be symmetric", where=where, found=found, allowed="0")
    axis = quantization.QuantizedDimension()
    if len(scales) > 1 and (not 0 <= axis < len(dims) or dims[axis] != len(scales)):
        found = f"{len(scales)} scales along axis {axis} of {list(dims)}"
        raise ModelError("quantisation scales do not fit the tensor's shape", where=where, found=found)


def _check_operators(model: tflite.Model, graph: tflite.SubGraph) -> None:
    tensors = graph.TensorsLength()
    if graph.OperatorsLength() > _MAX_OPERATORS:
        raise ModelError(
            "the graph has too many operators", found=str(graph.OperatorsLength()), allowed=str(_MAX_OPERATORS)
        )
    written = set()
    empty = set()  # a constant without elements has no bytes, so that it looks like a computed tensor
    for index in range(tensors):
        tensor = graph.Tensors(index)
        if model.BuffersLength() and model.Buffers(tensor.Buffer()).DataLength():
            written.add(index)
        elif any(tensor.Shape(axis) == 0 for axis in range(tensor.ShapeLength())):
            empty.add(index)
    for kind, indices in (("input", _indices(graph, "Inputs")), ("output", _indices(graph, "Outputs"))):
        for index in indices:
            if not 0 <= index < tensors:
                raise ModelError(f"a graph {kind} is no tensor", found=str(index), allowed=f"0 to {tensors - 1}")
    inputs = _indices(graph, "Inputs")
    if len(set(inputs)) != len(inputs):
        raise ModelError("a tensor is a graph input twice", found=str(inputs))
    written.update(inputs)
    variables = {index for index in range(tensors) if graph.Tensors(index).IsVariable()}
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        where = f"operator {number}"
        if operator.OpcodeIndex() >= model.OperatorCodesLength():
            raise ModelError("an operator's code does not exist", where=where, found=str(operator.OpcodeIndex()))
        for index in _indices(operator, "Inputs"):
            if not -1 <= index < tensors:
                raise ModelError("an operator reads a tensor that does not exist", where=where, found=str(index))
            if index >= 0 and index not in written and index not in empty and index not in variables:
                found = repr(tensor_name(graph, index))
                raise ModelError("an operator reads a tensor that nothing computes before it", where=where, found=found)
        outputs = _indices(operator, "Outputs")
        for index in outputs:
            if not 0 <= index < tensors:
                raise ModelError("an operator writes a tensor that does not exist", where=where, found=str(index))
            if index in written:
                found = repr(tensor_name(graph, index))
                raise ModelError("a tensor is written twice", where=where, found=found)
        written.update(outputs)
    for index in _indices(graph, "Outputs"):
        if index not in written and index not in empty:
            raise ModelError("an output is not computed by any operator", found=repr(tensor_name(graph, index)))


def _indices(table: tflite.SubGraph | tflite.Operator, name: str) -> list[int]:
    return [int(getattr(table, name)(index)) for index in range(getattr(table, f"{name}Length")())]
