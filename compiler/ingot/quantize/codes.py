"""From a layer's float weights to codes of few bits: scales, a codebook, and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.quantize.affine import SMALLEST_SCALE
from ingot.quantize.patches import Moments
from ingot.quantize.weights import bias_shift, passed_on, symmetric_scales
from ingot.schedules.half import BF16
from ingot.schedules.stored import GROUP, WeightFormat, power_levels

Array = np.ndarray[Any, Any]

#: Ends of the range that are tried, as shares of a group's largest weight.
_SHARES = np.linspace(0.7, 1.0, 7, dtype=np.float32)
#: Scales of powers of two that are tried, as powers of two of a row's largest weight: an octave.
_OCTAVE = np.linspace(-0.75, 0.25, 9)
#: Rounds of k-means, and of fitting scales to codes: neither changes much after these.
_ROUNDS, _FITS = 30, 2
#: Weights k-means looks at, about, evenly strided.
_SORTED = 1 << 18


def encode(
    rows: Array, inner: int, form: WeightFormat, moments: Moments | None
) -> tuple[Array, Array, Array, Array, Array]:
    """Round rows [O, K] to a format.

    inner: the extent of the fastest part of K, the input channels: groups do not cross it. With moments of a layer's
    inputs, rounding follows `passed_on` and the last result is what keeps each channel's mean.

    Returns codes uint8 [O, K], scales float32 [O, K / inner, groups or 1], the codebook, the decoded rows (float64),
    and the shift of each channel's bias.
    """
    rows = rows.astype(np.float64)
    covariance = moments.covariance() if moments is not None else None
    weight = _importance(rows, covariance)
    if form.grouped:
        table = np.arange(-form.limit, form.limit + 1, dtype=np.float64)
        scales, wide = _grouped_scales(rows, inner, form.limit, weight)
    elif form.kind == "whole":
        table = np.arange(-form.limit, form.limit + 1, dtype=np.float64)
        scales = symmetric_scales(rows, form.limit)[:, None, None]
        wide = np.broadcast_to(scales.reshape(-1, 1).astype(np.float64), rows.shape)
    else:
        table, scales = _levels(rows, form, weight)
        wide = np.broadcast_to(scales.reshape(-1, 1).astype(np.float64), rows.shape)
    middles = (table[1:] + table[:-1]) / 2

    def nearest(values: Array, column: int) -> Array:
        scale = wide[:, column]
        found: Array = table[np.searchsorted(middles, values / scale)] * scale
        return found

    if covariance is None or covariance.ndim == 3:
        rounded = table[np.searchsorted(middles, rows / wide)] * wide
    else:
        rounded = passed_on(rows, covariance, nearest)
    places = np.searchsorted(middles, rounded / wide)
    real = table[places] * wide
    codes, book = _numbered(places, table, form)
    return codes, scales.astype(np.float32), book, real, bias_shift(rows, real, moments)


def _importance(rows: Array, covariance: Array | None) -> Array:
    """Return how much an error of each weight counts: the variance of what it is multiplied with, [O, K]."""
    if covariance is None or covariance.ndim == 3:
        return np.ones_like(rows)
    variance = np.diagonal(covariance)
    return np.broadcast_to(np.maximum(variance, 1e-6 * max(float(variance.max()), 1e-30)), rows.shape)


def _grouped_scales(rows: Array, inner: int, limit: int, weight: Array) -> tuple[Array, Array]:
    """Return bfloat16-exact scales [O, K / inner, groups] of least weighted squared error, and as wide as the rows."""
    count, outer = len(rows), rows.shape[1] // inner
    groups = -(-inner // GROUP)

    def cut(array: Array) -> Array:
        padded = np.zeros((count, outer, groups * GROUP), np.float32)
        padded[..., :inner] = array.reshape(count, outer, inner)
        return padded.reshape(count, outer, groups, GROUP)

    values, weights = cut(rows), cut(weight)
    largest = np.abs(values).max(-1)
    best = np.full(largest.shape, np.inf)
    scales = np.ones(largest.shape, np.float32)
    for share in _SHARES:
        tried = BF16.restore(BF16.round(np.maximum(largest * share / limit, SMALLEST_SCALE).astype(np.float32)))
        wide = tried[..., None]
        error = (weights * (np.clip(np.rint(values / wide), -limit, limit) * wide - values) ** 2).sum(-1)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, tried, scales)
    spread = np.repeat(scales.astype(np.float64), GROUP, axis=-1)[..., :inner].reshape(rows.shape)
    return scales, spread


def _levels(rows: Array, form: WeightFormat, weight: Array) -> tuple[Array, Array]:
    """Return the sorted table and the scales [O, 1, 1] of a codebook or of powers of two.

    Codebook: k-means on the rows, each divided by its largest weight (Han et al. 2015, arXiv:1510.00149, section 3);
    then scales and table are fitted to each other, by least squares given the codes. Powers of two: the scale of each
    row that has the least squared error within an octave, fitted in the same way.
    """
    largest = np.maximum(np.abs(rows).max(1), SMALLEST_SCALE)
    scales = largest
    if form.kind == "power":
        table = np.unique(power_levels().astype(np.float64))
        middles = (table[1:] + table[:-1]) / 2
        best = np.full(len(rows), np.inf)
        for exponent in _OCTAVE:
            tried = (largest * 2.0**exponent)[:, None]
            error = (weight * (table[np.searchsorted(middles, rows / tried)] * tried - rows) ** 2).sum(1)
            better = error < best
            best, scales = np.where(better, error, best), np.where(better, tried[:, 0], scales)
        return table, _fitted(rows, table, scales, weight).astype(np.float32)[:, None, None]
    table = np.empty(0)
    for _ in range(_FITS):
        table = k_means(rows / scales[:, None], weight * scales[:, None] ** 2, 1 << form.bits, table)
        scales = _fitted(rows, table, scales, weight)
    table = table.astype(np.float32).astype(np.float64)
    return table, scales.astype(np.float32)[:, None, None]


def _fitted(rows: Array, table: Array, scales: Array, weight: Array) -> Array:
    """Return the scale of each row of least weighted squared error, given the codes that the old one leads to."""
    middles = (table[1:] + table[:-1]) / 2
    levels = table[np.searchsorted(middles, rows / scales[:, None])]
    power = (weight * levels**2).sum(1)
    fitted = (weight * levels * rows).sum(1) / np.where(power > 0, power, 1.0)
    return np.where((power > 0) & (fitted > SMALLEST_SCALE), fitted, scales)


def k_means(values: Array, weight: Array, count: int, start: Array) -> Array:
    """Return `count` sorted levels that weighted values lie nearest to, one of them 0 (Lloyd 1982).

    start: levels to begin with; empty for levels spread so that the cube root of the density is met evenly, which is
    where Lloyd's iteration ends for many levels (Panter and Dite 1951). On a line each round is two sums over sorted
    values.
    """
    step = max(1, values.size // _SORTED) | 1  # odd: not the columns of a matrix again and again
    x, w = values.reshape(-1)[::step], np.ascontiguousarray(weight).reshape(-1)[::step]
    order = np.argsort(x, kind="stable")
    x, w = x[order], w[order]
    if not len(start):
        counts, edges = np.histogram(x, bins=4 * count, weights=w)
        share = np.cumsum(np.cbrt(counts))
        start = np.interp((np.arange(count) + 0.5) / count, share / max(share[-1], 1e-30), edges[1:])
    levels = np.sort(start)
    mass, first = np.concatenate([[0.0], np.cumsum(w)]), np.concatenate([[0.0], np.cumsum(w * x)])
    for _ in range(_ROUNDS):
        levels[np.argmin(np.abs(levels))] = 0.0  # a weight of zero stays zero
        cuts = np.concatenate([[0], np.searchsorted(x, (levels[1:] + levels[:-1]) / 2), [x.size]])
        held, total = np.diff(mass[cuts]), np.diff(first[cuts])
        moved = np.where(held > 0, total / np.where(held > 0, held, 1.0), levels)
        if np.allclose(moved, levels, rtol=0, atol=1e-7):
            break
        levels = np.sort(moved)
    levels[np.argmin(np.abs(levels))] = 0.0
    return np.sort(levels)


def _numbered(places: Array, table: Array, form: WeightFormat) -> tuple[Array, Array]:
    """Return codes of places in a sorted table, and the float32 codebook to store with them, empty if there is none."""
    none = np.zeros(0, np.float32)
    if form.kind == "table":
        return places.astype(np.uint8), table.astype(np.float32)
    if form.kind == "whole":
        return (places + (form.offset - form.limit)).astype(np.uint8), none
    levels = power_levels()
    order = np.array([int(np.flatnonzero(levels == value)[0]) for value in table], np.uint8)
    return order[places], none
