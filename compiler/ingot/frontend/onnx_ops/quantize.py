"""QuantizeLinear and DequantizeLinear, and the operators that hold their own scales (QLinear..., ...Integer)."""

from __future__ import annotations

import numpy as np

from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.onnx_contrib import DOMAIN
from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.onnx_ops.convolution import convolution
from ingot.frontend.tvm_types import Expr


def _constant_parameters(ctx: Context) -> bool:
    return not ctx.attr("block_size", 0) and ctx.value(1) is not None and (not ctx.has(2) or ctx.value(2) is not None)


def _spread(ctx: Context, index: int) -> Expr:
    """Scale or zero point `index` in a shape that broadcasts with the data: per tensor, per channel or per block."""
    from tvm import relax

    data, shape = ctx.shape(), ctx.shape(index)
    if int(np.prod(shape, dtype=np.int64)) == 1:
        return relax.op.reshape(ctx.inputs[index], ())
    axis = normal_axis(ctx.attr("axis", 1), len(data))
    block = ctx.attr("block_size", 0)
    if not block:
        return relax.op.reshape(ctx.inputs[index], tuple(shape[0] if i == axis else 1 for i in range(len(data))))
    whole = ctx.emit(relax.op.repeat(ctx.inputs[index], block, axis))
    return relax.op.strided_slice(whole, [axis], [0], [data[axis]], [1])


def _quantized(ctx: Context, x: Expr, scale: Expr, zero: Expr | None, dtype: str) -> Expr:
    """round(x / scale) + zero, saturated: for scales that are only known at run time."""
    from tvm import relax

    limits = np.iinfo(dtype)
    rounded = ctx.emit(relax.op.round(relax.op.divide(x, scale)))
    if zero is not None:
        rounded = ctx.emit(relax.op.add(rounded, relax.op.astype(zero, "float32")))
    return relax.op.astype(relax.op.clip(rounded, float(limits.min), float(limits.max)), dtype)


def _parameters(ctx: Context, stored: str) -> tuple[Expr, Expr, int]:
    """Scale, zero point and axis as Relax wants them."""
    if ctx.attr("block_size", 0):
        raise ctx.unsupported("blocked quantisation", "per tensor or per channel")
    scale = ctx.need(1, "scale")
    zero = ctx.need(2, "zero point") if ctx.has(2) else np.zeros(scale.shape, dtype=np.dtype(stored))
    axis = normal_axis(ctx.attr("axis", 1), max(len(ctx.shape()), 1)) if scale.size > 1 else 0
    if scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    if scale.size > 1 and np.all(zero == zero.reshape(-1)[0]):
        zero = zero.reshape(-1)[:1].reshape(())
    return ctx.array("scale", scale), ctx.array("zero_point", zero), axis


def _as_zero_point(node: OpNode) -> Shapes:
    return [(node.shapes[0], node.dtypes[2] if len(node.dtypes) > 2 else "uint8")]


def _as_scale(node: OpNode) -> Shapes:
    return [(node.shapes[0], node.dtypes[1])]


# Those of com.microsoft are the same with 16-bit types, before ONNX had them.
@converts("QuantizeLinear")
@converts("QuantizeLinear", domain=DOMAIN, types=_as_zero_point)
def _quantize(ctx: Context) -> Expr:
    from tvm import relax

    x = ctx.inputs[0] if ctx.dtype() == "float32" else ctx.emit(relax.op.astype(ctx.inputs[0], "float32"))
    if not _constant_parameters(ctx):
        zero_point = ctx.emit(_spread(ctx, 2)) if ctx.has(2) else None
        spread = ctx.emit(relax.op.astype(_spread(ctx, 1), "float32"))
        return _quantized(ctx, x, spread, zero_point, ctx.out_dtype())
    scale, zero, axis = _parameters(ctx, ctx.out_dtype())
    return relax.op.quantize(x, scale, zero, axis=axis, out_dtype=ctx.out_dtype())


