"""TFLite operators: TVM's converters, behind tensors found by index, with our own where TVM's are wrong or missing.

Quantised operators become dequantize -> float operator -> quantize, the form every later pass recognises; those that
only move elements work on the stored integers when input and output share their scale.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.custom import CustomOp, OpNode, converted, custom_op
from ingot.frontend.interface import CONSTANT_ELEMENTS
from ingot.frontend.normalize import Weights
from ingot.frontend.tvm_types import Builder, Expr, Operator, Options, TfliteConverter, Value, Wrapper

if TYPE_CHECKING:
    import tflite

# TVM converts these into calls of other functions, values that are no tensors, or sizes only known at run time.
_REFUSED = frozenset(
    (
        "ASSIGN_VARIABLE", "CALL", "CALL_ONCE", "DELEGATE", "DETECTION_POSTPROCESS", "HASHTABLE", "HASHTABLE_FIND",
        "HASHTABLE_IMPORT", "HASHTABLE_LOOKUP", "HASHTABLE_SIZE", "IF", "MULTINOMIAL", "NON_MAX_SUPPRESSION_V4",
        "NON_MAX_SUPPRESSION_V5", "PLACEHOLDER_FOR_GREATER_OP_CODES", "RANDOM_STANDARD_NORMAL", "RANDOM_UNIFORM",
        "READ_VARIABLE", "UNIQUE",
        # These read or write where a tensor's values point, without a check.
        "DYNAMIC_UPDATE_SLICE", "EMBEDDING_LOOKUP_SPARSE", "REVERSE_SEQUENCE", "SCATTER_ND", "SEGMENT_SUM",
        "SPARSE_TO_DENSE", "UNSORTED_SEGMENT_MAX", "UNSORTED_SEGMENT_MIN", "UNSORTED_SEGMENT_PROD",
        "UNSORTED_SEGMENT_SUM", "VAR_HANDLE", "WHERE", "WHILE", "CUSTOM",
    )
)  # fmt: skip
_FLOATS = (0, 1)

# Operators with quantised inputs and float results, or the other way round.
_MIXED = frozenset(("QUANTIZE", "DEQUANTIZE", "custom TFLite_Detection_PostProcess"))
HYBRID = frozenset(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"))

# The files that fill OWN.
_FAMILIES = ("tflite_layers", "tflite_moves", "tflite_arithmetic", "tflite_detect", "tflite_signal")

Handler = Callable[[TfliteConverter, Operator], Expr]
OWN: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a function (converter, operator) -> Relax expression, or list of them, for these operators."""

    def register(function: Handler) -> Handler:
        for name in names:
            OWN[name] = function
        return function

    return register


def make_converter(
    model: tflite.Model, graph: tflite.SubGraph, bb: Builder, weights: Weights, values: dict[int, np.ndarray]
) -> TfliteConverter:
    """The converter of one graph, with tensors that are given values and so are constants.

    A function, because its class derives from TVM's and TVM is imported late.
    """
    return _converter_class()(model, graph, bb, weights, values)


class _BoundBuffer:
    """The value of an input that is a constant, in the form of a buffer of the file."""

    def __init__(self, value: np.ndarray) -> None:
        self._bytes = np.frombuffer(value.tobytes(), np.uint8)

    def DataLength(self) -> int:  # noqa: N802 - the schema's own name
        return len(self._bytes)

    def DataAsNumpy(self) -> np.ndarray:  # noqa: N802
        return self._bytes


