"""Affine 8-bit numbers: real = scale * (stored - zero point)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: The smallest scale: below it, what is divided by it overflows.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Affine:
    """Scale, zero point and stored dtype ("int8" or "uint8") of a tensor."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest stored value."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)

    @property
    def span(self) -> tuple[float, float]:
        """Return the smallest and the largest real value."""
        low, high = self.limits
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale

    def quantize(self, x: Array) -> Array:
        """Return round(x / scale) + zero point (halves to even), saturated, in the stored dtype."""
        low, high = self.limits
        scaled = np.rint(x / np.float32(self.scale)) + self.zero_point
        out: Array = np.clip(scaled, low, high).astype(self.dtype)
        return out

    def dequantize(self, q: Array) -> Array:
        """Return the float32 values of stored ones."""
        out: Array = (q.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return out

    def rounded(self, x: Array) -> Array:
        """Return the nearest values that can be stored, in float32."""
        low, high = self.limits
        scaled = np.rint(x / np.float32(self.scale))
        out: Array = np.clip(scaled, low - self.zero_point, high - self.zero_point) * np.float32(self.scale)
        return out.astype(np.float32)


def from_range(low: float, high: float, dtype: str) -> Affine:
    """Return the affine numbers that span [low, high], widened to hold 0 exactly.

    A range of one value (a constant tensor) keeps that value: it becomes the scale itself.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    info = np.iinfo(dtype)
    if high == low:
        return Affine(1.0, int(info.min) if low == 0 else 0, dtype)
    scale = float(np.float32(max((high - low) / 255.0, SMALLEST_SCALE)))
    zero_point = int(np.clip(np.rint(info.min - low / scale), info.min, info.max))
    return Affine(scale, zero_point, dtype)
