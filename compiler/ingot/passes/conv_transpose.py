"""Write a transposed convolution as a convolution: zeros between the pixels, the window turned around.

TVM lowers `conv2d_transpose` in NCHW only. As a convolution it has a template, and fuses as every other one does. Of
the products, all but one in (stride height * stride width) are with the zeros put in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, shape_of


def as_convolution(rewriter: Rewriter, call: Any, data: Any, weight: Any) -> Any:  # noqa: ANN401
    """Return the conv2d (NHWC, OHWI) equal to the conv2d_transpose `call` on `data` (NHWC) and `weight` (IHWO)."""
    attrs = call.attrs
    _, height, width, _ = shape_of(data)
    _, kernel_height, kernel_width, _ = shape_of(weight)
    pads = [int(v) for v in attrs.padding]  # top, left, bottom, right
    kernel, strides = (kernel_height, kernel_width), [int(v) for v in attrs.strides]
    dilation, extra = [int(v) for v in attrs.dilation], [int(v) for v in attrs.output_padding]
    before, after, begins, ends = [], [], [], []
    for i, size in enumerate((height, width)):
        span = (kernel[i] - 1) * dilation[i]
        out = (size - 1) * strides[i] + span + 1 - pads[i] - pads[i + 2] + extra[i]
        first = span - pads[i]
        last = out + span - size * strides[i] - first
        # A negative padding cuts the zeros (or pixels) that no output reads.
        begins.append(max(0, -first))
        ends.append(size * strides[i] + min(0, last))
        before.append(max(0, first))
        after.append(max(0, last))
    data = _spread(rewriter, data, strides)
    if begins != [0, 0] or ends != [height * strides[0], width * strides[1]]:
        data = rewriter.emit(relax.op.strided_slice(data, [1, 2], begins, ends))
    return relax.op.nn.conv2d(
        data,
        _turned(rewriter, weight, int(attrs.groups)),
        strides=[1, 1],
        padding=[*before, *after],
        dilation=dilation,
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="OHWI",
        out_layout="NHWC",
        out_dtype=str(call.ty.dtype.dtype),
    )


def _spread(rewriter: Rewriter, data: Any, strides: list[int]) -> Any:  # noqa: ANN401
    """Return NHWC data with `stride - 1` zeros after each row and column."""
    if strides == [1, 1]:
        return data
    n, height, width, channels = shape_of(data)
    cells = rewriter.emit(relax.op.reshape(data, (n, height, 1, width, 1, channels)))
    pad = [0, 0, 0, 0, 0, strides[0] - 1, 0, 0, 0, strides[1] - 1, 0, 0]
    spread = rewriter.emit(relax.op.nn.pad(cells, pad, "constant", 0.0))
    return rewriter.emit(relax.op.reshape(spread, (n, height * strides[0], width * strides[1], channels)))


def _turned(rewriter: Rewriter, weight: Any, groups: int) -> Any:  # noqa: ANN401
    """Return IHWO weights as OHWI with the window turned by 180 degrees."""
    inputs, height, width, outputs = shape_of(weight)
    split, order = (groups, inputs // groups, height, width, outputs), (0, 4, 2, 3, 1)
    final = (groups * outputs, height, width, inputs // groups)
    value = rewriter.weight(weight)
    if value is not None:
        turned = value[:, ::-1, ::-1].reshape(split).transpose(order).reshape(final)
        return rewriter.constant(np.ascontiguousarray(turned), str(getattr(weight, "name", "weight")) + "_turned")
    turned = rewriter.emit(relax.op.flip(rewriter.emit(relax.op.flip(weight, 1)), 2))
    turned = rewriter.emit(relax.op.permute_dims(rewriter.emit(relax.op.reshape(turned, split)), list(order)))
    return rewriter.emit(relax.op.reshape(turned, final))
