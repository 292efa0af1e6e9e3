"""TFLite operators that run other graphs of the file: their operators are written out in place of them.

- IF whose condition is known runs one graph; one whose condition is computed runs both and selects.
- STABLEHLO_COMPOSITE runs the graph that says what it computes.
- WHILE runs its body as often as its condition graph says, which must be known: the loop's counters are followed
  through the graphs by `tflite_fold`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ingot.errors import IngotError, ModelError, UnsupportedError
from ingot.frontend.onnx_expand import MAX_EXPANDED_NODES, MAX_STEPS
from ingot.frontend.tflite_fold import fold, value_of
from ingot.frontend.tflite_ops import KEEP_STATE, handles, make_converter
from ingot.frontend.tflite_variables import OPERATORS as VARIABLE_OPERATORS
from ingot.frontend.tflite_verify import check_graph, tensor_name
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter

#: By operator: its options, and the fields that name graphs.
_CALLERS = {
    "IF": ("IfOptions", ("ThenSubgraphIndex", "ElseSubgraphIndex")),
    "WHILE": ("WhileOptions", ("CondSubgraphIndex", "BodySubgraphIndex")),
    "STABLEHLO_COMPOSITE": ("StableHLOCompositeOptions", ("DecompositionSubgraphIndex",)),
}
#: Graphs that run graphs that run graphs.
_MAX_DEPTH = 8
#: These trap where they divide whole numbers by 0, which a branch that is not taken may do.
_DIVISIONS = frozenset(("DIV", "FLOOR_DIV", "FLOOR_MOD"))

#: What a graph is run on: an expression, or an array if its value is known.
Given = Any


def refusal_inside(converter: TfliteConverter, operator: Operator) -> str | None:
    """Why a graph that an operator runs cannot be converted, or None. The graphs are checked before they are read.

    Raises ModelError for graphs that do not exist or contradict themselves.
    """
    return _refusal(converter, operator, (), set())


def _refusal(converter: TfliteConverter, operator: Operator, path: tuple[int, ...], fine: set[int]) -> str | None:
    """`path`: the graphs that are being read; `fine`: those that can be converted."""
    name = str(converter.name_of(operator))
    for index in _graphs(converter, operator) if name in _CALLERS else ():
        if index in path or len(path) >= _MAX_DEPTH:
            return f"{name}, whose graphs run themselves, or each other more than {_MAX_DEPTH} deep"
        if index in fine:
            continue
        graph = converter.model.Subgraphs(index)
        check_graph(converter.model, graph)
        inner = make_converter(converter.model, graph, converter.bb, converter.exp_tab.weights, {})
        for number in range(graph.OperatorsLength()):
            found = graph.Operators(number)
            inside = str(inner.name_of(found))
            if inside in VARIABLE_OPERATORS or inside in KEEP_STATE:
                return f"{name} of a graph with {inside}, which keeps a state"
            why = inner.refusal(found) or _refusal(inner, found, (*path, index), fine)
            if why is not None:
                return f"{name} of a graph with {why}"
        fine.add(index)
    return None


def _graphs(converter: TfliteConverter, operator: Operator) -> list[int]:
    """The numbers of the graphs that an operator runs."""
    kind, fields = _CALLERS[converter.name_of(operator)]
    options = converter.options(operator, kind)
    found = [int(getattr(options, field)()) for field in fields]
    for index in found:
        if not 0 < index < converter.model.SubgraphsLength():
            raise ModelError("an operator runs a graph that does not exist", found=str(index))
    return found


def _arguments(converter: TfliteConverter, places: Sequence[int]) -> list[Given]:
    """What tensors are: arrays where the value is known."""
    found = []
    for place in places:
        value = value_of(converter, place)
        found.append(converter.tensor(place) if value is None else value)
    return found


def _type_of(value: Given) -> tuple[str, tuple[int, ...]]:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape
    return str(value.ty.dtype.dtype), tuple(int(dim) for dim in value.ty.shape)


def _enter(converter: TfliteConverter, index: int, given: Sequence[Given]) -> tuple[TfliteConverter, list[int]]:
    """A converter of another graph on what it is given, and the tensors that the graph gives back."""
    _count(converter)
    graph = converter.model.Subgraphs(index)
    places = [int(graph.Inputs(place)) for place in range(graph.InputsLength())]
    if len(places) != len(given):
        raise ModelError("a graph is run on another number of tensors", found=str(len(given)), allowed=str(len(places)))
    known = {place: item for place, item in zip(places, given, strict=True) if isinstance(item, np.ndarray)}
    inner = make_converter(converter.model, graph, converter.bb, converter.exp_tab.weights, known)
    inner.written_out = converter.written_out
    for place, item in zip(places, given, strict=True):
        dtype, shape = _type_of(item)
        declared = inner.get_tensor_type_str(graph.Tensors(place).Type())
        stored = tuple(int(graph.Tensors(place).Shape(axis)) for axis in range(graph.Tensors(place).ShapeLength()))
        if dtype != declared or (stored and len(stored) != len(shape)):
            found, allowed = f"{dtype}{list(shape)}", f"{declared}{list(stored)}"
            raise UnsupportedError("a graph is run on a tensor of another type", f"graph {index}", found, allowed)
        if place not in known:
            inner.bind(place, item)
    return inner, [int(graph.Outputs(place)) for place in range(graph.OutputsLength())]


def _run(converter: TfliteConverter, index: int, given: Sequence[Given]) -> list[Given]:
    """The results of another graph."""
    inner, outputs = _enter(converter, index, given)
    graph = inner.subgraph
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        label = f"graph {index}, operator {number} {inner.name_of(operator)}"
        results = [int(operator.Outputs(place)) for place in range(operator.OutputsLength())]
        values = fold(inner, operator)
        if values is not None:
            inner.given.update(zip(results, values, strict=False))
            continue
        _count(inner)
        try:
            made = inner.convert(operator)
        except IngotError:
            raise
        except Exception as error:  # as in the main graph: TVM reports what it does not support with any exception
            reason = " ".join(str(error).strip().splitlines()[-1:])[:300] or type(error).__name__
            raise UnsupportedError("an operator cannot be converted", where=label, found=reason) from error
        if inner.counters or len(made) < len(results):
            raise UnsupportedError("a size that depends on data inside another graph is not supported", where=label)
        for place, value in zip(results, made, strict=False):
            inner.bind(place, _checked(inner, place, converter.bb.emit(value), label))
    return _arguments(inner, outputs)


def _checked(inner: TfliteConverter, place: int, value: Expr, label: str) -> Expr:
    """A result, which is of the type that the graph declares for it; sizes may differ from those stored."""
    tensor = inner.subgraph.Tensors(place)
    dtype, shape = _type_of(value)
    if dtype != inner.get_tensor_type_str(tensor.Type()) or 0 in shape:
        name, found = tensor_name(inner.subgraph, place), f"{dtype}{list(shape)}"
        raise UnsupportedError("an operator cannot be converted", where=label, found=f"{found} for {name!r}")
    return value


def _expressions(converter: TfliteConverter, values: Sequence[Given]) -> list[Expr]:
    make = converter.exp_tab.new_const
    return [
        make(value, dtype=value.dtype.name, source_name=b"known") if isinstance(value, np.ndarray) else value
        for value in values
    ]


def _count(converter: TfliteConverter) -> None:
    """Count a graph or an operator that is written out, and refuse more than a model may become."""
    converter.written_out[0] += 1
    if converter.written_out[0] > MAX_EXPANDED_NODES:
        allowed = f"{MAX_EXPANDED_NODES} operators"
        raise UnsupportedError("graphs that are written out make the model too large", allowed=allowed)


@handles("IF")
def _if(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    from tvm import relax

    op, bb = relax.op, converter.bb
    places = [int(operator.Inputs(place)) for place in range(operator.InputsLength())]
    if not places:
        raise ModelError("an IF has no condition")
    branches = _graphs(converter, operator)
    condition, given = value_of(converter, places[0]), _arguments(converter, places[1:])
    if condition is not None:
        return _expressions(converter, _run(converter, branches[0 if np.all(condition) else 1], given))
    for index in branches:
        _refuse_divisions(converter, index)
    yes, no = (_expressions(converter, _run(converter, index, given)) for index in branches)
    whether = converter.tensor(places[0])
    if _type_of(whether)[0] != "bool" or int(np.prod(_type_of(whether)[1], dtype=np.int64)) != 1:
        raise UnsupportedError("an IF has this condition", found=str(_type_of(whether)), allowed="one bool")
    whether = bb.emit(op.reshape(whether, ()))
    results = []
    for left, right in zip(yes, no, strict=True):
        if _type_of(left) != _type_of(right):
            raise UnsupportedError(
                "an IF whose graphs make tensors of different shapes is not supported",
                found=" or ".join(f"{dtype}{list(shape)}" for dtype, shape in (_type_of(left), _type_of(right))),
                allowed="a constant condition, or graphs that make the same shapes",
                hint="bind the input that decides",
            )
        results.append(bb.emit(op.where(whether, left, right)))
    return results


def _refuse_divisions(converter: TfliteConverter, index: int) -> None:
    """Refuse a graph that divides whole numbers: it is run even where it is not taken."""
    graph = converter.model.Subgraphs(index)
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        name = converter.name_of(operator)
        if name in _CALLERS:
            for inner in _graphs(converter, operator):
                _refuse_divisions(converter, inner)
        elif name in _DIVISIONS and converter.get_tensor_type_str(graph.Tensors(operator.Inputs(0)).Type())[0] in "iu":
            raise UnsupportedError(
                "a graph that may not be taken divides whole numbers", f"graph {index}, operator {number}", name
            )


@handles("STABLEHLO_COMPOSITE")
def _composite(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    given = _arguments(converter, [int(operator.Inputs(place)) for place in range(operator.InputsLength())])
    return _expressions(converter, _run(converter, _graphs(converter, operator)[0], given))


@handles("WHILE")
def _while(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    condition, body = _graphs(converter, operator)
    given = _arguments(converter, [int(operator.Inputs(place)) for place in range(operator.InputsLength())])
    types = [_type_of(item) for item in given]
    for _ in range(MAX_STEPS + 1):
        inner, outputs = _enter(converter, condition, given)
        goes_on = value_of(inner, outputs[0]) if len(outputs) == 1 else None
        if goes_on is None or goes_on.size != 1:
            raise UnsupportedError(
                "a WHILE whose number of steps is known only at run time is not supported",
                found="a computed condition",
                allowed="counters that begin with constants and change by constants",
                hint="bind the inputs that decide, or export the model with the loop written out",
            )
        if not np.all(goes_on):
            return _expressions(converter, given)
        before, given = given, _run(converter, body, given)
        known = [(old, new) for old, new in zip(before, given, strict=False) if isinstance(new, np.ndarray)]
        if all(isinstance(old, np.ndarray) and np.array_equal(old, new) for old, new in known):
            raise UnsupportedError("a WHILE never ends", f"graph {body}", "a step that changes no counter")
        if [_type_of(item) for item in given] != types:
            raise UnsupportedError("a WHILE changes the type of a tensor from step to step", f"graph {body}")
    raise UnsupportedError("a WHILE has too many steps", found=f"more than {MAX_STEPS}", allowed=f"{MAX_STEPS}")
