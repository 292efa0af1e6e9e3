"""What is true of the program between two passes: one table, checked by name.

A pass names the entries it requires and ensures. The pipeline checks the names while it is put together; the tests
(and `INGOT_CHECK_IR=1`) check the program itself before and after each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax
from tvm.ir import GenericConst

from ingot.errors import CompilerError
from ingot.passes.lower import Call, Lowered
from ingot.passes.plan_memory import lifetimes
from ingot.passes.rewriter import bindings_of, op_name, outputs_of
from ingot.passes.state import State
from ingot.passes.windows import may_stay, moved_from_nhwc

Check = Callable[[State], str | None]


def _normal_form(state: State) -> str | None:
    """Return what breaks: one dataflow block, static shapes, the user's inputs first, a weight for each other one."""
    main = state.module["main"]
    if len(main.body.blocks) > 1:
        return f"main has {len(main.body.blocks)} blocks"
    names = [str(p.name) for p in main.params[state.n_inputs :]]
    if names != list(state.weights):
        return f"parameters {names[:3]}... differ from weights {list(state.weights)[:3]}..."
    if len(outputs_of(main)) != len(state.imported.outputs):
        return f"{len(outputs_of(main))} outputs, the model has {len(state.imported.outputs)}"
    for param, name in zip(main.params[state.n_inputs :], names, strict=True):
        want = tuple(int(d) for d in param.ty.shape)
        if state.weights[name].shape != want:
            return f"weight {name} has shape {state.weights[name].shape}, its parameter {want}"
    for binding in bindings_of(main):
        ty = binding.var.ty
        if isinstance(ty, relax.TensorType) and not _is_static(ty):
            return f"{binding.var.name} has no static shape"
    return None


def _is_static(ty: Any) -> bool:  # noqa: ANN401
    shape = ty.shape
    return shape is not None and all(type(dim).__name__ == "IntImm" for dim in shape)


def _interface_kept(state: State) -> str | None:
    """Return what breaks: inputs and outputs keep the user's dtypes and shapes."""
    main = state.module["main"]
    pairs = [
        *zip(main.params[: state.n_inputs], state.imported.inputs, strict=True),
        *zip(outputs_of(main), state.imported.outputs, strict=True),
    ]
    for expr, spec in pairs:
        shape = tuple(int(d) for d in expr.ty.shape)
        dtype = str(expr.ty.dtype.dtype)
        if shape != tuple(spec.shape) or dtype != spec.dtype:
            return f"{spec.name!r} is {dtype}{list(shape)}, the model says {spec.dtype}{list(spec.shape)}"
    return None


def _no_identities(state: State) -> str | None:
    """Return what breaks: no dropout, no squeeze or expand_dims (they are reshape), no reshape of a reshape."""
    made: dict[Any, str] = {}
    for binding in bindings_of(state.module["main"]):
        name = op_name(binding.value)
        made[binding.var] = name
        if name in ("relax.nn.dropout", "relax.squeeze", "relax.expand_dims", "relax.flatten"):
            return f"{binding.var.name} is {name}"
        if name == "relax.reshape" and made.get(binding.value.args[0]) == "relax.reshape":
            return f"{binding.var.name} is a reshape of a reshape"
    return None


def _constants_folded(state: State) -> str | None:
    """Return what breaks: no transpose, reshape, cast or dequantize of a weight is left to run time."""
    params = set(state.module["main"].params[state.n_inputs :])
    folded = ("relax.permute_dims", "relax.reshape", "relax.astype", "relax.dequantize")
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) in folded:
            source = binding.value.args[0]
            if isinstance(source, GenericConst) or source in params:
                return f"{binding.var.name} = {op_name(binding.value)} of a weight"
    return None


def _nhwc(state: State) -> str | None:
    """Return what breaks: every convolution, pooling and resize works in NHWC.

    What has a template for NCHW may stay there, where nothing made its operand from NHWC.
    """
    made: dict[Any, Any] = {}
    for binding in bindings_of(state.module["main"]):
        name = op_name(binding.value)
        made[binding.var] = binding.value
        if name in ("relax.nn.conv2d", "relax.nn.conv2d_transpose"):
            layout = str(binding.value.attrs.data_layout)
        elif name in ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.image.resize2d"):
            layout = str(binding.value.attrs.layout)
        else:
            continue
        alone = may_stay(state, binding.value) and not moved_from_nhwc(made.get(binding.value.args[0]))
        if layout != "NHWC" and not alone:
            return f"{binding.var.name} is {name} in {layout}"
    return None


