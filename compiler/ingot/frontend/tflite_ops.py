"""TFLite operators: TVM's converters, behind tensors found by index, with our own where TVM's are wrong or missing.

Quantised operators become dequantize -> float operator -> quantize, the form every later pass recognises; those that
only move elements work on the stored integers when input and output share their scale.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.custom import CustomOp, OpNode, converted, custom_op
from ingot.frontend.interface import CONSTANT_ELEMENTS
from ingot.frontend.normalize import Weights
from ingot.frontend.tflite_stored import DTYPES, FLOAT32, INT4, INT8, INT16, Disguised, Held, plain_values
from ingot.frontend.tvm_types import Builder, Expr, Operator, Options, TfliteConverter, Value, Wrapper

if TYPE_CHECKING:
    import tflite

_STRINGS = "works on strings"
_CHANCE = "makes random numbers"
_GRAPHS = "runs other graphs of the file"
_NO_KERNEL = "LiteRT has no kernel for it"
# Operators without a converter here, or with one of TVM's that does not make tensors of numbers, and why.
_REFUSED = {
    "CALL": _NO_KERNEL,
    "CONCAT_EMBEDDINGS": _NO_KERNEL,
    "CUSTOM": "is not known",
    "DELEGATE": "stands for code outside the file",
    "EMBEDDING_LOOKUP_SPARSE": "looks up rows by sparse indices",
    "HASHTABLE": _STRINGS,
    "HASHTABLE_FIND": _STRINGS,
    "HASHTABLE_IMPORT": _STRINGS,
    "HASHTABLE_LOOKUP": _STRINGS,
    "HASHTABLE_SIZE": _STRINGS,
    "LSH_PROJECTION": "hashes its inputs",
    "MULTINOMIAL": _CHANCE,
    "PLACEHOLDER_FOR_GREATER_OP_CODES": "is no operator",
    "RANDOM_STANDARD_NORMAL": _CHANCE,
    "RANDOM_UNIFORM": _CHANCE,
    "REDUCE_WINDOW": _NO_KERNEL,
    "SKIP_GRAM": _STRINGS,
    "STABLEHLO_CUSTOM_CALL": "stands for code outside the file",
    "STABLEHLO_REDUCE": _GRAPHS,
    "STABLEHLO_REDUCE_WINDOW": _GRAPHS,
    "STABLEHLO_RNG_BIT_GENERATOR": _CHANCE,
    "STABLEHLO_SCATTER": _GRAPHS,
    "STABLEHLO_SORT": _GRAPHS,
    "STABLEHLO_WHILE": _GRAPHS,
}
_FLOATS = (0, 1)

# Operators with quantised inputs and float results, or the other way round, whose own converters know it.
_MIXED = frozenset(
    ("QUANTIZE", "DEQUANTIZE", "IF", "STABLEHLO_COMPOSITE", "WHILE", "custom TFLite_Detection_PostProcess")
)
HYBRID = frozenset(("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"))
# Converters that read and make stored integers. The others see real numbers: what is quantised is dequantised before
# them and quantised after them.
_ON_INTEGERS = frozenset(
    (
        "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "DEQUANTIZE", "EXP",
        "FULLY_CONNECTED", "HARD_SWISH", "IF", "LEAKY_RELU", "LOGISTIC", "LSTM", "MAX_POOL_2D", "MEAN", "MUL", "PAD",
        "PADV2", "PRELU", "QUANTIZE", "RELU", "RELU6", "RELU_N1_TO_1", "RESIZE_BILINEAR", "SOFTMAX",
        "STABLEHLO_COMPOSITE", "SUB", "SVDF", "TANH", "TRANSPOSE_CONV", "UNIDIRECTIONAL_SEQUENCE_LSTM", "WHILE",
        "custom TFLite_Detection_PostProcess",
    )
)  # fmt: skip
# These only move elements, or choose among them: they work on the stored integers of any type.
_MOVES = frozenset(
    (
        "ARG_MAX", "ARG_MIN", "BATCH_TO_SPACE_ND", "BITCAST", "BROADCAST_TO", "CAST", "DENSIFY", "DEPTH_TO_SPACE",
        "DILATE", "DYNAMIC_UPDATE_SLICE", "EMBEDDING_LOOKUP", "EXPAND_DIMS", "FILL", "GATHER", "GATHER_ND",
        "MATRIX_DIAG", "MATRIX_SET_DIAG", "MIRROR_PAD", "ONE_HOT", "PACK", "RANK", "REDUCE_MAX", "REDUCE_MIN",
        "RESHAPE", "RESIZE_NEAREST_NEIGHBOR", "REVERSE_SEQUENCE", "REVERSE_V2", "SCATTER_ND", "SELECT", "SELECT_V2",
        "SHAPE", "SLICE", "SPACE_TO_BATCH_ND", "SPACE_TO_DEPTH", "SPARSE_TO_DENSE", "SPLIT", "SPLIT_V", "SQUEEZE",
        "STRIDED_SLICE", "TILE", "TOPK_V2", "TRANSPOSE", "UNIQUE", "UNPACK", "WHERE",
    )
)  # fmt: skip

# The files that fill OWN.
_FAMILIES = (
    "tflite_layers",
    "tflite_products",
    "tflite_moves",
    "tflite_blocks",
    "tflite_control",
    "tflite_counted",
    "tflite_index",
    "tflite_arithmetic",
    "tflite_elementwise",
    "tflite_detect",
    "tflite_recurrent",
    "tflite_resize",
    "tflite_signal",
    "tflite_stablehlo",
)

# These keep state tensors from one run to the next.
KEEP_STATE = frozenset(
    (
        "BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN", "LSTM", "RNN", "SVDF",
        "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN",
    )
)  # fmt: skip

# Of these, those that have a form on integers alone.
_INTEGER_STATE = frozenset(("LSTM", "SVDF", "UNIDIRECTIONAL_SEQUENCE_LSTM"))

Handler = Callable[[TfliteConverter, Operator], Expr]
OWN: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a function (converter, operator) -> Relax expression, or list of them, for these operators."""

    def register(function: Handler) -> Handler:
        for name in names:
            OWN[name] = function
        return function

    return register