@functools.cache
def _converter_class() -> type:
    from tvm import relax
    from tvm.relax.frontend.tflite import tflite_frontend as tvm_tflite

    for family in _FAMILIES:
        importlib.import_module(f"ingot.frontend.{family}")

    class Constants(tvm_tflite.ExprTable):  # type: ignore[misc]
        """Constants go to the weights instead of into the graph."""

        def __init__(self, weights: Weights) -> None:
            super().__init__()
            self.weights = weights

        def new_const(
            self, value: Value, shape: Value = None, dtype: str = "float32", source_name: Value = None
        ) -> Expr:
            array = np.asarray(value)
            array = array if array.dtype == np.dtype(dtype) else array.astype(np.dtype(dtype))
            if array.size <= CONSTANT_ELEMENTS:
                return relax.const(np.asarray(array, order="C"), dtype)
            name = source_name.decode("utf-8", "replace") if isinstance(source_name, bytes) else "constant"
            return self.weights.add(name, array)

    class Converter(tvm_tflite.OperatorConverter):  # type: ignore[misc]
        """TVM's converter with tensors kept by index: names may be missing, or the same for two tensors."""

        def __init__(
            self,
            model: tflite.Model,
            graph: tflite.SubGraph,
            bb: Builder,
            weights: Weights,
            given: dict[int, np.ndarray],
        ) -> None:
            super().__init__(model, graph, Constants(weights), bb)
            self.given = given
            self.values: dict[int, Expr] = {}
            self.fetched: dict[int, Expr] = {}

        def bind(self, index: int, value: Expr) -> None:
            self.values[index] = value

        def get_tensors(self, tensors_idx_list: Value) -> list[Wrapper]:
            indices = self._indices_or_empty(tensors_idx_list)
            return [self._wrapper(int(index)) for index in indices]

        def _wrapper(self, index: int) -> Wrapper:
            if index < 0:
                return tvm_tflite.TensorWrapper(index, 0, 0)
            tensor = self.subgraph.Tensors(index)
            quantization = tensor.Quantization()
            parameters = None
            # A scale on a float tensor is a leftover of training.
            if quantization is not None and quantization.ScaleLength() and tensor.Type() not in _FLOATS:
                scales = np.asarray(quantization.ScaleAsNumpy(), dtype=np.float32)
                zero = int(quantization.ZeroPoint(0)) if quantization.ZeroPointLength() else 0
                parameters = {
                    "scale": relax.const(scales if scales.size > 1 else scales[0], "float32"),
                    "zero_point": relax.const(zero, "int32"),
                    "axis": int(quantization.QuantizedDimension()) if scales.size > 1 else 0,
                }
            given = self.given.get(index)
            buffer = self.model.Buffers(tensor.Buffer()) if given is None else _BoundBuffer(given)
            return tvm_tflite.TensorWrapper(index, tensor, buffer, parameters)

        def tensor(self, index: int) -> Expr:
            """Relax expression of tensor `index`, whether computed or constant."""
            return self.get_tensor_expr(self.get_tensors([index])[0])

        def get_expr(self, input_tensor_idx: int) -> Expr:
            if int(input_tensor_idx) not in self.values:
                return self.tensor(int(input_tensor_idx))
            return self.values[int(input_tensor_idx)]

        def has_expr(self, input_tensor_idx: int) -> bool:
            return int(input_tensor_idx) in self.values

        def is_prefetched(self, input_tensor_idx: int) -> bool:
            return int(input_tensor_idx) in self.fetched

        def set_prefetched_node(self, input_tensor_idx: int, value: Expr) -> None:
            self.fetched[int(input_tensor_idx)] = value

        def get_prefetched_node(self, input_tensor_idx: int) -> Expr:
            return self.fetched[int(input_tensor_idx)]

        def get_tensor_expr(self, tensor: Wrapper, is_sparse: bool = False) -> Expr:
            index = int(tensor.tensor_idx)
            if index not in self.values:
                self.values[index] = super().get_tensor_expr(tensor, is_sparse)
            return self.values[index]

        def get_tensor_shape(self, tensor_wrapper: Wrapper) -> Value:
            # What the graph computes: the stored shape is only one of those a model with an open batch can have.
            given = self.given.get(int(tensor_wrapper.tensor_idx))
            if given is not None:
                return np.array(given.shape, dtype=np.int64)
            value = self.values.get(int(tensor_wrapper.tensor_idx))
            if value is not None and value.ty.shape is not None:
                return np.array([int(dim) for dim in value.ty.shape], dtype=np.int64)
            return super().get_tensor_shape(tensor_wrapper)

        def name_of(self, operator: tflite.Operator) -> str:
            """The operator's name in the schema; custom operators by their own name."""
            code = self.model.OperatorCodes(operator.OpcodeIndex())
            number = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())
            name = str(self.builtin_op_code.get(number, f"operator code {number}"))
            if name == "CUSTOM":
                custom = code.CustomCode()
                return f"custom {custom.decode('utf-8', 'replace') if custom else 'operator without a name'}"
            return name

        def refusal(self, operator: tflite.Operator) -> str | None:
            """Why this operator cannot be converted (its name and reason), or None."""
            name = self.name_of(operator)
            if name.startswith("custom ") and custom_op("", name.removeprefix("custom ")) is not None:
                return None
            if name not in OWN and (name not in self.convert_map or name in _REFUSED or name.startswith("STABLEHLO")):
                return name
            inputs = [item for item in self.get_tensors(operator.InputsAsNumpy()) if item.tensor_idx >= 0]
            outputs = self.get_tensors(operator.OutputsAsNumpy())
            if any(item.tensor.IsVariable() for item in inputs):
                return f"{name} with a state variable"
            if any(item.tensor.Sparsity() is not None for item in inputs) and name != "DENSIFY":
                return f"{name} with sparse weights"
            quantized = [item for item in (*inputs, *outputs) if item.qnn_params is not None]
            if not quantized:
                return None
            float_ends = [item for item in (*inputs[:1], *outputs) if item.tensor.Type() in _FLOATS]
            if float_ends and name not in _MIXED:
                # Integer weights under float activations: the layers below widen them, nothing else can.
                return None if name in HYBRID else f"{name} with dynamic-range quantised weights"
            if name not in OWN and name not in self._SUPPORTED_QUANTIZED_OPS:
                return f"quantised {name}"
            return None

        def is_hybrid(self, operator: tflite.Operator) -> bool:
            """Whether a layer has integer weights but float activations."""
            inputs = self.get_tensors(operator.InputsAsNumpy())
            return (
                self.name_of(operator) in HYBRID and inputs[0].qnn_params is None and inputs[1].qnn_params is not None
            )

        def convert(self, operator: tflite.Operator) -> list[Expr]:
            """The operator's outputs as Relax expressions."""
            name = self.name_of(operator)
            own = OWN.get(name)
            custom = custom_op("", name.removeprefix("custom ")) if name.startswith("custom ") else None
            if custom is not None:
                return self._custom(custom, operator, name)
            result = own(self, operator) if own is not None else self.convert_map[name](op=operator)
            if isinstance(result, list):
                return result
            if result is None:
                raise UnsupportedError("an operator has no result", found=name)
            if isinstance(result, relax.Tuple):
                return list(result.fields)
            result = self.bb.normalize(result)
            if isinstance(result.ty, relax.TupleType):
                var = self.bb.emit(result)
                return [relax.TupleGetItem(var, index) for index in range(len(result.ty.fields))]
            return [result]

        def _custom(self, custom: CustomOp, operator: tflite.Operator, name: str) -> list[Expr]:
            """The results of an operator that the user registered."""
            inputs = self.get_input_tensors(operator)
            raw = bytes(operator.CustomOptionsAsNumpy()) if operator.CustomOptionsLength() else b""
            held = [item if item.buffer.DataLength() else None for item in inputs]
            node = OpNode(
                label=name,
                inputs=tuple(self.get_tensor_expr(item) for item in inputs),
                shapes=tuple(self.shape_of(item) for item in inputs),
                dtypes=tuple(self.get_tensor_type_str(item.tensor.Type()) for item in inputs),
                constants=tuple(None if item is None else np.asarray(self.get_tensor_value(item)) for item in held),
                attributes={"custom_options": raw},
                outputs=operator.OutputsLength(),
                builder=self.bb,
            )
            return converted(custom, node)

        def options(self, operator: tflite.Operator, kind: str) -> Options:
            """The operator's options table, read as `kind` (a class of the schema)."""
            import tflite

            table = operator.BuiltinOptions()
            if table is None or operator.BuiltinOptionsType() != getattr(tflite.BuiltinOptions, kind):
                raise UnsupportedError("an operator has no options", found=self.name_of(operator), allowed=kind)
            options = getattr(tflite, kind)()
            options.Init(table.Bytes, table.Pos)
            return options

        def shape_of(self, tensor: Wrapper) -> tuple[int, ...]:
            """Static shape of a tensor wrapper."""
            return tuple(int(dim) for dim in self.get_tensor_shape(tensor))

        def constant(self, tensor: Wrapper, meaning: str) -> np.ndarray:
            """Value of a constant tensor; UnsupportedError if it is computed."""
            if int(tensor.tensor_idx) in self.values and not tensor.buffer.DataLength():
                allowed = f"a constant {meaning}"
                raise UnsupportedError(
                    f"the {meaning} is computed at run time", found="a computed tensor", allowed=allowed
                )
            return np.asarray(self.get_tensor_value(tensor))

        def constant_weight(self, value: np.ndarray) -> Expr:
            """A table made by the compiler, as a constant or, if it is large, a weight."""
            return self.exp_tab.new_const(value, dtype=str(value.dtype), source_name=b"table")

        def same_scale(self, left: Wrapper, right: Wrapper) -> bool:
            """Whether two tensors are quantised alike (or both not at all)."""
            if left.qnn_params is None or right.qnn_params is None:
                return left.qnn_params is right.qnn_params
            return all(
                np.array_equal(left.qnn_params[key].value.numpy(), right.qnn_params[key].value.numpy())
                for key in ("scale", "zero_point")
            )

        def finish(self, value: Expr, output: Wrapper, activation: int) -> Expr:
            """A float result with its fused activation; quantised if the output is."""
            if output.qnn_params is None:
                return self.convert_fused_activation_function(value, activation)
            quantized = self.quantize(value, output)
            scale = float(output.qnn_params["scale"].value.numpy().reshape(-1)[0])
            zero = int(output.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
            dtype = self.get_tensor_type_str(output.tensor.Type())
            return self.convert_qnn_fused_activation_function(quantized, activation, scale, zero, dtype)

    return Converter
