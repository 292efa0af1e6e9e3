"""Rewriting the one Relax function of a model, binding by binding.

`main` is a single dataflow block in A-normal form: a list of `var = operator(vars)`. A pass is then a function from
one call (with its arguments already rewritten) to a new expression, and needs no visitor class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from ingot.errors import CompilerError
from ingot.passes.state import State

Expr = Any  # TVM ships no types; every Relax expression is an `Expr` here.
Visit = Callable[["Rewriter", Expr, list[Expr]], "Expr | None"]


def shape_of(expr: Expr) -> tuple[int, ...]:
    """Return the static shape of a tensor expression."""
    return tuple(int(dim) for dim in expr.ty.shape)


def dtype_of(expr: Expr) -> str:
    """Return the element type of a tensor expression, as numpy names it."""
    return str(expr.ty.dtype.dtype)


def is_tensor(expr: Expr) -> bool:
    """Say whether the expression is one tensor (not a tuple or a shape)."""
    return isinstance(expr.ty, relax.TensorType)


def op_name(expr: Expr) -> str:
    """Return "relax.add" for a call of that operator, "" for anything else."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return str(expr.op.name)
    return ""


def bindings_of(function: Expr) -> list[Expr]:
    """Return the bindings of a function whose body is one block."""
    blocks = function.body.blocks
    if len(blocks) > 1:
        raise CompilerError("main has more than one block", found=f"{len(blocks)} blocks", allowed="1")
    return list(blocks[0].bindings) if blocks else []


def outputs_of(function: Expr) -> list[Expr]:
    """Return the elements of the tuple the function returns."""
    body = function.body.body
    if isinstance(body, relax.Tuple):
        return list(body.fields)
    for binding in reversed(bindings_of(function)):
        if binding.var.same_as(body) and isinstance(binding.value, relax.Tuple):
            return list(binding.value.fields)
    raise CompilerError("main does not return a tuple", found=str(type(body)))


def uses_of(function: Expr) -> dict[Expr, int]:
    """Count how often each variable is read, outputs included."""
    counts: dict[Expr, int] = {}

    def add(expr: Expr) -> None:
        if isinstance(expr, relax.Var):
            counts[expr] = counts.get(expr, 0) + 1
        elif isinstance(expr, relax.Tuple):
            for item in expr.fields:
                add(item)

    for binding in bindings_of(function):
        value = binding.value
        if isinstance(value, relax.Call):
            for arg in value.args:
                add(arg)
        elif isinstance(value, relax.TupleGetItem):
            add(value.tuple_value)
        else:
            add(value)
    add(function.body.body)
    return counts


class Rewriter:
    """Rebuilds `main` while `visit` replaces calls.

    `visit(rewriter, call, args)` gets every operator call with its arguments already rewritten and returns the new
    expression, or None to keep the call (with the new arguments).
    """

    def __init__(self, state: State, visit: Visit) -> None:
        self.state = state
        self.visit = visit
        self.weights: dict[str, np.ndarray] = dict(state.weights)
        # A copy: setting "main" below would change the caller's module.
        self.builder = relax.BlockBuilder(tvm.IRModule(dict(state.module.functions)))
        self.function = state.module["main"]
        self.map: dict[Expr, Expr] = {}
        self.definition: dict[Expr, Expr] = {}  # new variable -> the expression bound to it
        self.finish: Callable[[Expr], Expr] = lambda expr: expr  # applied to each output
        self.extra_outputs: list[Expr] = []  # old variables that `main` returns too, after its outputs
        self.params: list[Expr] = list(self.function.params)
        self._weight_vars: dict[str, Expr] = {str(p.name): p for p in self.params[state.n_inputs :]}

    # -- weights ---------------------------------------------------------------------------------------------------

    def weight(self, expr: Expr) -> np.ndarray | None:
        """Return the value of a weight or constant expression, or None if it is computed at run time."""
        if isinstance(expr, GenericConst):
            return np.asarray(expr.value.numpy())
        if isinstance(expr, relax.Var) and self._weight_vars.get(str(expr.name)) is not None:
            known = self._weight_vars[str(expr.name)]
            if known.same_as(expr):
                return self.weights[str(expr.name)]
        return None

    def add_weight(self, name: str, value: np.ndarray) -> Expr:
        """Add a parameter with the given value (or reuse an equal one of the same name) and return its variable."""
        value = np.ascontiguousarray(value).reshape(value.shape)  # ascontiguousarray makes 0-d 1-d
        base, count = name, 0
        while name in self.weights:
            old = self.weights[name]
            if old.dtype == value.dtype and old.shape == value.shape and old.tobytes() == value.tobytes():
                return self._weight_vars[name]
            count += 1
            name = f"{base}_{count}"
        var = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
        self.weights[name] = value
        self._weight_vars[name] = var
        self.params.append(var)
        return var

    def constant(self, value: np.ndarray, name: str) -> Expr:
        """Return a small value as a Relax constant, a larger one as a weight."""
        if value.size <= 64:
            return relax.const(value, str(value.dtype))
        return self.add_weight(name, value)

    # -- building --------------------------------------------------------------------------------------------------

    def emit(self, expr: Expr, name: str = "") -> Expr:
        """Bind an expression and return its variable; variables, constants and tuples pass through."""
        if isinstance(expr, relax.Var | GenericConst | relax.Tuple):
            return expr
        var = self.builder.emit(expr, name)
        self.definition[var] = self.builder.lookup_binding(var)
        return var

    def new(self, expr: Expr) -> Expr:
        """Translate an expression of the old function."""
        if isinstance(expr, relax.Var):
            return self.map.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.new(item) for item in expr.fields])
        return expr

    def value_of(self, expr: Expr) -> Expr:
        """Return the expression a new variable is bound to (itself if it is not bound here)."""
        return self.definition.get(expr, expr)

    def run(self) -> State:
        """Rewrite every binding and return the new state with unused weights dropped."""
        builder = self.builder
        builder.begin_scope(self.params)
        builder._begin_dataflow_block()
        outputs = [*outputs_of(self.function), *self.extra_outputs]
        for binding in bindings_of(self.function):
            value = binding.value
            name = str(binding.var.name)
            if isinstance(value, relax.Call):
                args = [self.new(arg) for arg in value.args]
                result = self.visit(self, value, args)
                if result is None:
                    result = value if not _changed(value.args, args) else rebuild(value, args)
                self.map[binding.var] = self.emit(result, name)
            elif isinstance(value, relax.TupleGetItem):
                source = self.new(value.tuple_value)
                bound = source if isinstance(source, relax.Tuple) else self.value_of(source)
                if isinstance(bound, relax.Tuple):
                    self.map[binding.var] = bound.fields[int(value.index)]
                else:
                    self.map[binding.var] = self.emit(relax.TupleGetItem(source, int(value.index)), name)
            elif isinstance(value, relax.Var | relax.Tuple | GenericConst):
                self.map[binding.var] = self.new(value)
            else:
                self.map[binding.var] = self.emit(value, name)
        result = builder.emit_output(relax.Tuple([self.finish(self.new(item)) for item in outputs]))
        block = builder._end_block()
        builder.end_scope()
        body = relax.SeqExpr([block], result)
        function = relax.Function(self.params, body, result.ty).with_attr("global_symbol", "main")
        module = builder.get()
        module["main"] = function
        return prune(self.state.having(module=module, weights=self.weights))


