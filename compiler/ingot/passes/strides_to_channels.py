"""See neighbouring pixels of a row as channels where a convolution's window and stride are whole numbers of them."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from ingot.passes.rewriter import Rewriter, dtype_of, rewrite, shape_of
from ingot.passes.state import State

#: With as many channels as a vector has lanes, the loop over them alone is long enough.
_FEW_CHANNELS = 16


def strides_to_channels(state: State) -> State:
    """See neighbouring pixels of a row as channels where a convolution's window and stride are whole numbers of them.

    With g dividing the window's width K and the stride S, pixels [.., W, C] are [.., W / g, g * C], the weights
    [O, KH, K / g, g * C], and the stride S / g: the same numbers at the same places of memory. A transform of a signal
    (C = 1, K = 512, S = 160) becomes 16 steps of 32 channels, the patches of a transformer (C = 3, K = S = 16) one of
    48. Only where there are few channels, and where the padding on the left is a whole number too.
    """
    return rewrite(state, {"relax.nn.conv2d": _convolution})


def _convolution(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    attrs, (data, weight) = call.attrs, args
    if str(attrs.data_layout) != "NHWC" or str(attrs.kernel_layout) != "OHWI" or int(attrs.groups) != 1:
        return None
    value = rewriter.weight(weight)
    n, height, width, channels = shape_of(data)
    top, left, bottom, _ = (int(pad) for pad in attrs.padding)
    stride, kernel = int(attrs.strides[1]), shape_of(weight)[2]
    joined = math.gcd(stride, kernel)
    if value is None or channels >= _FEW_CHANNELS or int(attrs.dilation[1]) != 1 or joined == 1 or left % joined:
        return None
    used = (shape_of(call)[2] - 1) * stride + kernel - left  # what the windows reach of the row
    if used > width and width % joined:
        return None  # the last pixels would be half row, half padding
    if width % joined:
        data = rewriter.emit(relax.op.strided_slice(data, [2], [0], [width // joined * joined]))
    out, _, _, inner = value.shape
    return relax.op.nn.conv2d(
        rewriter.emit(relax.op.reshape(data, (n, height, width // joined, joined * channels))),
        rewriter.constant(
            value.reshape(out, value.shape[1], kernel // joined, joined * inner), f"{getattr(weight, 'name', 'w')}_wide"
        ),
        strides=[int(attrs.strides[0]), stride // joined],
        padding=[top, left // joined, bottom, max(0, (used - width) // joined)],
        dilation=[int(attrs.dilation[0]), 1],
        data_layout="NHWC",
        kernel_layout="OHWI",
        out_layout="NHWC",
        out_dtype=dtype_of(call),
    )
