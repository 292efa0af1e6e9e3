"""Depthwise convolution: every channel with its own small window; channels are the vector lanes.

Weights are packed as [KH][KW][C]. One tile computes `pixels` neighbouring positions of `block` channels in registers,
with the window unrolled, so that each weight vector is loaded once a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from ingot.schedules.border import guarded_load, mark, specialise
from ingot.schedules.padding import Dequantize, copy_patch, pad_nhwc
from ingot.schedules.vector import annotate_block, ceil_div, lanes_for, registers
from ingot.target import Target

#: The annotation of a block whose borders are compiled apart.
WINDOW = "ingot.window"
#: Accumulators of a tile of one vector in half of 16 registers.
_WIDEST = 8
#: What a multiply-add or a load takes, in multiply-adds of which nothing else is between.
_INSTRUCTION = 0.55


@dataclass(frozen=True)
class DepthwiseWorkload:
    """A depthwise convolution, NHWC, multiplier 1. `padding` is (top, left, bottom, right)."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    dtype: str

    @property
    def out_height(self) -> int:
        """Return the output's height."""
        span = (self.kernel[0] - 1) * self.dilation[0] + 1
        return (self.height + self.padding[0] + self.padding[2] - span) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Return the output's width."""
        span = (self.kernel[1] - 1) * self.dilation[1] + 1
        return (self.width + self.padding[1] + self.padding[3] - span) // self.strides[1] + 1

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of one inference."""
        return self.batch * self.out_height * self.out_width * self.channels * self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class DepthwiseConfig:
    """The register tile: `pixels` output positions x `block` channels of `lanes` each."""

    pixels: int
    block: int
    lanes: int


def default_config(workload: DepthwiseWorkload, target: Target) -> DepthwiseConfig:
    """Return a tile whose accumulators fill half of the register file at most.

    Few registers hold a wide tile of one vector of channels or a narrow one of two. The wide one loads columns that
    windows share, and weights, less often; where windows of long rows share little, the narrow one reads memory in
    longer pieces.
    """
    w = workload
    if registers(target).count > 16 or (w.strides[1] > 1 and w.out_width > _WIDEST):
        return narrow_config(w, target)
    lanes = lanes_for(target, w.dtype, w.channels)
    pixels = min(range(1, min(w.out_width, _WIDEST) + 1), key=lambda p: (_row_cost(w, p), -p))
    return DepthwiseConfig(pixels, lanes, lanes)


def narrow_config(workload: DepthwiseWorkload, target: Target) -> DepthwiseConfig:
    """Return a tile of two vectors of channels if they are whole, and as many positions as then fit registers."""
    lanes = lanes_for(target, workload.dtype, workload.channels)
    block = lanes * 2 if workload.channels % (lanes * 2) == 0 else lanes
    limit = max(1, (registers(target).count - 4) // (block // lanes) // 2)
    widths = range(max(1, min(limit, 7) // 2), min(limit, 7) + 1)
    pixels = min(widths, key=lambda p: (ceil_div(workload.out_width, p) * p, -p))
    return DepthwiseConfig(pixels=pixels, block=block, lanes=lanes)


def _row_cost(w: DepthwiseWorkload, pixels: int) -> int:
    """Return the multiply-adds and the loads, of weights and of columns of the image, of a row of tiles."""
    (kh, kw), columns = w.kernel, (pixels - 1) * w.strides[1] + w.kernel[1]
    return ceil_div(w.out_width, pixels) * (pixels * kh * kw + kh * kw + kh * columns)


def configs(workload: DepthwiseWorkload, target: Target) -> list[DepthwiseConfig]:
    """Return the space: every tile whose accumulators and one weight vector fit the register file."""
    regs = registers(target)
    widest, found = lanes_for(target, workload.dtype, workload.channels), []
    for vectors in (1, 2, 3, 4, 6, 8):
        if workload.channels % (widest * vectors):
            continue
        for pixels in range(1, min(workload.out_width, 14) + 1):
            if pixels * vectors + vectors + 1 <= regs.count:
                found.append(DepthwiseConfig(pixels=pixels, block=widest * vectors, lanes=widest))
    return found


def cost(workload: DepthwiseWorkload, config: DepthwiseConfig, target: Target) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`."""
    w = workload
    rows = w.batch * w.out_height * ceil_div(w.channels, registers(target).lanes)
    return rows * _row_cost(w, config.pixels) * _INSTRUCTION


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """Pack OHWI weights with I = 1 to [KH][KW][C]."""
    return np.ascontiguousarray(weight[:, :, :, 0].transpose(1, 2, 0))


