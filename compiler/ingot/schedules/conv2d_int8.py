"""Convolution and matrix product of 8-bit integers with int32 sums, a few input channels at a time.

The weights are packed as [CO/b][KH][KW][CI/g][b/l][...] for an instruction of `schedules.microkernels` that adds g
products to each of its l lanes. The instruction fixes what the data must be, and the patch a tile reads is copied as
that. For an instruction on 8-bit data the zero point never enters the loop: data of the other signedness are shifted
by 128, and their zero point with them, and

    sum (x - z) w  =  sum x w  -  z sum w

where the last term is a constant of each output channel, if padding holds z; so it does. For an instruction on 16-bit
data the patch holds x - z, and padding 0.

Where a position's channels are no whole groups (a model's first layer has 3), a row of taps is taken as one, as its
columns and channels lie next to each other: KW * CI values. Only the end of a row then fills no group; what is read
there meets weights of 0.

Of several groups (`schedules.groups`) each is multiplied by itself. Where its channels are no whole groups of the
instruction's, the copy that a tile reads has zero points between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules import conv2d, conv2d_amx, conv2d_mmla, groups, winograd, winograd_int8
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload, TileConfig
from ingot.schedules.indices import ravel, unravel
from ingot.schedules.lanes import LANES
from ingot.schedules.microkernels import Dot, dot_named, dot_of, intrinsic_name
from ingot.schedules.mmla import Mmla, integer_mmla
from ingot.schedules.padding import PATCH_BYTES, SLACK, Dequantize, finish_rows, rows_of
from ingot.schedules.starts import start_from_constant
from ingot.schedules.vector import DTYPE_BYTES, annotate_block, ceil_div, largest_divisor, registers
from ingot.target import Target

#: Products of 9-bit data and 9-bit weights that int32 holds: longer sums could overflow.
MAX_TERMS = (1 << 31) // (255 * 255)

#: Positions of a tile where rows of taps are joined, at most.
MAX_PIXELS = 14
#: The cost of tiles that do not divide the positions, over that of others.
_CUT = 1.15

_DOT = "ingot.dot"


def preferred_activation(target: Target) -> str:
    """Return the 8-bit dtype of activations that the target's instructions read without shifting: a numpy name.

    x86 multiplies unsigned data with signed weights; all other instructions we use take signed data.
    """
    return "uint8" if target.arch == "x86_64" else "int8"


def grouped(workload: Conv2DWorkload, dot: Dot) -> Conv2DWorkload:
    """Return the workload as the inner loop sees it: a group of channels as one."""
    seen = of_rows(workload) if joins_rows(workload, dot) else workload
    return replace(seen, in_channels=ceil_div(seen.in_channels, dot.group))


def joins_rows(workload: Conv2DWorkload, dot: Dot) -> bool:
    """Say whether rows of taps are joined: the copied rows of a task fit the stack."""
    w, bytes_ = workload, DTYPE_BYTES[dot.data]
    columns = (w.out_width + MAX_PIXELS) * w.strides[1] + w.kernel[1]
    fits = (w.kernel[0] * (columns * w.in_channels + dot.group + SLACK)) * bytes_ <= PATCH_BYTES
    return fits and w.groups == 1 and min(w.kernel) > 1 and w.dilation[1] == 1 and w.in_channels % dot.group != 0


def of_rows(workload: Conv2DWorkload) -> Conv2DWorkload:
    """Return the convolution of as many positions whose channels are all of a row of taps."""
    w = workload
    (kh, kw), (top, left, bottom, right) = w.kernel, w.padding
    return replace(
        w, width=w.width + left + right - kw + 1, in_channels=kw * w.in_channels, kernel=(kh, 1),
        padding=(top, 0, bottom, 0),
    )  # fmt: skip


def default_config(workload: Conv2DWorkload, target: Target, dot: Dot) -> TileConfig:
    """Return the tile with the least estimated cost."""
    inner = grouped(workload, dot)
    space = [replace(c, unroll=_steps(inner, c, target, dot)) for c in conv2d.configs(inner, target)]
    if workload.positions == 1:
        return space[-1]
    if dot.form in ("madd", "bytes") and registers(target).count <= 16:
        # LLVM sums the products of several steps before it adds them to the sums, in registers that are not there.
        space = [replace(c, unroll=largest_divisor(c.unroll, 2)) for c in space]
    if inner.kernel[1] < workload.kernel[1]:
        space = [c for c in space if c.pixels <= MAX_PIXELS]
    fitting = [c for c in space if _registers_used(c, target, dot) <= registers(target).count] or space
    return min(fitting, key=lambda c: (_units(inner, c, target, dot), -c.pixels, c.block))


def _steps(inner: Conv2DWorkload, config: TileConfig, target: Target, dot: Dot) -> int:
    """Return the groups of channels of a step: with lanes, those of whole registers or, if that is few, all."""
    if not (_takes_lanes(target, dot) and config.unroll < LANES and inner.positions > 1):
        return config.unroll
    return inner.in_channels if inner.in_channels <= 2 * LANES else largest_divisor(inner.in_channels, 2)


def _takes_lanes(target: Target, dot: Dot) -> bool:
    return target.arch == "aarch64" and dot.form == "dot4"


def _registers_used(config: TileConfig, target: Target, dot: Dot) -> int:
    """Return sums, weights of one step and inputs: where lanes are used, a register of each position's data."""
    vectors = config.block // registers(target).lanes
    inputs = 2
    if conv2d.uses_lanes(target, config.unroll) or (_takes_lanes(target, dot) and config.unroll > 1):
        inputs = config.pixels + (6 if dot.form == "pairs" else 2)  # copied lanes and products of a few are alive too
    return config.pixels * vectors + vectors + inputs


