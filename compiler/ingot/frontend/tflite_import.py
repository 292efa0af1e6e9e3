"""TFLite -> Relax: verify, list what is unsupported, then one walk over the operators."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import IngotError, ShapeError, UnsupportedError
from ingot.frontend.bind import Bindable, bound_inputs
from ingot.frontend.extents import Extent
from ingot.frontend.interface import Bound, Counted, Cut, Imported, Quantization, StateTensor, TensorSpec
from ingot.frontend.liveness import Step, is_view, peak_bytes
from ingot.frontend.normalize import Weights, normalize
from ingot.frontend.onnx_read import refuse_operators
from ingot.frontend.shapes import DeclaredInput, Dim, resolve_shapes
from ingot.frontend.source import Source, c_name
from ingot.frontend.survey import Links, Part, Survey, part_without, surveyed
from ingot.frontend.tflite_control import refusal_inside
from ingot.frontend.tflite_counted import followed
from ingot.frontend.tflite_fold import fold
from ingot.frontend.tflite_variables import OPERATORS as VARIABLE_OPERATORS
from ingot.frontend.tflite_variables import Variable, Variables
from ingot.frontend.tflite_verify import tensor_name, verified_model
from ingot.frontend.tvm_types import Expr, Module, Operator

if TYPE_CHECKING:
    import tflite

_DTYPES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float64",
    12: "uint64", 15: "uint32", 16: "uint16",
}  # fmt: skip
# Between operators, a complex64 tensor is float32 with a last axis of two: real and imaginary part.
_COMPLEX64 = 8


def import_tflite(
    source: Source,
    shape: Mapping[str, Sequence[int]] | None,
    bind: Mapping[str, Bindable] | None = None,
    without: Collection[int] = (),
) -> Imported:
    """Import a TFLite model. See `ingot.frontend.import_model`."""
    model = verified_model(source.data, str(source.path))
    importer, part, bound, notices = _prepare(model, shape, bind, without)
    inputs = [index for index in part.inputs if index not in importer.values]
    outputs = list(part.outputs)
    module, weights, specs = importer.run(inputs, outputs)
    count = importer.graph.OperatorsLength()
    every, opened = (tuple(tensor_name(importer.graph, i) for i in places) for places in (part.outputs, part.opened))
    return Imported(
        module=module,
        weights=weights,
        inputs=specs[0],
        outputs=specs[1],
        name=c_name(source.path),
        source_format="tflite",
        source_sha256=source.sha256,
        source_peak_bytes=importer.source_peak(inputs, outputs),
        notices=(*notices, *importer.notices()),
        bound=bound,
        states=importer.states(len(inputs), len(outputs)),
        counts=importer.counts,
        cut=Cut(count, count - len(part.kept), every, opened) if without else None,
    )


def survey_tflite(
    source: Source, shape: Mapping[str, Sequence[int]] | None, bind: Mapping[str, Bindable] | None, survey: Survey
) -> None:
    """Tell a survey of all operators of a TFLite model that cannot be imported."""
    model = verified_model(source.data, str(source.path))
    importer, part, _, _ = _prepare(model, shape, bind, ())
    inputs = [index for index in part.inputs if index not in importer.values]
    importer.run(inputs, list(part.outputs), survey)


def _prepare(
    model: tflite.Model,
    shape: Mapping[str, Sequence[int]] | None,
    bind: Mapping[str, Bindable] | None,
    without: Collection[int],
) -> tuple[_Importer, Part[int], tuple[Bound, ...], tuple[str, ...]]:
    """An importer for these shapes and bound inputs, what of the graph it takes, what is bound, and the notices."""
    graph = model.Subgraphs(0)
    places = [int(graph.Inputs(index)) for index in range(graph.InputsLength())]
    outputs = [int(graph.Outputs(index)) for index in range(graph.OutputsLength())]
    part = Part(tuple(range(graph.OperatorsLength())), tuple(places), tuple(outputs), ())
    if without:
        operators = [graph.Operators(number) for number in part.kept]
        links = [Links(frozenset(_reads(operator)), _writes(operator)) for operator in operators]
        part = part_without(links, without, places, outputs)
        places = [index for index in places if index in part.inputs]
    declared = [DeclaredInput(tensor_name(graph, index), _dims(graph.Tensors(index))) for index in places]
    dtypes = [_DTYPES.get(graph.Tensors(index).Type(), "uint8") for index in places]
    bound = bound_inputs(declared, dtypes, bind, shape)
    given = {**(shape or {}), **{item.spec.name: item.spec.shape for item in bound}}
    shapes, notices, _ = resolve_shapes(declared, given, may_be_empty={item.spec.name for item in bound})
    values = {places[item.position]: item.value for item in bound}
    importer = _Importer(model, dict(zip(places, shapes.values(), strict=True)), values, part.kept)
    left_out = (graph.Operators(number) for number in set(range(graph.OperatorsLength())) - set(part.kept))
    if any(importer.converter.name_of(operator) == "ASSIGN_VARIABLE" for operator in left_out):
        raise UnsupportedError("a part of the model would never set a variable", hint="keep the operators that set it")
    return importer, part, bound, notices


def _dims(tensor: tflite.Tensor) -> tuple[Dim, ...]:
    """The declared shape: -1 in the signature is open, everything else is fixed."""
    stored = [int(tensor.Shape(axis)) for axis in range(tensor.ShapeLength())]
    signature = [int(tensor.ShapeSignature(axis)) for axis in range(tensor.ShapeSignatureLength())]
    if len(signature) != len(stored):
        return tuple(stored)
    return tuple(None if open_ == -1 else size for open_, size in zip(signature, stored, strict=True))


def _reads(operator: Operator) -> tuple[int, ...]:
    """The tensors that an operator reads; those it leaves out are none."""
    places = (int(operator.Inputs(index)) for index in range(operator.InputsLength()))
    return tuple(place for place in places if place >= 0)


def _writes(operator: Operator) -> tuple[int, ...]:
    return tuple(int(operator.Outputs(index)) for index in range(operator.OutputsLength()))


class _Importer:
    def __init__(
        self,
        model: tflite.Model,
        shapes: dict[int, tuple[int, ...]],
        values: dict[int, np.ndarray],
        kept: Sequence[int],
    ) -> None:
        from tvm import relax

        from ingot.frontend.tflite_ops import make_converter

        self.graph = model.Subgraphs(0)
        self.shapes = shapes
        self.values = values
        self.kept = kept  # numbers of the operators that are imported
        self.bb = relax.BlockBuilder()
        self.weights = Weights()
        self.converter = make_converter(model, self.graph, self.bb, self.weights, values)
        self.known: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.variables = Variables(model, self.converter)
        self.current: dict[str, Expr] = {}  # each variable's value at this point of the graph
        self.counted: dict[int, Extent] = {}  # tensors whose size depends on data, with the name of their counter
        self.counters: dict[str, Expr] = {}
        self.counts: tuple[Counted, ...] = ()
        self.opened = False  # whether the file left open a size that constants decide: the same of later tensors
        # Sizes other than the stored ones, for which the stored shapes of later tensors no longer hold.
        self.resized = any(shape != tuple(int(dim) for dim in self._stored(index)) for index, shape in shapes.items())

    def _stored(self, index: int) -> tuple[int, ...]:
        tensor = self.graph.Tensors(index)
        return tuple(int(tensor.Shape(axis)) for axis in range(tensor.ShapeLength()))

    def run(
        self, inputs: list[int], outputs: list[int], survey: Survey | None = None
    ) -> tuple[Module, dict[str, np.ndarray], tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
        from tvm import relax

        self._refuse_unsupported(survey)
        params = []
        for index in inputs:
            dtype = self._dtype(index, "input")
            var = relax.Var(tensor_name(self.graph, index), relax.TensorType(self.shapes[index], dtype))
            self._check_elements(index, self.shapes[index], "input")
            self.converter.bind(index, var)
            self.known[index] = (dtype, self.shapes[index])
            params.append(var)
        params += self._first_variables()
        failure: IngotError | None = None
        with self.bb.function("main", params):
            with self.bb.dataflow():
                try:
                    for number in self.kept:
                        operator = self.graph.Operators(number)
                        if survey is None or not survey.skips(number, _reads(operator), _writes(operator)):
                            with surveyed(survey, number, _writes(operator)):
                                self._convert(number)
                    outputs = [index for index in outputs if survey is None or index not in survey.lost]
                    results = [self._output(index) for index in outputs]
                    results += [self.current[variable.name] for variable in self.variables.kept]
                    counters = sorted({self.counted[index].counter for index in outputs if index in self.counted})
                    results += [self.counters[counter] for counter in counters]
                except IngotError as error:
                    # Raised below: a builder left with open blocks prints a warning of its own.
                    failure, results = error, params
                value = self.bb.emit_output(relax.Tuple(results))
            self.bb.emit_func_output(value)
        if failure is not None:
            raise failure
        module, weights = normalize(self.bb.get(), self.weights)
        kept = self.variables.kept
        before = [self._kept_spec(variable, variable.name) for variable in kept]
        after = [self._kept_spec(variable, f"{variable.name} (next)") for variable in kept]
        specs = [[self._spec(index) for index in places] for places in (inputs, outputs)]
        first = len(outputs) + len(after)
        self.counts = tuple(
            Counted(place, self.counted[index].axis, first + counters.index(self.counted[index].counter))
            for place, index in enumerate(outputs)
            if index in self.counted
        )
        ends = [TensorSpec(counter, "int64", (1,)) for counter in counters]
        return module, weights, ((*specs[0], *before), (*specs[1], *after, *ends))

    def _first_variables(self) -> list[Expr]:
        """Make the inputs that are variables, and the constants that are variables nobody sets."""
        from tvm import relax

        for name, variable in self.variables.known.items():
            spec = self._kept_spec(variable, name)
            if variable in self.variables.kept:
                self.current[name] = relax.Var(name, relax.TensorType(spec.shape, spec.dtype))
            else:
                self.current[name] = self.weights.add(name, self._first_value(variable))
        return [self.current[variable.name] for variable in self.variables.kept]

    def _kept_spec(self, variable: Variable, name: str) -> TensorSpec:
        index = variable.tensor
        self.known.setdefault(index, (self._dtype(index, "variable"), self._stored(index)))
        return replace(self._spec(index), name=name)

    def _first_value(self, variable: Variable) -> np.ndarray:
        spec = self._kept_spec(variable, variable.name)
        zero = spec.quantization.zero_points[0] if spec.quantization is not None else 0
        value = np.full(spec.shape, zero, spec.dtype) if variable.first is None else variable.first
        if (value.shape, str(value.dtype)) != (spec.shape, spec.dtype):
            found, allowed = f"{value.dtype}{list(value.shape)}", f"{spec.dtype}{list(spec.shape)}"
            raise UnsupportedError("a variable changes its type", f"variable {variable.name!r}", found, allowed)
        return value

    def states(self, inputs: int, outputs: int) -> tuple[StateTensor, ...]:
        """The variables as states, after that many inputs and outputs of the graph."""
        return tuple(
            StateTensor(inputs + i, outputs + i, self._first_value(variable), in_source=False)
            for i, variable in enumerate(self.variables.kept)
        )

    def _refuse_unsupported(self, survey: Survey | None) -> None:
        """Raise UnsupportedError with all operators that are refused, or tell the survey of each."""
        refused: dict[str, list[str]] = {}
        for number in self.kept:
            operator = self.graph.Operators(number)
            if survey is not None:
                survey.labels[number] = f"operator {number} {self.converter.name_of(operator)}"
            if self.converter.name_of(operator) in VARIABLE_OPERATORS:
                continue
            reason = self.converter.refusal(operator) or refusal_inside(self.converter, operator)
            if reason is not None and survey is not None:
                survey.fail(number, UnsupportedError("the operator is not supported", found=reason), _writes(operator))
            elif reason is not None:
                first = tensor_name(self.graph, int(operator.Outputs(0))) if operator.OutputsLength() else "nothing"
                refused.setdefault(reason, []).append(f"#{number} -> {first}")
        refuse_operators(refused)

    def notices(self) -> tuple[str, ...]:
        """What the user should know about how this model is computed."""
        operators = [self.graph.Operators(number) for number in range(self.graph.OperatorsLength())]
        hybrid = sum(self.converter.is_hybrid(operator) for operator in operators)
        if not hybrid:
            return ()
        return (
            f"{hybrid} layers have int8 weights and float activations: they are computed in float, which TFLite rounds"
            " to int8 in between",
        )

    def _dtype(self, index: int, role: str) -> str:
        kind = self.graph.Tensors(index).Type()
        if kind not in _DTYPES:
            where = f"{role} {tensor_name(self.graph, index)!r}"
            allowed = ", ".join(_DTYPES.values())
            raise UnsupportedError(
                "a tensor's data type is not supported", where=where, found=f"type {kind}", allowed=allowed
            )
        return _DTYPES[kind]

    def _check_elements(self, index: int, shape: tuple[int, ...], role: str) -> None:
        if 0 in shape:
            where = f"{role} {tensor_name(self.graph, index)!r}"
            raise UnsupportedError("a tensor without elements is not supported", where=where, found=str(list(shape)))

    def _convert(self, number: int) -> None:
        operator = self.graph.Operators(number)
        outputs = [int(operator.Outputs(index)) for index in range(operator.OutputsLength())]
        name = self.converter.name_of(operator)
        label = f"operator {number} {name}"
        if name == "ASSIGN_VARIABLE":
            self._assign(operator, label)
        if name in VARIABLE_OPERATORS and name != "READ_VARIABLE":
            return
        if name == "READ_VARIABLE":
            self._bind(outputs[0], self.current[self.variables.of(operator)], label)
            return
        folded = fold(self.converter, operator)
        if folded is not None:
            for index, value in zip(outputs, folded, strict=True):
                self.converter.given[index] = value
            return
        for index in (int(operator.Inputs(place)) for place in range(operator.InputsLength())):
            if index in self.variables.tensors:
                self.converter.bind(index, self.current[self.variables.tensors[index]])
        try:
            # TVM prints to stdout and warns about what it then raises.
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = self.converter.convert(operator)
            if len(results) < len(outputs):
                raise UnsupportedError("an operator has unexpected outputs", where=label, found=str(len(outputs)))
            self._count(operator, outputs, results, label)
            for index, result in zip(outputs, results, strict=False):
                self._bind(index, result, label)
            for index, value in self.converter.next_states.items():
                self._keep(self.variables.tensors[index], value, label)
            self.converter.next_states.clear()
        except IngotError:
            raise
        except Exception as error:  # TVM reports what it does not support with any exception type
            reason = " ".join(str(error).strip().splitlines()[-1:])[:300] or type(error).__name__
            if self.resized:
                raise ShapeError(
                    "the model does not work with this shape",
                    where=label,
                    found=reason,
                    hint="leave --shape out, or export the model with this shape",
                ) from error
            raise UnsupportedError("an operator cannot be converted", where=label, found=reason) from error

    def _count(self, operator: Operator, outputs: list[int], results: Sequence[Expr], label: str) -> None:
        """Note which of an operator's results have a size that depends on data."""
        for place, (axis, count) in self.converter.counters.items():
            self.counters[label] = count
            self.counted[outputs[place]] = Extent(axis, label)
        self.converter.counters.clear()
        if any(index in self.counted for index in _reads(operator)):
            if len(outputs) != 1:
                raise UnsupportedError("an operator works on a tensor whose size depends on data", where=label)
            largest = self.bb.normalize(results[0]).ty.shape
            self.counted[outputs[0]] = followed(
                self.converter, operator, self.counted, tuple(int(dim) for dim in largest)
            )

    def _assign(self, operator: Operator, label: str) -> None:
        self._keep(self.variables.of(operator), self.converter.tensor(int(operator.Inputs(1))), label)

    def _keep(self, name: str, value: Expr, label: str) -> None:
        """Give a variable its next value."""
        spec = self._kept_spec(self.variables.known[name], name)
        found = (str(value.ty.dtype.dtype), tuple(int(dim) for dim in value.ty.shape))
        if found != (spec.dtype, spec.shape):
            allowed = f"{spec.dtype}{list(spec.shape)}"
            raise UnsupportedError("a variable changes its type", label, f"{found[0]}{list(found[1])}", allowed)
        self.current[name] = value

    def _bind(self, index: int, result: Expr, label: str) -> None:
        import tvm
        from tvm import relax

        name = tensor_name(self.graph, index)
        hint = "".join(char if char.isascii() and char.isalnum() else "_" for char in name).strip("_") or "t"
        leaf = isinstance(result, (relax.Var, tvm.ir.GenericConst))
        var = result if leaf else self.bb.emit(result, name_hint=hint)
        shape = tuple(int(dim) for dim in var.ty.shape)
        stored = self._stored(index)
        if self.graph.Tensors(index).Type() == _COMPLEX64:
            stored, dtype = (*stored, 2), "float32"
        else:
            dtype = self._dtype(index, "tensor")
        same = shape == stored if not (self.resized or self.opened) else len(shape) == len(stored)
        # The file cannot store how large a tensor can become whose size depends on data.
        same = same or (index in self.counted and len(stored) in (0, len(shape)))
        if not same and self._is_open(index, shape):
            same = self.opened = True
        # Custom operators often store no shape for what they make.
        same = same or (not stored and " custom " in label)
        if not same or str(var.ty.dtype.dtype) != dtype:
            raise UnsupportedError(
                "an operator cannot be converted",
                where=label,
                found=f"its conversion makes {var.ty.dtype} {list(shape)} for {name!r}",
                allowed=f"{dtype} {list(stored)}, as the model declares",
            )
        self._check_elements(index, shape, "tensor")
        self.converter.bind(index, var)
        self.known[index] = (dtype, shape)

    def _is_open(self, index: int, shape: tuple[int, ...]) -> bool:
        """Whether the file leaves the size of a tensor open where `shape` differs from the stored one."""
        tensor = self.graph.Tensors(index)
        if tensor.ShapeSignatureLength() != len(shape):
            return False
        pairs = zip(shape, (int(tensor.ShapeSignature(axis)) for axis in range(len(shape))), strict=True)
        return all(open_size in (-1, size) for size, open_size in pairs)

    def _output(self, index: int) -> Expr:
        value = self.converter.tensor(index)
        self.known.setdefault(index, (self._dtype(index, "output"), tuple(int(dim) for dim in value.ty.shape)))
        self._check_elements(index, self.known[index][1], "output")
        return value

    def _spec(self, index: int) -> TensorSpec:
        dtype, shape = self.known[index]
        quantization = self.graph.Tensors(index).Quantization()
        found = None
        if quantization is not None and quantization.ScaleLength():
            scales = tuple(float(quantization.Scale(axis)) for axis in range(quantization.ScaleLength()))
            zeros = tuple(int(quantization.ZeroPoint(axis)) for axis in range(quantization.ZeroPointLength()))
            axis = int(quantization.QuantizedDimension()) if len(scales) > 1 else 0
            found = Quantization(scales, zeros or (0,) * len(scales), axis)
        return TensorSpec(tensor_name(self.graph, index), dtype, shape, found)

    def source_peak(self, inputs: list[int], outputs: list[int]) -> int:
        """Live bytes of the source graph: only tensors that depend on an input, without inputs and outputs."""
        steps, sizes = [], {}
        computed = set(inputs)
        constant: set[int] = set()
        for number in range(self.graph.OperatorsLength()):
            operator = self.graph.Operators(number)
            reads, writes = _reads(operator), _writes(operator)
            (computed if computed.intersection(reads) else constant).update(writes)
            name = self.converter.name_of(operator)
            steps.append(Step(tuple(map(str, reads)), tuple(map(str, writes)), is_view(name)))
            for index in writes:
                if index in self.known:
                    dtype, shape = self.known[index]
                    sizes[str(index)] = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return peak_bytes(steps, sizes, map(str, {*inputs, *outputs, *constant}))
