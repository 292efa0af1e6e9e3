"""Convolution and matrix product in half precision with float32 sums, two input channels at a time.

The weights are packed as [CO/b][KH][KW][CI/2][b][2] and one instruction of `schedules.dot2` adds two products to each
of its lanes. The data are stored in half precision as well; the result is float32, until what follows rounds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.errors import CompilerError
from ingot.schedules import conv2d, conv2d_amx, conv2d_mmla
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload, TileConfig
from ingot.schedules.dot2 import GROUP, dot2_of, intrinsic_name
from ingot.schedules.half import BF16, Half
from ingot.schedules.mmla import BFMMLA, Mmla
from ingot.schedules.vector import annotate_block, ceil_div
from ingot.target import Target

TEMPLATE = "conv2d_half"
#: Time of a layer whose arithmetic is as fast as float32's, and whose data are half as large, against float32's.
_SMALLER_LOADS = 0.99


def grouped(workload: Conv2DWorkload) -> Conv2DWorkload:
    """Return the workload as the inner loop sees it: pairs of channels as one."""
    fields = {**workload.__dict__, "in_channels": ceil_div(workload.in_channels, GROUP)}
    return Conv2DWorkload(**fields)


def configs(workload: Conv2DWorkload, target: Target) -> list[TileConfig]:
    """Return the space of tiles."""
    return conv2d.configs(grouped(workload), target)


def default_config(workload: Conv2DWorkload, target: Target) -> TileConfig:
    """Return the tile with the least estimated cost."""
    return conv2d.default_tile(grouped(workload), target)


def matmul_workload(workload: MatmulWorkload) -> Conv2DWorkload:
    """Return the 1x1 convolution that computes the same, the last dimension before K as its width."""
    *outer, width = workload.lead
    rows = int(np.prod(outer, dtype=np.int64))
    one, none = (1, 1), (0, 0, 0, 0)
    return Conv2DWorkload(1, rows, width, workload.k, workload.n, one, one, none, one, workload.dtype)


def matmul_config(workload: MatmulWorkload, target: Target) -> TileConfig:
    """Return the tile with the least estimated cost for a product: it joins rows of one outer dimension only."""
    conv = grouped(matmul_workload(workload))
    if workload.positions == 1:
        return conv2d.default_tile(conv, target)
    return min(_joining(workload, target), key=lambda c: (conv2d.cost(conv, c, target), -c.pixels, c.block))


def _joining(workload: MatmulWorkload, target: Target) -> list[TileConfig]:
    """Return the tiles that join rows of one outer dimension only."""
    tiles, lead = conv2d.configs(grouped(matmul_workload(workload)), target), (1, *workload.lead)
    return [c for c in tiles if c.pixels <= lead[-1] or lead[-2] % (c.pixels // lead[-1]) == 0]


def cost(workload: Conv2DWorkload, config: TileConfig, target: Target) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`.

    A dot product instruction takes the time of a float32 FMA of its width (Zen 4 and 5, Neoverse V1 and V2), except on
    the Intel cores that have AMX, which are taken to issue half as many: there it gains by smaller loads alone. Data
    with a border or a single channel over are copied, and the channel is multiplied as a pair.
    """
    pairs = grouped(workload)
    copies = any(workload.padding) or workload.in_channels % GROUP != 0
    if "amx-tile" in target.features:
        even = replace(workload, in_channels=GROUP * pairs.in_channels)
        return _SMALLER_LOADS * conv2d.cost(even, config, target, copies=copies)
    return conv2d.cost(pairs, config, target, copies=copies)


@dataclass(frozen=True)
class Choice:
    """How a layer multiplies: its tile, by an instruction on two rows or else by pairs, and the estimated cycles."""

    config: TileConfig
    mmla: Mmla | None
    cost: float


def multiplies(target: Target, half: Half) -> bool:
    """Say whether a target has instructions that multiply values of a format, with float32 sums."""
    return dot2_of(target, half) is not None or conv2d_amx.half_tdp_of(target, half) is not None


def choose(workload: Conv2DWorkload | MatmulWorkload, target: Target, half: Half) -> Chosen | None:
    """Return the fastest of pairs, an instruction on two rows and one on tiles; None if none is for such a layer."""
    found: list[Chosen] = []
    tdp = conv2d_amx.half_tdp_of(target, half)
    tiles = conv2d_amx.choose(workload, tdp, target) if tdp is not None else None
    if tiles is not None:
        found.append(tiles)
    if dot2_of(target, half) is not None:
        if isinstance(workload, MatmulWorkload):
            image, config = matmul_workload(workload), matmul_config(workload, target)
        else:
            image, config = workload, default_config(workload, target)
        if half is BF16 and BFMMLA.feature in target.features and image.out_width > 1:
            tile = conv2d_mmla.default_config(image, target, BFMMLA)
            found.append(Choice(tile, BFMMLA, conv2d_mmla.cost(image, tile, BFMMLA)))
        found.append(Choice(config, None, cost(image, config, target)))
    return min(found, key=lambda choice: choice.cost, default=None)


