"""Compute quantised layers on whole numbers and scale their sums once."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.fold_batch_norm import channel_axis
from ingot.passes.rewriter import Rewriter, Visit, dtype_of, op_name, rebuild, rewrite, shape_of
from ingot.passes.state import State

_EIGHT_BITS = ("int8", "uint8")


def whole_numbers(state: State) -> State:
    """Compute quantised layers on whole numbers and scale their sums once.

    With x = s (q - z) and w = t (p - v), sum x w = s t sum (q - z)(p - v): the sum is of integers.

    Case 1: conv2d(dequantize(q, s, z), dequantize(p, t, v)) is multiply(conv2d(dequantize(q, 1, z),
            dequantize(p, 1, v)), s t), with t one number or one for each output channel.
    Case 2: the same for matmul with a constant 2-D right-hand side.
    The product s t is rounded once, from float64.
    """
    table: dict[str, Visit] = {"relax.nn.conv2d": _linear, "relax.matmul": _linear}
    return rewrite(state, table)


def is_quantized(rewriter: Rewriter, expr: Any) -> bool:  # noqa: ANN401
    """Say whether an expression is the per-tensor dequantize of 8-bit values, with constant scale and zero point."""
    value = rewriter.value_of(expr)
    if op_name(value) != "relax.dequantize" or dtype_of(value) != "float32":
        return False
    scale, zero_point = rewriter.weight(value.args[1]), rewriter.weight(value.args[2])
    if scale is None or zero_point is None or dtype_of(value.args[0]) not in _EIGHT_BITS:
        return False
    return bool(scale.size == 1 and zero_point.size == 1)


def _linear(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Cases 1 and 2."""
    data, weight = rewriter.value_of(args[0]), rewriter.value_of(args[1])
    if not is_quantized(rewriter, args[0]) or op_name(weight) != "relax.dequantize":
        return None
    scale, factor = rewriter.weight(data.args[1]), rewriter.weight(weight.args[1])
    stored = rewriter.weight(weight.args[0])
    if scale is None or factor is None or stored is None or str(stored.dtype) not in _EIGHT_BITS:
        return None
    ratio = scale.astype(np.float64).reshape(-1) * factor.astype(np.float64).reshape(-1)
    if np.all(ratio == 1.0):
        return None
    if ratio.size > 1 and int(weight.attrs.axis) % stored.ndim != _output_axis(call, stored.ndim):
        return None
    shape = [1] * len(shape_of(call))
    shape[channel_axis(call)] = ratio.size
    whole = rewriter.emit(rebuild(call, [_unscaled(rewriter, data), _unscaled(rewriter, weight)]))
    return relax.op.multiply(whole, rewriter.constant(ratio.astype(np.float32).reshape(shape), "scale"))


def _output_axis(call: Any, ndim: int) -> int:  # noqa: ANN401
    """Return the dimension of the weights that counts output channels."""
    if op_name(call) == "relax.matmul":
        return ndim - 1
    return str(call.attrs.kernel_layout).index("O")


def _unscaled(rewriter: Rewriter, dequantize: Any) -> Any:  # noqa: ANN401
    """Return the same dequantize with a scale of 1."""
    stored, scale, zero_point = dequantize.args
    one = relax.const(np.ones(shape_of(scale), np.float32), "float32")
    axis = int(dequantize.attrs.axis)
    return rewriter.emit(relax.op.dequantize(stored, one, zero_point, axis=axis, out_dtype="float32"))
