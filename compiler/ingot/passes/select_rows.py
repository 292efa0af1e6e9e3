"""Turn softmax, norms and reductions over the last axis into PrimFuncs of one kernel each."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ingot.passes.recognise import all_equal
from ingot.passes.rewriter import Rewriter, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import REDUCTION, call_template
from ingot.schedules import rows


def select_rows(state: State) -> State:
    """Turn softmax, norms and reductions over the last axis into PrimFuncs of one kernel each.

    Case 1: softmax and log_softmax over the last axis.
    Case 2: layer_norm over the last axes, which count as one; a scale of ones and a shift of zeros are left out.
    Case 3: rms_norm over the last axis.
    Case 4: sum, mean, max and min over the last axes, which count as one.
    All in float32; others keep their operator, for `fuse` to legalise with TVM's own definitions.
    """
    target = state.target

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        name = op_name(call)
        make = _CASES.get(name)
        if make is None or dtype_of(call) != "float32" or dtype_of(args[0]) != "float32":
            return None
        return make(rewriter, call, args, target)

    return rewrite(state, visit)


def _softmax(rewriter: Rewriter, call: Any, args: list[Any], target: Any) -> Any:  # noqa: ANN401
    """Case 1."""
    shape = shape_of(call)
    if not shape or int(call.attrs.axis) % len(shape) != len(shape) - 1 or shape[-1] < 2:
        return None
    config = rows.default_config(shape[-1], dtype_of(call), target)
    logarithm = op_name(call) == "relax.nn.log_softmax"
    tensors = rows.compute_softmax(shape, dtype_of(call), config, logarithm=logarithm)
    return call_template(rewriter, "log_softmax" if logarithm else "softmax", tensors, [args[0]], call.ty)


def _layer_norm(rewriter: Rewriter, call: Any, args: list[Any], target: Any) -> Any:  # noqa: ANN401
    """Case 2."""
    shape = shape_of(call)
    axes = sorted(int(a) % len(shape) for a in call.attrs.axes)
    if axes != list(range(len(shape) - len(axes), len(shape))):
        return None
    length = 1
    for axis in axes:
        length *= shape[axis]
    flat = (*shape[: axes[0]], length)
    config = rows.default_config(length, dtype_of(call), target)
    scaled = not (all_equal(rewriter, args[1], 1.0) and all_equal(rewriter, args[2], 0.0))
    tensors = rows.compute_layer_norm(flat, dtype_of(call), float(call.attrs.epsilon), config, scaled=scaled)
    operands = [_reshaped(rewriter, args[0], flat)]
    if scaled:
        operands += [_reshaped(rewriter, arg, (length,)) for arg in args[1:3]]
    if len(axes) == 1:
        return call_template(rewriter, "layer_norm", tensors, operands, call.ty)
    ty = relax.TensorType(flat, dtype_of(call))
    out = rewriter.emit(call_template(rewriter, "layer_norm", tensors, operands, ty))
    return relax.op.reshape(out, shape)


def _rms_norm(rewriter: Rewriter, call: Any, args: list[Any], target: Any) -> Any:  # noqa: ANN401
    """Case 3."""
    shape = shape_of(call)
    axes = [int(a) % len(shape) for a in call.attrs.axes]
    if axes != [len(shape) - 1]:
        return None
    config = rows.default_config(shape[-1], dtype_of(call), target)
    tensors = rows.compute_rms_norm(shape, dtype_of(call), float(call.attrs.epsilon), config)
    return call_template(rewriter, "rms_norm", tensors, args[:2], call.ty)


def _reduction(rewriter: Rewriter, call: Any, args: list[Any], target: Any) -> Any:  # noqa: ANN401
    """Case 4."""
    shape = shape_of(args[0])
    axes = (
        sorted(int(a) % len(shape) for a in call.attrs.axis) if call.attrs.axis is not None else list(range(len(shape)))
    )
    length = 1
    for axis in axes:
        length *= shape[axis]
    if not axes or axes != list(range(axes[0], len(shape))) or length < 2:
        return None
    kind, out_shape = op_name(call).removeprefix("relax."), shape_of(call) or (1,)
    flat = (*shape[: axes[0]], length)
    config = rows.default_config(length, dtype_of(call), target, single=True)
    tensors = rows.compute_reduction(flat, out_shape, kind, dtype_of(call), config)
    ty = relax.TensorType(out_shape, dtype_of(call))
    out = call_template(rewriter, kind, tensors, [_reshaped(rewriter, args[0], flat)], ty, REDUCTION)
    return out if out_shape == shape_of(call) else relax.op.reshape(rewriter.emit(out), shape_of(call))


def _reshaped(rewriter: Rewriter, expr: Any, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    """Return the tensor in another shape; a weight is reshaped at compile time."""
    if shape_of(expr) == shape:
        return expr
    value = rewriter.weight(expr)
    if value is not None:
        return rewriter.add_weight(f"{getattr(expr, 'name', 'constant')}_flat", value.reshape(shape))
    return rewriter.emit(relax.op.reshape(expr, shape))


_CASES = {
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": _softmax,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.rms_norm": _rms_norm,
    "relax.sum": _reduction,
    "relax.mean": _reduction,
    "relax.max": _reduction,
    "relax.min": _reduction,
}
