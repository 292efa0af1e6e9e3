"""Convolution and matrix product by instructions that multiply two rows with two rows (`schedules.mmla`).

The weights are packed as [CO/b][KH][KW][CI/g][b/2][2][g], and one instruction adds g products to the sums of two
neighbouring positions and two neighbouring channels, which lie together as [2][2] until the result is stored. So the
tile's width is even; the two positions must be one step apart in what is read: columns of a strided convolution are
copied apart by their remainder (`_source`).

Integers: what `schedules.conv2d_int8` says of zero points holds here too. bfloat16: as in `schedules.conv2d_half`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload, TileConfig
from ingot.schedules.half import widen_bf16
from ingot.schedules.mmla import Mmla, intrinsic_name, mmla_named
from ingot.schedules.padding import copy_patch
from ingot.schedules.vector import annotate_block, ceil_div, registers
from ingot.target import Target

TEMPLATE, HALF_TEMPLATE = "conv2d_mmla", "conv2d_half_mmla"
_MMLA = "ingot.mmla"
#: Instructions in flight that hide the latency of one on a core with two pipes.
_LATENCY = 8


@dataclass(frozen=True)
class Operands:
    """How the stored data become an instruction's.

    dtype: what is stored. padding: the instruction's value of what lies outside. convert: from stored to the
    instruction's dtype; None where they are the same.
    """

    dtype: str
    padding: int
    convert: Callable[[Any], Any] | None


def configs(workload: Conv2DWorkload, target: Target) -> list[TileConfig]:
    """Return the space of tiles: every one whose sums and operands fit the register file."""
    limit = registers(target).count
    found = []
    for columns in range(1, min(ceil_div(workload.out_channels, 4), 4) + 1):
        for pairs in range(1, ceil_div(min(workload.out_width, 16), 2) + 1):
            if pairs * columns * 2 + pairs + 2 <= limit:
                found.append(TileConfig(2 * pairs, 4 * columns, 1))
    return found


def cost(workload: Conv2DWorkload, config: TileConfig, mmla: Mmla) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`.

    The instruction takes the time of one FMA (Neoverse N2, V1 and V2), and a tile's steps those, or its loads.
    """
    w = workload
    steps = w.kernel[0] * w.kernel[1] * ceil_div(w.in_channels, mmla.group)
    tiles = w.batch * w.out_height * ceil_div(w.out_width, config.pixels)
    sums, loads = config.pixels * config.block // 4, config.pixels + config.block // 2
    patch = 0.0
    if not _reads_in_place(w, config, mmla):
        columns = (config.pixels - 1) * w.strides[1] + w.kernel[1]
        patch = 2.5 * w.kernel[0] * columns * ceil_div(w.in_channels * 8 // mmla.group, 16)
    step = max(sums, 1.2 * loads, _LATENCY) + loads / 8
    return tiles * ceil_div(w.out_channels, config.block) * (steps * step + 2 * sums + 24 + patch)


def default_config(workload: Conv2DWorkload, target: Target, mmla: Mmla) -> TileConfig:
    """Return the tile with the least estimated cost."""
    return min(configs(workload, target), key=lambda c: (cost(workload, c, mmla), -c.pixels, c.block))


def pack_weight(weight: np.ndarray, block: int, mmla: Mmla) -> np.ndarray:
    """Pack OHWI weights, of the instruction's dtype, to [CO/block][KH][KW][CI/g][block/2][2][g], padded with zeros."""
    co, kh, kw, ci = weight.shape
    blocks, groups = ceil_div(co, block), ceil_div(ci, mmla.group)
    padded = np.zeros((blocks * block, kh, kw, groups * mmla.group), mmla.weight)
    padded[:co, :, :, :ci] = weight
    shaped = padded.reshape(blocks, block // 2, 2, kh, kw, groups, mmla.group)
    return np.ascontiguousarray(shaped.transpose(0, 3, 4, 5, 1, 2, 6))


def _reads_in_place(w: Conv2DWorkload, config: TileConfig, mmla: Mmla) -> bool:
    """Say whether tiles read data of the instruction's dtype where they lie."""
    whole = w.out_width % config.pixels == 0 and w.in_channels % mmla.group == 0
    return whole and not any(w.padding) and w.strides[1] == 1


def compute(workload: Conv2DWorkload, config: TileConfig, mmla: Mmla, operands: Operands) -> tuple[Any, Any, Any]:
    """Return the TE tensors data NHWC, packed weight, sums NHWC (of the instruction's dtype)."""
    w, group = workload, mmla.group
    (kh, kw), sh, (dh, dw) = w.kernel, w.strides[0], w.dilation
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels), operands.dtype, name="data")
    groups, pairs = ceil_div(w.in_channels, group), config.block // 2
    blocks, tiled = ceil_div(w.out_channels, config.block), ceil_div(w.out_width, config.pixels) * config.pixels
    weight = te.placeholder((blocks, kh, kw, groups, pairs, 2, group), mmla.weight, name="weight")
    source = _source(data, w, config, mmla, operands)
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    rc, rk = te.reduce_axis((0, groups), "rc"), te.reduce_axis((0, group), "rk")
    wide: Callable[[Any], Any] = widen_bf16 if mmla.total == "float32" else (lambda x: x.astype(mmla.total))
    sums = te.compute(
        (w.batch, w.out_height, tiled // 2, blocks * pairs, 2, 2),
        lambda n, y, x, c, p, q: te.sum(
            wide(source(n, y * sh + ry * dh, x * 2 + p, rx * dw, rc * group + rk))
            * wide(weight[c // pairs, ry, rx, rc, c % pairs, q, rk]),
            axis=[ry, rx, rc, rk],
        ),
        name="conv",
        attrs=_annotations("conv2d", mmla, config),
    )
    out = te.compute(
        (w.batch, w.out_height, w.out_width, w.out_channels),
        lambda n, y, x, c: sums[n, y, x // 2, c // 2, x % 2, c % 2],
        name="conv_sums",
    )
    return data, weight, out


def compute_matmul(
    workload: MatmulWorkload, config: TileConfig, mmla: Mmla, operands: Operands
) -> tuple[Any, Any, Any]:
    """Return the TE tensors data (lead..., K), packed weight, sums (lead..., N)."""
    w, group = workload, mmla.group
    groups, pairs, blocks = ceil_div(w.k, group), config.block // 2, ceil_div(w.n, config.block)
    *outer, rows = w.lead
    data = te.placeholder((*w.lead, w.k), operands.dtype, name="data")
    weight = te.placeholder((blocks, 1, 1, groups, pairs, 2, group), mmla.weight, name="weight")
    tiled = ceil_div(rows, config.pixels) * config.pixels
    source, moved = data, tiled > rows or groups * group > w.k
    if moved or operands.convert is not None:

        def value(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
            read = data(*i) if operands.convert is None else operands.convert(data(*i))
            inside = te.all(i[-2] < rows, i[-1] < w.k)
            return te.if_then_else(inside, read, tirx.const(operands.padding, mmla.data)) if moved else read

        source = te.compute((*outer, tiled, groups * group), value, name="padded")
    rc, rk = te.reduce_axis((0, groups), "rc"), te.reduce_axis((0, group), "rk")
    wide: Callable[[Any], Any] = widen_bf16 if mmla.total == "float32" else (lambda x: x.astype(mmla.total))

    def total(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        *lead, x, c, p, q = i
        factor = weight[c // pairs, 0, 0, rc, c % pairs, q, rk]
        return te.sum(wide(source(*lead, x * 2 + p, rc * group + rk)) * wide(factor), axis=[rc, rk])

    attrs = _annotations("matmul", mmla, config)
    sums = te.compute((*outer, tiled // 2, blocks * pairs, 2, 2), total, name="matmul", attrs=attrs)
    out = te.compute(
        (*w.lead, w.n),
        lambda *i: sums(*i[:-2], i[-2] // 2, i[-1] // 2, i[-2] % 2, i[-1] % 2),
        name="matmul_sums",
    )
    return data, weight, out


def _annotations(name: str, mmla: Mmla, config: TileConfig) -> dict[str, str]:
    template = HALF_TEMPLATE if mmla.total == "float32" else TEMPLATE
    return {**annotate_block(name, template, config), _MMLA: mmla.name}


def _source(
    data: Any,  # noqa: ANN401 - TE tensors
    w: Conv2DWorkload,
    config: TileConfig,
    mmla: Mmla,
    operands: Operands,
) -> Callable[..., Any]:
    """Return what the instruction reads, as a function of batch, row, output column, offset in the window, channel.

    That is `data`, or a copy padded with zero points: [batch, row, column % stride, column // stride, channel].
    """
    (kh, kw), (sh, sw), (dh, dw) = w.kernel, w.strides, w.dilation
    if operands.convert is None and _reads_in_place(w, config, mmla):
        return lambda n, y, x, offset, c: data[n, y, x + offset, c]
    (top, left), tiled = w.padding[:2], ceil_div(w.out_width, config.pixels) * config.pixels
    height = (w.out_height - 1) * sh + (kh - 1) * dh + 1
    columns = tiled + (kw - 1) * dw // sw
    zero = tirx.const(operands.padding, mmla.data)

    def value(n: Any, y: Any, phase: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        column = x * sw + phase
        read = data[n, y - top, column - left, c]
        inside = te.all(y >= top, y < w.height + top, column >= left, column < w.width + left, c < w.in_channels)
        return te.if_then_else(inside, read if operands.convert is None else operands.convert(read), zero)

    channels = ceil_div(w.in_channels, mmla.group) * mmla.group
    padded = te.compute((w.batch, height, min(sw, (kw - 1) * dw + 1), columns, channels), value, name="padded")
    return lambda n, y, x, offset, c: padded[n, y, offset % sw, x + offset // sw, c]


def schedule(sch: Any, anchor: Any, output: Any, config: TileConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile: `anchor` is the reduction block, `output` the block that stores the result."""
    mmla = mmla_named(str(sch.get(anchor).annotations[_MMLA]))
    sch.unannotate(anchor, _MMLA)
    *lead, x, c = sch.get_loops(output)
    out_channels = int(sch.get(c).extent)
    x_tile, x_inner = sch.split(x, [None, config.pixels])
    c_tile, c_inner = sch.split(c, [None, config.block])
    if _weights_stay(sch, anchor, config):
        order = [c_tile, *lead, x_tile]
    else:
        order = [*lead, c_tile, x_tile] if len(lead) > 1 else [*lead, x_tile, c_tile]
    sch.reorder(*order, x_inner, c_inner)
    c_registers, c_lanes = sch.split(c_inner, [None, min(4, out_channels & -out_channels)])
    task = sch.fuse(*order)
    sch.compute_at(anchor, task, preserve_unit_loops=True)
    sch.vectorize(c_lanes)
    sch.unroll(c_registers)
    sch.unroll(x_inner)
    loops = sch.get_loops(anchor)[1:]
    n_reduce = 4 if len(sch.get(anchor).iter_vars) == 10 else 2
    reduction, spatial = loops[len(loops) - n_reduce :], loops[: len(loops) - n_reduce]
    *outer, pairs, columns, row, channel = spatial
    sch.reorder(*outer, *reduction[:-1], pairs, columns, row, channel, reduction[-1])
    sch.parallel(task)
    sch.set_scope(anchor, 0, "global")
    sch.unroll(pairs)
    sch.unroll(columns)
    init = sch.decompose_reduction(anchor, reduction[0])
    *_, first, second = sch.get_loops(init)
    sch.vectorize(sch.fuse(first, second))
    copy_patch(sch, task, target)
    sch.tensorize(row, intrinsic_name(mmla))


def _weights_stay(sch: Any, anchor: Any, config: TileConfig) -> bool:  # noqa: ANN401
    """Say whether one block of output channels should visit all positions before the next block starts.

    Compares the bytes each order reads again: the data once per block of channels, or all weights once per row of
    tiles, or per tile of a product.
    """
    node = sch.get(anchor)
    data, weight = (int(np.prod([int(d) for d in r.source.shape], dtype=np.int64)) for r in node.reads[-2:])
    *lead, pairs, columns, _, _ = (int(d) for d in node.writes[0].source.shape)
    rows = int(np.prod(lead, dtype=np.int64)) if len(lead) > 1 else ceil_div(2 * pairs, config.pixels)
    return data * ceil_div(2 * columns, config.block) <= weight * rows


def finish(function: Any, block: str, config: TileConfig, target: Target) -> Any:  # noqa: ANN401
    """Return the function as it is: the schedule expresses all of this template."""
    return function
