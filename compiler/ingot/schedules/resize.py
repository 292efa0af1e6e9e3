"""Nearest and bilinear resize of images: source indices and weights are tables made at compile time.

TVM's definition computes a floor, a clamp and a division for every element of every channel; here each output row
and column looks its source up. In NHWC the channels are a plain vector loop; in NCHW, for a resize that no NHWC layer
stands next to, nothing is transposed, and bilinear mixes whole rows first, so that half as much is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules import pieces
from ingot.schedules.rows import MAX_STACK_ROW, STAGE
from ingot.schedules.vector import annotate_block, lanes_for
from ingot.target import Target

_NEAREST: dict[str, Callable[[Any], Any]] = {
    "round": lambda x: np.floor(x + np.float32(0.5)),
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}
COORDINATES = ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn")


@dataclass(frozen=True)
class ResizeWorkload:
    """A resize of [batch, height, width, channels] to [batch, out_height, out_width, channels], or of NCHW images.

    method: "linear" or "nearest_neighbor". coordinates: a name of COORDINATES (ONNX Resize's
    coordinate_transformation_mode). rounding: ONNX's nearest_mode, TVM's names.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    method: str
    coordinates: str
    rounding: str
    dtype: str
    layout: str = "NHWC"

    @property
    def supported(self) -> bool:
        """Say whether `compute` covers this resize."""
        if self.coordinates not in COORDINATES or not self.dtype.startswith("float"):
            return False
        return self.method == "linear" or (self.method == "nearest_neighbor" and self.rounding in _NEAREST)


def source_coordinates(size: int, out_size: int, mode: str) -> Any:  # noqa: ANN401 - numpy's arithmetic is untyped
    """Return the float32 source coordinate of each output index (ONNX Resize, "coordinate_transformation_mode")."""
    index = np.arange(out_size, dtype=np.float32)
    scale = np.float32(size) / np.float32(out_size)
    if mode == "align_corners":
        step = np.float32(size - 1) / np.float32(out_size - 1) if out_size > 1 else np.float32(0)
        return index * step
    if mode == "asymmetric":
        return index * scale
    if mode == "pytorch_half_pixel" and out_size == 1:
        return np.zeros(1, np.float32)
    if mode == "tf_half_pixel_for_nn":
        return (index + np.float32(0.5)) * scale
    return (index + np.float32(0.5)) * scale - np.float32(0.5)


def tables(size: int, out_size: int, workload: ResizeWorkload) -> list[np.ndarray]:
    """Return, for one dimension, [index] for nearest or [low index, high index, weight of high] for linear."""
    where = source_coordinates(size, out_size, workload.coordinates)
    if workload.method == "nearest_neighbor":
        nearest = _NEAREST[workload.rounding](where)
        return [np.clip(nearest, 0, size - 1).astype(np.int32)]
    low = np.floor(where)
    weight = (where - low).astype(workload.dtype)
    first = np.clip(low, 0, size - 1).astype(np.int32)
    second = np.clip(low + 1, 0, size - 1).astype(np.int32)
    return [first, second, weight]


def all_tables(workload: ResizeWorkload) -> list[np.ndarray]:
    """Return the tables of the rows, then those of the columns: the operands of `compute` after the image.

    Where every row and column is repeated equally often, there are none.
    """
    if factors(workload) is not None:
        return []
    return [
        *tables(workload.height, workload.out_height, workload),
        *tables(workload.width, workload.out_width, workload),
    ]