#: A way to compute a layer.
Chosen = Choice | conv2d_amx.Choice


def variants(layer: Conv2DWorkload | MatmulWorkload, target: Target, half: Half, chosen: Chosen) -> list[Chosen]:
    """Return the space of a search around what `choose` has chosen, each with the chosen one's cost.

    Tiles of AMX where the target has them; else or besides, pairs (or an instruction on two rows, if that is chosen)
    with every tile, in both orders, with all steps, and in groups that share a patch.
    """
    found: list[Chosen] = []
    tdp = conv2d_amx.half_tdp_of(target, half)
    if tdp is not None:
        found += [replace(choice, cost=chosen.cost) for choice in conv2d_amx.choices(layer, tdp, target)]
    if dot2_of(target, half) is None:
        return found
    mmla = chosen.mmla if isinstance(chosen, Choice) else None
    image = matmul_workload(layer) if isinstance(layer, MatmulWorkload) else layer
    tiles = conv2d_mmla.configs(image, target) if mmla is not None else _tiles(layer, target)
    return [*found, *(Choice(tile, mmla, chosen.cost) for tile in tiles)]


def _tiles(layer: Conv2DWorkload | MatmulWorkload, target: Target) -> list[TileConfig]:
    if isinstance(layer, MatmulWorkload):
        inner, tiles = grouped(matmul_workload(layer)), _joining(layer, target)
    else:
        inner = grouped(layer)
        tiles = conv2d.configs(inner, target)
    ordered = (config for tile in tiles for config in conv2d.in_orders(inner, tile, copies=not inner.pointwise))
    return [*tiles, *ordered]


def pack_chosen(weight: np.ndarray, choice: Chosen, half: Half) -> np.ndarray:
    """Return OHWI float32 weights, rounded, as the layer reads them."""
    if isinstance(choice, conv2d_amx.Choice):
        return conv2d_amx.pack_weight(half.round(weight), choice.plan, choice.block)
    if choice.mmla is None:
        return pack_weight(weight, choice.config.block, half)
    return conv2d_mmla.pack_weight(half.round(weight), choice.config.block, choice.mmla)


