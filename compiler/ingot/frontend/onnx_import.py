"""ONNX -> Relax: the steps in order, then one walk over the nodes with the converters of `onnx_ops`."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import IngotError, ModelError, UnsupportedError
from ingot.frontend.bind import Bindable, bound_inputs
from ingot.frontend.custom import converted, custom_op
from ingot.frontend.interface import CONSTANT_ELEMENTS, Bound, Counted, Imported, TensorSpec
from ingot.frontend.liveness import Step, is_view, peak_bytes
from ingot.frontend.normalize import Weights, normalize
from ingot.frontend.onnx_custom import op_node
from ingot.frontend.onnx_ops import IN_FLOAT32, own_converter, tvm_converters
from ingot.frontend.onnx_ops.context import Context, dtype_name
from ingot.frontend.onnx_read import OnnxModel, read_onnx
from ingot.frontend.onnx_static import StaticGraph, TensorType, make_static
from ingot.frontend.onnx_tensors import checked_count, element_bits
from ingot.frontend.shapes import DeclaredInput, Dim, resolve_shapes
from ingot.frontend.source import Source, c_name
from ingot.frontend.survey import Survey, surveyed
from ingot.frontend.tvm_types import Expr, Module, Value

if TYPE_CHECKING:
    import onnx

_RELAX_DTYPES = frozenset(
    (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    )
)


def import_onnx(
    source: Source,
    shape: Mapping[str, Sequence[int]] | None,
    bind: Mapping[str, Bindable] | None = None,
    without: Collection[int] = (),
) -> Imported:
    """Import an ONNX model. See `ingot.frontend.import_model`."""
    model = read_onnx(source, without)
    graph, notices, bound = _static_graph(model, shape, bind)
    graph.outputs += graph.counters
    for name in graph.outputs:
        _check_tensor(f"output {name!r}", graph.types[name])
    peak = _source_peak(graph)
    module, weights = _Importer(graph).run()
    return Imported(
        module=module,
        weights=weights,
        inputs=tuple(_spec(name, graph.types[name]) for name in graph.inputs),
        outputs=tuple(_spec(name, graph.types[name]) for name in graph.outputs),
        name=c_name(source.path),
        source_format="onnx",
        source_sha256=source.sha256,
        source_peak_bytes=peak,
        notices=notices,
        bound=bound,
        counts=tuple(
            Counted(graph.outputs.index(name), extent.axis, graph.outputs.index(extent.counter))
            for name in graph.outputs
            for extent in [graph.extents.get(name)]
            if extent is not None
        ),
        cut=model.cut,
    )


def survey_onnx(
    source: Source, shape: Mapping[str, Sequence[int]] | None, bind: Mapping[str, Bindable] | None, survey: Survey
) -> None:
    """Tell a survey of all nodes of an ONNX model that cannot be imported."""
    model = read_onnx(source, survey=survey)
    graph, _, _ = _static_graph(model, shape, bind, survey)
    _Importer(graph).run(survey)


def _static_graph(
    model: OnnxModel,
    shape: Mapping[str, Sequence[int]] | None,
    bind: Mapping[str, Bindable] | None,
    survey: Survey | None = None,
) -> tuple[StaticGraph, tuple[str, ...], tuple[Bound, ...]]:
    """The graph for these shapes and bound inputs, what the user should know, and what is bound."""
    declared, elems = _declared_inputs(model)
    bound = bound_inputs(declared, [dtype_name(elems[item.name]) for item in declared], bind, shape)
    given = {**(shape or {}), **{item.spec.name: item.spec.shape for item in bound}}
    shapes, notices, sizes = resolve_shapes(declared, given, may_be_empty={item.spec.name for item in bound})
    values = {item.spec.name: item.value for item in bound}
    model = replace(model, initializers={**model.initializers, **values})
    types = {name: TensorType(elems[name], dims) for name, dims in shapes.items() if name not in values}
    for name, kind in types.items():
        _check_tensor(f"input {name!r}", kind)
    return make_static(model, types, sizes, survey), notices, bound


def _spec(name: str, kind: TensorType) -> TensorSpec:
    return TensorSpec(name, dtype_name(kind.elem), kind.shape)


def _check_tensor(where: str, kind: TensorType) -> None:
    checked_count(kind.shape, element_bits(kind.elem, where), where)
    if dtype_name(kind.elem) not in _RELAX_DTYPES:
        allowed = ", ".join(sorted(_RELAX_DTYPES))
        raise UnsupportedError(
            "a tensor's data type is not supported", where=where, found=dtype_name(kind.elem), allowed=allowed
        )


def _declared_inputs(model: OnnxModel) -> tuple[list[DeclaredInput], dict[str, int]]:
    declared, elems = [], {}
    for value in model.proto.graph.input:
        if value.name in model.initializers:
            continue
        where = f"input {value.name!r}"
        if value.type.WhichOneof("value") != "tensor_type":
            found = str(value.type.WhichOneof("value")).removesuffix("_type")
            raise UnsupportedError("an input is not a tensor", where=where, found=found, allowed="tensors")
        kind = value.type.tensor_type
        if not kind.HasField("shape"):
            raise UnsupportedError(
                "an input has no declared rank", where=where, hint="export the model with input shapes"
            )
        dims: list[Dim] = []
        for dim in kind.shape.dim:
            if dim.WhichOneof("value") == "dim_value":
                if dim.dim_value < -1:
                    found = str(dim.dim_value)
                    raise ModelError("an input has a negative dimension", where=where, found=found, allowed=">= 1")
                # Some exporters write -1 for a dimension they leave open.
                dims.append(int(dim.dim_value) if dim.dim_value >= 0 else None)
            else:
                dims.append(dim.dim_param if dim.dim_param not in ("", "?", "None") else None)
        element_bits(kind.elem_type, where)
        declared.append(DeclaredInput(value.name, tuple(dims)))
        elems[value.name] = int(kind.elem_type)
    return declared, elems


def _source_peak(graph: StaticGraph) -> int:
    """Live bytes of the source graph: computed tensors only, neither constants nor what is computed from them alone."""
    known = set(graph.constants)
    steps, sizes = [], {}
    for node, _ in graph.nodes:
        outputs = tuple(name for name in node.output if name in graph.types)
        inputs = tuple(name for name in node.input if name)
        if all(name in known for name in inputs):
            known.update(outputs)
        steps.append(Step(inputs, outputs, is_view(node.op_type)))
        for name in outputs:
            kind = graph.types[name]
            sizes[name] = (int(np.prod(kind.shape, dtype=np.int64)) * element_bits(kind.elem, "") + 7) // 8
    return peak_bytes(steps, sizes, {*graph.inputs, *graph.outputs, *known})


class _LazyParams(dict[str, tuple[Expr, Expr]]):
    """The weights as TVM's converters look them up: name -> (variable, tensor), copied only when one is read."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def __contains__(self, name: object) -> bool:
        return name in self._weights.arrays

    def __getitem__(self, name: str) -> tuple[Expr, Expr]:
        import tvm

        array = self._weights.arrays[name]
        return self._weights.variables[name], tvm.runtime.tensor(np.asarray(array, order="C"))


