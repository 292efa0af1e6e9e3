"""Zero padding for windowed operators: each tile copies the patch it reads, zeros included, next to the core.

A patch is a few kilobytes, stays in the first-level cache and is read KH * KW * (channels of the tile) times, so the
copy costs about one percent of the arithmetic; a padded copy of the whole image would cost a pass over memory and its
size in the arena.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ingot.schedules.vector import DTYPE_BYTES, lanes_for
from ingot.target import Target

# A patch lives on the stack of the thread that computes the tile; a larger one is a padded image in the arena.
PATCH_BYTES = 32 * 1024


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