def primitive(workload: Conv2DWorkload | MatmulWorkload, choice: Chosen, half: Half, target: Target) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the PrimFunc (data in half precision, packed weight, output float32) of a layer."""
    if isinstance(choice, conv2d_amx.Choice):
        return conv2d_amx.primitive(choice.plan, choice.block, target)
    return te.create_prim_func(_tensors(workload, choice, half), index_dtype_override="int64")


def _tensors(workload: Conv2DWorkload | MatmulWorkload, choice: Choice, half: Half) -> list[Any]:
    """Return the TE tensors [data in half precision, packed weight, output float32] of a layer."""
    if choice.mmla is None:
        if isinstance(workload, MatmulWorkload):
            return compute_matmul(workload, choice.config, half)
        return compute(workload, choice.config, half)
    operands = conv2d_mmla.Operands(half.dtype, 0, None)
    if isinstance(workload, MatmulWorkload):
        return list(conv2d_mmla.compute_matmul(workload, choice.config, choice.mmla, operands))
    return list(conv2d_mmla.compute(workload, choice.config, choice.mmla, operands))


def pack_weight(weight: np.ndarray, block: int, half: Half) -> np.ndarray:
    """Pack OHWI float32 weights, rounded, to [CO/block][KH][KW][CI/2][block][2], padded with zeros."""
    co, kh, kw, ci = weight.shape
    blocks, groups = ceil_div(co, block), ceil_div(ci, GROUP)
    padded = np.zeros((blocks * block, kh, kw, groups * GROUP), half.dtype)
    padded[:co, :, :, :ci] = half.round(weight)
    shaped = padded.reshape(blocks, block, kh, kw, groups, GROUP)
    return np.ascontiguousarray(shaped.transpose(0, 2, 3, 4, 1, 5))


def compute(workload: Conv2DWorkload, config: TileConfig, half: Half) -> list[Any]:
    """Return the TE tensors [data NHWC in half precision, packed weight, output NHWC float32]."""
    w = workload
    (kh, kw), (sh, sw), (dh, dw) = w.kernel, w.strides, w.dilation
    height, width, co = w.out_height, w.out_width, w.out_channels
    blocks, groups = ceil_div(co, config.block), ceil_div(w.in_channels, GROUP)
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels), half.dtype, name="data")
    weight = te.placeholder((blocks, kh, kw, groups, config.block, GROUP), half.dtype, name="weight")
    tiled = width if config.pixels > width else ceil_div(width, config.pixels) * config.pixels
    need = ((height - 1) * sh + (kh - 1) * dh + 1, (tiled - 1) * sw + (kw - 1) * dw + 1)
    source = _source(data, w, need, groups * GROUP)
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    rc, rk = te.reduce_axis((0, groups), "rc"), te.reduce_axis((0, GROUP), "rk")
    conv = te.compute(
        (w.batch, height, tiled, blocks * config.block),
        lambda n, y, x, c: te.sum(
            half.widen(source[n, y * sh + ry * dh, x * sw + rx * dw, rc * GROUP + rk])
            * half.widen(weight[c // config.block, ry, rx, rc, c % config.block, rk]),
            axis=[ry, rx, rc, rk],
        ),
        name="conv",
        attrs=annotate_block("conv2d", TEMPLATE, config),
    )
    out = te.compute((w.batch, height, width, co), lambda n, y, x, c: conv[n, y, x, c], name="conv_out")
    return [data, weight, out]


def _source(data: Any, w: Conv2DWorkload, need: tuple[int, int], channels: int) -> Any:  # noqa: ANN401 - TE tensors
    """Return the tensor the instruction reads: `data`, or a copy padded with zeros, also to whole pairs."""
    top, left = w.padding[0], w.padding[1]
    if not (any(w.padding) or need[0] > w.height or need[1] > w.width or channels > w.in_channels):
        return data
    zero = tirx.const(0, str(data.dtype))

    def padded(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        inside = te.all(y >= top, y < w.height + top, x >= left, x < w.width + left, c < w.in_channels)
        return te.if_then_else(inside, data[n, y - top, x - left, c], zero)

    return te.compute((w.batch, *need, channels), padded, name="padded")


def compute_matmul(workload: MatmulWorkload, config: TileConfig, half: Half) -> list[Any]:
    """Return the TE tensors [data (lead..., K) in half precision, packed weight, output (lead..., N) float32].

    Rows that fill the last tile repeat the last row, and are not stored.
    """
    blocks, groups = ceil_div(workload.n, config.block), ceil_div(workload.k, GROUP)
    *outer, width = workload.lead
    tiled = width if config.pixels > width else ceil_div(width, config.pixels) * config.pixels
    data = te.placeholder((*workload.lead, workload.k), half.dtype, name="data")
    weight = te.placeholder((blocks, 1, 1, groups, config.block, GROUP), half.dtype, name="weight")
    source = data
    if workload.k % GROUP or tiled > width:
        zero = tirx.const(0, half.dtype)

        def padded(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
            row = tirx.min(i[-2], tirx.IntImm("int64", width - 1)) if tiled > width else i[-2]
            value = data(*i[:-2], row, i[-1])
            return te.if_then_else(i[-1] < workload.k, value, zero) if workload.k % GROUP else value

        source = te.compute((*outer, tiled, groups * GROUP), padded, name="padded")
    rc, rk = te.reduce_axis((0, groups), "rc"), te.reduce_axis((0, GROUP), "rk")
    conv = te.compute(
        (*outer, tiled, blocks * config.block),
        lambda *i: te.sum(
            half.widen(source(*i[:-1], rc * GROUP + rk))
            * half.widen(weight[i[-1] // config.block, 0, 0, rc, i[-1] % config.block, rk]),
            axis=[rc, rk],
        ),
        name="matmul",
        attrs=annotate_block("matmul", TEMPLATE, config),
    )
    return [data, weight, te.compute((*workload.lead, workload.n), lambda *i: conv(*i), name="matmul_out")]


def compute_row(workload: MatmulWorkload, config: TileConfig, half: Half) -> list[Any]:
    """Return the TE tensors [data (lead..., K) float32, weight as `conv2d.pack_weight`, rounded, output float32].

    The weights are widened as they are loaded; products and sums are float32.
    """
    blocks = ceil_div(workload.n, config.block)
    data = te.placeholder((*workload.lead, workload.k), "float32", name="data")
    weight = te.placeholder((blocks, 1, 1, workload.k, config.block), half.dtype, name="weight")
    rc = te.reduce_axis((0, workload.k), "rc")
    conv = te.compute(
        (*workload.lead, blocks * config.block),
        lambda *i: te.sum(
            data(*i[:-1], rc) * half.widen(weight[i[-1] // config.block, 0, 0, rc, i[-1] % config.block]), axis=[rc]
        ),
        name="matmul",
        attrs=annotate_block("matmul", "conv2d", config),
    )
    return [data, weight, te.compute((*workload.lead, workload.n), lambda *i: conv(*i), name="matmul_out")]


def schedule(sch: Any, anchor: Any, output: Any, config: TileConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile as `conv2d` does, with the dot product instruction as its innermost loops."""
    dot = dot2_of(target, BF16)
    if dot is None:
        raise CompilerError("this target has no dot product instruction of bfloat16", where=target.name)
    conv2d.schedule(sch, anchor, output, config, target, intrinsic_name(dot))


def finish(function: Any, block: str, config: TileConfig, target: Target) -> Any:  # noqa: ANN401
    """Return the function as it is: the schedule expresses all of this template."""
    return function