class _Importer:
    def __init__(self, graph: StaticGraph) -> None:
        from tvm import relax

        self.graph = graph
        self.bb = relax.BlockBuilder()
        self.weights = Weights()
        self.values: dict[str, Expr] = {}

    def run(self, survey: Survey | None = None) -> tuple[Module, dict[str, np.ndarray]]:
        """The model in the normal form, and its weights. With a survey, those are of what is left of it."""
        from tvm import relax

        inputs = []
        for name in self.graph.inputs:
            kind = self.graph.types[name]
            var = relax.Var(name, relax.TensorType(kind.shape, dtype_name(kind.elem)))
            self.values[name] = var
            inputs.append(var)
        failure: IngotError | None = None
        with self.bb.function("main", inputs):
            with self.bb.dataflow():
                try:
                    for number, (node, label) in zip(self.graph.numbers, self.graph.nodes, strict=True):
                        if survey is None or not survey.skips(number, node.input, node.output):
                            with surveyed(survey, number, node.output):
                                self._convert(node, label)
                    outputs = [name for name in self.graph.outputs if survey is None or name not in survey.lost]
                    result = [self._result(name) for name in outputs]
                except IngotError as error:
                    # Raised below: a builder left with open blocks prints a warning of its own.
                    failure, result = error, inputs
                output = self.bb.emit_output(relax.Tuple(result))
            # The weights' parameters are added by `normalize`, which knows which of them are left.
            self.bb.emit_func_output(output)
        if failure is not None:
            raise failure
        return normalize(self.bb.get(), self.weights)

    def _value(self, name: str) -> Expr:
        if name not in self.values:
            self.values[name] = self._make_weight(name, self.graph.constants[name])
        return self.values[name]

    def _result(self, name: str) -> Expr:
        """An output; zeros lie where it has no entries because its size depends on data."""
        from tvm import te, tirx

        value, extent = self._value(name), self.graph.extents.get(name)
        if extent is None:
            return value
        kind, axis = self.graph.types[name], extent.axis

        def define(x: Expr, count: Expr) -> Expr:
            zero = tirx.const(0, dtype_name(kind.elem))
            here = tirx.const(0, "int64")
            return te.compute(kind.shape, lambda *i: tirx.Select(i[axis] < count(here), x(*i), zero), name="counted")

        return self.bb.emit(self.bb.call_te(define, value, self._value(extent.counter), primfunc_name_hint="counted"))

    def _make_weight(self, name: str, array: np.ndarray) -> Expr:
        from tvm import relax

        if array.size <= CONSTANT_ELEMENTS:
            return relax.const(np.asarray(array, order="C"), str(array.dtype.name))
        return self.weights.add(name, array)

    def _convert(self, node: onnx.NodeProto, label: str) -> None:
        # A tensor without elements is a constant, whatever its node computes.
        typed = [name for name in node.output if name in self.graph.types and name not in self.graph.constants]
        for name in typed:
            _check_tensor(f"{label}, output {name!r}", self.graph.types[name])
        context = Context(
            bb=self.bb,
            node=node,
            label=label,
            opset=self.graph.opset,
            inputs=[self._value(name) if name else None for name in node.input],
            types=self.graph.types,
            constants=self.graph.constants,
            make_weight=self._make_weight,
            unread=self.graph.unread,
        )
        if node.op_type in IN_FLOAT32 and node.domain in ("", "ai.onnx"):
            self._widen(context)
        try:
            results: Expr = NotImplemented
            custom, own = custom_op(node.domain, node.op_type), own_converter(node.domain, node.op_type)
            if custom is not None:
                results = converted(custom, op_node(self.graph, node, label, context.inputs, self.bb))
            elif own is not None:
                results = own(context)
            if results is NotImplemented:
                results = self._by_tvm(context)
            results = self._as_list(results)
            for name, result in zip(node.output, results, strict=False):
                if name in typed and result is not None:
                    self.values[name] = self._bind(name, result, label)
        except IngotError:
            raise
        except Exception as error:  # TVM reports what it does not support with any exception type
            reason = " ".join(str(error).strip().splitlines()[-1:])[:300] or type(error).__name__
            raise UnsupportedError("an operator cannot be converted", where=label, found=reason) from error
        missing = [name for name in typed if name not in self.values]
        if missing:
            raise UnsupportedError("an optional output is not supported", where=label, found=repr(missing[0]))

    def _widen(self, context: Context) -> None:
        """Let a node of 16-bit floats compute in float32: its results are rounded once, when they are bound."""
        import onnx
        from tvm import relax

        types, constants = dict[str, TensorType](), dict[str, np.ndarray]()
        for index, name in enumerate(context.node.input):
            if not name or dtype_name(self.graph.types[name].elem) not in ("float16", "bfloat16"):
                continue
            types[name] = TensorType(int(onnx.TensorProto.FLOAT), self.graph.types[name].shape)
            if name in self.graph.constants:
                constants[name] = self.graph.constants[name].astype(np.float32)
                context.inputs[index] = self._make_weight(f"{name}_float32", constants[name])
            else:
                context.inputs[index] = self.bb.emit(relax.op.astype(context.inputs[index], "float32"))
        if not types:
            return
        for name in context.node.output:
            kind = self.graph.types.get(name)
            if kind is not None and dtype_name(kind.elem) in ("float16", "bfloat16"):
                types[name] = TensorType(int(onnx.TensorProto.FLOAT), kind.shape)
        context.types = {**self.graph.types, **types}
        context.constants = {**self.graph.constants, **constants}

    def _as_list(self, results: Expr) -> list[Expr]:
        from tvm import relax

        if isinstance(results, list):
            return results
        if isinstance(results, relax.Tuple):
            return list(results.fields)
        normal = self.bb.normalize(results)
        if isinstance(normal.ty, relax.TupleType):
            var = self.bb.emit(normal)
            return [relax.TupleGetItem(var, index) for index in range(len(normal.ty.fields))]
        return [normal]

    def _bind(self, name: str, result: Expr, label: str) -> Expr:
        """Bind a result under the tensor's name, and hold it against the type ONNX infers."""
        import tvm
        from tvm import relax

        var = (
            result
            if isinstance(result, (relax.Var, tvm.ir.GenericConst))
            else self.bb.emit(result, name_hint=_hint(name))
        )
        kind = self.graph.types[name]
        found = getattr(var.ty, "shape", None)
        shape = tuple(int(dim) for dim in found) if found is not None else None
        if shape != kind.shape:
            raise UnsupportedError(
                "an operator cannot be converted",
                where=label,
                found=f"its conversion makes {list(shape) if shape is not None else 'no static shape'}",
                allowed=f"{list(kind.shape)}, as ONNX defines",
            )
        if str(var.ty.dtype.dtype) != dtype_name(kind.elem):
            var = self.bb.emit(relax.op.astype(var, dtype_name(kind.elem)), name_hint=_hint(name))
        return var

    def _by_tvm(self, context: Context) -> Expr:
        converter = tvm_converters()[context.node.op_type].get_converter(self.graph.opset)
        attributes = _tvm_attributes(context.node)
        from tvm.relax.frontend.onnx.onnx_frontend import onnx_input

        # TVM prints to stdout and warns about what it then raises.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return converter(self.bb, onnx_input(context.inputs), attributes, [self.values, _LazyParams(self.weights)])


def _tvm_attributes(node: onnx.NodeProto) -> dict[str, Value]:
    """Attributes in the form TVM's converters read: bytes for strings, tuples for lists."""
    import onnx

    attributes: dict[str, Value] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = tuple(value) if attribute.type in (6, 7, 8) else value
    attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
    return attributes


def _hint(name: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in name) or "t"
