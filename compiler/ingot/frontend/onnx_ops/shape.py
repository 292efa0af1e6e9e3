"""Operators that only move or rename elements. Output shapes are known, so all of these are static."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


@converts("Identity", "Dropout")
def _identity(ctx: Context) -> Expr:
    if ctx.node.op_type == "Dropout" and ctx.has(2) and (ctx.value(2) is None or bool(ctx.need(2, "mode").reshape(()))):
        ratio = ctx.value(1)
        if ratio is None or float(ratio.reshape(())) != 0.0:  # nothing is dropped at ratio 0
            raise ctx.unsupported("training mode", "inference mode", "export the model in evaluation mode")
    if ctx.is_read(1):
        from tvm import relax

        return [ctx.inputs[0], relax.op.ones(ctx.out_shape(1), ctx.out_dtype(1))]
    return ctx.inputs[0]


@converts("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(ctx: Context) -> Expr:
    from tvm import relax

    return ctx.inputs[0] if ctx.shape() == ctx.out_shape() else relax.op.reshape(ctx.inputs[0], ctx.out_shape())


@converts("Expand")
def _expand(ctx: Context) -> Expr:
    from tvm import relax

    return ctx.inputs[0] if ctx.shape() == ctx.out_shape() else relax.op.broadcast_to(ctx.inputs[0], ctx.out_shape())


@converts("Transpose")
def _transpose(ctx: Context) -> Expr:
    from tvm import relax

    rank = len(ctx.shape())
    order = ctx.attr("perm", list(range(rank))[::-1])
    return ctx.inputs[0] if order == list(range(rank)) else relax.op.permute_dims(ctx.inputs[0], order)


@converts("Concat")
def _concat(ctx: Context) -> Expr:
    from tvm import relax

    axis = normal_axis(ctx.attr("axis", 0), len(ctx.out_shape()))
    parts = [part for index, part in enumerate(ctx.inputs) if 0 not in ctx.shape(index)]
    return parts[0] if len(parts) == 1 else relax.op.concat(parts, axis=axis)


@converts("Split")
def _split(ctx: Context) -> Expr:
    from tvm import relax

    axis = normal_axis(ctx.attr("axis", 0), len(ctx.shape()))
    if len(ctx.node.output) == 1:
        return [ctx.inputs[0]]
    ends = np.cumsum([ctx.out_shape(index)[axis] for index in range(len(ctx.node.output))])[:-1]
    parts = ctx.emit(relax.op.split(ctx.inputs[0], [int(end) for end in ends], axis))
    return [relax.TupleGetItem(parts, index) for index in range(len(ctx.node.output))]


@converts("Tile")
def _tile(ctx: Context) -> Expr:
    from tvm import relax

    repeats = [out // size if size else 1 for out, size in zip(ctx.out_shape(), ctx.shape(), strict=True)]
    return ctx.inputs[0] if ctx.shape() == ctx.out_shape() else relax.op.tile(ctx.inputs[0], repeats)


@converts("DepthToSpace")
def _depth_to_space(ctx: Context) -> Expr:
    from tvm import relax

    n, c, h, w = ctx.shape()
    b = ctx.attr("blocksize")
    if ctx.attr("mode", "DCR") == "DCR":
        split, order = (n, b, b, c // (b * b), h, w), [0, 3, 4, 1, 5, 2]
    else:
        split, order = (n, c // (b * b), b, b, h, w), [0, 1, 4, 2, 5, 3]
    return relax.op.reshape(relax.op.permute_dims(relax.op.reshape(ctx.inputs[0], split), order), ctx.out_shape())


@converts("SpaceToDepth")
def _space_to_depth(ctx: Context) -> Expr:
    from tvm import relax

    n, c, h, w = ctx.shape()
    b = ctx.attr("blocksize")
    blocks = relax.op.reshape(ctx.inputs[0], (n, c, h // b, b, w // b, b))
    order = [0, 3, 5, 1, 2, 4] if ctx.attr("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return relax.op.reshape(relax.op.permute_dims(blocks, order), ctx.out_shape())
