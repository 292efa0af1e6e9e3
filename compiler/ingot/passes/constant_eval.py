"""Evaluating one Relax operator on known values, in numpy.

TVM's own FoldConstant compiles every folded operator with LLVM (9 s on MobileNetV2); the operators that touch weights
are few and numpy has them all. An operator that is not in the table is compiled and run once by TVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.passes.rewriter import dtype_of, op_name, shape_of

Array = np.ndarray
Evaluate = Callable[[Any, list[Array]], Array]


def _ints(values: Any) -> tuple[int, ...]:  # noqa: ANN401 - a TVM array
    return tuple(int(v) for v in values)


def _channel(value: Array, axis: int, ndim: int) -> Array:
    """Reshape a per-channel vector so that it broadcasts along `axis`; scalars stay."""
    if value.size == 1:
        return value.reshape(())
    shape = [1] * ndim
    shape[axis % ndim] = value.size
    return value.reshape(shape)


def _dequantize(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    data, scale, zero_point = args
    axis = int(call.attrs.axis)
    # real = scale * (q - zero_point): the difference is exact in int32.
    difference = data.astype(np.int32) - _channel(zero_point, axis, data.ndim).astype(np.int32)
    out: Array = difference.astype(np.float32) * _channel(scale, axis, data.ndim).astype(np.float32)
    return out.astype(dtype_of(call))


def _quantize(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    data, scale, zero_point = args
    axis = int(call.attrs.axis)
    dtype = np.dtype(dtype_of(call))
    limits = np.iinfo(dtype)
    scaled = np.rint(data / _channel(scale, axis, data.ndim)) + _channel(zero_point, axis, data.ndim)
    out: Array = np.clip(scaled, limits.min, limits.max).astype(dtype)
    return out


def _strided_slice(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    raise Unevaluated  # its bounds are PrimValues in tuples: leave it to TVM


class Unevaluated(Exception):  # noqa: N818 - a signal, not an error
    """This operator has no numpy form here."""


def _reshape(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    return args[0].reshape(shape_of(call))


def _transpose(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    axes = call.attrs.axes
    return np.transpose(args[0], None if axes is None else _ints(axes))


def _broadcast(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    return np.broadcast_to(args[0], shape_of(call))


def _divide(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    if args[0].dtype.kind in "iu":
        raise Unevaluated  # integer division rounds differently in each frontend
    out: Array = args[0] / args[1]
    return out


TABLE: dict[str, Evaluate] = {
    "relax.reshape": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.flatten": _reshape,
    "relax.permute_dims": _transpose,
    "relax.broadcast_to": _broadcast,
    "relax.astype": lambda call, args: args[0].astype(dtype_of(call)),
    "relax.add": lambda _, args: args[0] + args[1],
    "relax.subtract": lambda _, args: args[0] - args[1],
    "relax.multiply": lambda _, args: args[0] * args[1],
    "relax.divide": _divide,
    "relax.maximum": lambda _, args: np.maximum(args[0], args[1]),
    "relax.minimum": lambda _, args: np.minimum(args[0], args[1]),
    "relax.less": lambda _, args: args[0] < args[1],
    "relax.greater": lambda _, args: args[0] > args[1],
    "relax.equal": lambda _, args: args[0] == args[1],
    "relax.where": lambda _, args: np.where(args[0], args[1], args[2]),
    "relax.negative": lambda _, args: -args[0],
    "relax.abs": lambda _, args: np.abs(args[0]),
    "relax.sqrt": lambda _, args: np.sqrt(args[0]),
    "relax.rsqrt": lambda _, args: (1 / np.sqrt(args[0])).astype(args[0].dtype),
    "relax.exp": lambda _, args: np.exp(args[0]),
    "relax.quantize": _quantize,
    "relax.dequantize": _dequantize,
}


def evaluate(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    """Return the value of `call` on `args`; shapes and dtype are those of the call's own type."""
    handler = TABLE.get(op_name(call))
    if handler is not None:
        try:
            value = np.asarray(handler(call, args)).astype(dtype_of(call), copy=False)
            return np.ascontiguousarray(value).reshape(shape_of(call))  # ascontiguousarray makes 0-d 1-d
        except Unevaluated:
            pass
    return _evaluate_with_tvm(call, args)


def _evaluate_with_tvm(call: Any, args: list[Array]) -> Array:  # noqa: ANN401
    """Compile the one operator for this machine and run it."""
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    tensors = [i for i, arg in enumerate(call.args) if hasattr(arg, "ty") and isinstance(arg.ty, relax.TensorType)]
    params = [relax.Var(f"p{i}", call.args[i].ty) for i in tensors]
    new_args = list(call.args)
    for i, param in zip(tensors, params, strict=True):
        new_args[i] = param
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(relax.Call(call.op, new_args, call.attrs, call.ty_args))
        builder.emit_func_output(out)
    executable = tvm.compile(relax.transform.LegalizeOps()(builder.finalize()), target="llvm")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a).reshape(a.shape)) for a in args])
    return np.asarray(result.numpy())
