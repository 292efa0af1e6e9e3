"""Write a convolution of volumes as one of images: the slices that a window reads are joined along the channels.

A window of depth KD at depth d' reads KD slices of the volume. [N * D', H, W, KD * C] holds them for every d', and the
weights [O, KH, KW, KD * C] multiply them: the same products and sums. A window of depth 1 reads the volume as it lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, dtype_of, op_name, shape_of


def weight_of(rewriter: Rewriter, call: Any, weight: Any) -> np.ndarray | None:  # noqa: ANN401
    """Return the constant weight of a conv3d of one group in float32; None for any other call."""
    if op_name(call) != "relax.nn.conv3d" or str(call.attrs.data_layout) not in ("NCDHW", "NDHWC"):
        return None
    return rewriter.weight(weight) if int(call.attrs.groups) == 1 and dtype_of(call) == "float32" else None


def as_images(rewriter: Rewriter, call: Any, data: Any, weight: np.ndarray) -> Any:  # noqa: ANN401
    """Return what equals the conv3d `call`, in NDHWC: of `data` (NDHWC) and `weight` (in the call's own layout)."""
    attrs = call.attrs
    ordered = np.transpose(weight, [str(attrs.kernel_layout).index(letter) for letter in "OHWDI"])
    outputs, high, wide, deep, channels = ordered.shape
    first, top, left, last, bottom, right = (int(pad) for pad in attrs.padding)
    stride, spread = int(attrs.strides[0]), int(attrs.dilation[0])
    if first or last:
        data = rewriter.emit(relax.op.nn.pad(data, [0, 0, first, last, 0, 0, 0, 0, 0, 0]))
    batch, depth, height, width, _ = shape_of(data)
    count = (depth - (deep - 1) * spread - 1) // stride + 1
    slices = []
    for begin in range(0, deep * spread, spread):
        end = begin + (count - 1) * stride + 1
        whole = begin == 0 and end == depth and stride == 1
        part = data if whole else relax.op.strided_slice(data, [1], [begin], [end], [stride])
        slices.append(rewriter.emit(part))
    joined = slices[0] if deep == 1 else rewriter.emit(relax.op.concat(slices, 4))
    images = rewriter.emit(relax.op.reshape(joined, (batch * count, height, width, deep * channels)))
    flat = np.ascontiguousarray(ordered.reshape(outputs, high, wide, deep * channels))
    convolved = rewriter.emit(
        relax.op.nn.conv2d(
            images,
            rewriter.constant(flat, f"{getattr(call.args[1], 'name', 'weight')}_image"),
            strides=[int(v) for v in attrs.strides[1:]],
            padding=[top, left, bottom, right],
            dilation=[int(v) for v in attrs.dilation[1:]],
            data_layout="NHWC",
            kernel_layout="OHWI",
            out_layout="NHWC",
            out_dtype=dtype_of(call),
        )
    )
    return relax.op.reshape(convolved, (batch, count, *shape_of(convolved)[1:]))
