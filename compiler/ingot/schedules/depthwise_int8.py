"""Depthwise convolution of 8-bit integers with int32 sums: channels are the vector lanes, taps are taken in pairs.

A product of two 8-bit integers fits 16 bits, and so does the sum of two unless all four numbers are -128. So where no
weight is -128, two products are made and added in 16 bits, in half the registers that 32 bits would take, and then
widened (smull, smlal, saddw on ARM; pmullw, paddw, pmovsxwd on x86). Other weights are multiplied in 32 bits.

Weights are packed as [KH * KW / 2][2][C], with a zero for a tap that is missing. Data are read as signed (unsigned ones
with 128 subtracted), and the zero point is taken off afterwards, as in `schedules.conv2d_int8`.

Where an instruction adds four products to a 32-bit lane (sdot), taps are taken by columns: up to four rows of a column
are interleaved channel by channel, which costs fewer instructions than products of pairs, and windows that overlap
share the columns. Their weights are packed as [C / lanes][groups of rows][KW][lanes][4].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules.columns import DOT_ROWS, column_name, takes_columns
from ingot.schedules.depthwise import DepthwiseWorkload
from ingot.schedules.padding import PATCH_BYTES, Dequantize, copy_patch, copy_rows, finish_rows, rows_of
from ingot.schedules.starts import start_from_constant
from ingot.schedules.vector import annotate_block, ceil_div, largest_divisor, registers
from ingot.target import Target

#: A window of more pairs of taps is a loop.
_MAX_UNROLLED = 13
#: Taps of a window that is written out, where columns are.
_MAX_COLUMN_TAPS = 64
#: Channels of a tile of columns: with more, weights and constants of the epilogue do not stay in registers.
_COLUMN_LANES = 8
#: What a tile of columns takes besides its positions, in positions: columns that only one of its ends needs.
_COLUMN = 0.7
#: The annotation of a block that reads copied rows: what `copy_rows` needs, and the channels of a task.
_SHARED = "ingot.shared_rows"


@dataclass(frozen=True)
class DepthwiseInt8Config:
    """The register tile: `pixels` output positions x `lanes` channels; `wide` (0 or 1): products in 32 bits.

    rows: how many rows of a column are taken at once, or 0 where taps are taken in pairs.
    """

    pixels: int
    lanes: int
    wide: int
    rows: int = 0


def is_whole(weight: np.ndarray) -> bool:
    """Say whether weights are whole numbers of at most 9 bits."""
    return bool(np.all(weight == np.rint(weight)) and weight.min(initial=0) >= -255 and weight.max(initial=0) <= 255)


def default_config(workload: DepthwiseWorkload, weight: np.ndarray, target: Target) -> DepthwiseInt8Config:
    """Return a tile whose sums take at most half of the registers, or one of a few columns."""
    rows = _rows(workload, weight, target)
    if rows:
        pixels = min(range(2, 6), key=lambda w: (ceil_div(workload.out_width, w) * (w + _COLUMN), -w))
        return DepthwiseInt8Config(min(pixels, workload.out_width), _COLUMN_LANES, 0, rows)
    lanes, most = 1, registers(target).lanes * (2 if target.arch == "x86_64" else 4)
    while lanes * 2 <= most and workload.channels % (lanes * 2) == 0:
        lanes *= 2
    wide = int(weight.min(initial=0) < -127 or weight.max(initial=0) > 127)
    limit = max(1, registers(target).count // 2 // ceil_div(lanes, registers(target).lanes))
    widths = range(max(1, min(limit, 7) // 2), min(limit, 7) + 1)
    pixels = min(widths, key=lambda w: (ceil_div(workload.out_width, w) * w, -w))
    return DepthwiseInt8Config(pixels, lanes, wide)


def _rows(workload: DepthwiseWorkload, weight: np.ndarray, target: Target) -> int:
    """Return how many rows of a column are taken at once: 0 if taps are taken in pairs."""
    w, (kh, kw) = workload, workload.kernel
    fits = weight.min(initial=0) >= -128 and weight.max(initial=0) <= 127
    if not (takes_columns(target) and fits and w.channels % _COLUMN_LANES == 0 and kh * kw <= _MAX_COLUMN_TAPS):
        return 0
    if kh < 2 or w.dilation[0] > 1 or _task_channels(w, kh, 2 * _COLUMN_LANES) is None:
        return 0
    return ceil_div(kh, ceil_div(kh, DOT_ROWS))


def _task_channels(workload: DepthwiseWorkload, rows: int, lanes: int) -> int | None:
    """Return the most channels whose copied rows fit the stack, or None."""
    w = workload
    columns = (w.out_width + 4) * w.strides[1] + w.kernel[1] * w.dilation[1]
    most = PATCH_BYTES // ((rows + 2) * columns * lanes)
    return largest_divisor(w.channels // lanes, most) * lanes if most else None


def configs(workload: DepthwiseWorkload, weight: np.ndarray, target: Target) -> list[DepthwiseInt8Config]:
    """Return the space of a search: tiles of up to 14 positions whose sums fit the registers."""
    usual, regs = default_config(workload, weight, target), registers(target)
    if usual.rows:
        widths = range(1, min(workload.out_width, 6) + 1)
        lanes = [n for n in (8, 16) if workload.channels % n == 0]
        return [DepthwiseInt8Config(pixels, n, 0, usual.rows) for n in lanes for pixels in widths]
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
    if config.rows:
        return vectors * 0.6
    copied = workload.batch * workload.out_height * workload.out_width * workload.channels / min(config.lanes, lanes)
    return vectors * (2.0 if config.wide else 1.1) + copied * (workload.kernel[0] + 4)


def pack_weight(weight: np.ndarray, config: DepthwiseInt8Config, target: Target) -> np.ndarray:
    """Pack OHWI weights (whole numbers, I = 1) to [KH * KW / 2][2][C], or by columns (see the module's text)."""
    channels, kh, kw, _ = weight.shape
    if config.rows:
        groups = ceil_div(kh, config.rows)
        taps = np.zeros((channels, groups * config.rows, kw), np.int8)
        taps[:, :kh] = weight[..., 0].astype(np.int8)
        columns = np.zeros((channels // config.lanes, groups, kw, config.lanes, DOT_ROWS), np.int8)
        shaped = taps.reshape(channels // config.lanes, config.lanes, groups, config.rows, kw)
        columns[..., : config.rows] = shaped.transpose(0, 2, 4, 1, 3)
        return columns
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
    if config.rows:
        return _compute_columns(w, config, convert, out_dtype)
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


def _compute_columns(
    w: DepthwiseWorkload, config: DepthwiseInt8Config, convert: Dequantize, out_dtype: str
) -> list[Any]:
    """Return the TE tensors of `compute`, taps by columns."""
    (kh, kw), (sh, sw), dw, rows = w.kernel, w.strides, w.dilation[1], config.rows
    groups, tiled = ceil_div(kh, rows), ceil_div(w.out_width, config.pixels) * config.pixels
    data = te.placeholder((w.batch, w.height, w.width, w.channels), convert.dtype, name="data")
    shape = (w.channels // config.lanes, groups, kw, config.lanes, DOT_ROWS)
    weight = te.placeholder(shape, "int8", name="weight")
    constant = te.placeholder((w.channels,), "int32", name="correction")
    zero = tirx.const(convert.zero_point - (128 if convert.dtype == "uint8" else 0), "int8")

    def signed(value: Any) -> Any:  # noqa: ANN401 - TE expressions
        if convert.dtype == "int8":
            return value
        return tirx.reinterpret("int8", value ^ tirx.const(128, "uint8"))

    need = (w.out_height - 1) * sh + groups * rows, (tiled - 1) * sw + (kw - 1) * dw + 1
    patch = rows_of(data, w.padding[:2], need, zero, signed, flat=False)
    group, rx = te.reduce_axis((0, groups), "group"), te.reduce_axis((0, kw), "rx")
    row = te.reduce_axis((0, rows), "row")
    shared = [w.height, w.width, *w.padding[:2], _task_channels(w, kh, config.lanes)]
    sums = te.compute(
        (w.batch, w.out_height, tiled, w.channels),
        lambda n, y, x, c: te.sum(
            patch[n, y * sh + group * rows + row, x * sw + rx * dw, c].astype("int32")
            * weight[c // config.lanes, group, rx, c % config.lanes, row].astype("int32"),
            axis=[group, rx, row],
        ),
        name="depthwise",
        attrs={**annotate_block("depthwise", "depthwise_int8", config), _SHARED: shared},
    )
    out = te.compute(
        (w.batch, w.out_height, w.out_width, w.channels),
        lambda n, y, x, c: (sums[n, y, x, c] + constant[c]).astype(out_dtype),
        name="depthwise_out",
    )
    return [data, weight, constant, out]


def _schedule_columns(sch: Any, anchor: Any, output: Any, config: DepthwiseInt8Config, shared: list[int]) -> None:  # noqa: ANN401
    """Schedule a tile of columns: a task computes a row of some channels, one position after another."""
    n, y, x, c = sch.get_loops(output)
    x_tiles, x_inner = sch.split(x, [None, config.pixels])
    c_tasks, c_tiles, c_lanes = sch.split(c, [None, shared[-1] // config.lanes, config.lanes])
    sch.reorder(n, y, c_tasks, c_tiles, x_tiles, x_inner, c_lanes)
    task = sch.fuse(n, y, c_tasks)
    sch.compute_at(anchor, x_tiles, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(x_inner)
    *_, px, channel, group, rx, row = sch.get_loops(anchor)
    sch.reorder(px, group, rx, channel, row)
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    for loop in (px, group, rx):
        sch.unroll(loop)
    init = sch.decompose_reduction(anchor, group)
    copy_rows(sch, task, shared[:-1])
    sch.vectorize(sch.get_loops(init)[-1])
    sch.tensorize(channel, column_name(config.rows, config.lanes))


def schedule(sch: Any, anchor: Any, output: Any, config: DepthwiseInt8Config, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile; the block between `anchor` and `output` has been inlined."""
    shared = sch.get(anchor).annotations.get(_SHARED)
    if shared is not None:
        sch.unannotate(anchor, _SHARED)
        _schedule_columns(sch, anchor, output, config, [int(v) for v in shared])
        return
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
    """Write the copies of rows as plain loops, and start sums from their corrections."""
    return start_from_constant(finish_rows(function), block)
