"""Which layers can compute on 8-bit integers, and which tensors are stored as such: decided on the graph alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.fold_batch_norm import channel_axis
from ingot.passes.rewriter import Rewriter, bindings_of, dtype_of, is_tensor, op_name, shape_of
from ingot.passes.state import State

Expr = Any  # TVM ships no types; a Relax expression

#: Operators whose output holds nothing but values of their inputs: one scale for all of them.
SAME = frozenset(
    f"relax.{name}"
    for name in ("reshape", "permute_dims", "strided_slice", "concat", "split", "nn.max_pool2d", "nn.batch_flatten")
)
#: Operators on 8-bit tensors that give new values.
ARITHMETIC = frozenset(
    f"relax.{name}"
    for name in (
        "add",
        "subtract",
        "multiply",
        "maximum",
        "minimum",
        "mean",
        "nn.avg_pool2d",
        "nn.adaptive_avg_pool2d",
        "image.resize2d",
    )
)
_BINARY = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"))
#: Functions of one value at a time: the kernel before them applies them to its sums.
POINTWISE = frozenset(
    f"relax.{name}"
    for name in (
        "nn.relu",
        "nn.leakyrelu",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.silu",
        "nn.prelu",
        "clip",
        "sigmoid",
        "tanh",
        "exp",
        "erf",
        "abs",
        "negative",
    )
)


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with constant weights.

    name:    of the variable that holds its result; unique in the program.
    kind:    "conv2d", "depthwise" or "matmul".
    data:    the variable it reads. weight: its weights, in `layout` ("OIHW", "HWIO", ... or "IO" for a matmul).
    macs:    multiply-accumulates of one inference.
    """

    name: str
    kind: str
    call: Expr
    var: Expr
    data: Expr
    weight: np.ndarray = field(repr=False)
    layout: str
    macs: int

    @property
    def out_axis(self) -> int:
        """Return the dimension of the weights that counts output channels."""
        return self.layout.index("O")

    @property
    def channel_axis(self) -> int:
        """Return the dimension of the result that counts output channels."""
        return channel_axis(self.call)

    @property
    def data_axis(self) -> int:
        """Return the dimension of the input that counts input channels."""
        if self.kind == "matmul":
            return len(shape_of(self.data)) - 1
        return str(self.call.attrs.data_layout).index("C")

    @property
    def channels(self) -> int:
        """Return the number of output channels."""
        return int(self.weight.shape[self.out_axis])