def _units(inner: Conv2DWorkload, config: TileConfig, target: Target, dot: Dot) -> float:
    """Return the estimated time in units of one instruction, or group of them, of `dot`."""
    lanes = _takes_lanes(target, dot) and config.unroll > 1
    total = conv2d.cost(inner, replace(config, unroll=LANES) if lanes else config, target)
    if inner.pointwise and inner.positions % config.pixels and target.arch == "aarch64":
        total *= _CUT  # LLVM moves what the last tile does not store below a branch, and spills registers there
    if dot.form == "pairs" and target.arch == "aarch64":  # two lanes are copied for each position and step
        steps = inner.kernel[0] * inner.kernel[1] * inner.in_channels
        total += 2 / dot.cost * inner.positions * steps * ceil_div(inner.out_channels, config.block)
    return total


def as_image(workload: MatmulWorkload) -> Conv2DWorkload:
    """Return the 1x1 convolution that computes a matrix product's rows as the columns of an image."""
    lead = workload.lead
    height = lead[-2] if len(lead) > 1 else 1
    return Conv2DWorkload(**{**workload.as_conv().__dict__, "height": height, "width": lead[-1]})


@dataclass(frozen=True)
class Choice:
    """An instruction for a layer, its tile, and the estimated cycles of one core in the unit of `conv2d.cost`."""

    instruction: Dot | Mmla
    config: TileConfig
    cost: float
    #: Whether rows of taps are joined.
    rows: bool = False


#: A way to compute a layer.
Chosen = Choice | conv2d_amx.Choice | winograd_int8.Choice


def choose(
    layer: Conv2DWorkload | MatmulWorkload, target: Target, stored: str, weight: np.ndarray, workspace: int = 0
) -> Chosen | None:
    """Return the fastest way to compute a layer of `stored` data, or None for weights that are no whole numbers.

    weight: OHWI, zero points subtracted. workspace: bytes of the arena the layer may use for itself.
    """
    workload = as_image(layer) if isinstance(layer, MatmulWorkload) else layer
    found: list[Chosen] = []
    dot = dot_of(target, weight, workload.positions)
    if dot is not None:
        config = default_config(workload, target, dot)
        found.append(Choice(dot, config, cost(workload, config, target, dot), joins_rows(workload, dot)))
    if workload.groups > 1:
        return found[0] if found else None
    tdp = conv2d_amx.tdp_of(target, stored, weight)
    tiles = conv2d_amx.choose(layer, tdp, target) if tdp is not None else None
    if tiles is not None:
        found.append(tiles)
    mmla = integer_mmla(target, stored, weight)
    if mmla is not None and workload.out_width > 1:  # it computes two positions at a time
        config = conv2d_mmla.default_config(workload, target, mmla)
        found.append(Choice(mmla, config, conv2d_mmla.cost(workload, config, mmla)))
    fewer = winograd_int8.choose(workload, target, weight, workspace)
    if fewer is not None:
        found.append(fewer)
    return min(found, key=lambda choice: choice.cost, default=None)


