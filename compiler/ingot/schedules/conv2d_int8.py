"""Convolution and matrix product of 8-bit integers with int32 sums, four input channels at a time.

The weights are packed as [CO/b][KH][KW][CI/4][b][4] and one instruction of `schedules.microkernels` adds four products
to each of its lanes. The instruction fixes the signedness of the data (unsigned on x86): data of the other kind are
shifted by 128 as the patch is copied, and their zero point with them. Zero points never enter the loop:

    sum (x - z) w  =  sum x w  -  z sum w

the last term is a constant of each output channel, if padding holds z; so it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.errors import CompilerError
from ingot.schedules import conv2d
from ingot.schedules.conv2d import Conv2DWorkload, TileConfig
from ingot.schedules.microkernels import Dot4, dot4_of, intrinsic_name
from ingot.schedules.padding import Dequantize
from ingot.schedules.vector import annotate_block, ceil_div
from ingot.target import Target

#: Input channels one instruction takes.
GROUP = 4


def preferred_activation(target: Target) -> str:
    """Return the 8-bit dtype of activations that the target's instructions read without shifting: a numpy name.

    x86 multiplies unsigned data with signed weights; all other instructions we use take signed data.
    """
    return "uint8" if target.arch == "x86_64" else "int8"


def is_whole(weight: np.ndarray) -> bool:
    """Say whether float weights are whole numbers that fit int8."""
    return bool(np.all(weight == np.rint(weight)) and weight.min(initial=0) >= -128 and weight.max(initial=0) <= 127)


def grouped(workload: Conv2DWorkload) -> Conv2DWorkload:
    """Return the workload as the inner loop sees it: groups of four channels as one."""
    fields = {**workload.__dict__, "in_channels": ceil_div(workload.in_channels, GROUP)}
    return Conv2DWorkload(**fields)


def default_config(workload: Conv2DWorkload, target: Target) -> TileConfig:
    """Return the tile with the least estimated cost."""
    return conv2d.default_config(grouped(workload), target)


def pack_weight(weight: np.ndarray, block: int) -> np.ndarray:
    """Pack OHWI weights (whole numbers) to int8 [CO/block][KH][KW][CI/4][block][4], padded with zeros."""
    co, kh, kw, ci = weight.shape
    blocks, groups = ceil_div(co, block), ceil_div(ci, GROUP)
    padded = np.zeros((blocks * block, kh, kw, groups * GROUP), np.int8)
    padded[:co, :, :, :ci] = weight.astype(np.int8)
    shaped = padded.reshape(blocks, block, kh, kw, groups, GROUP)
    return np.ascontiguousarray(shaped.transpose(0, 2, 3, 4, 1, 5))


def _shift(convert: Dequantize, dot: Dot4) -> int:
    """Return what is added to a stored value to make it the instruction's kind."""
    if convert.dtype == dot.data:
        return 0
    return 128 if dot.data == "uint8" else -128


def correction(weight: np.ndarray, convert: Dequantize, dot: Dot4) -> np.ndarray:
    """Return the constant of each output channel: -z sum w, int32 [CO], z as the instruction sees it."""
    sums = weight.astype(np.int64).sum(axis=(1, 2, 3))
    constant: np.ndarray = -(convert.zero_point + _shift(convert, dot)) * sums
    return constant.astype(np.int32)


def compute(workload: Conv2DWorkload, config: TileConfig, convert: Dequantize, dot: Dot4) -> list[Any]:
    """Return the TE tensors [data NHWC, packed weight, correction, output NHWC float32 (whole numbers)]."""
    w = workload
    (kh, kw), (sh, sw), (dh, dw) = w.kernel, w.strides, w.dilation
    height, width, co = w.out_height, w.out_width, w.out_channels
    blocks, groups = ceil_div(co, config.block), ceil_div(w.in_channels, GROUP)
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels), convert.dtype, name="data")
    weight = te.placeholder((blocks, kh, kw, groups, config.block, GROUP), "int8", name="weight")
    constant = te.placeholder((co,), "int32", name="correction")
    tiled = width if config.pixels > width else ceil_div(width, config.pixels) * config.pixels
    need = ((height - 1) * sh + (kh - 1) * dh + 1, (tiled - 1) * sw + (kw - 1) * dw + 1)
    source = _source(data, w, need, groups * GROUP, convert, dot)
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    rc, rk = te.reduce_axis((0, groups), "rc"), te.reduce_axis((0, GROUP), "rk")
    conv = te.compute(
        (w.batch, height, tiled, blocks * config.block),
        lambda n, y, x, c: te.sum(
            source[n, y * sh + ry * dh, x * sw + rx * dw, rc * GROUP + rk].astype("int32")
            * weight[c // config.block, ry, rx, rc, c % config.block, rk].astype("int32"),
            axis=[ry, rx, rc, rk],
        ),
        name="conv",
        attrs=annotate_block("conv2d", "conv2d_int8", config),
    )
    out = te.compute(
        (w.batch, height, width, co),
        lambda n, y, x, c: (conv[n, y, x, c] + constant[c]).astype("float32"),
        name="conv_out",
    )
    return [data, weight, constant, out]


def _source(
    data: Any,  # noqa: ANN401 - TE tensors
    w: Conv2DWorkload,
    need: tuple[int, int],
    channels: int,
    convert: Dequantize,
    dot: Dot4,
) -> Any:  # noqa: ANN401
    """Return the tensor the instruction reads: `data`, or a padded copy of the right kind and channel count."""
    top, left = w.padding[0], w.padding[1]
    shift = _shift(convert, dot)
    moved = any(w.padding) or need[0] > w.height or need[1] > w.width or channels > w.in_channels
    if not moved and shift == 0:
        return data
    zero = tirx.const(convert.zero_point + shift, dot.data)

    def padded(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        stored = data[n, y - top, x - left, c]
        # Flipping the top bit adds or subtracts 128, and reads the byte as the other kind.
        value = tirx.reinterpret(dot.data, stored ^ tirx.const(-128, "int8")) if shift > 0 else stored
        if shift < 0:
            value = tirx.reinterpret(dot.data, stored ^ tirx.const(128, "uint8"))
        if not moved:
            return value
        inside = te.all(y >= top, y < w.height + top, x >= left, x < w.width + left, c < w.in_channels)
        return te.if_then_else(inside, value, zero)

    return te.compute((w.batch, *need, channels), padded, name="padded")


def schedule(sch: Any, anchor: Any, output: Any, config: TileConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile as `conv2d` does, with the dot product instruction as its innermost loops."""
    dot = dot4_of(target)
    if dot is None:
        raise CompilerError("this target has no dot product instruction for the int8 template", where=target.name)
    conv2d.schedule(sch, anchor, output, config, target, intrinsic_name(dot))


def finish(function: Any, block: str, config: TileConfig, target: Target) -> Any:  # noqa: ANN401
    """Return the function as it is: the schedule expresses all of this template."""
    return function
