"""Give every remaining operator its loop nest, and group neighbours into one kernel each."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax

from ingot.passes.definitions import DEFINITIONS
from ingot.passes.picks import ELEMENTWISE
from ingot.passes.rewriter import (
    Rewriter,
    bindings_of,
    dtype_of,
    is_tensor,
    op_name,
    prune,
    rebuild,
    rewrite,
    shape_of,
    uses_of,
)
from ingot.passes.state import State
from ingot.passes.template_call import INJECTIVE, OUT_ELEMENTWISE_FUSABLE

# A reshape moves no data: the memory plan gives both names the same bytes.
_VIEWS = ["relax.reshape"]
_DEQUANTIZE = "relax.dequantize"
#: An operator that does nothing and that nothing is fused with.
_BARRIER = "relax.builtin.stop_lift_params"
_BYTES = ("int8", "uint8")
#: Operators that read a smaller operand's elements several times.
_BROADCASTING = ELEMENTWISE | {
    "relax.broadcast_to",
    "relax.equal",
    "relax.greater",
    "relax.greater_equal",
    "relax.less",
    "relax.less_equal",
    "relax.where",
}
#: Polynomials of many terms, which are computed once, however often they are read.
_COSTLY = frozenset(
    (
        "relax.cos",
        "relax.erf",
        "relax.exp",
        "relax.log",
        "relax.nn.gelu",
        "relax.nn.gelu_tanh",
        "relax.nn.silu",
        "relax.power",
        "relax.sigmoid",
        "relax.sin",
        "relax.tanh",
    )
)
_SUMS = ("relax.add", "relax.subtract", "relax.multiply")


def fuse(state: State) -> State:
    """Give every remaining operator its loop nest, and group neighbours into one kernel each.

    Step 1: dequantize is copied to each of its readers; a barrier keeps the first of two sums' bytes in memory,
    and what a template computes where it is broadcast.
    Step 2: all other operators are legalised and fused, so that a kernel ends with quantize.
    Step 3: dequantize is legalised and fused with the kernel that reads it: integers, not floats, lie in memory.
    Step 4: the barriers go.
    Ensures that `main` holds only calls of PrimFuncs, reshapes, tuples and tuple items.
    """
    state = rewrite(state, _copy_dequantize())
    state = rewrite(state, _put_barriers(state))
    state = rewrite(state, _compute_once(state))
    state = _fused(_fused(state, skip=[*_VIEWS, _DEQUANTIZE]), skip=_VIEWS)
    return rewrite(state, lambda _, call, args: args[0] if op_name(call) == _BARRIER else None)


def _copy_dequantize() -> Any:  # noqa: ANN401 - a visitor
    """Step 1: return a visitor that gives each reader of a dequantize one of its own."""
    taken: set[Any] = set()

    def own(rewriter: Rewriter, arg: Any) -> Any:  # noqa: ANN401
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([own(rewriter, item) for item in arg.fields])
        if not isinstance(arg, relax.Var) or op_name(rewriter.value_of(arg)) != _DEQUANTIZE:
            return arg
        if arg not in taken:
            taken.add(arg)
            return arg
        value = rewriter.value_of(arg)
        return rewriter.emit(rebuild(value, value.args))

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        if op_name(call) == _DEQUANTIZE:
            return None
        return rebuild(call, [own(rewriter, arg) for arg in args])

    return visit


def _put_barriers(state: State) -> Any:  # noqa: ANN401 - a visitor
    """Step 1: return a visitor that puts a barrier before bytes become wider, where two kernels meet in a sum.

    Only one of the two can compute the sum. The other would take the conversion of its own result with it and leave
    four bytes in memory where there was one.
    """
    main = state.module["main"]
    uses = uses_of(main)
    definition = {binding.var: binding.value for binding in bindings_of(main)}
    place = {var: index for index, var in enumerate(definition)}

    def widening(expr: Any) -> Any:  # noqa: ANN401
        """Return the call that widens the bytes from which alone `expr` is computed, None if there is none."""
        while expr in definition and uses.get(expr) == 1:
            call = definition[expr]
            computed = [arg for arg in getattr(call, "args", ()) if arg in definition]
            if len(computed) != 1:
                return None
            (expr,) = computed
            if op_name(call) == "relax.astype" and dtype_of(expr) in _BYTES:
                return call if uses.get(expr) == 1 else None
        return None

    chosen: list[Any] = []
    for value in definition.values():
        if op_name(value) in _SUMS:
            calls = [call for call in map(widening, value.args) if call is not None]
            if len(calls) > 1:
                chosen.append(min(calls, key=lambda call: place[call.args[0]]))

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        if not any(call.same_as(one) for one in chosen):
            return None
        return rebuild(call, [rewriter.emit(relax.op.builtin.stop_lift_params(args[0]))])

    return visit


def _compute_once(state: State) -> Any:  # noqa: ANN401 - a visitor
    """Step 1: return a visitor that puts a barrier where the result of a template or of a costly function is broadcast.

    FuseOps would compute it again for each element that reads it: a gate of one weight a channel (squeeze and
    excitation) once a pixel. A bias or another cheap operand may still be computed in the kernel that reads it.
    """

    templates = {
        gvar
        for gvar, function in state.module.functions.items()
        if dict(function.attrs or {}).get("op_pattern") == OUT_ELEMENTWISE_FUSABLE
    }

    def small(expr: Any, like: Any) -> bool:  # noqa: ANN401
        return isinstance(expr, relax.Var) and is_tensor(expr) and 2 * _size(expr) <= _size(like)

    def costly(rewriter: Rewriter, expr: Any) -> bool:  # noqa: ANN401
        seen, left = set(), [expr]
        while left:
            value = rewriter.value_of(left.pop())
            name = op_name(value)
            if name in _COSTLY or (name == "relax.call_tir" and value.args[0] in templates):
                return True
            if name in _BROADCASTING:
                left += [arg for arg in value.args if isinstance(arg, relax.Var) and arg not in seen]
                seen.update(left)
        return False

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        if op_name(call) not in _BROADCASTING:
            return None
        chosen = [small(arg, call) and costly(rewriter, arg) for arg in args]
        if not any(chosen):
            return None
        kept = [
            rewriter.emit(relax.op.builtin.stop_lift_params(a)) if c else a for a, c in zip(args, chosen, strict=True)
        ]
        return rebuild(call, kept)

    return visit


def _size(expr: Any) -> int:  # noqa: ANN401
    return math.prod(shape_of(expr))


@tvm.transform.module_pass(opt_level=0, name="ingot.DequantizeGoesForward")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
def _dequantize_goes_forward(module: Any, _: Any) -> Any:  # noqa: ANN401
    """Call dequantize injective, which joins the kernel that reads it but never the one that made its operand."""
    functions = {
        gvar: function.with_attr("op_pattern", INJECTIVE) if gvar.name_hint.startswith("dequantize") else function
        for gvar, function in module.functions.items()
    }
    return tvm.IRModule(functions)


@tvm.transform.module_pass(opt_level=0, name="ingot.OnlyBroadcasts")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
def _only_broadcasts(module: Any, _: Any) -> Any:  # noqa: ANN401
    """Call injective what reads [i, j] for [i, j], but of another shape: a pad at the ends alone, a slice from 0.

    Such a kernel takes no place in one whose results are all made in one way.
    """
    functions = {}
    for gvar, function in module.functions.items():
        pattern = dict(function.attrs or {}).get("op_pattern")
        if pattern is not None and int(pattern) < INJECTIVE and not _broadcasts(function):
            function = function.with_attr("op_pattern", INJECTIVE)
        functions[gvar] = function
    return tvm.IRModule(functions)


def _broadcasts(function: Any) -> bool:  # noqa: ANN401
    """Say whether all operands of a kernel fit its result as broadcasting has it."""
    *operands, result = ([int(dim) for dim in param.ty.shape] for param in function.params)
    return all(
        have in (1, wanted)
        for operand in operands
        for have, wanted in zip(reversed(operand), reversed(result), strict=False)
    )


def _fused(state: State, skip: list[str]) -> State:
    """Steps 2 and 3: legalise all operators but those to skip, and fuse."""
    sequence = tvm.ir.transform.Sequential(
        [
            relax.transform.LegalizeOps(DEFINITIONS, skip_ops=skip),
            _dequantize_goes_forward,
            relax.transform.AnnotateTIROpPattern(),
            _only_broadcasts,
            relax.transform.FuseOps(fuse_opt_level=2),
            relax.transform.FuseTIR(),
        ]
    )
    with tvm.transform.PassContext(opt_level=3):
        module: Any = sequence(state.module)
    return prune(state.having(module=module))
