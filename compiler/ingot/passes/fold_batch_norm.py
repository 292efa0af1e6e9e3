"""Fold what batch normalisation leaves (a scale and a shift per channel) into the weights before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, Visit, op_name, rebuild, rewrite, shape_of, uses_of
from ingot.passes.state import State

Array = Any  # numpy arrays of any rank; their shapes change under one name here

_LINEAR = frozenset(
    {"relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv2d_transpose", "relax.nn.conv3d", "relax.matmul"}
)


def channel_axis(call: Any) -> int:  # noqa: ANN401
    """Return the output dimension that counts output channels."""
    if op_name(call) == "relax.matmul":
        return len(shape_of(call)) - 1
    return str(call.attrs.out_layout or call.attrs.data_layout).index("C")


def _per_channel(value: Array, call: Any) -> Array | None:  # noqa: ANN401
    """Return `value` as a vector over the output channels of `call`, or None if it varies along another dimension."""
    shape, axis = shape_of(call), channel_axis(call)
    if value.ndim > len(shape):
        return None
    full: Array = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    if any(dim != 1 for i, dim in enumerate(full.shape) if i != axis):
        return None
    return np.broadcast_to(full.reshape(-1), (shape[axis],))


def _scaled(weight: Array, scale: Array, call: Any) -> Array | None:  # noqa: ANN401
    """Return the weight times the scale of each output channel (in float64, rounded once), or None if it has none."""
    if op_name(call) == "relax.matmul":
        if weight.ndim != 2:
            return None
        shaped = scale.reshape(1, -1)
    else:
        layout = str(call.attrs.kernel_layout)
        if "O" not in layout:
            return None
        axes = [1] * weight.ndim
        channels = weight.shape[layout.index("O")]
        if layout == "HWOI" and int(call.attrs.groups) > 1:  # TFLite depthwise: [H, W, channels, multiplier]
            channels = weight.shape[2] * weight.shape[3]
            if channels != scale.size:
                return None
            shaped = scale.reshape(1, 1, weight.shape[2], weight.shape[3])
        else:
            if channels != scale.size:
                return None
            axes[layout.index("O")] = channels
            shaped = scale.reshape(axes)
    return (weight.astype(np.float64) * shaped.astype(np.float64)).astype(weight.dtype)


def fold_batch_norm(state: State) -> State:
    """Fold the scale and shift that batch normalisation leaves into the weights before it.

    Case 1: multiply(linear(x, W), s) with s constant per output channel is linear(x, W * s).
    Case 2: multiply(add(linear(x, W), b), s) is add(linear(x, W * s), b * s).
    Case 3: add(add(y, b), c) with b and c constant is add(y, b + c).
    Only where the inner value has no other reader, and not for layers that read a dequantize. The products are rounded
    once, from float64.
    """
    uses = uses_of(state.module["main"])
    single: set[Any] = set()

    def scale_linear(rewriter: Rewriter, linear: Any, scale: Array) -> Any:  # noqa: ANN401
        """Cases 1 and 2: return the call with a scaled weight, or None."""
        if op_name(linear) not in _LINEAR:
            return None
        if op_name(rewriter.value_of(linear.args[0])) == "relax.dequantize":
            return None  # a quantised layer sums whole numbers; its scale stays outside
        weight, vector = rewriter.weight(linear.args[1]), _per_channel(scale, linear)
        if weight is None or vector is None or weight.dtype.kind != "f":
            return None
        scaled = _scaled(weight, vector, linear)
        if scaled is None:
            return None
        name = str(getattr(linear.args[1], "name", "weight"))
        return rebuild(linear, [linear.args[0], rewriter.add_weight(name + "_scaled", scaled)])

    def operand(rewriter: Rewriter, args: list[Any]) -> tuple[Any, Array | None]:
        """Split the arguments into the computed one and the constant one."""
        for i in (1, 0):
            value = rewriter.weight(args[i])
            if value is not None:
                return args[1 - i], value
        return args[0], None

    def multiply(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        data, scale = operand(rewriter, args)
        inner = rewriter.value_of(data)
        if scale is None or data not in single or shape_of(data) != shape_of(call):
            return None
        if op_name(inner) == "relax.add":  # case 2
            linear_var, bias = operand(rewriter, list(inner.args))
            linear = rewriter.value_of(linear_var)
            if bias is None or linear_var not in single or shape_of(linear_var) != shape_of(call):
                return None
            folded = scale_linear(rewriter, linear, scale)
            if folded is None:
                return None
            shift = (bias.astype(np.float64) * scale.astype(np.float64)).astype(bias.dtype)
            out = rewriter.emit(folded)
            single.add(out)
            return relax.op.add(out, rewriter.constant(shift, "shift"))
        return scale_linear(rewriter, inner, scale)  # case 1

    def add(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        data, shift = operand(rewriter, args)
        inner = rewriter.value_of(data)
        if shift is None or data not in single or op_name(inner) != "relax.add":
            return None
        base, first = operand(rewriter, list(inner.args))
        if first is None or first.dtype.kind != "f" or shape_of(base) != shape_of(call):
            return None
        total = (first.astype(np.float64) + shift.astype(np.float64)).astype(first.dtype)
        if total.size > max(first.size, shift.size):
            return None
        return relax.op.add(base, rewriter.constant(total, "shift"))  # case 3

    table: dict[str, Visit] = {"relax.multiply": multiply, "relax.add": add}

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        # A value with one reader in the old function has one reader in the new one.
        for old, new in zip(call.args, args, strict=True):
            if isinstance(old, relax.Var) and uses.get(old) == 1:
                single.add(new)
        handler = table.get(op_name(call))
        return handler(rewriter, call, args) if handler else None

    return rewrite(state, visit)
