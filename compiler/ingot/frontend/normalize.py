"""Expr importer's Relax function -> the normal form: parameters for weights, nothing computed from weights alone.

Cases, by number:
1. a variable that only renames another value: replaced by it;
2. an operator that only moves or converts elements, on constants: done here, in numpy;
3. a constant of more than 64 elements: becomes a parameter;
4. two weights with the same dtype, shape and bytes: become one;
5. a tuple that is only taken apart again: vanishes;
6. shape arithmetic on static shapes: becomes numbers;
7. a binding nobody reads: dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ingot.errors import CompilerError, UnsupportedError
from ingot.frontend.interface import CONSTANT_ELEMENTS
from ingot.frontend.tvm_types import Binding, Expr, Function, Module


@dataclass
class Weights:
    """Large constants, each behind a Relax variable of its name."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    variables: dict[str, Expr] = field(default_factory=dict)
    _by_content: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def add(self, name: str, array: np.ndarray) -> Expr:
        """The variable of this array: a new one, or that of an array with the same content (case 4)."""
        from tvm import relax

        key = (array.dtype.name, array.shape, _digest(array))
        if key in self._by_content:
            return self.variables[self._by_content[key]]
        unique, count = name, 1
        while unique in self.arrays:
            count += 1
            unique = f"{name}_{count}"
        self._by_content[key] = unique
        self.arrays[unique] = array
        self.variables[unique] = relax.Var(unique, relax.TensorType(array.shape, array.dtype.name))
        return self.variables[unique]


def _digest(array: np.ndarray) -> bytes:
    if array.size and not any(array.strides):
        # One number repeated by broadcasting: its value is its content, without making it whole.
        return b"fill" + array.reshape(-1)[:1].tobytes()
    whole = np.ascontiguousarray(array)
    return hashlib.blake2b(whole.reshape(-1).view(np.uint8).data, digest_size=16).digest()


def normalize(module: Module, weights: Weights) -> tuple[Module, dict[str, np.ndarray]]:
    """Rebuild `module["main"]` in the normal form. Its own parameters are the inputs; weights are free variables.

    Returns the module and the weights that are left, in the order of their parameters (that of first use).
    """
    return _Normalizer(module, weights).run()