def groups_to_join(workload: Conv2DWorkload, target: Target, weight: np.ndarray) -> int:
    """Return how many groups become one for the least estimated cost of `choose`'s kernels.

    weight: OHWI, zero points subtracted.
    """

    def estimate(count: int) -> float:
        joined, dot = conv2d.joined(workload, count), dot_of(target, weight, workload.positions)
        return cost(joined, default_config(joined, target, dot), target, dot) if dot is not None else float("inf")

    return min(groups.joinable(workload.groups, workload.out_channels), key=estimate)


def variants(
    layer: Conv2DWorkload | MatmulWorkload,
    target: Target,
    weight: np.ndarray,
    chosen: Chosen,
    workspace: int,
    stored: str,
) -> list[Chosen]:
    """Return the space of a search around what `choose` has chosen, each with the chosen one's cost.

    The direct convolution has every tile, in both orders, with all steps, and in groups that share a patch. Blocks of
    AMX tiles stand next to them where the target has an instruction on `stored` data.
    """
    workload = as_image(layer) if isinstance(layer, MatmulWorkload) else layer
    direct = chosen.instruction if isinstance(chosen, Choice) else dot_of(target, weight, workload.positions)
    tdp = conv2d_amx.tdp_of(target, stored, weight)
    found: list[Chosen] = []
    if tdp is not None:
        found += [replace(choice, cost=chosen.cost) for choice in conv2d_amx.choices(layer, tdp, target)]
    if isinstance(direct, Mmla):
        found += [Choice(direct, config, chosen.cost) for config in conv2d_mmla.configs(workload, target)]
    elif direct is not None:
        joined = joins_rows(workload, direct)
        found += [Choice(direct, config, chosen.cost, joined) for config in _tiles(workload, target, direct)]
    form = winograd_int8.form_of(workload, target, weight)
    if form is not None:
        fewer = winograd.configs(workload, target, workspace, form)
        found += [winograd_int8.Choice(form, config, chosen.cost) for config in fewer]
    return found


def _tiles(workload: Conv2DWorkload, target: Target, dot: Dot) -> list[TileConfig]:
    inner, joined = grouped(workload, dot), joins_rows(workload, dot)
    found = []
    for tile in conv2d.configs(inner, target):
        if joined and tile.pixels > MAX_PIXELS:
            continue
        copies = not (inner.pointwise or joined)
        for step in dict.fromkeys((tile.unroll, _steps(inner, tile, target, dot))):
            stepped = conv2d.in_orders(inner, replace(tile, unroll=step), copies=copies)
            found += [*(replace(tile, unroll=u) for u in dict.fromkeys(c.unroll for c in stepped)), *stepped]
    return list(dict.fromkeys(found))


def read_dtype(choice: Chosen) -> str:
    """Return the dtype of data that the chosen instruction reads."""
    if isinstance(choice, winograd_int8.Choice):
        return choice.form.patch
    return choice.plan.tdp.data if isinstance(choice, conv2d_amx.Choice) else choice.instruction.data


def primitive(
    workload: Conv2DWorkload | MatmulWorkload,
    choice: Chosen,
    convert: Dequantize,
    out_dtype: str,
    target: Target,
) -> Any:  # noqa: ANN401 - a PrimFunc
    """Return the PrimFunc (data, packed weight, correction, output of `out_dtype`) of a layer."""
    if isinstance(choice, conv2d_amx.Choice):
        return conv2d_amx.primitive(choice.plan, choice.block, target, convert.zero_point, out_dtype)
    if isinstance(choice, winograd_int8.Choice):
        image = as_image(workload) if isinstance(workload, MatmulWorkload) else workload
        return winograd_int8.primitive(image, choice, convert, out_dtype, target)
    return te.create_prim_func(_tensors(workload, choice, convert, out_dtype), index_dtype_override="int64")


