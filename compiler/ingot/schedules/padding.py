"""Zero padding for windowed operators: each tile copies the patch it reads, zeros included, next to the core.

A patch is a few kilobytes, stays in the first-level cache and is read KH * KW * (channels of the tile) times, so the
copy costs about one percent of the arithmetic; a padded copy of the whole image would cost a pass over memory and its
size in the arena.

Where an element takes part in few products (few channels, or a depthwise convolution of bytes), conditions on every
load of a copy cost as much as they do. There a task copies the whole rows that it reads (`rows_of`), and each row is
written as three loops without conditions (`finish_rows`), which LLVM makes loops of vectors or calls of memcpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import s_tir, te, tirx

from ingot.schedules.border import first_block, renewed
from ingot.schedules.vector import DTYPE_BYTES, lanes_for
from ingot.target import Target

# A patch lives on the stack of the thread that computes the tile; a larger one is a padded image in the arena.
PATCH_BYTES = 32 * 1024

#: The block that copies whole rows, and how many elements more than it holds may be read.
ROWS = "padded_rows"
SLACK = 16
_COPIED = "ingot.copied_rows"


@dataclass(frozen=True)
class Dequantize:
    """How the stored integers of a quantised activation become real: scale * (stored - zero_point)."""

    dtype: str
    scale: float
    zero_point: int

    def __call__(self, stored: Any) -> Any:  # noqa: ANN401 - TE expressions
        """Return the float32 value of a stored integer."""
        value = (stored.astype("int32") - self.zero_point).astype("float32")
        return value if self.scale == 1.0 else value * tirx.const(self.scale, "float32")


def pad_nhwc(
    data: Any,  # noqa: ANN401 - TE tensors
    top: int,
    left: int,
    height: int,
    width: int,
    convert: Dequantize | None = None,
) -> Any:  # noqa: ANN401
    """Return `data` (NHWC) moved down by `top` and right by `left` into zeros of `height` x `width`.

    With `convert`, stored integers become real values on the way. Returns `data` itself if nothing moves, nothing is
    converted and it is already at least that large: a window then never reads past it.
    """
    n, old_height, old_width, channels = (int(d) for d in data.shape)
    moved = top != 0 or left != 0 or height > old_height or width > old_width
    if not moved and convert is None:
        return data
    value: Callable[[Any], Any] = convert if convert is not None else (lambda stored: stored)
    zero = tirx.const(0, "float32" if convert is not None else str(data.dtype))

    def padded(b: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        read = value(data[b, y - top, x - left, c])
        if not moved:
            return read
        inside = te.all(y >= top, y < old_height + top, x >= left, x < old_width + left)
        return te.if_then_else(inside, read, zero)

    return te.compute((n, height, width, channels), padded, name="padded")


def copy_patch(sch: Any, loop: Any, target: Target) -> None:  # noqa: ANN401
    """Compute the block "padded", if there is one, below `loop`, when the patch fits the stack.

    Otherwise the block stays a loop nest of its own, for the caller's caller to schedule.
    """
    blocks = [b for b in sch.get_child_blocks(sch.get_sblock("root")) if str(sch.get(b).name_hint) == "padded"]
    if not blocks:
        return
    trial = sch.copy()
    trial.compute_at(blocks[0], loop, preserve_unit_loops=True)
    depth = len(trial.get_loops(blocks[0])) - len(trial.get(blocks[0]).iter_vars)
    extents = [int(trial.get(item).extent) for item in trial.get_loops(blocks[0])[depth:]]
    size = DTYPE_BYTES[str(trial.get(blocks[0]).writes[0].source.dtype)]
    for extent in extents:
        size *= extent
    if size > PATCH_BYTES:
        return
    sch.compute_at(blocks[0], loop, preserve_unit_loops=True)
    sch.set_scope(blocks[0], 0, "global")
    *_, channels = sch.get_loops(blocks[0])
    lanes = lanes_for(target, str(sch.get(blocks[0]).writes[0].source.dtype), extents[-1])
    if lanes > 1:
        _, inner = sch.split(channels, [None, lanes])
        sch.vectorize(inner)


def rows_of(
    data: Any,  # noqa: ANN401 - TE tensors and expressions
    offset: tuple[int, int],
    shape: tuple[int, int],
    filler: Any,  # noqa: ANN401
    change: Callable[[Any], Any],
    *,
    flat: bool,
) -> Any:  # noqa: ANN401
    """Return `data` (NHWC) moved down and right by `offset`, in `filler`, each value changed: for `copy_rows`.

    shape: rows, and columns or, if `flat`, elements of a row of columns and channels. The result is
    [N, rows, columns, C], or [N, rows, elements + SLACK].
    """
    n, height, width, channels = (int(d) for d in data.shape)
    (top, left), (rows, length) = offset, shape

    def at(b: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        inside = te.all(y >= top, y < height + top, x >= left, x < width + left)
        return te.if_then_else(inside, change(data[b, y - top, x - left, c]), filler)

    if not flat:
        return te.compute((n, rows, length, channels), at, name=ROWS)
    return te.compute((n, rows, length + SLACK), lambda b, y, i: at(b, y, i // channels, i % channels), name=ROWS)


def copy_rows(sch: Any, loop: Any, image: list[int]) -> None:  # noqa: ANN401
    """Compute the block of `rows_of` below `loop`, which must be above all columns; `finish_rows` writes its loops.

    image: its rows and columns (or elements of a row), how far it is moved down, and to the right.
    """
    (block,) = (b for b in sch.get_child_blocks(sch.get_sblock("root")) if str(sch.get(b).name_hint) == ROWS)
    sch.compute_at(block, loop, preserve_unit_loops=True)
    sch.set_scope(block, 0, "global")
    columns = sch.get_loops(block)[2 - len(sch.get(block).iter_vars)]
    sch.annotate(columns, _COPIED, image)


def finish_rows(function: Any) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Write the copies of `copy_rows` as a loop to the left of the image, one inside and one to its right.

    Rows outside the image are filled. The last loop goes on to the end of the buffer.
    """

    def visit(loop: Any) -> Any:  # noqa: ANN401
        if _COPIED not in loop.annotations:
            return loop
        rows, columns, top, left = (int(v) for v in loop.annotations[_COPIED])
        realize = first_block(loop.body)
        y, size = realize.iter_values[1], int(realize.block.body.buffer.shape[2])
        kind, end = str(loop.loop_var.ty.dtype), min(left + columns, size)

        def piece(first: int, last: int, chosen: int) -> Any:  # noqa: ANN401
            store = realize.block.body
            value = store.value.args[chosen]
            block = s_tir.SBlock(
                realize.block.iter_vars, realize.block.reads if chosen == 1 else [], realize.block.writes,
                realize.block.name_hint, tirx.BufferStore(store.buffer, value, store.indices),
            )  # fmt: skip
            inner = tvm_ffi.structural_map(loop.body, [(s_tir.SBlock, lambda _: block)])
            nest = tirx.For(
                loop.loop_var, tirx.IntImm(kind, first), tirx.IntImm(kind, last - first), tirx.ForKind.SERIAL, inner
            )
            return renewed(nest, [], [])

        pieces = [(0, left, 2), (left, end, 1), (end, size, 2)]
        copied = [piece(*limits) for limits in pieces if limits[1] > limits[0]]
        inside = tirx.all(y >= top, y < rows + top)
        row = tirx.SeqStmt(copied) if len(copied) > 1 else copied[0]
        return tirx.IfThenElse(inside, row, piece(0, size, 2))

    return tvm_ffi.structural_map(function, [(tirx.For, visit)])