def factors(workload: ResizeWorkload) -> tuple[int, int] | None:
    """Return how often nearest repeats each row and each column, if that is the same everywhere."""
    w = workload
    found = []
    for size, out_size in ((w.height, w.out_height), (w.width, w.out_width)):
        if w.method != "nearest_neighbor" or out_size % size:
            return None
        found.append(out_size // size)
        if not np.array_equal(tables(size, out_size, w)[0], np.arange(out_size) // found[-1]):
            return None
    return found[0], found[1]


@dataclass(frozen=True)
class ResizeConfig:
    """Vectors of `lanes` mix two rows of an image in NCHW, before its columns are looked up."""

    lanes: int


def default_config(workload: ResizeWorkload, target: Target) -> ResizeConfig | None:
    """Return the config of a bilinear resize in NCHW, or None where no row is mixed first."""
    w, lanes = workload, lanes_for(target, workload.dtype, 0)
    fits = lanes <= w.width <= min(MAX_STACK_ROW, 4 * w.out_width)
    return ResizeConfig(lanes) if w.method == "linear" and w.layout == "NCHW" and fits else None


def schedule(sch: Any, anchor: Any, output: Any, config: ResizeConfig, _: Target) -> None:  # noqa: ANN401
    """Mix the two rows that a row of the result is made of, then look its columns up."""
    *others, _last = sch.get_loops(output)
    task = sch.fuse(*others)
    sch.compute_at(anchor, task, preserve_unit_loops=True)
    pieces.mark(sch, sch.get_loops(anchor)[-1], config.lanes, 1, overlap=True)
    sch.parallel(task)


def compute(workload: ResizeWorkload, config: ResizeConfig | None) -> list[Any]:
    """Return the TE tensors [image, *tables, output]; with a config, each row is mixed on the stack."""
    w = workload
    sizes = {"N": w.batch, "H": w.height, "W": w.width, "C": w.channels}
    image = te.placeholder([sizes[axis] for axis in w.layout], w.dtype, name="image")
    arrays = all_tables(w)
    places = [te.placeholder(a.shape, str(a.dtype), name=f"table{i}") for i, a in enumerate(arrays)]
    shape = [(sizes | {"H": w.out_height, "W": w.out_width})[axis] for axis in w.layout]

    def load(at: dict[str, Any], y: Any, x: Any) -> Any:  # noqa: ANN401 - TE expressions
        place = at | {"H": y, "W": x}
        return image(*(place[axis] for axis in w.layout))

    if (repeats := factors(w)) is not None:
        fy, fx = repeats

        def repeat(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
            at = dict(zip(w.layout, i, strict=True))
            return load(at, at["H"] // fy, at["W"] // fx)

        return [image, te.compute(shape, repeat, name="resize")]
    if w.method == "nearest_neighbor":
        rows, columns = places

        def nearest(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
            at = dict(zip(w.layout, i, strict=True))
            return load(at, rows[at["H"]], columns[at["W"]])

        return [image, *places, te.compute(shape, nearest, name="resize")]
    row0, row1, row_weight, col0, col1, col_weight = places
    if config is not None:

        def mix(n: Any, c: Any, y: Any, x: Any) -> Any:  # noqa: ANN401 - TE expressions
            above = image(n, c, row0[y], x)
            return above + (image(n, c, row1[y], x) - above) * row_weight[y]

        notes = annotate_block("resize", "resize", config)
        row = te.compute((w.batch, w.channels, w.out_height, w.width), mix, name=f"{STAGE}mixed", attrs=notes)

        def between(n: Any, c: Any, y: Any, x: Any) -> Any:  # noqa: ANN401 - TE expressions
            # The bounds, which the tables keep anyway, tell TVM how much of a row is read.
            left, right = (row(n, c, y, tirx.min(tirx.max(t[x], 0), w.width - 1)) for t in (col0, col1))
            return left + (right - left) * col_weight[x]

        return [image, *places, te.compute(shape, between, name="resize")]

    def linear(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        at = dict(zip(w.layout, i, strict=True))
        y, x = at["H"], at["W"]

        def along(row: Any) -> Any:  # noqa: ANN401 - TE expressions
            left = load(at, row, col0[x])
            return left + (load(at, row, col1[x]) - left) * col_weight[x]

        top = along(row0[y])
        return top + (along(row1[y]) - top) * row_weight[y]

    return [image, *places, te.compute(shape, linear, name="resize")]
