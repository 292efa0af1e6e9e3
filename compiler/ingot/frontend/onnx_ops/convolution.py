"""Convolutions and pools, with every padding written out."""

from __future__ import annotations

from ingot.frontend.onnx_ops.context import Context, converts, spread
from ingot.frontend.onnx_ops.windows import pool_places
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


@converts("ConvTranspose")
def _conv_transpose(ctx: Context) -> Expr:
    """Case of `output_shape`: the pads that make it; the rest is TVM's converter."""
    import onnx

    wanted = ctx.attr("output_shape")
    if not wanted:
        return NotImplemented
    dims = len(ctx.shape()) - 2
    strides, dilations = spread(ctx.attr("strides"), dims, 1), spread(ctx.attr("dilations"), dims, 1)
    more, begins, ends = spread(ctx.attr("output_padding"), dims, 0), [], []
    for i, size in enumerate(wanted[-dims:]):
        whole = strides[i] * (ctx.shape()[i + 2] - 1) + more[i] + (ctx.shape(1)[i + 2] - 1) * dilations[i] + 1
        total = max(whole - size, 0)
        small, large = total // 2, total - total // 2
        upper = ctx.attr("auto_pad", "NOTSET") == "SAME_UPPER"
        begins.append(small if upper else large)
        ends.append(large if upper else small)
        more[i] += max(size - whole, 0)
    replaced = ("output_shape", "auto_pad", "pads", "output_padding")
    kept = [attribute for attribute in ctx.node.attribute if attribute.name not in replaced]
    node = onnx.helper.make_node("ConvTranspose", ctx.node.input, ctx.node.output, ctx.node.name)
    node.attribute.extend(kept)
    node.attribute.append(onnx.helper.make_attribute("pads", begins + ends))
    node.attribute.append(onnx.helper.make_attribute("output_padding", more))
    ctx.node = node
    return NotImplemented


def _cut_windows(
    ctx: Context, pads: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """Pads with room at the end for a window that is larger than its image by less than a stride.

    ONNX and ONNX Runtime count the windows of such an image by a division that cuts off towards 0: it has one.
    """
    dims, wanted = len(kernel), list(pads)
    for i, size in enumerate(ctx.shape()[2:]):
        beyond = (kernel[i] - 1) * dilations[i] + 1 - size - pads[i] - pads[i + dims]
        if 0 < beyond < strides[i] and ctx.out_shape()[i + 2] == 1:
            wanted[i + dims] += beyond
    return wanted


@converts("MaxPool", "AveragePool")
def _pool(ctx: Context) -> Expr:
    from tvm import relax

    kernel = ctx.attr("kernel_shape")
    dims = len(kernel)
    if dims not in _LAYOUTS:
        raise ctx.unsupported(f"{dims} spatial dimensions", "1 to 3")
    strides, dilations = spread(ctx.attr("strides"), dims, 1), spread(ctx.attr("dilations"), dims, 1)
    pads = _cut_windows(ctx, _pads(ctx, kernel, strides, dilations), kernel, strides, dilations)
    ceil_mode = bool(ctx.attr("ceil_mode", 0))
    if ceil_mode and all(
        (size + pads[i] + pads[i + dims] - (kernel[i] - 1) * dilations[i] - 1) % strides[i] == 0
        for i, size in enumerate(ctx.shape()[2:])
    ):
        ceil_mode = False
    common = {"strides": strides, "padding": pads, "dilation": dilations, "ceil_mode": ceil_mode}
    if ctx.node.op_type == "MaxPool":
        largest = getattr(relax.op.nn, f"max_pool{dims}d")(ctx.inputs[0], kernel, layout=_LAYOUTS[dims][0], **common)
        if not ctx.is_read(1):
            return largest
        largest = ctx.emit(largest)
        return [largest, pool_places(ctx, largest, kernel, strides, pads)]
    include = bool(ctx.attr("count_include_pad", 0))
    if include and pads != _pads(ctx, kernel, strides, dilations):
        # ONNX Runtime counts what lies beyond the pads before opset 19, and not since.
        raise ctx.unsupported("count_include_pad, and a window larger than the padded image", "one of the two")
    operator = getattr(relax.op.nn, f"avg_pool{dims}d")
    return operator(ctx.inputs[0], kernel, layout=_LAYOUTS[dims][0], count_include_pad=include, **common)


@converts("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(ctx: Context) -> Expr:
    from tvm import relax

    axes = list(range(2, len(ctx.shape())))
    if ctx.node.op_type == "GlobalMaxPool":
        return relax.op.max(ctx.inputs[0], axes, keepdims=True)
    return relax.op.mean(ctx.inputs[0], axes, keepdims=True)