class Graph:
    """The bindings of `main` with their readers, and the layers among them."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.main = state.module["main"]
        self.bindings = bindings_of(self.main)
        self.inputs: list[Expr] = list(self.main.params[: state.n_inputs])
        self._constants = Rewriter(state, lambda *_: None)
        self.value: dict[Expr, Expr] = {binding.var: binding.value for binding in self.bindings}
        self.variable: dict[Expr, Expr] = {binding.value: binding.var for binding in self.bindings}
        self.readers: dict[Expr, list[Expr]] = {}  # variable -> variables bound to what reads it
        for binding in self.bindings:
            for var in self.reads(binding.value):
                self.readers.setdefault(var, []).append(binding.var)
        self.layers: dict[str, Layer] = {}
        for binding in self.bindings:
            layer = self._layer(binding.var, binding.value)
            if layer is not None:
                self.layers[layer.name] = layer
        self.layer_of: dict[Expr, Layer] = {layer.var: layer for layer in self.layers.values()}
        self.root = self._roots()

    def constant(self, expr: Expr) -> np.ndarray | None:
        """Return the value of a constant or weight, or None."""
        return self._constants.weight(expr)

    def adds_constant(self, var: Expr) -> bool:
        """Say whether a variable is a sum with a constant."""
        value = self.value[var]
        return op_name(value) == "relax.add" and any(self.constant(arg) is not None for arg in value.args)

    def reads(self, value: Expr) -> list[Expr]:
        """Return the variables computed at run time that an expression reads."""
        if isinstance(value, relax.Var):
            bound = self.value.get(value)
            if isinstance(bound, relax.Tuple):
                return self.reads(bound)
            return [] if self._constants.weight(value) is not None else [value]
        if isinstance(value, relax.TupleGetItem):
            return self.reads(value.tuple_value)
        if isinstance(value, relax.Call | relax.Tuple):
            parts = value.args if isinstance(value, relax.Call) else value.fields
            return [var for part in parts for var in self.reads(part)]
        return []

    def _layer(self, var: Expr, call: Expr) -> Layer | None:
        """Return the layer a call is, or None: float32, constant weights, a kind that has an integer kernel."""
        name = op_name(call)
        own = str(var.name)
        while own in self.layers:
            own += "_"
        if name not in ("relax.nn.conv2d", "relax.matmul") or dtype_of(call) != "float32":
            return None
        weight = self.constant(call.args[1])
        if weight is None or self.constant(call.args[0]) is not None or weight.dtype != np.float32:
            return None
        positions = int(np.prod(shape_of(call), dtype=np.int64))
        if name == "relax.matmul":
            if weight.ndim != 2 or len(shape_of(call.args[0])) < 2:
                return None
            return Layer(own, "matmul", call, var, call.args[0], weight, "IO", positions * int(weight.shape[0]))
        layout, groups = str(call.attrs.kernel_layout), int(call.attrs.groups)
        channels = int(weight.shape[layout.index("O")])
        kind = "conv2d" if groups == 1 else "depthwise"
        if groups > 1 and (groups != channels or weight.size // channels != _window(weight, layout)):
            return None  # grouped convolutions have no integer kernel
        macs = positions * (weight.size // channels)
        return Layer(own, kind, call, var, call.args[0], weight, layout, macs)

    def pointwise(self, var: Expr) -> bool:
        """Say whether a variable is a function of one value at a time of one tensor."""
        return var in self.root

    def _roots(self) -> dict[Expr, Expr]:
        """Return, for each value computed point by point from one tensor, that tensor."""
        roots: dict[Expr, Expr] = {}
        for binding in self.bindings:
            var, call, name = binding.var, binding.value, op_name(binding.value)
            if not (name in POINTWISE or name in _BINARY) or not is_tensor(var) or dtype_of(var) != "float32":
                continue
            sources = {roots.get(read, read) for read in self.reads(call)}
            if len(sources) == 1:
                (source,) = sources
                if is_tensor(source) and shape_of(source) == shape_of(var) and dtype_of(source) == "float32":
                    roots[var] = source
        return roots

    def walk(self) -> Iterator[tuple[Expr, Expr, str]]:
        """Return (variable, value, operator name) of every binding, in order."""
        for binding in self.bindings:
            yield binding.var, binding.value, op_name(binding.value)


def _window(weight: np.ndarray, layout: str) -> int:
    return int(weight.shape[layout.index("H")]) * int(weight.shape[layout.index("W")])


def bounds_of(graph: Graph) -> dict[Expr, tuple[float, float]]:
    """Return what the values of a variable can be at all, where operators say so: clips, and what moves or averages."""
    found: dict[Expr, tuple[float, float]] = {}
    for var, call, name in graph.walk():
        reads = [found.get(read, _ANYTHING) for read in graph.reads(call)]
        if name in _CLIPPING and len(reads) == 1:
            (low, high), (least, most) = reads[0], _clipped(graph, call, name)
            found[var] = (min(max(low, least), most), max(min(high, most), least))
        elif reads and (name in SAME or name in _AVERAGING or isinstance(call, relax.TupleGetItem)):
            found[var] = (min(low for low, _ in reads), max(high for _, high in reads))
    return found


_ANYTHING = (-np.inf, np.inf)
_CLIPPING = frozenset(f"relax.{name}" for name in ("clip", "nn.relu", "sigmoid", "tanh", "maximum", "minimum"))
_AVERAGING = frozenset(f"relax.{name}" for name in ("mean", "nn.avg_pool2d", "nn.adaptive_avg_pool2d"))


def _clipped(graph: Graph, call: Expr, name: str) -> tuple[float, float]:
    """Return the bounds that one operator sets."""
    if name == "relax.clip":
        return float(call.args[1].value), float(call.args[2].value)
    if name in ("relax.maximum", "relax.minimum"):
        values = [value for arg in call.args if (value := graph.constant(arg)) is not None]
        if not values or not values[0].size:
            return _ANYTHING
        return (float(values[0].min()), np.inf) if name == "relax.maximum" else (-np.inf, float(values[0].max()))
    return {"relax.nn.relu": (0.0, np.inf), "relax.sigmoid": (0.0, 1.0), "relax.tanh": (-1.0, 1.0)}[name]


@dataclass(frozen=True)
class Placement:
    """Where 8-bit tensors are.

    stored: variables that are quantised, in the order of the program. group: variable -> the number of its scale;
    variables with one number share it. integer: variables whose operator reads (only) 8-bit tensors.
    """

    stored: tuple[Expr, ...]
    group: dict[Expr, int]
    integer: frozenset[Expr]

    @property
    def members(self) -> dict[int, list[Expr]]:
        """Return the variables of each scale."""
        found: dict[int, list[Expr]] = {}
        for var in self.stored:
            found.setdefault(self.group[var], []).append(var)
        return found


def place(graph: Graph, in_float: Collection[str] = ()) -> Placement:
    """Decide which tensors are stored in 8 bits when the layers named in `in_float` stay as they are.

    Case 1: what a quantised layer reads is quantised.
    Case 2: what lies between (operators of SAME and ARITHMETIC all of whose inputs come from integers, and whose
            result a case wants) reads and writes 8 bits too.
    Case 3: pointwise functions of a layer's or an arithmetic operator's result stay in that kernel's registers; of any
            other tensor, they read 8 bits as in case 2.
    A result that only float operators read is not quantised: the layer's int32 sums are scaled to float once.
    """
    integers = _from_integers(graph, in_float)
    need: set[Expr] = set()
    integer: set[Expr] = set()
    demanded: dict[Expr, bool] = {}

    def want(call: Expr) -> None:
        need.update(var for var in graph.reads(call) if is_tensor(var))

    for var, call, name in reversed(list(graph.walk())):
        demanded[var] = var in need or any(
            demanded.get(reader, False) for reader in graph.readers.get(var, []) if graph.root.get(reader) is not None
        )
        layer = graph.layer_of.get(var)
        if layer is not None:
            if layer.name not in in_float:  # case 1
                need.add(layer.data)
                integer.add(var)
        elif isinstance(call, relax.TupleGetItem):
            if var in need and call.tuple_value in integers:
                need.add(call.tuple_value)
        elif var in graph.root:  # case 3
            root = graph.root[var]
            if demanded[var] and root in integers and _stays_in_memory(graph, root):
                need.add(root)
                integer.add(var)
        elif name in SAME or name in ARITHMETIC:  # case 2
            wanted = var in need if name in SAME else demanded[var]
            if wanted and var in integers:
                want(call)
                integer.add(var)
    order = [*graph.inputs, *(binding.var for binding in graph.bindings)]
    stored = tuple(var for var in order if var in need and is_tensor(var) and dtype_of(var) == "float32")
    return Placement(stored, _groups(graph, stored, integer), frozenset(integer))


def _stays_in_memory(graph: Graph, root: Expr) -> bool:
    """Say whether a tensor comes from a kernel that cannot apply a pointwise function to what it writes."""
    value = graph.value.get(root)
    return value is None or isinstance(value, relax.TupleGetItem) or op_name(value) in SAME


def _from_integers(graph: Graph, in_float: Collection[str]) -> set[Expr]:
    """Return the variables that can be computed from 8-bit tensors alone."""
    found = {var for var in graph.inputs if is_tensor(var) and dtype_of(var) == "float32"}
    for var, value, name in graph.walk():
        layer = graph.layer_of.get(var)
        if layer is not None:
            if layer.name not in in_float:
                found.add(var)
            continue
        known = name in SAME or name in ARITHMETIC or var in graph.root or isinstance(value, relax.TupleGetItem)
        reads = graph.reads(value)
        if known and reads and all(read in found for read in reads):
            found.add(var)
    return found


def _groups(graph: Graph, stored: tuple[Expr, ...], integer: set[Expr]) -> dict[Expr, int]:
    """Number the scales: operators of SAME write with the scale they read.

    Where a tensor of the input's scale has other readers, a concatenation reads it with a scale of its own: sharing
    would cost those readers precision.
    """
    parent = {var: var for var in stored}

    def find(var: Expr) -> Expr:
        while parent[var] is not var:
            var = parent[var]
        return var

    for var in stored:
        value = graph.value.get(var)
        source = graph.value.get(value.tuple_value) if isinstance(value, relax.TupleGetItem) else value
        if source is None or op_name(source) not in SAME or (var not in integer and source is value):
            continue
        reads = [read for read in graph.reads(source) if read in parent]
        joins = op_name(source) == "relax.concat"
        for read in reads:
            together = [other for other in stored if find(other) is find(read)]
            if not joins or all(len(graph.readers[other]) == 1 for other in together):
                parent[find(read)] = find(var)
    numbers: dict[Expr, int] = {}
    return {var: numbers.setdefault(find(var), len(numbers)) for var in stored}