def why_refused(name: str) -> str:
    """Why an operator of the schema has no converter here; empty if it has one."""
    return _REFUSED.get(name, "")


def make_converter(
    model: tflite.Model, graph: tflite.SubGraph, bb: Builder, weights: Weights, values: dict[int, np.ndarray]
) -> TfliteConverter:
    """The converter of one graph, with tensors that are given values and so are constants.

    A function, because its class derives from TVM's and TVM is imported late.
    """
    return _converter_class()(model, graph, bb, weights, values)


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
            # Constants that the file has not, or not in this form.
            self.given = {**plain_values(model, graph), **given}
            # What tensors look like while an operator is converted, if not as in the file.
            self.looks: dict[int, Wrapper] = {}
            # By output of the operator at hand: the axis whose size depends on data, and the number of entries there.
            self.counters: dict[int, tuple[int, Expr]] = {}
            # What an operator leaves in the state tensors that it keeps.
            self.next_states: dict[int, Expr] = {}
            # How many operators of other graphs were written out, for all graphs of the file together.
            self.written_out = [0]
            self.values: dict[int, Expr] = {}
            self.fetched: dict[int, Expr] = {}

        def bind(self, index: int, value: Expr) -> None:
            self.values[index] = value

        def get_tensor_type_str(self, tensor_type: int) -> str:
            if tensor_type not in DTYPES:
                raise UnsupportedError("a tensor's data type is not supported", found=f"type {tensor_type}")
            return DTYPES[tensor_type]

        def get_tensor_type_as_numpy(self, tensor_wrapper: Wrapper) -> np.dtype:
            return np.dtype(self.get_tensor_type_str(tensor_wrapper.tensor.Type()))

        def get_tensors(self, tensors_idx_list: Value) -> list[Wrapper]:
            indices = self._indices_or_empty(tensors_idx_list)
            return [self._wrapper(int(index)) for index in indices]

        def _wrapper(self, index: int) -> Wrapper:
            if index < 0:
                return tvm_tflite.TensorWrapper(index, 0, 0)
            if index in self.looks:
                return self.looks[index]
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
            if given is None:
                return tvm_tflite.TensorWrapper(index, tensor, self.model.Buffers(tensor.Buffer()), parameters)
            kind = INT8 if tensor.Type() == INT4 else tensor.Type()
            return tvm_tflite.TensorWrapper(index, Disguised(tensor, kind), Held(given), parameters)

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
            if name not in OWN:
                why = why_refused(name)
                if why or name not in self.convert_map:
                    return name if name.startswith("custom ") else f"{name}, which {why or 'is not implemented'}"
            inputs = [item for item in self.get_tensors(operator.InputsAsNumpy()) if item.tensor_idx >= 0]
            if any(item.tensor.IsVariable() for item in inputs) and name not in KEEP_STATE:
                return f"{name} with a state variable"
            if name in KEEP_STATE - _INTEGER_STATE and inputs and inputs[0].qnn_params is not None:
                return f"{name} with quantised activations"
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
            custom = custom_op("", name.removeprefix("custom ")) if name.startswith("custom ") else None
            if custom is not None:
                return self._custom(custom, operator, name)
            ends = (*self.get_input_tensors(operator), *self.get_output_tensors(operator))
            quantized = [item for item in ends if item.qnn_params is not None]
            floats = any(item.tensor_idx >= 0 and item.tensor.Type() in _FLOATS for item in ends)
            plain = name in _ON_INTEGERS and (not floats or name in _MIXED or name in HYBRID)
            wide = any(item.tensor.Type() == INT16 for item in quantized)
            plain = plain and not (wide and name in ("AVERAGE_POOL_2D", "MAX_POOL_2D"))
            if not quantized or plain:
                return self._results(operator, name)
            outputs = self.get_output_tensors(operator)
            # Integer weights under float activations are real numbers all the same.
            stored = name in _MOVES and not any(item.tensor.Type() in _FLOATS for item in outputs)
            with self._disguised(quantized, stored):
                results = self._results(operator, name)
            if stored:
                return results
            for item in quantized:
                if int(item.tensor_idx) in self.next_states:
                    value = self.next_states[int(item.tensor_idx)]
                    self.next_states[int(item.tensor_idx)] = self.bb.emit(self.quantize(value, item))
            return [
                result if output.qnn_params is None else self.quantize(self.bb.emit(result), output)
                for result, output in zip(results, outputs, strict=False)
            ]

        @contextlib.contextmanager
        def _disguised(self, quantized: Sequence[Wrapper], stored: bool) -> Iterator[None]:
            """Let quantised tensors look like plain ones: of their stored integers, or of the real numbers.

            Stored integers are brought to the scale of the operator's first quantised output.
            """
            values = dict(self.values)
            outputs = [item for item in quantized if not self._is_known(item)]
            for item in quantized:
                kind, buffer = item.tensor.Type(), item.buffer
                if self._is_known(item):
                    value = self.get_tensor_expr(item)
                    if stored and outputs and not self.same_scale(item, outputs[0]):
                        value = self.quantize(self.dequantize(value, item), outputs[0])
                    elif not stored:
                        kind, value = FLOAT32, self.dequantize(value, item)
                        buffer = Held(self.real(item)) if buffer.DataLength() else buffer
                    self.values[int(item.tensor_idx)] = self.bb.emit(value)
                elif not stored:
                    kind = FLOAT32
                self.looks[int(item.tensor_idx)] = tvm_tflite.TensorWrapper(
                    item.tensor_idx, Disguised(item.tensor, kind), buffer, None
                )
            try:
                yield
            finally:
                self.looks.clear()
                self.values = values

        def _is_known(self, item: Wrapper) -> bool:
            return int(item.tensor_idx) in self.values or item.buffer.DataLength() > 0

        def real(self, item: Wrapper) -> np.ndarray:
            """The real numbers (float32) of a constant tensor."""
            stored = np.asarray(self.get_tensor_value(item))
            if item.qnn_params is None:
                return stored.astype(np.float32)
            scale, zero = item.qnn_params["scale"].value.numpy(), item.qnn_params["zero_point"].value.numpy()
            if scale.size > 1:
                shape = [1] * stored.ndim
                shape[item.qnn_params["axis"]] = scale.size
                scale = scale.reshape(shape)
            return np.asarray((stored.astype(np.int64) - int(zero)).astype(np.float32) * scale.astype(np.float32))

        def _results(self, operator: tflite.Operator, name: str) -> list[Expr]:
            own = OWN.get(name)
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

            second = hasattr(tflite.BuiltinOptions2, kind)
            table = operator.BuiltinOptions2() if second else operator.BuiltinOptions()
            found = operator.BuiltinOptions2Type() if second else operator.BuiltinOptionsType()
            union = tflite.BuiltinOptions2 if second else tflite.BuiltinOptions
            if table is None or found != getattr(union, kind):
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

        def zero_of(self, tensor: Wrapper) -> int:
            """What is stored for the number 0."""
            quantization = self.subgraph.Tensors(int(tensor.tensor_idx)).Quantization()
            if quantization is None or quantization.ZeroPointLength() == 0 or tensor.tensor.Type() in _FLOATS:
                return 0
            return int(quantization.ZeroPoint(0))

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
