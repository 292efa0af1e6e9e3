"""Layers whose weights are stored in few bits: their form in the program, and their kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from ingot.passes.rewriter import Rewriter, op_name, shape_of
from ingot.passes.select_integers import window_of
from ingot.passes.template_call import call_template
from ingot.schedules import conv2d
from ingot.schedules.conv2d import CHANNELS_INNER, POSITIONS_INNER, Conv2DWorkload, MatmulWorkload, TileConfig
from ingot.schedules.stored import FORMATS, Decoder, StoredWeight, WeightFormat, pack_codes, pack_scales
from ingot.schedules.vector import ceil_div, registers
from ingot.target import Target

#: Calls whose function has a name with this beginning stand for a weight in the format of the name's rest.
STORED = "ingot.stored."
#: FuseOps' pattern kind of an operator each of whose results depends on a few elements.
_INJECTIVE = 2


def stored_call(rewriter: Rewriter, weight: StoredWeight, name: str) -> Any:  # noqa: ANN401 - a Relax expression
    """Return the expression that stands for a weight: a call on its codes, scales and codebook."""
    parts = {"codes": weight.codes, "scales": weight.scales, "codebook": weight.table}
    args = [rewriter.add_weight(f"{name}_{part}", value) for part, value in parts.items() if value.size]
    ty = relax.TensorType(weight.codes.shape, "float32")
    return relax.op.call_dps_packed(STORED + weight.format.name, relax.Tuple(args), out_ty=ty)


def is_stored(rewriter: Rewriter, expr: Any) -> StoredWeight | None:  # noqa: ANN401 - a Relax expression
    """Return the weight that an expression stands for, also where the call is transposed; None for all others."""
    value = rewriter.value_of(expr)
    if op_name(value) in ("relax.permute_dims", "relax.reshape"):
        inner = is_stored(rewriter, value.args[0])
        return None if inner is None else _moved(inner, value)
    if op_name(value) != "relax.call_dps_packed" or not str(value.args[0].global_symbol).startswith(STORED):
        return None
    parts = [rewriter.weight(part) for part in value.args[1].fields]
    codes, scales, *table = (part for part in parts if part is not None)
    name = str(value.args[0].global_symbol).removeprefix(STORED)
    return StoredWeight(FORMATS[name], codes, scales, table[0] if table else np.zeros(0, np.float32))


def _moved(weight: StoredWeight, call: Any) -> StoredWeight | None:  # noqa: ANN401 - a Relax call
    """Return the weight after permute_dims, or after a reshape that only adds or drops dimensions of extent 1."""
    codes, scales, shape = weight.codes, weight.scales, shape_of(call)
    if op_name(call) == "relax.permute_dims":
        axes = None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
        return replace(weight, codes=np.transpose(codes, axes), scales=np.transpose(scales, axes))
    kept = [axis for axis, extent in enumerate(codes.shape) if extent > 1]
    if [codes.shape[axis] for axis in kept] != [extent for extent in shape if extent > 1]:
        return None
    extents = iter(scales.shape[axis] for axis in kept)
    scale_shape = [next(extents) if extent > 1 else 1 for extent in shape]
    return replace(weight, codes=codes.reshape(shape), scales=scales.reshape(scale_shape))


def select_stored(rewriter: Rewriter, call: Any, args: list[Any], target: Target) -> tuple[Any, int] | None:  # noqa: ANN401
    """Return the kernel's call and its multiply-accumulates for a layer that reads a stored weight, or None.

    Case 1: conv2d of one group. Case 2: matmul. Both with the tile of the float32 layer: `schedules.conv2d`.
    Case 3: take of rows.
    """
    position = 0 if op_name(call) == "relax.take" else 1
    if op_name(call) not in ("relax.nn.conv2d", "relax.matmul", "relax.take"):
        return None
    weight = is_stored(rewriter, args[position])
    if weight is None:
        return None
    base = str(getattr(args[position], "name", "weight"))
    if op_name(call) == "relax.take":
        return _rows(rewriter, call, args, weight, base), 0
    if op_name(call) == "relax.nn.conv2d":
        out_channels, *_, channels = weight.codes.shape
        work = Conv2DWorkload(in_channels=channels, out_channels=out_channels, **window_of(call, args))
        config = _tile(work, target, weight.format)
        decoder = Decoder(weight.format, conv2d.packed_shape(work, config), out_channels)
        tensors = conv2d.compute(work, config, weight=decoder)
        macs = work.macs
    else:
        weight = _as_ohwi(weight)
        product = MatmulWorkload(shape_of(args[0])[:-1], weight.codes.shape[3], weight.codes.shape[0], "float32")
        config = _tile(product.as_conv(), target, weight.format)
        decoder = Decoder(weight.format, conv2d.packed_shape(product.as_conv(), config), product.n)
        tensors = conv2d.compute_matmul(product, config, weight=decoder)
        macs = product.macs
    name = f"{op_name(call).split('.')[-1]}_{weight.format.name}"
    parts = _parts(rewriter, weight, config.block, base)
    return call_template(rewriter, name, tensors, [args[0], *parts], call.ty), macs


def _as_ohwi(weight: StoredWeight) -> StoredWeight:
    """Return the weight of a matrix product, [K, N], as that of a 1x1 convolution."""
    codes, scales = (part.T[:, None, None, :] for part in (weight.codes, weight.scales))
    return replace(weight, codes=codes, scales=scales)


def _tile(work: Conv2DWorkload, target: Target, form: WeightFormat) -> TileConfig:
    """Return the tile, with the order that reads fewer bytes again: activations per block or weights per tile.

    What decoding keeps in registers must fit beside the tile.
    """
    regs = registers(target)
    free = regs.count - form.registers
    space = conv2d.configs(work, target)
    fitting = [c for c in space if c.pixels * (v := c.block // regs.lanes) + v + 1 <= free]
    config = conv2d.default_tile(work, target)
    if work.positions > 1 and config not in fitting and fitting:
        config = min(fitting, key=lambda c: (conv2d.cost(work, c, target), -c.pixels, c.block))
    data = work.batch * work.height * work.width * work.in_channels * ceil_div(work.out_channels, config.block)
    kh, kw = work.kernel
    weights = kh * kw * work.in_channels * work.out_channels * ceil_div(work.positions, config.pixels)
    return replace(config, order=POSITIONS_INNER if data <= weights else CHANNELS_INNER)


def _parts(rewriter: Rewriter, weight: StoredWeight, block: int, base: str) -> list[Any]:
    """Return the packed constants in the order of `Decoder.placeholders`."""
    arrays = {f"{base}_{weight.format.name}": pack_codes(weight, block), f"{base}_scales": pack_scales(weight, block)}
    if weight.table.size:
        arrays[f"{base}_codebook"] = weight.table
    return [rewriter.add_weight(name, array) for name, array in arrays.items()]


def _rows(rewriter: Rewriter, call: Any, args: list[Any], weight: StoredWeight, base: str) -> Any:  # noqa: ANN401
    """Case 3: each element of a row is decoded as it is read."""
    index = shape_of(args[1])
    rows, columns = weight.codes.shape
    wide = replace(weight, codes=weight.codes[:, None, None], scales=weight.scales[:, None, None])
    decoder = Decoder(weight.format, (rows, 1, 1, columns, 1), rows)
    indices = te.placeholder(index, str(args[1].ty.dtype.dtype), name="indices")

    def value(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        row = tirx.max(tirx.min(indices(*i[:-1]).astype("int64"), tirx.IntImm("int64", rows - 1)), 0)
        return decoder.finish(decoder.at(row, 0, 0, i[-1], 0), row)

    out = te.compute((*index, columns), value, name="rows")
    parts = _parts(rewriter, wide, 1, base)
    tensors = [indices, *decoder.placeholders, out]
    return call_template(rewriter, "take_stored", tensors, [args[1], *parts], call.ty, pattern=_INJECTIVE)