def _tensors(
    workload: Conv2DWorkload | MatmulWorkload, choice: Choice, convert: Dequantize, out_dtype: str
) -> list[Any]:
    """Return the TE tensors [data, packed weight, correction, output of `out_dtype`] of a layer."""
    used, config = choice.instruction, choice.config
    if isinstance(used, Dot):
        if isinstance(workload, MatmulWorkload):
            return compute_matmul(workload, config, convert, used, out_dtype)
        return compute(workload, config, convert, used, out_dtype)
    kind = used.data
    change = None if convert.dtype == kind else lambda stored: _as_kind(stored, convert, kind)
    operands = conv2d_mmla.Operands(convert.dtype, convert.zero_point + _shift(convert, kind), change)
    if isinstance(workload, MatmulWorkload):
        data, weight, sums = conv2d_mmla.compute_matmul(workload, config, used, operands)
    else:
        data, weight, sums = conv2d_mmla.compute(workload, config, used, operands)
    constant = te.placeholder((int(sums.shape[-1]),), "int32", name="correction")
    out = te.compute(sums.shape, lambda *i: (sums(*i) + constant[i[-1]]).astype(out_dtype), name="whole_out")
    return [data, weight, constant, out]


def pack_chosen(weight: np.ndarray, choice: Chosen, n_groups: int = 1) -> np.ndarray:
    """Return OHWI weights, whole numbers, as the layer reads them; of `n_groups` groups."""
    if isinstance(choice, winograd_int8.Choice):
        return winograd_int8.pack_weight(weight, choice)
    if isinstance(choice, conv2d_amx.Choice):
        return conv2d_amx.pack_weight(weight, choice.plan, choice.block)
    used, block = choice.instruction, choice.config.block
    if choice.rows:
        weight = weight.reshape(*weight.shape[:2], 1, -1)
    if isinstance(used, Dot):
        return pack_weight(weight, block, used, n_groups)
    return conv2d_mmla.pack_weight(weight, block, used)


def cost(workload: Conv2DWorkload, config: TileConfig, target: Target, dot: Dot) -> float:
    """Return the estimated cycles of one core, in the unit of `conv2d.cost`."""
    return _units(grouped(workload, dot), config, target, dot) * dot.cost


