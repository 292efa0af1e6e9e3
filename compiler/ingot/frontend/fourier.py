"""Discrete Fourier transforms of a known length, for every model format: products with constant matrices."""

from __future__ import annotations

import numpy as np

from ingot.errors import UnsupportedError

# Elements of a matrix: the definition is quadratic in the length.
MAX_MATRIX = 2**24


def matrices(length: int, rows: int, *, inverse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [length, rows] of a transform, in float64; an inverse one is divided by the length.

    The product `i * k` is reduced by the length before it becomes an angle. Raises UnsupportedError beyond MAX_MATRIX.
    """
    if length * rows > MAX_MATRIX:
        raise UnsupportedError(
            "a transform of this length is not supported",
            found=f"{length} to {rows}",
            allowed=f"at most {MAX_MATRIX} factors",
        )
    turns = np.outer(np.arange(length), np.arange(rows)) % length / length
    angles = 2 * np.pi * turns * (1 if inverse else -1)
    factor = 1 / length if inverse else 1.0
    return np.cos(angles) * factor, np.sin(angles) * factor
