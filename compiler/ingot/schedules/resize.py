"""Nearest and bilinear resize of NHWC images: source indices and weights are tables made at compile time.

TVM's definition computes a floor, a clamp and a division for every element of every channel; here each output row
and column looks its source up, and the channels are a plain vector loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

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
    """A resize of [batch, height, width, channels] to [batch, out_height, out_width, channels].

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
    """Return the tables of the rows, then those of the columns: the operands of `compute` after the image."""
    return [
        *tables(workload.height, workload.out_height, workload),
        *tables(workload.width, workload.out_width, workload),
    ]


def compute(workload: ResizeWorkload) -> list[Any]:
    """Return the TE tensors [image, *tables, output]."""
    w = workload
    image = te.placeholder((w.batch, w.height, w.width, w.channels), w.dtype, name="image")
    arrays = all_tables(w)
    places = [te.placeholder(a.shape, str(a.dtype), name=f"table{i}") for i, a in enumerate(arrays)]
    shape = (w.batch, w.out_height, w.out_width, w.channels)
    if w.method == "nearest_neighbor":
        rows, columns = places
        out = te.compute(shape, lambda n, y, x, c: image[n, rows[y], columns[x], c], name="resize")
        return [image, *places, out]
    row0, row1, row_weight, col0, col1, col_weight = places

    def linear(n: Any, y: Any, x: Any, c: Any) -> Any:  # noqa: ANN401 - TE expressions
        top = (
            image[n, row0[y], col0[x], c]
            + (image[n, row0[y], col1[x], c] - image[n, row0[y], col0[x], c]) * (col_weight[x])
        )
        bottom = (
            image[n, row1[y], col0[x], c]
            + (image[n, row1[y], col1[x], c] - image[n, row1[y], col0[x], c]) * (col_weight[x])
        )
        return top + (bottom - top) * row_weight[y]

    return [image, *places, te.compute(shape, linear, name="resize")]