@converts("DequantizeLinear")
@converts("DequantizeLinear", domain=DOMAIN, types=_as_scale)
def _dequantize(ctx: Context) -> Expr:
    from tvm import relax

    if not _constant_parameters(ctx):
        number = relax.op.astype(ctx.inputs[0], "int32")
        if ctx.has(2):
            number = relax.op.subtract(number, relax.op.astype(ctx.emit(_spread(ctx, 2)), "int32"))
        spread = relax.op.astype(ctx.emit(_spread(ctx, 1)), "float32")
        return relax.op.multiply(relax.op.astype(ctx.emit(number), "float32"), spread)
    scale, zero, axis = _parameters(ctx, ctx.dtype())
    return relax.op.dequantize(ctx.inputs[0], scale, zero, axis=axis, out_dtype=ctx.out_dtype())


def _own_parameters(ctx: Context, index: int, rank: int, axis: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Constant scale (float32) and zero point at inputs `index` and `index` + 1."""
    scale, zero = ctx.need(index, "scale").astype(np.float32), ctx.need(index + 1, "zero point")
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(-1)[:1].reshape(()), 0
    if scale.ndim != 1:
        raise ctx.unsupported(f"scales of shape {list(scale.shape)}", "one scale, or one per channel")
    zero = zero.reshape(-1)
    same = zero.size == 1 or bool(np.all(zero == zero[0]))
    return scale.reshape(-1), zero[:1].reshape(()) if same else zero, normal_axis(axis, rank)


def _real(ctx: Context, index: int, axis: int) -> Expr:
    """The quantised input `index`, whose scale and zero point follow it, as real numbers."""
    from tvm import relax

    scale, zero, where = _own_parameters(ctx, index + 1, len(ctx.shape(index)), axis)
    constants = ctx.array(f"scale{index}", scale), ctx.array(f"zero{index}", zero)
    return ctx.emit(relax.op.dequantize(ctx.inputs[index], *constants, axis=where, out_dtype="float32"))


def _requantized(ctx: Context, x: Expr, index: int) -> Expr:
    from tvm import relax

    scale, zero, _ = _own_parameters(ctx, index, len(ctx.out_shape()), 1)
    if scale.size != 1:
        raise ctx.unsupported("an output with several scales", "one scale")
    constants = ctx.array("scale", scale), ctx.array("zero", zero)
    return relax.op.quantize(ctx.emit(x), *constants, axis=0, out_dtype=ctx.out_dtype())


@converts("QLinearMatMul")
def _qlinear_matmul(ctx: Context) -> Expr:
    from tvm import relax

    return _requantized(ctx, relax.op.matmul(_real(ctx, 0, -2), _real(ctx, 3, -1)), 6)


@converts("QLinearConv")
def _qlinear_conv(ctx: Context) -> Expr:
    from tvm import relax

    result = convolution(ctx, _real(ctx, 0, 1), _real(ctx, 3, 0), ctx.shape(3))
    if ctx.has(8):
        scale = ctx.need(1, "scale").astype(np.float32).reshape(-1) * ctx.need(4, "scale").astype(np.float32).reshape(
            -1
        )
        bias = ctx.need(8, "bias").astype(np.float32) * scale
        shape = (1, ctx.shape(3)[0], *[1] * (len(ctx.shape()) - 2))
        result = relax.op.add(ctx.emit(result), ctx.array("bias", bias.reshape(shape)))
    return _requantized(ctx, result, 6)


def _centred(ctx: Context, index: int, zero: int, axis: int) -> Expr:
    """Input `index` minus its zero point, in int32."""
    from tvm import relax

    number = relax.op.astype(ctx.inputs[index], "int32")
    if not ctx.has(zero):
        return ctx.emit(number)
    point, rank = relax.op.astype(ctx.inputs[zero], "int32"), len(ctx.shape(index))
    size = int(np.prod(ctx.shape(zero), dtype=np.int64))
    shape = () if size == 1 else tuple(size if i == normal_axis(axis, rank) else 1 for i in range(rank))
    return ctx.emit(relax.op.subtract(number, ctx.emit(relax.op.reshape(point, shape))))


@converts("ConvInteger")
def _conv_integer(ctx: Context) -> Expr:
    return convolution(ctx, _centred(ctx, 0, 2, 1), _centred(ctx, 1, 3, 0), ctx.shape(1))


@converts("MatMulInteger")
def _matmul_integer(ctx: Context) -> Expr:
    from tvm import relax

    return relax.op.matmul(_centred(ctx, 0, 2, -2), _centred(ctx, 1, 3, -1))