def _changed(old: Sequence[Expr], new: Sequence[Expr]) -> bool:
    return any(not a.same_as(b) for a, b in zip(old, new, strict=True))


def rebuild(call: Expr, args: Iterable[Expr]) -> Expr:
    """Return the same call on other arguments, its type to be inferred anew (kept for call_tir)."""
    ty_args = call.ty_args if op_name(call).startswith("relax.call_") else []
    return relax.Call(call.op, list(args), call.attrs, ty_args)


def prune(state: State) -> State:
    """Drop bindings nobody reads, weights nobody reads and PrimFuncs nobody calls."""
    function = state.module["main"]
    needed: set[Expr] = set()
    called: set[str] = set()

    def need(expr: Expr) -> None:
        if isinstance(expr, relax.Var):
            needed.add(expr)
        elif isinstance(expr, relax.Tuple):
            for item in expr.fields:
                need(item)

    need(function.body.body)
    kept: list[Expr] = []
    for binding in reversed(bindings_of(function)):
        if binding.var not in needed:
            continue
        kept.append(binding)
        value = binding.value
        if isinstance(value, relax.Call):
            for arg in value.args:
                need(arg)
                if isinstance(arg, tvm.ir.GlobalVar):
                    called.add(str(arg.name_hint))
            if isinstance(value.op, tvm.ir.GlobalVar):
                called.add(str(value.op.name_hint))
        elif isinstance(value, relax.TupleGetItem):
            need(value.tuple_value)
        else:
            need(value)
    kept.reverse()
    params = list(function.params)
    live = params[: state.n_inputs] + [p for p in params[state.n_inputs :] if p in needed]
    body = relax.SeqExpr([relax.DataflowBlock(kept)] if kept else [], function.body.body)
    new = relax.Function(live, body, function.ret_ty).with_attr("global_symbol", "main")
    functions = {gv: f for gv, f in state.module.functions.items() if gv.name_hint in called}
    module = tvm.IRModule(functions)
    module["main"] = new
    weights = {str(p.name): state.weights[str(p.name)] for p in live[state.n_inputs :]}
    return state.having(module=module, weights=weights)


def rewrite(state: State, visitors: Mapping[str, Visit] | Visit) -> State:
    """Rewrite `main` with one visitor, or with a visitor per operator name."""
    if callable(visitors):
        return Rewriter(state, visitors).run()
    table = visitors

    def visit(rewriter: Rewriter, call: Expr, args: list[Expr]) -> Expr | None:
        handler = table.get(op_name(call))
        return handler(rewriter, call, args) if handler else None

    return Rewriter(state, visit).run()
