"""TFLite's resource variables, which a model keeps from run to run: each becomes an input and an output, one state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.tflite_verify import check_graph, tensor_name
from ingot.frontend.tvm_types import Operator, TfliteConverter

if TYPE_CHECKING:
    import tflite

#: The operators that make, set and read variables; CALL_ONCE gives them their first values.
OPERATORS = frozenset(("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"))


@dataclass(frozen=True)
class Variable:
    """One variable: `tensor` is a tensor of the graph with its dtype, shape and quantisation.

    first: its value before the first run, from the graph that CALL_ONCE names; None if that sets none.
    """

    name: str
    tensor: int
    first: np.ndarray | None


class Variables:
    """The variables of a model's main graph, by the tensors that are their handles."""

    def __init__(self, model: tflite.Model, converter: TfliteConverter) -> None:
        self.model, self.converter = model, converter
        graph = model.Subgraphs(0)
        self.handles = self._handles(graph)
        first: dict[str, np.ndarray] = {}
        tensors: dict[str, int] = {}
        assigned: set[str] = set()
        for operator in _operators(graph):
            name = converter.name_of(operator)
            if name == "CALL_ONCE":
                first.update(self._first_values(operator))
            elif name == "READ_VARIABLE":
                tensors.setdefault(self.of(operator), int(operator.Outputs(0)))
            elif name == "ASSIGN_VARIABLE":
                tensors.setdefault(self.of(operator), int(operator.Inputs(1)))
                assigned.add(self.of(operator))
        #: In the order of their names; one that is never set is its first value.
        self.known = {name: Variable(name, tensors[name], first.get(name)) for name in sorted(tensors)}
        self.kept = tuple(variable for name, variable in self.known.items() if name in assigned)
        #: Tensors that operators keep themselves, by number; their variables have the tensors' names.
        self.tensors = self._kept_tensors(graph)
        own = {name: Variable(name, tensor, None) for tensor, name in self.tensors.items()}
        self.known |= own
        self.kept += tuple(own.values())
        for name, variable in self.known.items():
            if name not in assigned and name not in own and variable.first is None:
                raise ModelError("a variable is read but never set", where=f"variable {name!r}")

    def of(self, operator: Operator) -> str:
        """The variable an operator reads or sets."""
        handle = int(operator.Inputs(0)) if operator.InputsLength() else -1
        if handle not in self.handles:
            raise UnsupportedError(
                "an operator works on a variable that is made elsewhere",
                where=self.converter.name_of(operator),
                found=f"tensor {handle}",
                allowed="the result of VAR_HANDLE in the main graph",
            )
        return self.handles[handle]

    def _kept_tensors(self, graph: tflite.SubGraph) -> dict[int, str]:
        read = {int(operator.Inputs(i)) for operator in _operators(graph) for i in range(operator.InputsLength())}
        found: dict[int, str] = {}
        for index in sorted(read):
            if index >= 0 and graph.Tensors(index).IsVariable():
                name = tensor_name(graph, index)
                taken = name in self.known or name in found.values()
                found[index] = f"{name} #{index}" if taken else name
        return found

    def _handles(self, graph: tflite.SubGraph) -> dict[int, str]:
        import tflite

        found = {}
        for operator in _operators(graph):
            if self.converter.name_of(operator) != "VAR_HANDLE" or not operator.OutputsLength():
                continue
            options = tflite.VarHandleOptions()
            table = operator.BuiltinOptions()
            name = f"variable {int(operator.Outputs(0))}"
            if table is not None:
                options.Init(table.Bytes, table.Pos)
                parts = [
                    part.decode("utf-8", "replace") for part in (options.Container(), options.SharedName()) if part
                ]
                name = "/".join(parts) or name
            found[int(operator.Outputs(0))] = name
        return found

    def _first_values(self, once: Operator) -> dict[str, np.ndarray]:
        """What the graph of a CALL_ONCE sets its variables to: constants."""
        import tflite

        options, table = tflite.CallOnceOptions(), once.BuiltinOptions()
        if table is not None:
            options.Init(table.Bytes, table.Pos)
        index = int(options.InitSubgraphIndex()) if table is not None else 0
        if not 0 < index < self.model.SubgraphsLength():
            raise ModelError("CALL_ONCE names a graph that does not exist", found=str(index))
        graph = self.model.Subgraphs(index)
        check_graph(self.model, graph)
        handles = self._handles(graph)
        values = {}
        for operator in _operators(graph):
            name = self.converter.name_of(operator)
            if name == "VAR_HANDLE":
                continue
            source = int(operator.Inputs(1)) if name == "ASSIGN_VARIABLE" and operator.InputsLength() > 1 else -1
            handle = int(operator.Inputs(0)) if operator.InputsLength() else -1
            value = self._constant(graph, source) if source >= 0 else None
            if value is None or handle not in handles:
                raise UnsupportedError(
                    "the graph that runs once does more than set variables to constants",
                    where=f"graph {index}",
                    found=name,
                    allowed="VAR_HANDLE, ASSIGN_VARIABLE of a constant",
                )
            values[handles[handle]] = value
        return values

    def _constant(self, graph: tflite.SubGraph, index: int) -> np.ndarray | None:
        tensor = graph.Tensors(index)
        buffer = self.model.Buffers(tensor.Buffer())
        dtype = {0: "float32", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"}.get(tensor.Type())
        if dtype is None or not buffer.DataLength():
            return None
        shape = tuple(int(tensor.Shape(axis)) for axis in range(tensor.ShapeLength()))
        if buffer.DataLength() != int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize:
            raise ModelError("a tensor's data does not fit its shape", where=repr(tensor_name(graph, index)))
        return np.frombuffer(buffer.DataAsNumpy().tobytes(), dtype).reshape(shape)


def _operators(graph: tflite.SubGraph) -> list[Operator]:
    return [graph.Operators(number) for number in range(graph.OperatorsLength())]
