"""Pooling of NHWC images: channels are the lanes, and a window is a depthwise convolution's with maximum or sum.

A tile computes some neighbouring positions of a block of channels in registers; border tiles are compiled apart
(`schedules.border`), so that no window inside the image asks where it is. A mean multiplies by 1 / (the elements that
count), a table where that differs from window to window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules import depthwise
from ingot.schedules.border import guarded_load
from ingot.schedules.vector import annotate_block, ceil_div
from ingot.target import Target

#: A maximum over more elements than this is taken along columns first, and then along rows.
MAX_DIRECT = 16


@dataclass(frozen=True)
class PoolWorkload:
    """A pool of NHWC float32 images. kind: "max" or "mean"; `padding` is (top, left, bottom, right).

    The output's size is given: it may leave out rows and columns of the image, or have windows that end after the
    padding. include_padding: elements of the padding count in a mean.
    """

    kind: str
    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    include_padding: bool = False

    def window(self) -> depthwise.DepthwiseWorkload:
        """Return the depthwise convolution of the same window."""
        image = (self.batch, self.height, self.width, self.channels)
        return depthwise.DepthwiseWorkload(*image, self.kernel, self.strides, self.padding, self.dilation, "float32")

    def stages(self) -> list[PoolWorkload]:
        """Return the pools that make up this one, in order: a maximum over a large window is one of maxima."""
        if self.kind != "max" or 1 in self.kernel or self.kernel[0] * self.kernel[1] <= MAX_DIRECT:
            return [self]
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.strides, self.dilation
        top, left, bottom, right = self.padding
        columns = replace(
            self, out_width=self.width, kernel=(kh, 1), strides=(sh, 1), padding=(top, 0, bottom, 0), dilation=(dh, 1)
        )
        rows = replace(
            self, height=self.out_height, kernel=(1, kw), strides=(1, sw), padding=(0, left, 0, right), dilation=(1, dw)
        )
        return [columns, rows]


def inverse_counts(workload: PoolWorkload) -> np.ndarray:
    """Return 1 / (the elements that count) of each window, [out_height, out_width], or [1, 1] if all are the same.

    Elements after the padding never count; a window of nothing else has the sum zero, which is divided by 1.
    """
    w = workload

    def counts(axis: int, size: int, out: int) -> np.ndarray:
        first = np.arange(out)[:, None] * w.strides[axis] - w.padding[axis]
        places = first + np.arange(w.kernel[axis]) * w.dilation[axis]
        if w.include_padding:
            return np.asarray((places < size + w.padding[axis + 2]).sum(1))
        return np.asarray(((places >= 0) & (places < size)).sum(1))

    rows, columns = counts(0, w.height, w.out_height), counts(1, w.width, w.out_width)
    table = np.float32(1) / np.maximum(rows[:, None] * columns[None, :], 1).astype(np.float32)
    same = bool((table == table[0, 0]).all())
    return np.asarray(table[:1, :1] if same else table)


def default_config(workload: PoolWorkload, target: Target) -> depthwise.DepthwiseConfig:
    """Return the tile: a pool has no weights, for which wide ones pay."""
    return depthwise.narrow_config(workload.window(), target)


def compute(workload: PoolWorkload, config: depthwise.DepthwiseConfig, scale: float = 1.0, *, table: bool) -> list[Any]:
    """Return the TE tensors [data NHWC, (table [out_height, out_width]), output NHWC]; scheduled like a depthwise one.

    scale: what each sum of a mean is multiplied by where there is no table.
    """
    w = workload
    (sh, sw), (dh, dw), (top, left) = w.strides, w.dilation, w.padding[:2]
    data = te.placeholder((w.batch, w.height, w.width, w.channels), "float32", name="data")
    ry, rx = te.reduce_axis((0, w.kernel[0]), "ry"), te.reduce_axis((0, w.kernel[1]), "rx")
    tiled = ceil_div(w.out_width, config.pixels) * config.pixels
    attrs: dict[str, Any] = annotate_block("pool", "depthwise", config)
    attrs[depthwise.WINDOW] = depthwise.window_of(w.window())
    filler = float("-inf") if w.kind == "max" else 0.0
    reducer = te.sum
    if w.kind == "max":
        reducer = te.comm_reducer(lambda x, y: tirx.max(x, y), lambda t: tirx.const(filler, t), name="max")

    def window(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        load = guarded_load(data, n, y * sh + ry * dh - top, x * sw + rx * dw - left, c, filler)
        return reducer(load, axis=[ry, rx])

    pool = te.compute((w.batch, w.out_height, tiled, w.channels), window, name="pool", attrs=attrs)
    shape = (w.batch, w.out_height, w.out_width, w.channels)
    if table:
        scales = te.placeholder((w.out_height, w.out_width), "float32", name="scales")
        return [data, scales, te.compute(shape, lambda n, y, x, c: pool[n, y, x, c] * scales[y, x], name="pool_out")]

    def scaled(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        return pool(*i) if scale == 1.0 else pool(*i) * tirx.const(scale, "float32")

    return [data, te.compute(shape, scaled, name="pool_out")]
