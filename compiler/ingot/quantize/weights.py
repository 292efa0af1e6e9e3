"""Rounding a layer's weights to 8 bits so that what the layer computes changes least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ingot.quantize.affine import SMALLEST_SCALE
from ingot.quantize.graph import Layer
from ingot.quantize.patches import Moments, as_rows, from_rows

Array = np.ndarray[Any, Any]

#: What is added to the diagonal of a covariance, as a share of its mean: few samples leave directions unseen.
DAMPING = 0.01
#: Columns whose errors are passed on together.
_BLOCK = 64


@dataclass(frozen=True)
class QuantizedWeights:
    """Stored int8 values in the layer's layout, a scale per output channel, and what to add to the layer's bias."""

    stored: Array = field(repr=False)
    scales: Array = field(repr=False)
    shift: Array = field(repr=False)


def symmetric_scales(rows: Array, limit: int = 127) -> Array:
    """Return float32 scales, one per row, with which the largest weight is stored as `limit`; 1 for a row of zeros."""
    largest = np.abs(rows).max(axis=1)
    scales = np.maximum(largest.astype(np.float64) / limit, SMALLEST_SCALE)
    return np.where(largest == 0, 1.0, scales).astype(np.float32)


def quantize_layer(layer: Layer, moments: Moments | None, limit: int = 127) -> QuantizedWeights:
    """Round a layer's weights per output channel, symmetrically, and correct its bias.

    With moments, rounding follows `passed_on` and the bias is corrected by E[x] w - E[q] v, with w the float weights,
    v the rounded ones, x the float input and q the stored one (Nagel et al. 2019, arXiv:1906.04721, section 4.2):
    the mean of every channel of the result stays what it was on the samples.
    """
    rows = as_rows(layer).astype(np.float64)
    scales = symmetric_scales(rows, limit)
    scaled = rows / scales.astype(np.float64)[:, None]
    covariance = moments.covariance() if moments is not None else None

    def whole(values: Array, _: int) -> Array:
        return np.clip(np.rint(values), -limit, limit)

    if covariance is None:
        stored = whole(scaled, 0)
    elif covariance.ndim == 3:
        stored = np.concatenate([passed_on(r[None], c, whole) for r, c in zip(scaled, covariance, strict=True)])
    else:
        stored = passed_on(scaled, covariance, whole)
    shift = bias_shift(rows, stored * scales.astype(np.float64)[:, None], moments)
    return QuantizedWeights(from_rows(layer, stored.astype(np.int8)), scales, shift)


def bias_shift(rows: Array, real: Array, moments: Moments | None) -> Array:
    """Return what keeps the mean of each channel of the result, float32, one per row; zeros without moments.

    rows: the float weights. real: those that are stored.
    """
    if moments is None or not moments.count:
        return np.zeros(len(rows), np.float32)
    x, q = moments.x / moments.count, moments.q / moments.count
    shift: Array = ((rows * x).sum(-1) - (real * q).sum(-1)).astype(np.float32)
    return shift


def passed_on(rows: Array, covariance: Array, nearest: Callable[[Array, int], Array]) -> Array:
    """Round rows column by column, each error compensated by the columns not yet rounded.

    nearest: what can be stored nearest to the values of a column, given its number.

    Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), after Hassibi and Stork's optimal brain surgeon: with H the
    covariance of the inputs and U the upper Cholesky factor of its inverse, the error e of column k is taken back by
    subtracting e U[k, k+1:] / U[k, k] from the columns after it. Columns of large variance go first.
    """
    size = rows.shape[1]
    order = np.argsort(-np.diagonal(covariance), kind="stable")
    matrix = covariance[np.ix_(order, order)]
    mean = float(np.mean(np.diagonal(matrix)))
    if not mean > 0:
        return np.stack([nearest(rows[:, k], k) for k in range(size)], axis=1)
    matrix = matrix + np.eye(size) * (DAMPING * mean)
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    left = rows[:, order].copy()
    stored = np.empty_like(left)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        errors = np.empty((len(left), end - start))
        for k in range(start, end):
            stored[:, k] = nearest(left[:, k], int(order[k]))
            errors[:, k - start] = (left[:, k] - stored[:, k]) / upper[k, k]
            left[:, k:end] -= errors[:, k - start, None] * upper[k, k:end]
        left[:, end:] -= errors @ upper[start:end, end:]
    result: Array = np.empty_like(stored)
    result[:, order] = stored
    return result
