"""GridSample of images: where each output pixel looks is worked out once, for all channels.

One kernel writes the places of the neighbours and their weights, the next reads them channel by channel, with whatever
follows fused to it. Cubic sampling, reflections at the border and volumes are TVM's.
"""

from __future__ import annotations

from typing import Any

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr

# FuseOps' pattern kind of an operator that stays alone: fused, it would be computed again for every channel.
_ALONE = 8


@converts("GridSample")
def _grid_sample(ctx: Context) -> Expr:
    from tvm import relax, te, tirx

    mode, padding = ctx.attr("mode", "linear"), ctx.attr("padding_mode", "zeros")
    shape, aligned = ctx.shape(), bool(ctx.attr("align_corners", 0))
    plain = len(shape) == 4 and 0 not in (*shape, *ctx.out_shape()) and {ctx.dtype(0), ctx.dtype(1)} == {"float32"}
    if not plain or mode not in ("nearest", "linear", "bilinear") or padding not in ("zeros", "border"):
        return NotImplemented
    (batch, channels, height, width), (rows, columns) = shape, ctx.out_shape()[2:]
    around = 1 if mode == "nearest" else 2

    def number(value: float) -> Any:  # noqa: ANN401 - TIR
        return tirx.const(value, "float32")

    def position(value: Any, size: int) -> Any:  # noqa: ANN401
        """From -1 .. 1 to pixels; what lies far outside, or nowhere (NaN), comes near, so that it fits an integer."""
        moved = value + number(1)
        pixels = moved * number((size - 1) / 2) if aligned else (moved * number(size) - number(1)) * number(0.5)
        least, most = (-2, size + 1) if padding == "zeros" else (0, size - 1)
        return tirx.max(tirx.min(pixels, number(most)), number(least))

    def places(grid: Any) -> Any:  # noqa: ANN401
        """[neighbour, batch, row, column]: the neighbour's pixel in the image, -1 where it is outside."""

        def pixel(k: Any, n: Any, i: Any, j: Any) -> Any:  # noqa: ANN401
            at, inside = [], tirx.const(True, "bool")
            for axis, size, step in ((1, height, k // around), (0, width, k % around)):
                exact = position(grid[n, i, j, axis], size)
                first = tirx.nearbyint(exact) if mode == "nearest" else tirx.floor(exact)
                index = first.astype("int32") + step.astype("int32")
                bounded = tirx.max(tirx.min(index, tirx.const(size - 1, "int32")), tirx.const(0, "int32"))
                inside = tirx.And(inside, index.equal(bounded))
                at.append(bounded)
            place = at[0] * tirx.const(width, "int32") + at[1]
            return tirx.Select(inside, place, tirx.const(-1, "int32")) if padding == "zeros" else place

        return te.compute((around * around, batch, rows, columns), pixel, name="places")

    def weights(grid: Any) -> Any:  # noqa: ANN401
        """[axis, batch, row, column]: how far behind the first neighbour, along x and y."""

        def part(axis: Any, n: Any, i: Any, j: Any) -> Any:  # noqa: ANN401
            parts = [position(grid[n, i, j, a], size) for a, size in enumerate((width, height))]
            x, y = (value - tirx.floor(value) for value in parts)
            return tirx.Select(axis.equal(0), x, y)

        return te.compute((2, batch, rows, columns), part, name="weights")

    def sample(image: Any, place: Any, *weight: Any) -> Any:  # noqa: ANN401
        def neighbour(k: int, n: Any, c: Any, i: Any, j: Any) -> Any:  # noqa: ANN401
            index = place[k, n, i, j]
            if padding != "zeros":
                return image[n, c, index]
            inside = image[n, c, tirx.max(index, tirx.const(0, "int32"))]
            return tirx.Select(index >= tirx.const(0, "int32"), inside, number(0))

        def value(n: Any, c: Any, i: Any, j: Any) -> Any:  # noqa: ANN401
            found = [neighbour(k, n, c, i, j) for k in range(around * around)]
            if mode == "nearest":
                return found[0]
            x, y = weight[0][0, n, i, j], weight[0][1, n, i, j]
            above, below = (found[k] * (number(1) - x) + found[k + 1] * x for k in (0, 2))
            return above * (number(1) - y) + below * y

        return te.compute((batch, channels, rows, columns), value, name="grid_sample")

    alone = {"op_pattern": _ALONE}
    grid = ctx.inputs[1]
    tables = [ctx.emit(ctx.bb.call_te(places, grid, primfunc_name_hint="grid_places", primfunc_attrs=alone))]
    if mode != "nearest":
        tables.append(ctx.emit(ctx.bb.call_te(weights, grid, primfunc_name_hint="grid_weights", primfunc_attrs=alone)))
    image = ctx.emit(relax.op.reshape(ctx.inputs[0], (batch, channels, height * width)))
    return ctx.bb.call_te(sample, image, *tables, primfunc_name_hint="grid_sample")
