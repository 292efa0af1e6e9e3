"""Schedule every fused function and cut it into kernels with raw pointers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.ir import GenericConst

from ingot.errors import CompilerError
from ingot.passes.multiplications import multiply_adds
from ingot.passes.rewriter import bindings_of, dtype_of, op_name, outputs_of, shape_of
from ingot.passes.state import State
from ingot.schedules.apply import schedule_function
from ingot.schedules.recurrent import ROUNDS
from ingot.schedules.vector import DTYPE_BYTES
from ingot.schedules.written import WORKSPACE


@dataclass(frozen=True)
class Value:
    """A tensor of the lowered program: something with bytes, before it has an address.

    kind: "input" / "output" (index says which), "weight" (data holds it), "temp" (the memory plan places it).
    """

    id: int
    kind: str
    bytes: int
    dtype: str
    index: int = 0
    data: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RawKernel:
    """One loop nest as a PrimFunc over raw pointers, ready for LLVM."""

    symbol: str
    function: Any
    dtypes: tuple[str, ...]
    readonly: tuple[bool, ...]
    extent: int
    rounds: int = 1


@dataclass(frozen=True)
class Call:
    """One kernel call: the values its parameters point to; the written ones are `writes`."""

    kernel: RawKernel
    args: tuple[Value, ...]
    writes: tuple[Value, ...]
    label: str


@dataclass(frozen=True)
class Copy:
    """A plain copy of a value into an output."""

    source: Value
    destination: Value
    label: str


@dataclass(frozen=True)
class Lowered:
    """The program before memory planning: calls in order over values; multiply-adds on integers and on others."""

    calls: tuple[Call | Copy, ...]
    kernels: tuple[RawKernel, ...]
    multiply_adds: tuple[int, int] = (0, 0)


def lower(state: State) -> State:
    """Schedule every fused function and cut it into kernels with raw pointers.

    Each top-level loop nest of a scheduled function is a kernel; what one nest hands to the next becomes a value of
    the memory plan. Equal kernels (same loops on other buffers) are made once.
    """
    return state.having(lowered=_Lowering(state).run())


@dataclass(frozen=True)
class _Nest:
    """One top-level loop nest: its statement, the buffers it reads and writes, its parallel extent and rounds."""

    statement: Any
    buffers: tuple[Any, ...]
    written: frozenset[int]
    extent: int
    rounds: int


class _Lowering:
    def __init__(self, state: State) -> None:
        self.state = state
        self.values: dict[Any, Value | tuple[Value, ...]] = {}
        self.kernels: list[RawKernel] = []
        self.by_function: dict[str, list[tuple[RawKernel, tuple[Any, ...], frozenset[int]]]] = {}
        self.prepared: dict[str, tuple[Any, list[Any], list[Any]]] = {}
        self.hashes: dict[int, list[tuple[Any, str]]] = {}
        self.calls: list[Call | Copy] = []
        self.count = 0
        self.multiply_adds = (0, 0)
        self.work: dict[str, tuple[int, int]] = {}
        self.constants: dict[bytes, Value] = {}

    def value(self, kind: str, shape: tuple[int, ...], dtype: str, **more: Any) -> Value:  # noqa: ANN401
        """Make a value with a new id."""
        size = DTYPE_BYTES[dtype]
        for dim in shape:
            size *= dim
        self.count += 1
        return Value(self.count, kind, size, dtype, **more)

    def run(self) -> Lowered:
        """Lower `main`."""
        state, main = self.state, self.state.module["main"]
        for i, param in enumerate(main.params):
            kind = "input" if i < state.n_inputs else "weight"
            data = None if kind == "input" else state.weights[str(param.name)]
            self.values[param] = self.value(kind, shape_of(param), dtype_of(param), index=i, data=data)
        outputs = outputs_of(main)
        self._reserve_outputs(main, outputs)
        for binding in bindings_of(main):
            self._bind(binding)
        for i, out in enumerate(outputs):
            source = self._resolve(out)
            if source.kind != "output" or source.index != i:
                spec = state.imported.outputs[i]
                destination = self.value("output", tuple(spec.shape), source.dtype, index=i)
                self.calls.append(Copy(source, destination, f"output {i}"))
        return Lowered(tuple(self.calls), tuple(self.kernels), self.multiply_adds)

    def _reserve_outputs(self, main: Any, outputs: list[Any]) -> None:  # noqa: ANN401
        """Let the call that makes an output write straight into it, also through reshapes."""
        definition = {binding.var: binding.value for binding in bindings_of(main)}
        self.reserved: dict[Any, int] = {}
        for i, out in enumerate(outputs):
            var = out
            while op_name(definition.get(var)) == "relax.reshape":
                var = definition[var].args[0]
            value = definition.get(var)
            made_here = isinstance(value, relax.Call) and op_name(value) != "relax.reshape"
            if made_here and is_single_tensor(var) and var not in self.reserved:
                self.reserved[var] = i

    def _resolve(self, expr: Any) -> Value:  # noqa: ANN401
        if isinstance(expr, GenericConst):
            data = np.asarray(expr.value.numpy())
            key = repr((data.dtype, data.shape)).encode() + data.tobytes()
            if key not in self.constants:
                self.constants[key] = self.value("weight", data.shape, str(data.dtype), data=data)
            return self.constants[key]
        value = self.values.get(expr)
        if not isinstance(value, Value):
            raise CompilerError("a tensor is used before it is made", found=str(expr))
        return value

    def _bind(self, binding: Any) -> None:  # noqa: ANN401
        value, var = binding.value, binding.var
        name = op_name(value)
        if name == "relax.reshape":
            self.values[var] = self._resolve(value.args[0])
        elif name == "relax.call_tir":
            self._call_tir(var, value)
        elif isinstance(value, relax.TupleGetItem):
            items = self.values[value.tuple_value]
            if isinstance(items, Value):
                raise CompilerError("a tensor is indexed like a tuple", found=str(value))
            self.values[var] = items[int(value.index)]
        elif isinstance(value, relax.Var | GenericConst):
            self.values[var] = self._resolve(value)
        elif not isinstance(value, relax.Tuple):
            raise CompilerError("an operator reached lowering", found=name or str(value), allowed="call_tir, reshape")

    def _call_tir(self, var: Any, call: Any) -> None:  # noqa: ANN401
        gvar, inputs = call.args[0], [self._resolve(arg) for arg in call.args[1].fields]
        types = list(var.ty.fields) if isinstance(var.ty, relax.TupleType) else [var.ty]
        results: list[Value] = []
        for ty in types:
            shape, dtype = tuple(int(d) for d in ty.shape), str(ty.dtype.dtype)
            index = self.reserved.get(var)
            kind = "temp" if index is None else "output"
            results.append(self.value(kind, shape, dtype, index=index or 0))
        self.values[var] = results[0] if len(types) == 1 and not isinstance(var.ty, relax.TupleType) else tuple(results)
        name = str(gvar.name_hint)
        function = self.state.module[gvar]
        if name not in self.by_function:
            self.by_function[name] = self._kernels_of(name, function)
            self.work[name] = multiply_adds(function)
        whole, real = self.work[name]
        self.multiply_adds = (self.multiply_adds[0] + whole, self.multiply_adds[1] + real)
        params = list(function.params)
        place: dict[Any, Value] = {}
        scheduled = self.prepared[name][0]
        for param, value in zip(scheduled.params, inputs + results, strict=True):
            place[param] = value
        if len(params) != len(inputs) + len(results):
            raise CompilerError("a kernel is called with the wrong number of tensors", where=name)
        for kernel, buffers, written in self.by_function[name]:
            args: list[Value] = []
            for buffer in buffers:
                if buffer not in place:
                    place[buffer] = self.value("temp", tuple(int(d) for d in buffer.shape), str(buffer.dtype))
                args.append(place[buffer])
            writes = tuple(args[i] for i in sorted(written))
            self.calls.append(Call(kernel, tuple(args), writes, name))

    # -- one fused function ----------------------------------------------------------------------------------------

    def _kernels_of(self, name: str, function: Any) -> list[tuple[RawKernel, tuple[Any, ...], frozenset[int]]]:  # noqa: ANN401
        plain = (
            function.without_attr("global_symbol") if function.attrs and "global_symbol" in function.attrs else function
        )
        scheduled = schedule_function(plain.with_attr("global_symbol", "main"), self.state.target)
        self.prepared[name] = (scheduled, [], [])
        result = []
        for i, nest in enumerate(split_nests(scheduled)):
            raw = raw_function(nest)
            symbol = self._unique(raw, f"ingot_{self.state.imported.name}_{name}" + (f"_{i}" if i else ""))
            kernel = next((k for k in self.kernels if k.symbol == symbol), None)
            if kernel is None:
                dtypes = tuple(str(buffer.dtype) for buffer in nest.buffers)
                readonly = tuple(j not in nest.written for j in range(len(nest.buffers)))
                kernel = RawKernel(
                    symbol, raw.with_attr("global_symbol", symbol), dtypes, readonly, nest.extent, nest.rounds
                )
                self.kernels.append(kernel)
            result.append((kernel, nest.buffers, nest.written))
        return result

    def _unique(self, raw: Any, symbol: str) -> str:  # noqa: ANN401
        """Return the symbol of an equal kernel made before, or `symbol` for a new one."""
        key = int(tvm_ffi.structural_hash(raw))
        for other, known in self.hashes.setdefault(key, []):
            if tvm_ffi.structural_equal(raw, other):
                return known
        self.hashes[key].append((raw, symbol))
        return symbol


def is_single_tensor(expr: Any) -> bool:  # noqa: ANN401
    """Say whether an expression is one tensor."""
    return isinstance(expr.ty, relax.TensorType)


def split_nests(function: Any) -> list[_Nest]:  # noqa: ANN401
    """Cut a scheduled PrimFunc into its top-level loop nests, in order."""
    root = function.body.block
    body = root.body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    candidates = list(function.params) + list(root.alloc_buffers)
    # Buffers that tasks share out among themselves lie in the arena even if one nest alone uses them.
    workspace = set(root.annotations.get(WORKSPACE, ()))
    used = [_buffers_of(statement) for statement in statements]
    nests = []
    for i, statement in enumerate(statements):
        reads, writes = used[i]
        elsewhere = workspace | {b for j, (r, w) in enumerate(used) if j != i for b in (*r, *w)}
        params = set(function.params)
        shared = [b for b in candidates if (b in reads or b in writes) and (b in params or b in elsewhere)]
        private = [b for b in root.alloc_buffers if (b in reads or b in writes) and b not in elsewhere]
        written = frozenset(k for k, b in enumerate(shared) if b in writes)
        loop = statement
        parallel = isinstance(loop, tirx.For) and loop.kind == tirx.ForKind.PARALLEL
        extent = int(loop.extent) if parallel else 1
        rounds = int(loop.annotations.get(ROUNDS, 1)) if parallel else 1
        block = s_tir.SBlock([], [], [], "root", statement, None, private)
        realize = s_tir.SBlockRealize([], tirx.const(True, "bool"), block)
        nests.append(_Nest(realize, tuple(shared), written, extent, rounds))
    return nests


def _buffers_of(statement: Any) -> tuple[set[Any], set[Any]]:  # noqa: ANN401
    """Return the buffers the blocks under a statement read and write."""
    reads: set[Any] = set()
    writes: set[Any] = set()
    stack = [statement]
    while stack:
        node = stack.pop()
        if isinstance(node, s_tir.SBlockRealize):
            reads.update(region.source for region in node.block.reads)
            writes.update(region.source for region in node.block.writes)
            stack.append(node.block.body)
            if node.block.init is not None:
                stack.append(node.block.init)
        elif isinstance(node, tirx.SeqStmt):
            stack.extend(node.seq)
        elif isinstance(node, tirx.For | tirx.AttrStmt):
            stack.append(node.body)
        elif isinstance(node, tirx.IfThenElse):
            stack.append(node.then_case)
            if node.else_case is not None:
                stack.append(node.else_case)
    return reads, writes


def raw_function(nest: _Nest) -> Any:  # noqa: ANN401
    """Return `void f(T *..., int32 begin, int32 end)` over the nest's buffers."""
    begin, end = tirx.Var("begin", "int32"), tirx.Var("end", "int32")
    pointers, declarations = [], []
    for buffer in nest.buffers:
        pointer = tirx.Var("p_" + str(buffer.name), buffer.data.ty)
        pointers.append(pointer)
        declarations.append(tirx.DeclBuffer(buffer, data=pointer))
    body = tirx.SeqStmt([*declarations, nest.statement])
    function = tirx.PrimFunc([*pointers, begin, end], body)
    for key, value in (("calling_conv", 1), ("tirx.noalias", True), ("s_tir", True), ("global_symbol", "kernel")):
        function = function.with_attr(key, value)
    return function
