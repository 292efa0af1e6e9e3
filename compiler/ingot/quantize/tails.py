"""How far a channel's values may reach in samples that calibration has not seen.

The largest value among n samples is exceeded by the next one with a chance of 1 / (n + 1), and what saturates then can
cost far more than a slightly larger step costs everywhere. Beyond the largest value of a channel, its distribution is
continued as an exponential one, the limit of light tails (Pickands 1975, Annals of Statistics 3:119), with one value of
the samples in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: The gap over the standard deviation before anything is known (of 20 normal values it is a half), and how many
#: channels that counts for.
_PRIOR_SHARE, _PRIOR_CHANNELS = 0.5, 8
#: How much of b counts. All of it has the least expected error, most of which comes from few inputs; all others pay for
#: that with larger steps. Half of it is most of what few samples gain, and costs almost nothing with many.
_ROOM = 0.5


@dataclass(frozen=True)
class Tail:
    """The largest value of each channel, and the mean of what lies beyond it."""

    ends: Array
    excess: Array

    def error(self, end: float) -> float:
        """Return the expected squared error of one value in the tail of each channel if `end` is the largest stored.

        With x = M + excess of an exponential law with mean b: 2 b^2 exp(-(c - M) / b) for an end c beyond M, else
        d^2 + 2 b d + 2 b^2 with d = M - c.
        """
        inside = np.maximum(self.ends - end, 0.0)
        beyond = np.exp(-np.maximum(end - self.ends, 0.0) / np.maximum(self.excess, 1e-30))
        return float(np.sum(inside**2 + 2 * self.excess * inside + 2 * self.excess**2 * beyond))


#: The tail of a tensor that was not looked at channel by channel.
NONE = Tail(np.zeros(0), np.zeros(0))


class Ends:
    """The largest value of each channel in each sample: the two largest, the mean and the spread."""

    def __init__(self, channels: int) -> None:
        self.first = np.full(channels, -np.inf)
        self.second = np.full(channels, -np.inf)
        self._sum, self._squares = np.zeros(channels), np.zeros(channels)
        self._samples = 0

    def add(self, largest: Array) -> None:
        """Take in the largest values of one sample."""
        self.second = np.maximum(self.second, np.minimum(self.first, largest))
        self.first = np.maximum(self.first, largest)
        self._sum += largest
        self._squares += np.square(largest, dtype=np.float64)
        self._samples += 1

    def tail(self) -> Tail:
        """Return the tail of each channel.

        Of an exponential law the mean gap between the two largest of n values is its mean b. One gap says little, so
        half of b comes from the gaps of all channels, as a share of their standard deviations; the gap itself knows
        about channels that few samples excite. A largest value that two samples share, such as a white pixel's, is a
        bound: nothing lies beyond.
        """
        if self._samples < 2:
            return Tail(self.first, np.zeros_like(self._sum))
        mean = self._sum / self._samples
        spread = np.sqrt(np.maximum(self._squares / self._samples - mean**2, 0.0))
        gap = self.first - self.second
        live = (spread > 0) & (gap > 0)
        shares = gap[live] / spread[live]
        share = (shares.sum() + _PRIOR_CHANNELS * _PRIOR_SHARE) / (shares.size + _PRIOR_CHANNELS)
        return Tail(self.first, np.where(live, _ROOM * (gap + share * spread) / 2, 0.0))


def joined(ends: Sequence[Ends]) -> Tail:
    """Return the tails of the channels of several tensors."""
    tails = [one.tail() for one in ends]
    return Tail(np.concatenate([one.ends for one in tails]), np.concatenate([one.excess for one in tails]))
