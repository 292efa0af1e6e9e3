"""Store the tensors between half-precision layers in half precision: half the memory, and no kernels that convert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm_ffi
from tvm import ir, relax, s_tir, tirx
from tvm.ir import GenericConst

from ingot.passes.precision import NARROW
from ingot.passes.rewriter import Rewriter, bindings_of, dtype_of, is_tensor, op_name, outputs_of, rewrite, shape_of
from ingot.passes.state import State
from ingot.schedules import conv2d_amx, conv2d_half, conv2d_mmla
from ingot.schedules.half import Half, half_of

#: Templates that multiply in half precision.
_HALF_TEMPLATES = (conv2d_half.TEMPLATE, conv2d_mmla.HALF_TEMPLATE, conv2d_amx.HALF_TEMPLATE)
#: Templates whose own loads may be widened: each value is loaded a few times, by whole vectors.
_WIDENING_TEMPLATES = ("depthwise", "rows")


def half_storage(state: State) -> State:
    """Store the tensors between half-precision layers in half precision.

    A float32 tensor between two kernels becomes half if its maker multiplies in half precision or a reader rounds it
    anyway, and if every reader can widen it as it loads: not a float32 matrix product, which loads a value many times.
    What a kernel reads that makes an output of the model stays float32: outputs should not be rounded for nothing.
    Case 1: the kernel that makes it gets a last block that rounds, each kernel that reads it a first one that widens;
            the schedules inline both.
    Case 2: a kernel that only rounds it has nothing left to do, and goes.
    The model's inputs and outputs keep their dtypes.
    """
    half = half_of(state.precision)
    if half is None:
        return state
    program = _Program(state)
    chosen = program.chosen(half)
    changed = _Functions(half)

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        if op_name(call) != "relax.call_tir":
            return None
        gvar, given = call.args[0], list(args[1].fields)
        function = state.module[gvar]
        params = function.params
        if _only_rounds(function) and dtype_of(given[0]) == half.dtype:
            return given[0]  # case 2
        wide = frozenset(i for i, arg in enumerate(given) if dtype_of(arg) != str(params[i].dtype))
        narrow = call in chosen
        if not wide and not narrow:
            return None
        ty = relax.TensorType(shape_of(call), half.dtype) if narrow else call.ty
        return relax.call_tir(changed.of(rewriter, gvar, function, wide, narrow), relax.Tuple(given), ty)

    return rewrite(state, visit).having(half_tensors=len(chosen))


class _Program:
    """Who makes and who reads each tensor of `main`; a reshape is another name of what it reads."""

    def __init__(self, state: State) -> None:
        self.state = state
        main = state.module["main"]
        self.root: dict[Any, Any] = {}
        self.readers: dict[Any, list[tuple[Any, int]]] = {}
        self.makers: dict[Any, Any] = {}
        self.fixed: set[Any] = set()
        for binding in bindings_of(main):
            value = binding.value
            if op_name(value) == "relax.reshape":
                self.root[binding.var] = self._root(value.args[0])
            elif op_name(value) == "relax.call_tir":
                if is_tensor(binding.var):
                    self.makers[binding.var] = value
                for i, arg in enumerate(value.args[1].fields):
                    self.readers.setdefault(self._root(arg), []).append((value, i))
            elif isinstance(value, relax.Tuple):
                self.fixed.update(self._root(item) for item in value.fields)
            elif isinstance(value, relax.Var):
                self.root[binding.var] = self._root(value)
        self.fixed.update(self._root(out) for out in outputs_of(main))
        self.last = {value for var, value in self.makers.items() if var in self.fixed}

    def _root(self, expr: Any) -> Any:  # noqa: ANN401
        return expr if isinstance(expr, GenericConst) else self.root.get(expr, expr)

    def chosen(self, half: Half) -> set[Any]:
        """Return the calls whose results should be stored in half precision."""
        module = self.state.module
        found = set()
        for var, call in self.makers.items():
            function = module[call.args[0]]
            calls = self.readers.get(var, [])
            readers = [(module[reader.args[0]], i) for reader, i in calls]
            if any(reader in self.last for reader, _ in calls):
                continue
            if dtype_of(var) != "float32" or not shape_of(var) or var in self.fixed or not _is_computed(function):
                continue
            multiplied = _templates(function) & set(_HALF_TEMPLATES)
            rounded = any(_only_rounds(f) and str(f.params[-1].dtype) == half.dtype for f, _ in readers)
            if (multiplied or rounded) and all(_can_widen(f, f.params[i]) for f, i in readers):
                found.add(call)
        return found


def _blocks(function: Any) -> list[Any]:  # noqa: ANN401
    """Return the blocks below the root of a PrimFunc that is not scheduled yet."""
    found: list[Any] = []
    tvm_ffi.structural_walk(function.body.block.body, [(s_tir.SBlock, lambda block: found.append(block))])
    return found


def _template(block: Any) -> str:  # noqa: ANN401
    return str(block.annotations.get("ingot.template", ""))


def _templates(function: Any) -> set[str]:  # noqa: ANN401
    return {_template(block) for block in _blocks(function)} - {""}


def _is_computed(function: Any) -> bool:  # noqa: ANN401
    """Say whether one block, of one value an iteration, writes the result."""
    writers = [b for b in _blocks(function) if any(w.source.same_as(function.params[-1]) for w in b.writes)]
    return len(writers) == 1 and len(writers[0].iter_vars) > 0


def _only_rounds(function: Any) -> bool:  # noqa: ANN401
    """Say whether a kernel rounds its only operand and does nothing else."""
    blocks = _blocks(function)
    if len(function.params) != 2 or len(blocks) != 1 or not str(blocks[0].name_hint).startswith(NARROW):
        return False
    return [int(d) for d in function.params[0].shape] == [int(d) for d in function.params[1].shape]


def _can_widen(function: Any, param: Any) -> bool:  # noqa: ANN401
    """Say whether a kernel may widen the values of a parameter as it loads them.

    A reduction that reads a second tensor is a product, and loads a value once for each value it makes of it.
    """
    if str(param.dtype) != "float32":
        return False
    for block in _blocks(function):
        if not any(region.source.same_as(param) for region in block.reads):
            continue
        reduces = any(int(var.iter_type) == 2 for var in block.iter_vars)
        operands = {region.source for region in block.reads} - {region.source for region in block.writes}
        product = reduces and len(operands) > 1 and _template(block) not in _WIDENING_TEMPLATES
        if product or not block.iter_vars:
            return False
    return True


@dataclass
class _Functions:
    """The changed PrimFuncs, each made once."""

    half: Half
    made: dict[tuple[str, frozenset[int], bool], Any] = field(default_factory=dict)

    def of(self, rewriter: Rewriter, gvar: Any, function: Any, wide: frozenset[int], narrow: bool) -> Any:  # noqa: ANN401
        """Return the global variable of `function` with the parameters `wide`, and its result if `narrow`, in half."""
        key = (str(gvar.name_hint), wide, narrow)
        if key not in self.made:
            last = len(function.params) - 1
            changed = with_half_params(function, wide | ({last} if narrow else set()), self.half)
            self.made[key] = rewriter.builder.add_func(changed, f"{gvar.name_hint}_{self.half.name}")
        return self.made[key]


def with_half_params(function: Any, which: frozenset[int] | set[int], half: Half) -> Any:  # noqa: ANN401 - PrimFuncs
    """Return a PrimFunc that computes the same with some of its parameters stored in half precision.

    The old parameters become buffers of the function. The last parameter is the result, the others are read.
    """
    params, first, last, own = list(function.params), [], [], []
    for i in sorted(which):
        old = params[i]
        new = tirx.decl_buffer(list(old.shape), half.dtype, f"{old.name}_{half.name}", layout=None)
        params[i] = new
        own.append(old)
        if i == len(params) - 1:
            last.append(_elementwise(old, new, half.narrow, f"{old.name}_{half.name}"))
        else:
            first.append(_elementwise(new, old, half.widen, f"{old.name}_wide"))
    root = function.body.block
    body = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    block = s_tir.SBlock(
        [], root.reads, root.writes, root.name_hint, tirx.SeqStmt([*first, *body, *last]), root.init,
        [*root.alloc_buffers, *own], root.match_buffers, root.annotations,
    )  # fmt: skip
    realize = s_tir.SBlockRealize([], tirx.const(True, "bool"), block)
    result = tirx.PrimFunc(params, realize)
    for name, value in (function.attrs or {}).items():
        result = result.with_attr(name, value)
    return result


def _elementwise(source: Any, destination: Any, value: Any, name: str) -> Any:  # noqa: ANN401 - TIR
    """Return the loop nest destination[...] = value(source[...])."""
    shape = list(source.shape)
    zero, one = tirx.IntImm("int64", 0), tirx.IntImm("int64", 1)
    loops = [tirx.Var(f"i{k}", "int64") for k in range(len(shape))]
    axes = [tirx.Var(f"v{k}", "int64") for k in range(len(shape))]
    iters = [
        tirx.IterVar(ir.Range.from_min_extent(zero, d), v, tirx.IterVar.DataPar)
        for d, v in zip(shape, axes, strict=True)
    ]
    points = [ir.Range.from_min_extent(v, one) for v in axes]
    reads, writes = ([tirx.BufferRegion(buffer, points)] for buffer in (source, destination))
    store = tirx.BufferStore(destination, value(tirx.BufferLoad(source, axes)), axes)
    statement: Any = s_tir.SBlockRealize(
        loops, tirx.const(True, "bool"), s_tir.SBlock(iters, reads, writes, name, store)
    )
    for loop, extent in reversed(list(zip(loops, shape, strict=True))):
        statement = tirx.For(loop, zero, extent, tirx.ForKind.SERIAL, statement)
    return statement