def pack_weight(weight: np.ndarray, block: int, dot: Dot, n_groups: int = 1) -> np.ndarray:
    """Pack OHWI weights (whole numbers) to [CO/block][KH][KW][CI/g][block/l][split][l][g/split], padded with zeros.

    The blocks of each of `n_groups` groups lie together, the last of each padded.
    """
    co, kh, kw, ci = weight.shape
    blocks, steps, within = ceil_div(co // n_groups, block), ceil_div(ci, dot.group), dot.group // dot.split
    padded = np.zeros((n_groups, blocks * block, kh, kw, steps * dot.group), dot.weight)
    padded[:, : co // n_groups, :, :, :ci] = weight.reshape(n_groups, -1, kh, kw, ci).astype(dot.weight)
    shaped = padded.reshape(n_groups * blocks, block // dot.lanes, dot.lanes, kh, kw, steps, dot.split, within)
    return np.ascontiguousarray(shaped.transpose(0, 3, 4, 5, 1, 6, 2, 7))


def _shift(convert: Dequantize, kind: str) -> int:
    """Return what is added to a stored value to make it the instruction's `kind` of data, a dtype."""
    if kind == "int16":
        return -convert.zero_point
    if convert.dtype == kind:
        return 0
    return 128 if kind == "uint8" else -128


def correction(
    weight: np.ndarray, convert: Dequantize, choice: Chosen, bias: np.ndarray | None = None, n_groups: int = 1
) -> np.ndarray:
    """Return the constant of each output channel: bias - z sum w, int32 [CO], z as the chosen instruction sees it.

    Sums of a `Dot` start from it, those of all channels that its blocks hold: each group's is padded with zeros.
    weight: OHWI, whole numbers. bias: [CO], whole numbers of at most 32 bits.
    """
    kind = read_dtype(choice)
    sums = weight.astype(np.int64).sum(axis=(1, 2, 3))
    constant: np.ndarray = -(convert.zero_point + _shift(convert, kind)) * sums
    if bias is not None:
        constant = constant + bias.astype(np.int64).reshape(-1)
    if isinstance(choice, Choice) and isinstance(choice.instruction, Dot):
        constant = constant.reshape(n_groups, -1)
        constant = np.pad(constant, ((0, 0), (0, -constant.shape[1] % choice.config.block))).reshape(-1)
    return constant.astype(np.int32)  # sums in int32 wrap around, so this may too


def compute(
    workload: Conv2DWorkload, config: TileConfig, convert: Dequantize, dot: Dot, out_dtype: str = "float32"
) -> list[Any]:
    """Return the TE tensors [data NHWC, packed weight, correction, output NHWC of `out_dtype` (whole numbers)]."""
    w = workload
    (kh, kw), (sh, sw), (dh, dw) = w.kernel, w.strides, w.dilation
    height, width, co = w.out_height, w.out_width, w.out_channels
    data = te.placeholder((w.batch, w.height, w.width, w.in_channels * w.groups), convert.dtype, name="data")
    if w.pointwise:
        lead = (w.batch, height, width)

        def place(n: Any, y: Any, x: Any) -> tuple[Any, ...]:  # noqa: ANN401 - TE expressions
            return n, y * sh, x * sw

        return _product(data, lead, co, "conv", config, convert, dot, out_dtype, place, w.groups)
    if joins_rows(w, dot):
        return _compute_rows(data, w, config, convert, dot, out_dtype)
    weight = _weight(w.blocks(config.block), w.kernel, w.in_channels, config, dot)
    lanes, of_group = w.blocks(config.block) * config.block, co // w.groups
    constant = te.placeholder((lanes,), "int32", name="correction")
    tiled = width if config.pixels > width else ceil_div(width, config.pixels) * config.pixels
    need = ((height - 1) * sh + (kh - 1) * dh + 1, (tiled - 1) * sw + (kw - 1) * dw + 1)
    steps = ceil_div(w.in_channels, dot.group)
    inputs = steps * dot.group
    source = _source(data, w, need, inputs, convert, dot)
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    rc, rk = te.reduce_axis((0, steps), "rc"), te.reduce_axis((0, dot.group), "rk")

    def channel(c: Any) -> Any:  # noqa: ANN401 - TE expressions
        return groups.channel(c, rc * dot.group + rk, inputs, of_group, w.groups, config.block)

    conv = te.compute(
        (w.batch, height, tiled, lanes),
        lambda n, y, x, c: te.sum(
            source[n, y * sh + ry * dh, x * sw + rx * dw, channel(c)].astype("int32")
            * _weight_at(weight, c, ry, rx, rc, rk, config, dot),
            axis=[ry, rx, rc, rk],
        ),
        name="conv",
        attrs={
            **annotate_block("conv2d", "conv2d_int8", config), _DOT: dot.name, **groups.annotate(of_group, w.groups)
        },
    )  # fmt: skip

    def at(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        lane = groups.lane(c, of_group, w.groups, config.block)
        return (conv[n, y, x, lane] + constant[lane]).astype(out_dtype)

    return [data, weight, constant, te.compute((w.batch, height, width, co), at, name="conv_out")]


def _compute_rows(
    data: Any,  # noqa: ANN401 - a TE tensor
    w: Conv2DWorkload,
    config: TileConfig,
    convert: Dequantize,
    dot: Dot,
    out_dtype: str,
) -> list[Any]:
    """Return the TE tensors of `compute`, rows of taps joined: tiles read copies of whole rows of the image."""
    flat, (kh, _), (sh, sw), dh = of_rows(w), w.kernel, w.strides, w.dilation[0]
    height, width, co, ci = w.out_height, w.out_width, w.out_channels, w.in_channels
    steps, tiled = ceil_div(flat.in_channels, dot.group), ceil_div(width, config.pixels) * config.pixels
    weight = _weight(flat.blocks(config.block), flat.kernel, flat.in_channels, config, dot)
    constant = te.placeholder((ceil_div(co, config.block) * config.block,), "int32", name="correction")
    zero = tirx.const(convert.zero_point + _shift(convert, dot.data), dot.data)
    need = (height - 1) * sh + (kh - 1) * dh + 1, (tiled - 1) * sw * ci + steps * dot.group
    source = rows_of(data, w.padding[:2], need, zero, lambda stored: _as_kind(stored, convert, dot.data), flat=True)
    ry = te.reduce_axis((0, kh), "ry")
    rc, rk = te.reduce_axis((0, steps), "rc"), te.reduce_axis((0, dot.group), "rk")
    shared = [w.height, w.width * ci, w.padding[0], w.padding[1] * ci]
    conv = te.compute(
        (w.batch, height, tiled, ceil_div(co, config.block) * config.block),
        lambda n, y, x, c: te.sum(
            source[n, y * sh + ry * dh, x * (sw * ci) + rc * dot.group + rk].astype("int32")
            * _weight_at(weight, c, ry, 0, rc, rk, config, dot),
            axis=[ry, rc, rk],
        ),
        name="conv",
        attrs={**annotate_block("conv2d", "conv2d_int8", config), _DOT: dot.name, conv2d.SHARED: shared},
    )
    out = te.compute(
        (w.batch, height, width, co),
        lambda n, y, x, c: (conv[n, y, x, c] + constant[c]).astype(out_dtype),
        name="conv_out",
    )
    return [data, weight, constant, out]


def compute_matmul(
    workload: MatmulWorkload, config: TileConfig, convert: Dequantize, dot: Dot, out_dtype: str = "float32"
) -> list[Any]:
    """Return the TE tensors [data (lead..., K), packed weight, correction, output (lead..., N) of `out_dtype`]."""
    w = workload
    data = te.placeholder((*w.lead, w.k), convert.dtype, name="data")
    return _product(data, w.lead, w.n, "matmul", config, convert, dot, out_dtype, lambda *i: i)


def _product(
    data: Any,  # noqa: ANN401 - a TE tensor
    lead: tuple[int, ...],
    n: int,
    name: str,
    config: TileConfig,
    convert: Dequantize,
    dot: Dot,
    out_dtype: str,
    place: Callable[..., Sequence[Any]],
    n_groups: int = 1,
) -> list[Any]:
    """Return the TE tensors of a product, all positions of `lead` joined; the last tile may repeat the last position.

    place: where `data` holds the position at an index of `lead`.
    """
    k, rows, of_group = int(data.shape[-1]) // n_groups, int(np.prod(lead, dtype=np.int64)), n // n_groups
    blocks = n_groups * ceil_div(of_group, config.block)
    weight = _weight(blocks, (1, 1), k, config, dot)
    constant = te.placeholder((blocks * config.block,), "int32", name="correction")
    steps, tall = ceil_div(k, dot.group), ceil_div(rows, config.pixels) * config.pixels
    inputs = steps * dot.group

    def source(row: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        row = row if tall == rows else tirx.min(row, tirx.IntImm("int64", rows - 1))
        return data(*place(*unravel(row, lead)), c)

    read: Any = source
    if inputs > k or dot.data != convert.dtype:
        zero = tirx.const(convert.zero_point + _shift(convert, dot.data), dot.data)

        def value(row: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
            if inputs == k:
                return _as_kind(source(row, c), convert, dot.data)
            inside, c = c % inputs < k, c // inputs * k + c % inputs
            return te.if_then_else(inside, _as_kind(source(row, c), convert, dot.data), zero)

        read = te.compute((tall, inputs * n_groups), value, name="padded")
    rc, rk = te.reduce_axis((0, steps), "rc"), te.reduce_axis((0, dot.group), "rk")
    product = te.compute(
        (tall, blocks * config.block),
        lambda row, c: te.sum(
            read(row, groups.channel(c, rc * dot.group + rk, inputs, of_group, n_groups, config.block)).astype("int32")
            * _weight_at(weight, c, 0, 0, rc, rk, config, dot),
            axis=[rc, rk],
        ),
        name=name,
        attrs={
            **annotate_block(name, "conv2d_int8", config), _DOT: dot.name, **groups.annotate(of_group, n_groups)
        },
    )  # fmt: skip

    def at(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        lane = groups.lane(i[-1], of_group, n_groups, config.block)
        return (product[ravel(i[:-1], lead), lane] + constant[lane]).astype(out_dtype)

    return [data, weight, constant, te.compute((*lead, n), at, name=f"{name}_out")]


def _weight(blocks: int, kernel: tuple[int, int], ci: int, config: TileConfig, dot: Dot) -> Any:  # noqa: ANN401
    """Return the placeholder of packed weights."""
    lanes, within = dot.lanes, dot.group // dot.split
    shape = (blocks, *kernel, ceil_div(ci, dot.group), config.block // lanes)
    return te.placeholder((*shape, dot.split, lanes, within), dot.weight, name="weight")


def _weight_at(
    weight: Any,  # noqa: ANN401 - TE tensors and expressions
    c: Any,  # noqa: ANN401
    ry: Any,  # noqa: ANN401
    rx: Any,  # noqa: ANN401
    rc: Any,  # noqa: ANN401
    rk: Any,  # noqa: ANN401
    config: TileConfig,
    dot: Dot,
) -> Any:  # noqa: ANN401
    """Return one weight as int32."""
    block, lanes, within = config.block, dot.lanes, dot.group // dot.split
    place = (c // block, ry, rx, rc, c % block // lanes, rk // within, c % lanes, rk % within)
    return weight[place].astype("int32")


def _as_kind(stored: Any, convert: Dequantize, kind: str) -> Any:  # noqa: ANN401 - TE expressions
    """Return a stored value as the instruction reads it."""
    if kind == "int16":
        return stored.astype("int16") - tirx.const(convert.zero_point, "int16")
    if convert.dtype == kind:
        return stored
    # Flipping the top bit adds or subtracts 128, and reads the byte as the other kind.
    flip = tirx.const(-128, "int8") if convert.dtype == "int8" else tirx.const(128, "uint8")
    return tirx.reinterpret(kind, stored ^ flip)


def _source(
    data: Any,  # noqa: ANN401 - TE tensors
    w: Conv2DWorkload,
    need: tuple[int, int],
    inputs: int,
    convert: Dequantize,
    dot: Dot,
) -> Any:  # noqa: ANN401
    """Return the tensor the instruction reads: `data`, or a copy of the right kind with `inputs` channels a group."""
    top, left = w.padding[0], w.padding[1]
    moved = any(w.padding) or need[0] > w.height or need[1] > w.width or inputs > w.in_channels
    if not moved and convert.dtype == dot.data:
        return data
    zero = tirx.const(convert.zero_point + _shift(convert, dot.data), dot.data)

    def padded(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        stored = c if inputs == w.in_channels else c // inputs * w.in_channels + c % inputs
        value = _as_kind(data[n, y - top, x - left, stored], convert, dot.data)
        if not moved:
            return value
        inside = [y >= top, y < w.height + top, x >= left, x < w.width + left]
        if inputs > w.in_channels:
            inside.append(c % inputs < w.in_channels)
        return te.if_then_else(te.all(*inside), value, zero)

    return te.compute((w.batch, *need, inputs * w.groups), padded, name="padded")


def schedule(sch: Any, anchor: Any, output: Any, config: TileConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile as `conv2d` does, with the dot product instruction as its innermost loops."""
    dot = dot_named(str(sch.get(anchor).annotations[_DOT]), target)
    sch.unannotate(anchor, _DOT)
    conv2d.schedule(sch, anchor, output, config, target, intrinsic_name(dot))


def finish(function: Any, block: str, config: TileConfig, target: Target) -> Any:  # noqa: ANN401
    """Write the copies of rows as plain loops, and start sums from their corrections."""
    return start_from_constant(finish_rows(function), block)
