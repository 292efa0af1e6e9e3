"""Winograd convolution F(2 x 2, 3 x 3) of 8-bit integers, exact to the last bit: 16 products in place of 36.

With the points 0, 1, -1 and infinity B^T and A^T of `schedules.winograd` hold 0 and +-1 alone, and 2 G whole numbers:

    4 * output tile = A^T [ ((2 G) w (2 G)^T) * (B^T patch B) ] A

Data less their zero point are at most 255, transformed patches 4 times as much; rows of 2 G add up to 3 at most, and so
transformed weights are at most 9 times as large: both fit 16 bits. Sums are int32. They may wrap around on the way, as
integers do, but not the last ones, four times the result: `exact` says when. F(4x4) would need more than 16 bits.

Only worth it where integers are multiplied in 16 bits anyway, two channels an instruction ("madd").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ingot.schedules import winograd, winograd_nests
from ingot.schedules.conv2d import Conv2DWorkload
from ingot.schedules.microkernels import Dot, dot_of, dots_of
from ingot.schedules.padding import Dequantize
from ingot.schedules.statements import Expr
from ingot.schedules.vector import ceil_div
from ingot.schedules.winograd import Form, WinogradConfig
from ingot.target import Target

#: The largest |data - zero point|.
_DATA = 255


@dataclass(frozen=True)
class Choice:
    """A config and the estimated cycles of one core in the unit of `conv2d.cost`."""

    form: Form
    config: WinogradConfig
    cost: float


def exact(weight: np.ndarray) -> bool:
    """Say whether four times any result fits int32, for OHWI weights, whole numbers."""
    largest = np.abs(weight.astype(np.int64)).sum(axis=(1, 2, 3)).max(initial=0)
    return int(4 * _DATA * largest) < 1 << 31


def _dot(target: Target) -> Dot | None:
    """Return the instruction on 16-bit data and weights, if the target has it."""
    return next((dot for dot in dots_of(target) if dot.form == "madd" and dot.weight == "int16"), None)


def form_of(workload: Conv2DWorkload, target: Target, weight: np.ndarray) -> Form | None:
    """Return what a layer would be computed on, or None if the family does not cover it.

    weight: OHWI, zero points subtracted.
    """
    direct, dot = dot_of(target, weight, workload.positions), _dot(target)
    if direct is None or direct.form not in ("madd", "bytes") or dot is None:
        return None
    covered = winograd.supports(workload, target) and workload.in_channels % dot.group == 0 and exact(weight)
    return Form(patch="int16", sums="int32", dot=dot) if covered else None


def choose(workload: Conv2DWorkload, target: Target, weight: np.ndarray, workspace: int) -> Choice | None:
    """Return the config with the least estimated cost, or None if the family does not cover the layer.

    weight: OHWI, zero points subtracted. workspace: bytes the arena has for transformed patches.
    """
    form = form_of(workload, target, weight)
    if form is None:
        return None
    found = [
        Choice(form, config, winograd.cost(workload, config, target, form))
        for config in winograd.configs(workload, target, workspace, form)
    ]
    return min(found, key=lambda choice: (choice.cost, -choice.config.tiles), default=None)


def pack_weight(weight: np.ndarray, choice: Choice) -> np.ndarray:
    """Transform OHWI weights [CO, 3, 3, CI] to int16 [CO/block][16][CI/g][block][g], g channels of a lane together."""
    _, g, _ = winograd.matrices(choice.config.size)
    (co, _, _, ci), block, group = weight.shape, choice.config.block, choice.form.group
    padded = np.zeros((ceil_div(co, block) * block, 3, 3, ci), np.int64)
    padded[:co] = weight.astype(np.int64)
    both = np.rint(2 * g).astype(np.int64)
    transformed = np.einsum("ik,oklc,jl->ijco", both, padded, both, optimize=True).astype(np.int16)
    shaped = transformed.reshape(choice.config.positions, ci // group, group, -1, block)
    return np.ascontiguousarray(shaped.transpose(3, 0, 1, 4, 2))


def primitive(workload: Conv2DWorkload, choice: Choice, convert: Dequantize, out_dtype: str, target: Target) -> Expr:
    """Return the PrimFunc (data NHWC, packed weights, int32 of each output channel, output NHWC of `out_dtype`)."""
    form = replace(choice.form, stored=convert.dtype, zero_point=convert.zero_point, result=out_dtype)
    return winograd_nests.primitive(workload, choice.config, target, form)