class _Normalizer:
    def __init__(self, module: Module, weights: Weights) -> None:
        from tvm import relax

        self.module = module
        self.weights = weights
        self.bb = relax.BlockBuilder()
        self.known: dict[Expr, np.ndarray] = {}  # new weight variables by value
        self.names = {var: name for name, var in weights.variables.items()}
        self.env: dict[Expr, Expr] = {}

    def run(self) -> tuple[Module, dict[str, np.ndarray]]:
        import tvm
        from tvm import relax

        main = self.module["main"]
        inputs = [relax.Var(param.name, param.ty) for param in main.params]
        self.env.update(zip(main.params, inputs, strict=True))
        bindings = _bindings(main)
        wanted = _needed(main.body.body, bindings)
        with self.bb.function("main", inputs):
            with self.bb.dataflow():
                for binding in bindings:
                    if binding.var in wanted:  # case 7
                        self._binding(binding)
                result = self._expr(main.body.body)
                fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
                output = self.bb.emit_output(relax.Tuple([self._leaf(item) for item in fields]))
            self.bb.emit_func_output(output)
        function = self.bb.get()["main"]
        used = _weights_in_order(function, set(inputs))
        params = [*inputs, *used]
        function = relax.Function(params, function.body, function.ret_ty).with_attr("global_symbol", "main")
        function = function.with_attr("num_input", len(inputs))
        functions = {var: func for var, func in self.module.functions.items() if var.name_hint != "main"}
        kept = {var: func for var, func in functions.items() if _called(function, var)}
        module = tvm.IRModule({tvm.ir.GlobalVar("main"): function, **kept})
        return module, {var.name: self.weights.arrays[self.names[var]] for var in used}

    def _leaf(self, expr: Expr) -> Expr:
        import tvm
        from tvm import relax

        return expr if isinstance(expr, (relax.Var, tvm.ir.GenericConst)) else self.bb.emit(expr)

    def _binding(self, binding: Binding) -> None:
        import tvm
        from tvm import relax

        if isinstance(binding, relax.MatchCast):
            raise UnsupportedError("a shape is only known at run time", where=f"tensor {binding.var.name!r}")
        value = self._expr(binding.value)
        if isinstance(value, (relax.Var, tvm.ir.GenericConst, relax.Tuple, relax.ShapeExpr)):  # cases 1, 5, 6
            self.env[binding.var] = value
            return
        self.env[binding.var] = self.bb.emit(value, name_hint=binding.var.name)

    def _expr(self, expr: Expr) -> Expr:
        import tvm
        from tvm import relax

        if isinstance(expr, relax.Var):
            found = self.env.get(expr, expr)
            return found
        if isinstance(expr, tvm.ir.GenericConst):
            return self._constant(expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._expr(item) for item in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            source = self._expr(expr.tuple_value)
            if isinstance(source, relax.Tuple):
                return source.fields[expr.index]
            return relax.TupleGetItem(source, expr.index)
        if isinstance(expr, relax.Call):
            return self._call(expr)
        return expr

    def _constant(self, expr: Expr) -> Expr:
        count = 1
        for dim in expr.ty.shape:
            count *= int(dim)
        if count <= CONSTANT_ELEMENTS:
            return expr
        return self._weight("constant", expr.value.numpy())  # case 3

    def _weight(self, name: str, array: np.ndarray) -> Expr:
        from tvm import relax

        if array.size <= CONSTANT_ELEMENTS:
            return relax.const(np.asarray(array, order="C"), array.dtype.name)
        var = self.weights.add(name, array)
        self.names[var] = var.name
        return var

    def _numpy(self, expr: Expr) -> np.ndarray | None:
        import tvm
        from tvm import relax

        if isinstance(expr, tvm.ir.GenericConst):
            return np.asarray(expr.value.numpy())
        if isinstance(expr, relax.Var) and expr in self.names:
            return self.weights.arrays[self.names[expr]]
        return None

    def _call(self, call: Expr) -> Expr:
        import tvm
        from tvm import relax

        args = [self._expr(arg) for arg in call.args]
        if isinstance(call.op, tvm.ir.Op):
            folded = self._fold(call.op.name, args, call)
            if folded is not None:
                return folded
        args = [arg if _is_leaf(arg) else self.bb.emit(arg) for arg in args]
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _fold(self, name: str, args: list[Expr], call: Expr) -> Expr:
        from tvm import relax

        if name == "relax.shape_of":
            return relax.ShapeExpr([int(dim) for dim in args[0].ty.shape])  # case 6
        if name == "relax.shape_to_tensor" and isinstance(args[0], relax.ShapeExpr):
            return relax.const(np.array([int(dim) for dim in args[0].values], dtype=np.int64), "int64")
        evaluate = _FOLDS.get(name)
        if evaluate is None or not args:
            return None
        source = self._numpy(args[0])
        if source is None:
            return None
        result = evaluate(source, args, call)
        if result is None:
            return None
        return self._weight(f"{self._name_of(args[0])}_{name.removeprefix('relax.')}", result)  # case 2

    def _name_of(self, expr: Expr) -> str:
        from tvm import relax

        return self.names.get(expr, "constant") if isinstance(expr, relax.Var) else "constant"


def _is_leaf(expr: Expr) -> bool:
    import tvm
    from tvm import relax

    leaves = (relax.Var, tvm.ir.Constant, relax.ShapeExpr, relax.Tuple, relax.ExternFunc, tvm.ir.GlobalVar)
    return isinstance(expr, leaves) or bool(tvm.ir.is_prim_expr(expr))


def _permute(source: np.ndarray, args: list[Expr], call: Expr) -> np.ndarray | None:
    axes = call.attrs.axes
    return np.transpose(source, [int(axis) for axis in axes] if axes is not None else None)


def _reshape(source: np.ndarray, args: list[Expr], call: Expr) -> np.ndarray | None:
    from tvm import relax

    if not isinstance(args[1], relax.ShapeExpr):
        return None
    return source.reshape([int(dim) for dim in args[1].values])


def _expand_dims(source: np.ndarray, args: list[Expr], call: Expr) -> np.ndarray | None:
    return np.expand_dims(source, [int(axis) for axis in call.attrs.axis])


def _squeeze(source: np.ndarray, args: list[Expr], call: Expr) -> np.ndarray | None:
    axis = call.attrs.axis
    return np.squeeze(source, None if axis is None else tuple(int(a) for a in axis))


def _astype(source: np.ndarray, args: list[Expr], call: Expr) -> np.ndarray | None:
    return source.astype(np.dtype(str(call.attrs.dtype)))


_FOLDS: dict[str, Callable[[np.ndarray, list[Expr], Expr], np.ndarray | None]] = {
    "relax.permute_dims": _permute,
    "relax.reshape": _reshape,
    "relax.expand_dims": _expand_dims,
    "relax.squeeze": _squeeze,
    "relax.astype": _astype,
}


def _bindings(function: Function) -> list[Binding]:
    from tvm import relax

    if not isinstance(function.body, relax.SeqExpr):
        raise CompilerError("the importer made a function that is no sequence", found=type(function.body).__name__)
    return [binding for block in function.body.blocks for binding in block.bindings]


def free_vars(expr: Expr) -> list[Expr]:
    """The variables an expression reads, in order."""
    from tvm import relax

    found: list[Expr] = []
    stack = [expr]
    while stack:
        item = stack.pop()
        if isinstance(item, relax.Var):
            found.append(item)
        elif isinstance(item, relax.Tuple):
            stack.extend(reversed(list(item.fields)))
        elif isinstance(item, relax.TupleGetItem):
            stack.append(item.tuple_value)
        elif isinstance(item, relax.Call):
            stack.extend(reversed(list(item.args)))
    return found


def _needed(result: Expr, bindings: list[Binding]) -> set[Expr]:
    wanted = set(free_vars(result))
    for binding in reversed(bindings):
        if binding.var in wanted:
            wanted.update(free_vars(binding.value))
    return wanted


def _weights_in_order(function: Function, inputs: set[Expr]) -> list[Expr]:
    bound = set(inputs)
    order: dict[Expr, None] = {}
    bindings = _bindings(function)
    for binding in bindings:
        for var in free_vars(binding.value):
            if var not in bound:
                order.setdefault(var)
        bound.add(binding.var)
    for var in free_vars(function.body.body):
        if var not in bound:
            order.setdefault(var)
    return list(order)


def _called(function: Function, target: Expr) -> bool:
    for binding in _bindings(function):
        value = binding.value
        if hasattr(value, "args") and any(arg.same_as(target) for arg in value.args if hasattr(arg, "same_as")):
            return True
    return False
