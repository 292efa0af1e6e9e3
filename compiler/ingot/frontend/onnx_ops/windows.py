"""Operators on windows of an image that are no plain convolution or pool."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.onnx_ops.context import Context, converts, spread
from ingot.frontend.onnx_ops.index import bounded_indices
from ingot.frontend.tvm_types import Expr

# Points along one side of a bin of RoiAlign, and pixels from the image's corner to that of a region of MaxRoiPool:
# regions are data, and must not make a kernel run forever or an index overflow.
_MAX_POINTS = 1024
_MAX_PIXELS = 2**15
# The parts that RoiAlign's channels are cut into, one for each task.
_MOST_PARTS = 4


@converts("Col2Im")
def _col2im(ctx: Context) -> Expr:
    """Each pixel is the sum of the columns' entries that cover it."""
    from tvm import te, tirx

    image = [int(size) for size in ctx.need(1, "image shape").reshape(-1)]
    block = [int(size) for size in ctx.need(2, "block shape").reshape(-1)]
    dims = len(image)
    strides, dilations = spread(ctx.attr("strides"), dims, 1), spread(ctx.attr("dilations"), dims, 1)
    pads = spread(ctx.attr("pads"), 2 * dims, 0)
    steps = [
        (size + pads[i] + pads[i + dims] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1
        for i, size in enumerate(image)
    ]
    batch, channels = ctx.out_shape()[:2]

    def define(columns: Any) -> Any:  # noqa: ANN401
        inner = [te.reduce_axis((0, size), f"k{i}") for i, size in enumerate(block)]

        def at(n: Any, c: Any, *pixel: Any) -> Any:  # noqa: ANN401
            inside, column, row = tirx.const(True, "bool"), tirx.const(0, "int64"), c
            for i in range(dims):
                offset = pixel[i] + pads[i] - inner[i] * dilations[i]
                window = tirx.floordiv(offset, strides[i])
                whole = tirx.floormod(offset, strides[i]).equal(0)
                inside = tirx.all(inside, offset >= 0, whole, window < steps[i])
                column = column * steps[i] + tirx.max(tirx.min(window, steps[i] - 1), 0)
                row = row * block[i] + inner[i]
            return te.sum(tirx.if_then_else(inside, columns[n, row, column], tirx.const(0, ctx.dtype())), axis=inner)

        return te.compute((batch, channels, *image), at, name="col2im")

    return ctx.bb.call_te(define, ctx.inputs[0], primfunc_name_hint="col2im")


@converts("DeformConv")
def _deform_conv(ctx: Context) -> Expr:
    """Sample the pixels that the offsets point to, between four neighbours, then multiply by the weights."""
    from tvm import relax, te, tirx

    (batch, channels, height, width), (filters, per_group, rows, columns) = ctx.shape(), ctx.shape(1)
    dtype = ctx.dtype()
    group, offset_group = ctx.attr("group", 1), ctx.attr("offset_group", 1)
    (stride_y, stride_x), (step_y, step_x) = (spread(ctx.attr(name), 2, 1) for name in ("strides", "dilations"))
    top, left = spread(ctx.attr("pads"), 4, 0)[:2]
    out_y, out_x = ctx.out_shape()[2:]
    taps, each = rows * columns, channels // offset_group

    def sample(x: Any, offset: Any, *mask: Any) -> Any:  # noqa: ANN401
        def at(n: Any, c: Any, tap: Any, place: Any) -> Any:  # noqa: ANN401
            oy, ox = tirx.floordiv(place, out_x), tirx.floormod(place, out_x)
            which = tirx.floordiv(c, each) * taps + tap
            moved_y, moved_x = offset[n, which * 2, oy, ox], offset[n, which * 2 + 1, oy, ox]
            y = (oy * stride_y - top + tirx.floordiv(tap, columns) * step_y).astype(dtype) + moved_y
            x_ = (ox * stride_x - left + tirx.floormod(tap, columns) * step_x).astype(dtype) + moved_x
            # Kept near the image, so that no offset makes an index overflow.
            y = tirx.max(tirx.min(y, tirx.const(height + 1, dtype)), tirx.const(-2, dtype))
            x_ = tirx.max(tirx.min(x_, tirx.const(width + 1, dtype)), tirx.const(-2, dtype))
            y0, x0 = tirx.floor(y), tirx.floor(x_)
            total = tirx.const(0, dtype)
            for down in (0, 1):
                for right in (0, 1):
                    py, px = y0.astype("int64") + down, x0.astype("int64") + right
                    share_y = (y - y0) if down else (tirx.const(1, dtype) - (y - y0))
                    share_x = (x_ - x0) if right else (tirx.const(1, dtype) - (x_ - x0))
                    inside = tirx.all(py >= 0, py < height, px >= 0, px < width)
                    safe_y, safe_x = tirx.max(tirx.min(py, height - 1), 0), tirx.max(tirx.min(px, width - 1), 0)
                    value = x[n, c, safe_y, safe_x] * share_y * share_x
                    total = total + tirx.if_then_else(inside, value, tirx.const(0, dtype))
            return total * mask[0][n, which, oy, ox] if mask else total

        return te.compute((batch, channels, taps, out_y * out_x), at, name="deformed")

    arguments = [ctx.inputs[0], ctx.inputs[2], *([ctx.inputs[4]] if ctx.has(4) else [])]
    sampled = ctx.emit(ctx.bb.call_te(sample, *arguments, primfunc_name_hint="deform_sample"))
    # [batch, group, filters, depth] times [batch, group, depth, pixels]
    depth = per_group * taps
    patches = ctx.emit(relax.op.reshape(sampled, (batch, group, depth, out_y * out_x)))
    weights = ctx.emit(relax.op.reshape(ctx.inputs[1], (1, group, filters // group, depth)))
    result = ctx.emit(relax.op.reshape(relax.op.matmul(weights, patches), ctx.out_shape()))
    return relax.op.add(result, relax.op.reshape(ctx.inputs[3], (1, filters, 1, 1))) if ctx.has(3) else result


def pool_places(ctx: Context, values: Expr, kernel: list[int], strides: list[int], pads: list[int]) -> Expr:
    """For each result of a MaxPool the place of its element in the whole input: the first in the window that has it."""
    from tvm import te, tirx

    shape, dims = ctx.shape(), len(kernel)
    dilations = spread(ctx.attr("dilations"), dims, 1)
    by_column = bool(ctx.attr("storage_order", 0))
    never = int(np.iinfo(np.int64).max)

    def define(x: Any, best: Any) -> Any:  # noqa: ANN401
        inner = [te.reduce_axis((0, size), f"k{i}") for i, size in enumerate(kernel)]

        def at(n: Any, c: Any, *out: Any) -> Any:  # noqa: ANN401
            pixel = [out[i] * strides[i] - pads[i] + inner[i] * dilations[i] for i in range(dims)]
            inside = tirx.all(*[tirx.all(p >= 0, p < shape[i + 2]) for i, p in enumerate(pixel)])
            safe = [tirx.max(tirx.min(p, shape[i + 2] - 1), 0) for i, p in enumerate(pixel)]
            order = range(dims - 1, -1, -1) if by_column else range(dims)
            place = n * shape[1] + c
            for i in order:
                place = place * shape[i + 2] + safe[i]
            hit = tirx.all(inside, x(n, c, *safe).equal(best(n, c, *out)))
            return te.min(tirx.if_then_else(hit, place.astype("int64"), tirx.const(never, "int64")), axis=inner)

        return te.compute(ctx.out_shape(), at, name="places")

    return ctx.bb.call_te(define, ctx.inputs[0], values, primfunc_name_hint="pool_places")


def _unpooled(node: OpNode) -> Shapes:
    """The shape of MaxUnpool, also where a constant gives it, which onnx does not look at."""
    shape, dims = node.shapes[0], len(node.attributes["kernel_shape"])
    if len(node.constants) > 2:
        wanted = node.constants[2]
        if wanted is None or wanted.size != len(shape) or wanted.min() < 1:
            raise UnsupportedError(
                "this form of MaxUnpool is not supported",
                where=node.label,
                found="an output shape that is computed at run time" if wanted is None else f"shape {wanted.tolist()}",
                allowed=f"a constant shape of {len(shape)} sizes",
                hint="if it is an input of the model: --bind NAME=VALUE",
            )
        return [(tuple(int(size) for size in wanted.reshape(-1)), node.dtypes[0])]
    return [((*shape[:2], *_least(shape, node.attributes, dims)), node.dtypes[0])]


def _least(shape: tuple[int, ...], attributes: Mapping[str, Any], dims: int) -> list[int]:
    """The smallest sizes that MaxUnpool can have made `shape` of."""
    strides, pads = spread(attributes.get("strides"), dims, 1), spread(attributes.get("pads"), 2 * dims, 0)
    kernel = attributes["kernel_shape"]
    return [(shape[i + 2] - 1) * strides[i] - pads[i] - pads[i + dims] + kernel[i] for i in range(dims)]


@converts("MaxUnpool", types=_unpooled)
def _max_unpool(ctx: Context) -> Expr:
    """Each element goes to its place in a tensor of zeros; the places count within the smallest output that fits."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    shape, out = ctx.shape(), ctx.out_shape()
    attributes = {name: ctx.attr(name) for name in ("kernel_shape", "strides", "pads")}
    inner = (*shape[:2], *_least(shape, attributes, len(attributes["kernel_shape"])))
    if any(small > large for small, large in zip(inner, out, strict=True)):
        raise ctx.unsupported(f"an output of {list(out)}", f"at least {list(inner)}")

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        values, places = ins
        (result,) = outs
        with T.grid(*out) as point:
            result[tuple(point)] = tirx.const(0, ctx.dtype())
        with T.grid(*shape) as point:
            at, rest, target = tuple(point), places[tuple(point)], list[Any]()
            for size in reversed(inner):
                target.insert(0, tirx.floormod(rest, tirx.const(size, "int64")))
                rest = tirx.floordiv(rest, tirx.const(size, "int64"))
            result[tuple(target)] = values[at]

    places = ctx.emit(bounded_indices(ctx, 1, (math.prod(inner),)))
    return call_loops(ctx.bb, "max_unpool", [ctx.inputs[0], places], [(out, ctx.dtype())], body)[0]


@converts("RoiAlign")
def _roi_align(ctx: Context) -> Expr:
    """The mean, or the largest weighted neighbour, of points between pixels inside each bin of each region."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    (_, channels, height, width), (regions, _, rows, columns) = ctx.shape(), ctx.out_shape()
    dtype, ratio, scale = ctx.dtype(), ctx.attr("sampling_ratio", 0), float(ctx.attr("spatial_scale", 1.0))
    mode = ctx.attr("mode", "avg")
    if mode not in ("avg", "max"):
        raise ctx.unsupported(f"mode {mode!r}", "avg or max")
    if max(height, width) > 2**15:
        raise ctx.unsupported(f"an image of {height} x {width}", "sides up to 32768")
    half = ctx.opset >= 16 and ctx.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    bounded = ctx.emit(bounded_indices(ctx, 2, (ctx.shape()[0],)))

    def number(value: float) -> Any:  # noqa: ANN401
        return tirx.const(value, dtype)

    most = ratio if ratio > 0 else _MAX_POINTS
    parts = max(n for n in range(1, _MOST_PARTS + 1) if channels % n == 0)
    sides = (height, rows, 0), (width, columns, 1)

    def body(ins: Any, outs: Any, task: Any) -> None:  # noqa: ANN401
        (image, rois, which), (out, near, share) = ins, outs
        begins, sizes, counts = ([scalar(kind) for _ in sides] for kind in (dtype, dtype, "int64"))
        exact, total = scalar(dtype), scalar(dtype)
        shift = number(0.5 if half else 0.0)

        def measure(r: Any) -> None:  # noqa: ANN401
            """Where the region begins, its size and its points in each bin, along y and x."""
            for (_, bins, axis), begin, size, count in zip(sides, begins, sizes, counts, strict=True):
                begin[0] = rois[r, 1 - axis] * number(scale) - shift
                size[0] = rois[r, 3 - axis] * number(scale) - shift - begin[0]
                if not half:
                    size[0] = tirx.max(size[0], number(1))
                if ratio > 0:
                    count[0] = tirx.const(ratio, "int64")
                else:
                    points = tirx.ceil(size[0] / number(bins))
                    bounded_points = tirx.max(tirx.min(points, number(_MAX_POINTS)), number(0))
                    count[0] = bounded_points.astype("int64")

        def look(axis: int, side: int, bins: int) -> None:
            """The two neighbours of each point along an axis, and their shares: none for a point outside."""
            with T.serial(0, bins) as i, T.serial(0, counts[axis][0]) as a:
                exact[0] = begins[axis][0] + sizes[axis][0] / number(bins) * (
                    i.astype(dtype) + (a.astype(dtype) + number(0.5)) / counts[axis][0].astype(dtype)
                )
                outside = tirx.Or(exact[0] < number(-1), exact[0] > number(side))
                clamped = tirx.min(tirx.max(exact[0], number(0)), number(side))  # fits an integer, NaN too
                last = tirx.const(side - 1, "int64")
                first = tirx.max(tirx.min(tirx.floor(clamped).astype("int64"), last), tirx.const(0, "int64"))
                behind = tirx.if_then_else(first >= last, number(0), clamped - first.astype(dtype))
                point = i * most + a
                near[task, axis, 0, point] = first
                near[task, axis, 1, point] = tirx.min(first + 1, last)
                share[task, axis, 0, point] = tirx.if_then_else(outside, number(0), number(1) - behind)
                share[task, axis, 1, point] = tirx.if_then_else(outside, number(0), behind)

        with T.serial(0, regions) as r:
            measure(r)
            for side, bins, axis in sides:
                look(axis, side, bins)
            with T.grid(channels // parts, rows, columns) as (k, i, j):
                c = task * (channels // parts) + k
                total[0] = number(0 if mode == "avg" else float("-inf"))
                with T.serial(0, counts[0][0]) as a, T.serial(0, counts[1][0]) as b:
                    y, x = i * most + a, j * most + b
                    values = [
                        share[task, 0, m, y] * share[task, 1, n, x]
                        * image[which[r].astype("int64"), c, near[task, 0, m, y], near[task, 1, n, x]]
                        for m in (0, 1) for n in (0, 1)
                    ]  # fmt: skip
                    if mode == "avg":
                        total[0] = total[0] + values[0] + values[1] + values[2] + values[3]
                    else:
                        highest = tirx.max(tirx.max(values[0], values[1]), tirx.max(values[2], values[3]))
                        total[0] = tirx.max(total[0], highest)
                points_ = tirx.max(counts[0][0] * counts[1][0], tirx.const(1, "int64"))
                if mode == "avg":
                    out[r, c, i, j] = total[0] / points_.astype(dtype)
                else:
                    empty = (counts[0][0] * counts[1][0]).equal(0)
                    out[r, c, i, j] = tirx.if_then_else(empty, number(0), total[0])

    # What is looked up is the same for all channels: it is worked out once, by each task for itself.
    table = (parts, 2, 2, max(rows, columns) * most)
    outputs = [(ctx.out_shape(), dtype), (table, "int64"), (table, dtype)]
    inputs = [ctx.inputs[0], ctx.inputs[1], bounded]
    return call_loops(ctx.bb, "roi_align", inputs, outputs, body, tasks=parts)[0]


@converts("MaxRoiPool")
def _max_roi_pool(ctx: Context) -> Expr:
    """The largest pixel of each bin of each region (batch, left, top, right, bottom), borders rounded to pixels."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    (batch, channels, height, width), (regions, _, rows, columns) = ctx.shape(), ctx.out_shape()
    dtype, scale = ctx.dtype(), float(ctx.attr("spatial_scale", 1.0))

    def whole(value: Any, least: int, most: int) -> Any:  # noqa: ANN401
        bounded = tirx.max(tirx.min(value, tirx.const(most, dtype)), tirx.const(least, dtype))
        return bounded.astype("int64")

    def border(begin: Any, size: Any, index: Any, bins: int, side: int, *, last: bool) -> Any:  # noqa: ANN401
        step = index.astype(dtype) * (size[0].astype(dtype) / tirx.const(bins, dtype))
        offset = (tirx.ceil(step) if last else tirx.floor(step)).astype("int64") + begin[0]
        return tirx.max(tirx.min(offset, tirx.const(side, "int64")), tirx.const(0, "int64"))

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        image, rois = ins
        (out,) = outs
        left, top, wide, high, which = (scalar("int64") for _ in range(5))
        best = scalar(dtype)
        with T.serial(0, regions) as r:
            which[0] = whole(rois[r, 0], 0, batch - 1)
            for begin, size, low in ((left, wide, 1), (top, high, 2)):
                first, end = (
                    whole(tirx.round(rois[r, i] * tirx.const(scale, dtype)), -_MAX_PIXELS, _MAX_PIXELS)
                    for i in (low, low + 2)
                )
                begin[0] = first
                size[0] = tirx.max(end - begin[0] + 1, tirx.const(1, "int64"))
            with T.grid(channels, rows, columns) as (c, i, j):
                y0, y1 = (
                    border(top, high, i, rows, height, last=False),
                    border(top, high, i + 1, rows, height, last=True),
                )
                x0 = border(left, wide, j, columns, width, last=False)
                x1 = border(left, wide, j + 1, columns, width, last=True)
                best[0] = tirx.const(float("-inf"), dtype)
                tall, broad = (tirx.max(size, tirx.const(0, "int64")) for size in (y1 - y0, x1 - x0))
                with T.serial(0, tall) as a, T.serial(0, broad) as b:
                    best[0] = tirx.max(best[0], image[which[0], c, y0 + a, x0 + b])
                empty = tirx.any(y1 <= y0, x1 <= x0)
                out[r, c, i, j] = tirx.if_then_else(empty, tirx.const(0, dtype), best[0])

    inputs = [ctx.inputs[0], ctx.inputs[1]]
    return call_loops(ctx.bb, "max_roi_pool", inputs, [(ctx.out_shape(), dtype)], body)[0]