def window_of(w: DepthwiseWorkload) -> list[int]:
    """Return what `border.mark` needs: height, width, strides, dilation of rows, extent in columns, top, left."""
    span = (w.kernel[1] - 1) * w.dilation[1] + 1
    return [w.height, w.width, *w.strides, w.dilation[0], span, w.padding[0], w.padding[1]]


def compute(workload: DepthwiseWorkload, config: DepthwiseConfig, convert: Dequantize | None = None) -> list[Any]:
    """Return the TE tensors [data NHWC, packed weight, output NHWC].

    With `convert` the data are stored integers: each tile copies its patch as float32, since a window that read the
    image would convert every value KH * KW times. Without, border tiles are compiled apart (`schedules.border`).
    """
    w = workload
    kh, kw = w.kernel
    (sh, sw), (dh, dw) = w.strides, w.dilation
    stored = convert.dtype if convert is not None else w.dtype
    data = te.placeholder((w.batch, w.height, w.width, w.channels), stored, name="data")
    weight = te.placeholder((kh, kw, w.channels), w.dtype, name="weight")
    tiled = ceil_div(w.out_width, config.pixels) * config.pixels
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    top, left = w.padding[0], w.padding[1]
    attrs: dict[str, Any] = annotate_block("depthwise", "depthwise", config)
    if convert is not None:
        need_h, need_w = (w.out_height - 1) * sh + (kh - 1) * dh + 1, (tiled - 1) * sw + (kw - 1) * dw + 1
        patch = pad_nhwc(data, top, left, need_h, need_w, convert)

        def load(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
            return patch[n, y, x, c]
    else:
        attrs[WINDOW] = window_of(w)

        def load(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
            return guarded_load(data, n, y - top, x - left, c)

    conv = te.compute(
        (w.batch, w.out_height, tiled, w.channels),
        lambda n, y, x, c: te.sum(load(n, y * sh + ry * dh, x * sw + rx * dw, c) * weight[ry, rx, c], axis=[ry, rx]),
        name="depthwise",
        attrs=attrs,
    )
    shape = (w.batch, w.out_height, w.out_width, w.channels)
    return [data, weight, te.compute(shape, lambda n, y, x, c: conv[n, y, x, c], name="depthwise_out")]


def schedule(sch: Any, anchor: Any, output: Any, config: DepthwiseConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile; the block between `anchor` and `output` has been inlined."""
    window = sch.get(anchor).annotations.get(WINDOW)
    if window is not None:
        sch.unannotate(anchor, WINDOW)
    n, y, x, c = sch.get_loops(output)
    x_tiles, x_inner = sch.split(x, [None, config.pixels])
    c_tiles, c_registers, c_lanes = sch.split(c, [None, config.block // config.lanes, config.lanes])
    sch.reorder(n, y, x_tiles, c_tiles, x_inner, c_registers, c_lanes)
    task = sch.fuse(n, y)
    sch.compute_at(anchor, c_tiles, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(c_registers)
    sch.unroll(x_inner)
    *_, px, channel, ry, rx = sch.get_loops(anchor)
    w_registers, w_lanes = sch.split(channel, [None, config.lanes])
    sch.reorder(ry, rx, px, w_registers, w_lanes)
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    sch.vectorize(w_lanes)
    for loop in (px, w_registers, rx):
        sch.unroll(loop)
    sch.decompose_reduction(anchor, ry)
    if window is None:
        copy_patch(sch, c_tiles, target)
        return
    height, width, sh, sw, row_dilation, span, top, left = (int(v) for v in window)
    mark(sch, ry, x_tiles, tile=config.pixels, height=(height, sh, row_dilation, top), width=(width, sw, span, left))


def finish(function: Any, block: str, config: DepthwiseConfig, target: Target) -> Any:  # noqa: ANN401
    """Apply what a schedule cannot express to the scheduled function: border tiles compiled apart."""
    return specialise(function)
