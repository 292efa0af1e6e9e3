"""Convolutions of several groups in the register tile of `conv2d`, float32 or (`conv2d_int8`) of 8-bit integers.

A tile lies in one group. Where the output channels of a group do not fill whole blocks, the last block of each computes
some lanes for nothing. Groups may be joined before, which fills lanes, and multiplies zeros: what they do not share.
1x1 windows that step over positions are computed as wider ones are: TVM's bounds of joined indices overflow in 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.sym import Analyzer

from ingot.schedules.vector import ceil_div

#: The annotation of a reduction block of several groups: the output channels of one.
GROUPED = "ingot.of_group"


def joinable(groups: int, out_channels: int) -> list[int]:
    """Return the numbers of groups that may become one.

    Those of one result are always joined: TVM cannot place sums of which a tile stores one lane.
    """
    divisors = [n for n in range(2, groups + 1) if groups % n == 0]
    few = [n for n in divisors if n in (2, 4)]
    return [1, *few] if out_channels > groups else few or divisors[:1]


def join_weight(weight: np.ndarray, groups: int, count: int) -> np.ndarray:
    """Return OHWI weights in which `count` groups at a time are one; what they do not share are zeros."""
    out, kh, kw, channels = weight.shape
    wide = np.zeros((groups, out // groups, kh, kw, count, channels), weight.dtype)
    for group, part in enumerate(weight.reshape(groups, -1, kh, kw, channels)):
        wide[group, :, :, :, group % count] = part
    return wide.reshape(out, kh, kw, count * channels)


def annotate(of_group: int, groups: int) -> dict[str, Any]:
    """Return the annotation of a reduction block."""
    return {GROUPED: of_group} if groups > 1 else {}


def channel(lane: Any, rc: Any, inputs: int, of_group: int, groups: int, block: int) -> Any:  # noqa: ANN401 - TE
    """Return the input channel of a lane's step: a block lies in one group, which has its own `inputs`."""
    return rc if groups == 1 else lane // block // ceil_div(of_group, block) * inputs + rc


def lane(c: Any, of_group: int, groups: int, block: int) -> Any:  # noqa: ANN401 - TE expressions
    """Return the lane in the blocks of all groups that computes an output channel."""
    padded = ceil_div(of_group, block) * block
    return c if groups == 1 or padded == of_group else c // of_group * padded + c % of_group


def split_channels(sch: Any, output: Any, of_group: int) -> None:  # noqa: ANN401
    """Cut the last axis of the block `output` into groups and the channels of one.

    The indices of what it reads are simplified: else the regions it reads would be found too large.
    """
    layout = tirx.IndexMap.from_func(
        lambda *i: [*i[:-1], i[-1] // of_group, i[-1] % of_group],
        ndim=len(sch.get(output).iter_vars),
        index_dtype="int64",
    )
    sch.transform_block_layout(output, layout)
    node, analyzer = sch.get(output), Analyzer()
    for item in node.iter_vars:
        analyzer.bind(item.var, item.dom)

    def load(expr: Any) -> Any:  # noqa: ANN401
        return tirx.BufferLoad(expr.source, [analyzer.simplify(index) for index in expr.indices])

    def region(read: Any) -> Any:  # noqa: ANN401
        ranges = [ir.Range.from_min_extent(analyzer.simplify(r.min), r.extent) for r in read.region]
        return tirx.BufferRegion(read.source, ranges)

    block = s_tir.SBlock(
        node.iter_vars,
        [region(read) for read in node.reads],
        node.writes,
        node.name_hint,
        tvm_ffi.structural_map(node.body, [(ir.TensorLoad, load)]),
        node.init,
        node.alloc_buffers,
        node.match_buffers,
        node.annotations,
    )
    sch.state.replace(sch.get_sref(output), block, {node: block})
