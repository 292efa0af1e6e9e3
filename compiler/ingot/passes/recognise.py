"""Find the norms that exporters write out as means, squares and roots, and name them again."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, Visit, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State

_LAYER_NORM = "relax.nn.layer_norm"
_RMS_NORM = "relax.nn.rms_norm"


def recognise(state: State) -> State:
    """Find the norms that exporters write out as means, squares and roots, and name them again.

    All over the last axis, in float32. s is sqrt(mean(d * d) + epsilon), dividing by it is written d / s,
    d * (1 / s) or d * rsqrt(mean(d * d) + epsilon).

    Case 1: d / s with d = x - mean(x) is layer_norm(x) with scale 1 and shift 0.
    Case 2: d / s with any other d is rms_norm(d) with scale 1.
    Case 3: a norm with scale 1 (and shift 0) times a constant per channel takes it as its scale.
    Case 4: a layer_norm with shift 0 plus a constant per channel takes it as its shift.
    """
    return rewrite(state, _TABLE)


def _divide(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Cases 1 and 2 for d / s."""
    root = rewriter.value_of(args[1])
    if op_name(root) != "relax.sqrt":
        return None
    return _norm(rewriter, call, args[0], root.args[0])


def _multiply(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Cases 1 and 2 for d * (1 / s) and d * rsqrt(...), and case 3."""
    for centred, factor in (args, args[::-1]):
        inverse = rewriter.value_of(factor)
        if op_name(inverse) == "relax.rsqrt":
            found = _norm(rewriter, call, centred, inverse.args[0])
        elif op_name(inverse) == "relax.divide" and all_equal(rewriter, inverse.args[0], 1.0):
            root = rewriter.value_of(inverse.args[1])
            found = _norm(rewriter, call, centred, root.args[0]) if op_name(root) == "relax.sqrt" else None
        else:
            found = _with_scale(rewriter, call, centred, factor)
        if found is not None:
            return found
    return None


def _norm(rewriter: Rewriter, call: Any, d: Any, shifted: Any) -> Any:  # noqa: ANN401
    """Return the norm, if `shifted` is mean(d * d) + epsilon over the last axis and `call` has the shape of `d`."""
    shape = shape_of(d)
    total = rewriter.value_of(shifted)
    if op_name(total) != "relax.add" or shape != shape_of(call) or not shape or dtype_of(d) != "float32":
        return None
    for mean, constant in (total.args, list(total.args)[::-1]):
        epsilon = rewriter.weight(constant)
        square = _mean_over_last(rewriter, mean)
        if epsilon is None or epsilon.size != 1 or square is None or not _is_square(rewriter, square, d):
            continue
        unit = rewriter.add_weight("norm_unit", np.ones(shape[-1], "float32"))
        small = float(epsilon.reshape(()))
        source = rewriter.value_of(d)
        if op_name(source) == "relax.subtract":
            centre = _mean_over_last(rewriter, source.args[1])
            if centre is not None and centre.same_as(source.args[0]):
                zero = rewriter.add_weight("norm_zero", np.zeros(shape[-1], "float32"))
                return relax.op.nn.layer_norm(centre, unit, zero, [len(shape) - 1], small)  # case 1
        return relax.op.nn.rms_norm(d, unit, [len(shape) - 1], small)  # case 2
    return None


def _mean_over_last(rewriter: Rewriter, expr: Any) -> Any:  # noqa: ANN401
    """Return x if the expression is mean(x) over the last axis, which is kept; else None."""
    mean = rewriter.value_of(expr)
    if op_name(mean) != "relax.mean" or not mean.attrs.keepdims or mean.attrs.axis is None:
        return None
    last = len(shape_of(mean.args[0])) - 1
    return mean.args[0] if [int(a) % (last + 1) for a in mean.attrs.axis] == [last] else None


def _is_square(rewriter: Rewriter, expr: Any, d: Any) -> bool:  # noqa: ANN401
    """Say whether the expression is d * d."""
    square = rewriter.value_of(expr)
    if op_name(square) == "relax.multiply":
        return bool(square.args[0].same_as(d) and square.args[1].same_as(d))
    if op_name(square) == "relax.square":
        return bool(square.args[0].same_as(d))
    return (
        op_name(square) == "relax.power"
        and bool(square.args[0].same_as(d))
        and all_equal(rewriter, square.args[1], 2.0)
    )


def _with_scale(rewriter: Rewriter, call: Any, norm: Any, factor: Any) -> Any:  # noqa: ANN401
    """Case 3."""
    inner = rewriter.value_of(norm)
    if op_name(inner) not in (_LAYER_NORM, _RMS_NORM) or not all_equal(rewriter, inner.args[1], 1.0):
        return None
    if op_name(inner) == _LAYER_NORM and not all_equal(rewriter, inner.args[2], 0.0):
        return None
    scale = _per_channel(rewriter, call, norm, factor)
    if scale is None:
        return None
    return relax.Call(inner.op, [inner.args[0], scale, *list(inner.args)[2:]], inner.attrs)


def _add(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 4."""
    for norm, shift in (args, args[::-1]):
        inner = rewriter.value_of(norm)
        if op_name(inner) != _LAYER_NORM or not all_equal(rewriter, inner.args[2], 0.0):
            continue
        beta = _per_channel(rewriter, call, norm, shift)
        if beta is not None:
            return relax.Call(inner.op, [inner.args[0], inner.args[1], beta], inner.attrs)
    return None


def _per_channel(rewriter: Rewriter, call: Any, norm: Any, expr: Any) -> Any:  # noqa: ANN401
    """Return a weight as a vector along the norm's axis, or None if it is none (or computed, or changes the shape)."""
    value, shape = rewriter.weight(expr), shape_of(norm)
    axes = rewriter.value_of(norm).attrs.axes
    if value is None or shape_of(call) != shape or len(axes) != 1 or int(axes[0]) % len(shape) != len(shape) - 1:
        return None
    if value.size != 1 and (value.size != shape[-1] or value.shape[-1] != shape[-1]):
        return None
    if value.shape == (shape[-1],) and isinstance(expr, relax.Var):
        return expr
    flat = np.broadcast_to(value.reshape(-1), (shape[-1],))
    return rewriter.add_weight(f"{getattr(expr, 'name', 'norm_constant')}_vector", flat)


def all_equal(rewriter: Rewriter, expr: Any, wanted: float) -> bool:  # noqa: ANN401
    """Say whether the expression is a constant whose elements are all `wanted`."""
    value = rewriter.weight(expr)
    return value is not None and bool(np.all(value == wanted))


_TABLE: dict[str, Visit] = {
    "relax.divide": _divide,
    "relax.multiply": _multiply,
    "relax.add": _add,
}
