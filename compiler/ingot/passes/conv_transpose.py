"""Write a transposed convolution as a convolution: by phases, or with zeros between the pixels.

TVM lowers `conv2d_transpose` in NCHW only. As a convolution it has a template, and fuses as every other one does.

By phases: along one axis, with stride s, padding p, dilation l and any whole number d, let y + d = q * s + r with
0 <= r < s. Output y takes x[q - t] * w[k] for all t and k with k * l = t * s + r + p - d. So the outputs of one phase r
are an ordinary convolution of x with every s-th weight, and all phases together one convolution with s times as many
channels, whose result is put together row by row (`passes.select_transposes`); `d` outputs are cut off at the
beginning. Of two phases one may have a tap less: its weight is 0.

With zeros: `stride - 1` zeros after each pixel and the window turned around; of the products, all but one in
(stride height * stride width) are with them. For groups, and weights that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, shape_of


@dataclass(frozen=True)
class _Axis:
    """A transposed convolution along one axis: `out` results of `size` elements."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int  # cut off the result at the beginning
    out: int

    @property
    def span(self) -> int:
        """Return the distance of the window's last weight from its first."""
        return (self.kernel - 1) * self.dilation


@dataclass(frozen=True)
class _Phases:
    """An axis by phases: `count` results of each from windows of `taps`, the first at t = `last`; `cut` is d."""

    axis: _Axis
    cut: int

    @property
    def first(self) -> int:
        """Return the smallest t of all phases."""
        axis = self.axis
        return -((axis.stride - 1 + axis.before - self.cut) // axis.stride)

    @property
    def last(self) -> int:
        """Return the largest t of all phases."""
        return (self.axis.span - self.axis.before + self.cut) // self.axis.stride

    @property
    def taps(self) -> int:
        """Return the width of the window."""
        return self.last - self.first + 1

    @property
    def count(self) -> int:
        """Return the number of results of each phase."""
        return -(-(self.axis.out + self.cut) // self.axis.stride)

    def weight_of(self, phase: int, tap: int) -> int | None:
        """Return which weight stands at a place of a phase's window, None for zero."""
        axis = self.axis
        place = (self.last - tap) * axis.stride + phase + axis.before - self.cut
        return place // axis.dilation if place % axis.dilation == 0 and 0 <= place <= axis.span else None


def as_convolution(rewriter: Rewriter, call: Any, data: Any, weight: Any) -> Any:  # noqa: ANN401
    """Return what equals the conv2d_transpose `call` on `data` (NHWC) and `weight` (IHWO): a conv2d (NHWC, OHWI)."""
    attrs, value = call.attrs, rewriter.weight(weight)
    axes = []
    for i in (0, 1):
        kernel, stride, dilation = shape_of(weight)[i + 1], int(attrs.strides[i]), int(attrs.dilation[i])
        size, (before, after) = shape_of(data)[i + 1], (int(attrs.padding[j]) for j in (i, i + 2))
        whole = (size - 1) * stride + (kernel - 1) * dilation + 1 + int(attrs.output_padding[i])
        axes.append(_Axis(size, kernel, stride, dilation, before, whole - before - after))
    if value is not None and int(attrs.groups) == 1 and [axis.stride for axis in axes] != [1, 1]:
        phases = [
            min((_Phases(axis, cut) for cut in range(axis.stride)), key=lambda p: p.taps * p.count) for axis in axes
        ]
        by_phases = np.prod([p.taps * p.count * p.axis.stride for p in phases])
        if by_phases < np.prod([axis.kernel * axis.out for axis in axes]):
            return _by_phases(rewriter, call, data, (value, str(getattr(weight, "name", "weight"))), phases)
    return _with_zeros(rewriter, call, data, weight, axes)


def _by_phases(
    rewriter: Rewriter,
    call: Any,  # noqa: ANN401
    data: Any,  # noqa: ANN401
    weight: tuple[np.ndarray, str],
    phases: list[_Phases],
) -> Any:  # noqa: ANN401
    """Return the convolution of all phases, its result put together."""
    value, name = weight
    inputs, _, _, outputs = value.shape
    rows, columns = phases
    steps = (rows.axis.stride, columns.axis.stride)
    turned = np.zeros((*steps, outputs, rows.taps, columns.taps, inputs), value.dtype)
    for index in np.ndindex(*steps, rows.taps, columns.taps):
        y, x = (p.weight_of(index[i], index[i + 2]) for i, p in enumerate(phases))
        if y is not None and x is not None:
            turned[index[0], index[1], :, index[2], index[3]] = value[:, y, x].T
    # Window `tap` of result q reads q - last + tap.
    pads = [(p.last, p.count - 1 - p.first - (p.axis.size - 1)) for p in phases]
    flat = turned.reshape(-1, rows.taps, columns.taps, inputs)
    out = rewriter.emit(_conv2d(rewriter, call, data, rewriter.constant(flat, f"{name}_phases"), pads, [1, 1]))
    batch, (high, wide) = shape_of(data)[0], (p.count for p in phases)
    if steps[0] > 1:
        cells = rewriter.emit(relax.op.reshape(out, (batch, high, wide, steps[0], steps[1] * outputs)))
        out = rewriter.emit(relax.op.permute_dims(cells, [0, 1, 3, 2, 4]))
    sizes, begins = (high * steps[0], wide * steps[1]), [p.cut for p in phases]
    pixels = relax.op.reshape(out, (batch, *sizes, outputs))
    ends = [p.cut + p.axis.out for p in phases]
    if begins == [0, 0] and ends == [*sizes]:
        return pixels
    return relax.op.strided_slice(rewriter.emit(pixels), [1, 2], begins, ends)


def _with_zeros(rewriter: Rewriter, call: Any, data: Any, weight: Any, axes: list[_Axis]) -> Any:  # noqa: ANN401
    """Return the convolution of the spread data."""
    pads = []
    for axis in axes:
        first = axis.span - axis.before
        pads.append((first, axis.out + axis.span - axis.size * axis.stride - first))
    data = _spread(rewriter, data, [axis.stride for axis in axes])
    turned = _turned(rewriter, weight, int(call.attrs.groups))
    return _conv2d(rewriter, call, data, turned, pads, [axis.dilation for axis in axes])


def _conv2d(
    rewriter: Rewriter,
    call: Any,  # noqa: ANN401
    data: Any,  # noqa: ANN401
    weight: Any,  # noqa: ANN401
    pads: list[tuple[int, int]],
    dilation: list[int],
) -> Any:  # noqa: ANN401
    """Return a convolution in place of `call`; a negative padding cuts the pixels that no output reads."""
    sizes = shape_of(data)[1:3]
    begins = [max(0, -first) for first, _ in pads]
    ends = [size + min(0, last) for size, (_, last) in zip(sizes, pads, strict=True)]
    if begins != [0, 0] or ends != [*sizes]:
        data = rewriter.emit(relax.op.strided_slice(data, [1, 2], begins, ends))
    return relax.op.nn.conv2d(
        data,
        weight,
        strides=[1, 1],
        padding=[*(max(0, first) for first, _ in pads), *(max(0, last) for _, last in pads)],
        dilation=dilation,
        groups=int(call.attrs.groups),
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
