"""Convolutions and pools, with every padding written out."""

from __future__ import annotations

from ingot.frontend.onnx_ops.context import Context, converts, spread
from ingot.frontend.tvm_types import Expr

_LAYOUTS = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}


def _pads(ctx: Context, kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Explicit pads (all begins, then all ends) for ONNX's pads and auto_pad."""
    dims = len(kernel)
    auto = ctx.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return spread(ctx.attr("pads"), 2 * dims, 0)
    if auto == "VALID":
        return [0] * (2 * dims)
    begins, ends = [], []
    for size, width, stride, dilation in zip(ctx.shape()[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins + ends


def convolution(ctx: Context, data: Expr, weight: Expr, shape: tuple[int, ...]) -> Expr:
    """The convolution of `data` with `weight` (of this shape), by the node's attributes and without its bias."""
    from tvm import relax

    kernel = list(shape[2:])
    dims = len(kernel)
    if dims not in _LAYOUTS:
        raise ctx.unsupported(f"{dims} spatial dimensions", "1 to 3")
    strides, dilations = spread(ctx.attr("strides"), dims, 1), spread(ctx.attr("dilations"), dims, 1)
    return getattr(relax.op.nn, f"conv{dims}d")(
        data,
        weight,
        strides=strides,
        padding=_pads(ctx, kernel, strides, dilations),
        dilation=dilations,
        groups=ctx.attr("group", 1),
        data_layout=_LAYOUTS[dims][0],
        kernel_layout=_LAYOUTS[dims][1],
    )


@converts("Conv")
def _conv(ctx: Context) -> Expr:
    from tvm import relax

    result = convolution(ctx, ctx.inputs[0], ctx.inputs[1], ctx.shape(1))
    if not ctx.has(2):
        return result
    dims = len(ctx.shape()) - 2
    return relax.op.add(result, relax.op.reshape(ctx.inputs[2], (1, ctx.shape(1)[0], *[1] * dims)))


@converts("MaxPool", "AveragePool")
def _pool(ctx: Context) -> Expr:
    from tvm import relax

    kernel = ctx.attr("kernel_shape")
    dims = len(kernel)
    if dims not in _LAYOUTS:
        raise ctx.unsupported(f"{dims} spatial dimensions", "1 to 3")
    if len([name for name in ctx.node.output if name in ctx.types]) > 1:
        raise ctx.unsupported("the indices output is used", "only the pooled values")
    strides, dilations = spread(ctx.attr("strides"), dims, 1), spread(ctx.attr("dilations"), dims, 1)
    pads = _pads(ctx, kernel, strides, dilations)
    ceil_mode = bool(ctx.attr("ceil_mode", 0))
    if ceil_mode and all(
        (size + pads[i] + pads[i + dims] - (kernel[i] - 1) * dilations[i] - 1) % strides[i] == 0
        for i, size in enumerate(ctx.shape()[2:])
    ):
        ceil_mode = False
    common = {"strides": strides, "padding": pads, "dilation": dilations, "ceil_mode": ceil_mode}
    if ctx.node.op_type == "MaxPool":
        return getattr(relax.op.nn, f"max_pool{dims}d")(ctx.inputs[0], kernel, layout=_LAYOUTS[dims][0], **common)
    include = bool(ctx.attr("count_include_pad", 0))
    operator = getattr(relax.op.nn, f"avg_pool{dims}d")
    return operator(ctx.inputs[0], kernel, layout=_LAYOUTS[dims][0], count_include_pad=include, **common)


@converts("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(ctx: Context) -> Expr:
    from tvm import relax

    axes = list(range(2, len(ctx.shape())))
    if ctx.node.op_type == "GlobalMaxPool":
        return relax.op.max(ctx.inputs[0], axes, keepdims=True)
    return relax.op.mean(ctx.inputs[0], axes, keepdims=True)