def _packed_weights(state: State) -> str | None:
    """Return what breaks: no convolution with constant weights and one group (or depthwise) is left an operator."""
    params = set(state.module["main"].params[state.n_inputs :])
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) != "relax.nn.conv2d":
            continue
        weight, groups = binding.value.args[1], int(binding.value.attrs.groups)
        channels = int(binding.value.args[0].ty.shape[3])
        same = str(binding.value.args[0].ty.dtype) == str(weight.ty.dtype)
        if (
            weight in params
            and same
            and groups in (1, channels)
            and (groups == 1 or int(weight.ty.shape[0]) == channels)
        ):
            return f"{binding.var.name} still is a conv2d operator"
    return None


def _only_kernels(state: State) -> str | None:
    """Return what breaks: main holds calls of PrimFuncs, reshapes, tuples and tuple items, nothing else."""
    for binding in bindings_of(state.module["main"]):
        value = binding.value
        if isinstance(value, relax.Call) and op_name(value) not in ("relax.call_tir", "relax.reshape"):
            return f"{binding.var.name} is {op_name(value) or value.op}"
    return None


def _defined_before_use(state: State) -> str | None:
    """Return what breaks: a call reads only inputs, weights and what an earlier call wrote."""
    lowered: Lowered = state.lowered
    made: set[int] = set()
    for step, call in enumerate(lowered.calls):
        values = call.args if isinstance(call, Call) else (call.source,)
        writes = {v.id for v in call.writes} if isinstance(call, Call) else {call.destination.id}
        for value in values:
            if value.kind in ("temp", "output") and value.id not in made and value.id not in writes:
                return f"step {step} reads a value nobody wrote"
        made |= writes
    return None


def _all_outputs_written(state: State) -> str | None:
    """Return what breaks: each output is written by a call or a copy."""
    lowered: Lowered = state.lowered
    written = set()
    for call in lowered.calls:
        writes = call.writes if isinstance(call, Call) else (call.destination,)
        written |= {v.index for v in writes if v.kind == "output"}
    missing = set(range(len(state.imported.outputs))) - written
    return f"outputs {sorted(missing)} are never written" if missing else None


def _no_overlap(state: State) -> str | None:
    """Return what breaks: two temporaries that live at the same time share no byte, and all lie in the arena."""
    program = state.program
    if program is None:
        return "there is no program"
    where: dict[int, tuple[int, int]] = {}
    from ingot.program import Step

    for call, step in zip(state.lowered.calls, program.steps, strict=True):
        if isinstance(step, Step):
            for value, ref in zip(call.args, step.args, strict=True):
                if value.kind == "temp":
                    where[value.id] = (ref.offset, ref.offset + value.bytes)
    intervals = lifetimes(state.lowered)
    for i, a in enumerate(intervals):
        if where[a.id][1] > program.arena_bytes:
            return f"a temporary ends at {where[a.id][1]}, the arena at {program.arena_bytes}"
        for b in intervals[i + 1 :]:
            together = a.first <= b.last and b.first <= a.last
            if together and where[a.id][0] < where[b.id][1] and where[b.id][0] < where[a.id][1]:
                return f"temporaries {a.id} and {b.id} overlap at {where[a.id]} and {where[b.id]}"
    return None


INVARIANTS: dict[str, Check] = {
    "normal_form": _normal_form,
    "interface_kept": _interface_kept,
    "no_identities": _no_identities,
    "constants_folded": _constants_folded,
    "nhwc": _nhwc,
    "packed_weights": _packed_weights,
    "only_kernels": _only_kernels,
    "defined_before_use": _defined_before_use,
    "all_outputs_written": _all_outputs_written,
    "no_overlap": _no_overlap,
}


def check(state: State, names: tuple[str, ...], where: str) -> None:
    """Raise CompilerError naming the first of the invariants `names` that does not hold."""
    for name in names:
        broken = INVARIANTS[name](state)
        if broken:
            raise CompilerError(f"invariant {name!r} does not hold", where=where, found=broken)


__all__ = ["INVARIANTS", "check"]
