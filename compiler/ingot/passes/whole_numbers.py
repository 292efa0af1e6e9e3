"""Compute quantised layers on whole numbers and scale their sums once."""

from __future__ import annotations

import math
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

    What only moves stored values of 8 bits moves them before they are converted, and they stay so in the artifact:
    Case 3: permute_dims(dequantize(p, t, v)) of a constant p is dequantize(permute_dims(p), t, v).
    Case 4: take(dequantize(p, t, v), i) is dequantize(take(p, i), t, v) where t and v are one number each (embeddings).
    Case 5: max_pool2d(dequantize(q, s, z)) is dequantize(max_pool2d(q), s, z): a larger q is a larger number. Padding
            is the least q, and loses as minus infinity does, where every window holds an input.
    Case 6: quantize(dequantize(q, s, z), s, z) is q.
    """
    table: dict[str, Visit] = {
        "relax.nn.conv2d": _linear,
        "relax.matmul": _linear,
        "relax.permute_dims": _permuted,
        "relax.take": _taken,
        "relax.nn.max_pool2d": _pool,
        "relax.quantize": _quantized_again,
    }
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


def _stored(rewriter: Rewriter, expr: Any) -> tuple[Any, np.ndarray] | None:  # noqa: ANN401
    """Return the dequantize call that an expression is, and its constant operand of 8 bits."""
    value = rewriter.value_of(expr)
    if op_name(value) != "relax.dequantize":
        return None
    stored = rewriter.weight(value.args[0])
    return None if stored is None or str(stored.dtype) not in _EIGHT_BITS else (value, stored)


def _permuted(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 3."""
    found = _stored(rewriter, args[0])
    if found is None:
        return None
    dequantize, stored = found
    axes = [int(a) for a in call.attrs.axes] if call.attrs.axes else list(range(stored.ndim))[::-1]
    name = str(getattr(dequantize.args[0], "name", "weight"))
    moved = rewriter.add_weight(f"{name}_permuted", stored.transpose(axes))
    axis = axes.index(int(dequantize.attrs.axis) % stored.ndim)
    return relax.op.dequantize(moved, *dequantize.args[1:], axis=axis, out_dtype=dtype_of(dequantize))


def _taken(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 4."""
    found = _stored(rewriter, args[0])
    if found is None:
        return None
    dequantize, _ = found
    operand, scale, zero_point = dequantize.args
    if math.prod(shape_of(scale)) != 1 or math.prod(shape_of(zero_point)) != 1:
        return None
    taken = rewriter.emit(rebuild(call, [operand, args[1]]))
    return relax.op.dequantize(taken, scale, zero_point, axis=0, out_dtype=dtype_of(dequantize))


def _pool(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 5."""
    value = rewriter.value_of(args[0])
    if not is_quantized(rewriter, args[0]) or bool(call.attrs.ceil_mode):
        return None
    scale = rewriter.weight(value.args[1])
    edges, window = (tuple(int(v) for v in item) for item in (call.attrs.padding, call.attrs.pool_size))
    steps = tuple(int(v) for v in call.attrs.dilation)
    # A window that begins or ends in the image holds an input, and so does one that steps over no row or column.
    held = all(max(edges[axis::2]) < window[axis] and steps[axis] == 1 for axis in (0, 1))
    if scale is None or float(scale.reshape(-1)[0]) <= 0 or not held:
        return None
    whole = rewriter.emit(rebuild(call, [value.args[0]]))
    return relax.op.dequantize(whole, value.args[1], value.args[2], axis=int(value.attrs.axis), out_dtype="float32")


def _quantized_again(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 6."""
    value = rewriter.value_of(args[0])
    if not is_quantized(rewriter, args[0]) or dtype_of(value.args[0]) != dtype_of(call):
        return None
    numbers = [rewriter.weight(expr) for expr in (*value.args[1:], *args[1:])]
    same = all(
        a is not None and b is not None and np.array_equal(a.reshape(-1), b.reshape(-1))
        for a, b in zip(numbers[:2], numbers[2:], strict=True)
    )
    return value.args[0] if same else None


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
