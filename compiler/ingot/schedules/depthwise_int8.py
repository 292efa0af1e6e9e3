"""Depthwise convolution of 8-bit integers with int32 sums: channels are the vector lanes, taps are taken in pairs.

A product of two 8-bit integers fits 16 bits, and so does the sum of two unless all four numbers are -128. So where no
weight is -128, two products are made and added in 16 bits, in half the registers that 32 bits would take, and then
widened (smull, smlal, saddw on ARM; pmullw, paddw, pmovsxwd on x86). Other weights are multiplied in 32 bits.

Weights are packed as [KH * KW / 2][2][C], with a zero for a tap that is missing. Data are read as signed (unsigned ones
with 128 subtracted), and the zero point is taken off afterwards, as in `schedules.conv2d_int8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules.depthwise import DepthwiseWorkload
from ingot.schedules.padding import Dequantize, copy_patch
from ingot.schedules.vector import annotate_block, ceil_div, registers
from ingot.target import Target

#: A window of more pairs of taps is a loop.
_MAX_UNROLLED = 13


@dataclass(frozen=True)
class DepthwiseInt8Config:
    """The register tile: `pixels` output positions x `lanes` channels; `wide` (0 or 1): products in 32 bits."""

    pixels: int
    lanes: int
    wide: int


def is_whole(weight: np.ndarray) -> bool:
    """Say whether weights are whole numbers of at most 9 bits."""
    return bool(np.all(weight == np.rint(weight)) and weight.min(initial=0) >= -255 and weight.max(initial=0) <= 255)


def default_config(workload: DepthwiseWorkload, weight: np.ndarray, target: Target) -> DepthwiseInt8Config:
    """Return a tile whose sums take at most half of the registers."""
    lanes, most = 1, registers(target).lanes * (2 if target.arch == "x86_64" else 4)
    while lanes * 2 <= most and workload.channels % (lanes * 2) == 0:
        lanes *= 2
    wide = int(weight.min(initial=0) < -127 or weight.max(initial=0) > 127)
    limit = max(1, registers(target).count // 2 // ceil_div(lanes, registers(target).lanes))
    widths = range(max(1, min(limit, 7) // 2), min(limit, 7) + 1)
    pixels = min(widths, key=lambda w: (ceil_div(workload.out_width, w) * w, -w))
    return DepthwiseInt8Config(pixels, lanes, wide)


def configs(workload: DepthwiseWorkload, weight: np.ndarray, target: Target) -> list[DepthwiseInt8Config]:
    """Return the space of a search: tiles of up to 14 positions whose sums fit the registers."""
    usual, regs = default_config(workload, weight, target), registers(target)
    lanes = [n for n in (usual.lanes * 2, usual.lanes, usual.lanes // 2) if n > 0 and workload.channels % n == 0]
    return [
        DepthwiseInt8Config(pixels, n, usual.wide)
        for n in lanes
        for pixels in range(1, min(workload.out_width, 14) + 1)
        if pixels == 1 or pixels * ceil_div(n, regs.lanes) < regs.count
    ]


def cost(workload: DepthwiseWorkload, config: DepthwiseInt8Config, target: Target) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`."""
    lanes = registers(target).lanes
    vectors = workload.macs / min(config.lanes, lanes)
    copied = workload.batch * workload.out_height * workload.out_width * workload.channels / min(config.lanes, lanes)
    return vectors * (2.0 if config.wide else 1.1) + copied * (workload.kernel[0] + 4)


def pack_weight(weight: np.ndarray, config: DepthwiseInt8Config, target: Target) -> np.ndarray:
    """Pack OHWI weights (whole numbers, I = 1) to [KH * KW / 2][2][C]."""
    channels, kh, kw, _ = weight.shape
    pairs = ceil_div(kh * kw, 2)
    packed = np.zeros((pairs * 2, channels), _stored(config, target))
    packed[: kh * kw] = weight.reshape(channels, kh * kw).T.astype(packed.dtype)
    return packed.reshape(pairs, 2, channels)


def _stored(config: DepthwiseInt8Config, target: Target) -> str:
    """Return the dtype of packed weights and patches.

    x86 multiplies 16-bit operands from memory; ARM's widening instructions take 8-bit ones.
    """
    return "int16" if config.wide or target.arch == "x86_64" else "int8"


