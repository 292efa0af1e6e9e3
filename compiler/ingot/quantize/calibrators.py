"""From what a tensor held during calibration to the range that its 8 bits shall span.

Values outside the range saturate; a wider range has larger steps. Each calibrator weighs the two in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.quantize.affine import from_range
from ingot.quantize.tails import NONE, Tail

Array = np.ndarray[Any, Any]

#: Bins of a histogram: enough that a bin is an eighth of a quantisation step.
BINS = 2048
#: Share of the values that the percentile calibrator leaves inside.
PERCENTILE = 0.9999
_LEVELS = 256
#: Bins over which the entropy calibrator averages.
_SMOOTHED = 9
#: Ends of the range that are tried, as shares of the largest value.
_INSIDE = np.concatenate([np.linspace(0.2, 0.9, 29), np.linspace(0.91, 1.0, 19)])
_SHARES = np.concatenate([_INSIDE, np.linspace(1.02, 2.0, 50), np.linspace(2.1, 4.0, 20)])


@dataclass(frozen=True)
class Observed:
    """What calibration saw of one scale's tensors: extremes, and counts in BINS equal bins between them.

    above, below: how each channel may go on beyond its largest value, and beyond its smallest (negated). bounds: what
    values can be at all.
    """

    low: float
    high: float
    counts: Array
    above: Tail = NONE
    below: Tail = NONE
    bounds: tuple[float, float] = (-np.inf, np.inf)

    @property
    def centres(self) -> Array:
        """Return the middle of each bin."""
        width = (self.high - self.low) / BINS
        return self.low + width * (np.arange(BINS) + 0.5)

    @property
    def constant(self) -> bool:
        """Say whether all values were the same."""
        return self.low == self.high


Range = tuple[float, float]


def minmax(seen: Observed) -> Range:
    """Return the extremes: nothing saturates (Jacob et al. 2018, arXiv:1712.05877)."""
    return seen.low, seen.high


def percentile(seen: Observed) -> Range:
    """Return the range that holds PERCENTILE of the values, cut evenly at both ends (Wu et al. 2020, arXiv:2004.09602).

    An end that holds more than its share at one value, as 0 does after a ReLU, is not cut.
    """
    cumulative = np.cumsum(seen.counts) / max(1.0, float(seen.counts.sum()))
    tail = (1.0 - PERCENTILE) / 2
    width = (seen.high - seen.low) / BINS
    first = int(np.searchsorted(cumulative, tail, side="right"))
    last = int(np.searchsorted(cumulative, 1.0 - tail, side="left"))
    return seen.low + width * first, seen.low + width * (min(last, BINS - 1) + 1)


def entropy(seen: Observed) -> Range:
    """Return the range whose 8-bit histogram diverges least from the seen one, by Kullback and Leibler.

    Migacz, "8-bit inference with TensorRT", GTC 2017, for ranges with two ends: both are cut to the same share, the
    mass outside moves to the outermost bins of the reference, and each quantised bin spreads evenly over the
    occupied bins it stands for. The histogram is smoothed first: between the counts of few samples every distribution
    diverges, and the narrowest range would win.
    """
    best, chosen = np.inf, (seen.low, seen.high)
    counts = np.convolve(seen.counts, np.full(_SMOOTHED, 1 / _SMOOTHED), "same")
    width = (seen.high - seen.low) / BINS
    for share in _INSIDE:
        low, high = seen.low * share, seen.high * share
        first = int(np.clip(round((low - seen.low) / width), 0, BINS - 1))
        last = int(np.clip(round((high - seen.low) / width), first + 1, BINS))
        inside = counts[first:last]
        if inside.size < _LEVELS // 2 or inside.sum() == 0:
            continue
        reference = inside.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        levels = np.minimum((np.arange(inside.size) * _LEVELS) // inside.size, _LEVELS - 1)
        occupied = inside > 0
        mass = np.bincount(levels, weights=inside, minlength=_LEVELS)
        sharing = np.bincount(levels, weights=occupied, minlength=_LEVELS)
        spread = np.where(occupied, mass[levels] / np.maximum(sharing[levels], 1), 0.0)
        divergence = _divergence(reference, spread)
        if divergence < best:
            best, chosen = divergence, (low, high)
    return chosen


def _divergence(p: Array, q: Array) -> float:
    """Return KL(p || q) of two histograms; where q is empty and p is not, q counts as a millionth."""
    p, q = p / p.sum(), q / max(q.sum(), 1e-12)
    held = p > 0
    return float(np.sum(p[held] * np.log(p[held] / np.maximum(q[held], 1e-6))))


def mse(seen: Observed) -> Range:
    """Return the range with the least mean squared error of a stored value (Banner et al. 2019, arXiv:1810.05723).

    The two ends are searched for one after the other, on the histogram and on the tails beyond it: between the ends the
    error of a step s is s^2 / 12, outside it is the distance to the end.
    """
    centres, counts = seen.centres, seen.counts.astype(np.float64)

    def best(ranges: list[Range]) -> Range:
        errors = [
            squared_error(centres, counts, span) + seen.above.error(span[1]) + seen.below.error(-span[0])
            for span in ranges
        ]
        return ranges[int(np.argmin(errors))]

    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    for _ in range(2):
        if seen.high > 0:
            ends = np.minimum(seen.high * _SHARES, max(seen.bounds[1], 0.0))
            high = best([(low, float(end)) for end in ends])[1]
        if seen.low < 0:
            ends = np.maximum(seen.low * _SHARES, min(seen.bounds[0], 0.0))
            low = best([(float(end), high) for end in ends])[0]
    return low, high


def squared_error(centres: Array, counts: Array, span: Range) -> float:
    """Return the summed squared error of values `centres`, each `counts` times, in 8 bits that span a range."""
    affine = from_range(*span, "uint8")
    low, high = -affine.zero_point * affine.scale, (255 - affine.zero_point) * affine.scale
    outside = centres - np.clip(centres, low, high)
    # 0 is stored exactly, however often it occurs.
    uniform = affine.scale**2 / 12
    inside = np.where(np.abs(centres) < affine.scale / 2, np.minimum(centres**2, uniform), uniform)
    return float(np.sum(counts * np.where(outside == 0, inside, outside**2)))


CALIBRATORS: dict[str, Callable[[Observed], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def range_of(seen: Observed, calibrator: str) -> Range:
    """Return the range that a calibrator chooses; a constant tensor keeps its value."""
    if seen.constant:
        return seen.low, seen.high
    return CALIBRATORS[calibrator](seen)
