"""What a layer's weights are multiplied with: second moments of its input patches, float and as stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.passes.rewriter import shape_of
from ingot.quantize.graph import Layer

Array = np.ndarray[Any, Any]

#: Layers whose sums are longer than this are rounded without second moments: they grow with its square.
LONGEST = 2304


def as_rows(layer: Layer, weight: Array | None = None) -> Array:
    """Return weights as [O, K]: the products one output channel sums, in the order of `take`'s columns."""
    weight = layer.weight if weight is None else weight
    if layer.kind == "matmul":
        return np.ascontiguousarray(weight.T)
    ordered = weight.transpose([layer.layout.index(axis) for axis in "OHWI"])
    return np.ascontiguousarray(ordered).reshape(ordered.shape[0], -1)


def from_rows(layer: Layer, rows: Array) -> Array:
    """Return rows of `as_rows` in the layer's own layout."""
    if layer.kind == "matmul":
        return np.ascontiguousarray(rows.T)
    order = [layer.layout.index(axis) for axis in "OHWI"]
    shape = [layer.weight.shape[axis] for axis in order]
    return np.ascontiguousarray(rows.reshape(shape).transpose(np.argsort(order)))


def take(layer: Layer, data: Array, count: int, random: np.random.Generator) -> Array:
    """Return up to `count` of a layer's input patches, at random positions.

    data is the layer's whole input. The result is [count, K], for depthwise layers [count, channels, KH * KW].
    """
    if layer.kind == "matmul":
        rows = data.reshape(-1, data.shape[-1])
        return rows if len(rows) <= count else rows[random.choice(len(rows), count, replace=False)]
    attrs = layer.call.attrs
    image = data if str(attrs.data_layout) == "NHWC" else data.transpose(0, 2, 3, 1)
    out = shape_of(layer.call)
    layout = str(attrs.out_layout) or str(attrs.data_layout)
    height, width = out[layout.index("H")], out[layout.index("W")]
    total = image.shape[0] * height * width
    index = np.arange(total) if total <= count else random.choice(total, count, replace=False)
    batch, y, x = np.unravel_index(index, (image.shape[0], height, width))
    top, left = int(attrs.padding[0]), int(attrs.padding[1])
    kh, kw = (layer.weight.shape[layer.layout.index(axis)] for axis in "HW")
    rows = (y * int(attrs.strides[0]) - top)[:, None] + np.arange(kh) * int(attrs.dilation[0])
    columns = (x * int(attrs.strides[1]) - left)[:, None] + np.arange(kw) * int(attrs.dilation[1])
    vertical, horizontal = (rows >= 0) & (rows < image.shape[1]), (columns >= 0) & (columns < image.shape[2])
    inside = vertical[:, :, None] & horizontal[:, None]
    patch = image[
        batch[:, None, None],
        np.clip(rows, 0, image.shape[1] - 1)[:, :, None],
        np.clip(columns, 0, image.shape[2] - 1)[:, None],
    ]
    patch = np.where(inside[..., None], patch, np.float32(0))
    if layer.kind == "depthwise":
        return np.ascontiguousarray(patch.reshape(len(index), kh * kw, -1).transpose(0, 2, 1))
    flat: Array = patch.reshape(len(index), -1)
    return flat


class Moments:
    """Sums over patches x (float) and q (as stored): of x, q, (q - c)(q - c)^T; per channel for depthwise layers.

    c is the mean of the first patches: where values lie far from 0 and close together, products of the values
    themselves would leave nothing but rounding of the covariance.
    """

    def __init__(self, layer: Layer) -> None:
        rows = as_rows(layer)
        self.depthwise = layer.kind == "depthwise"
        size = rows.shape[1]
        lead = (rows.shape[0],) if self.depthwise else ()
        self.count = 0
        self.x = np.zeros((*lead, size))
        self.q = np.zeros((*lead, size))
        self.squares = np.zeros((*lead, size, size)) if size <= LONGEST else None
        self.centre: Array = np.zeros((*lead, size), np.float32)

    def add(self, x: Array, q: Array) -> None:
        """Add patches of `take` and what is stored of them."""
        if not self.count:
            self.centre = q.mean(0, dtype=np.float64).astype(np.float32)
        self.count += len(x)
        self.x += x.sum(0, dtype=np.float64)
        self.q += q.sum(0, dtype=np.float64)
        if self.squares is None:
            return
        around = q - self.centre
        if self.depthwise:
            self.squares += np.einsum("nck,ncl->ckl", around, around, optimize=True)
        else:
            self.squares += around.T @ around

    def covariance(self) -> Array | None:
        """Return the covariance of q, [K, K] or [channels, K, K]; None where it was not collected."""
        if self.squares is None or not self.count:
            return None
        mean = self.q / self.count - self.centre
        outer = mean[..., :, None] * mean[..., None, :]
        result: Array = self.squares / self.count - outer
        return result