def correction(weight: np.ndarray, convert: Dequantize, bias: np.ndarray | None = None) -> np.ndarray:
    """Return the constant of each channel: bias - z sum w, int32 [C], z as the products see it."""
    zero_point = convert.zero_point - (128 if convert.dtype == "uint8" else 0)
    constant: np.ndarray = -zero_point * weight.astype(np.int64).sum(axis=(1, 2, 3))
    if bias is not None:
        constant = constant + bias.astype(np.int64).reshape(-1)
    return constant.astype(np.int32)


def compute(
    workload: DepthwiseWorkload,
    config: DepthwiseInt8Config,
    convert: Dequantize,
    target: Target,
    out_dtype: str = "float32",
) -> list[Any]:
    """Return the TE tensors [data NHWC, packed weight, correction, output NHWC of `out_dtype` (whole numbers)]."""
    w = workload
    (kh, kw), (sh, sw), (dh, dw) = w.kernel, w.strides, w.dilation
    top, left, taps = w.padding[0], w.padding[1], kh * kw
    kind = _stored(config, target)
    data = te.placeholder((w.batch, w.height, w.width, w.channels), convert.dtype, name="data")
    weight = te.placeholder((ceil_div(taps, 2), 2, w.channels), kind, name="weight")
    constant = te.placeholder((w.channels,), "int32", name="correction")
    tiled = ceil_div(w.out_width, config.pixels) * config.pixels
    shift = 128 if convert.dtype == "uint8" else 0
    zero = tirx.const(convert.zero_point - shift, kind)

    def padded(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        value = data[n, y - top, x - left, c]
        if shift:  # flipping the top bit subtracts 128 and reads the byte as signed
            value = tirx.reinterpret("int8", value ^ tirx.const(128, "uint8"))
        inside = te.all(y >= top, y < w.height + top, x >= left, x < w.width + left)
        return te.if_then_else(inside, value.astype(kind), zero)

    need = ((w.out_height - 1) * sh + (kh - 1) * dh + 1, (tiled - 1) * sw + (kw - 1) * dw + 1)
    patch = te.compute((w.batch, *need, w.channels), padded, name="padded")
    pair = te.reduce_axis((0, ceil_div(taps, 2)), "pair")
    dtype = "int32" if config.wide else "int16"

    def product(j: int, n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401
        tap = tirx.min(pair * 2 + j, taps - 1) if taps % 2 else pair * 2 + j
        value = patch[n, y * sh + tap // kw * dh, x * sw + tap % kw * dw, c]
        return value.astype(dtype) * weight[pair, j, c].astype(dtype)

    sums = te.compute(
        (w.batch, w.out_height, tiled, w.channels),
        lambda *i: te.sum((product(0, *i) + product(1, *i)).astype("int32"), axis=[pair]),
        name="depthwise",
        attrs=annotate_block("depthwise", "depthwise_int8", config),
    )
    out = te.compute(
        (w.batch, w.out_height, w.out_width, w.channels),
        lambda n, y, x, c: (sums[n, y, x, c] + constant[c]).astype(out_dtype),
        name="depthwise_out",
    )
    return [data, weight, constant, out]


def schedule(sch: Any, anchor: Any, output: Any, config: DepthwiseInt8Config, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile; the block between `anchor` and `output` has been inlined."""
    n, y, x, c = sch.get_loops(output)
    x_tiles, x_inner = sch.split(x, [None, config.pixels])
    c_tiles, c_lanes = sch.split(c, [None, config.lanes])
    sch.reorder(n, y, x_tiles, c_tiles, x_inner, c_lanes)
    task = sch.fuse(n, y)
    sch.compute_at(anchor, c_tiles, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(x_inner)
    *_, px, channel, pair = sch.get_loops(anchor)
    sch.reorder(pair, px, channel)
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    sch.vectorize(channel)
    sch.unroll(px)
    if int(sch.get(pair).extent) <= _MAX_UNROLLED:
        sch.unroll(pair)
    sch.decompose_reduction(anchor, pair)
    copy_patch(sch, c_tiles, target)


def finish(function: Any, block: str, config: DepthwiseInt8Config, target: Target) -> Any:  # noqa: ANN401
    """Return the function as it is: the schedule expresses all of this template."""
    return function
