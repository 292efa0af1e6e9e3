"""How far unseen samples reach beyond the seen ones, next to samples that were held back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.quantize.calibrators import BINS, Observed, mse, range_of
from ingot.quantize.tails import _ROOM, Ends, Tail, joined


def ends_of(samples: np.ndarray) -> Ends:
    """Return the ends of samples [number, channels]."""
    ends = Ends(samples.shape[1])
    for largest in samples:
        ends.add(largest)
    return ends


def test_the_two_largest_values_are_kept_for_each_channel() -> None:
    ends = ends_of(np.array([[1.0, 7.0], [4.0, 7.0], [3.0, -2.0], [4.0, 0.0]]))
    assert ends.first.tolist() == [4, 7] and ends.second.tolist() == [4, 7]
    assert ends_of(np.array([[2.0], [5.0], [1.0]])).second.tolist() == [2]


@pytest.mark.parametrize("count", [12, 100])
@pytest.mark.parametrize("law", ["exponential", "normal", "lognormal"])
def test_the_error_of_unseen_samples_is_foretold(law: str, count: int) -> None:
    random = np.random.default_rng(0)

    def draw(rows: int) -> np.ndarray:
        values: np.ndarray = getattr(random, law)(size=(rows, 64)) * np.linspace(0.1, 2, 64)
        return values if law != "lognormal" else values**0.3

    foretold = measured = 0.0
    for _ in range(20):
        ends = ends_of(draw(count))
        tail = ends.tail()
        foretold += sum(Tail(end, mean).error(float(end)) for end, mean in zip(tail.ends, tail.excess, strict=True))
        beyond = np.maximum(draw(2000) - ends.first, 0)
        measured += float((beyond**2).sum()) * count / 2000
    assert 0.8 < foretold / _ROOM**2 / measured < 3


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(0.01, 2), st.floats(-4, 8))
def test_the_formula_is_the_integral(end: float, excess: float, stored: float) -> None:
    x = end + excess * -np.log((np.arange(20_000) + 0.5) / 20_000)
    measured = float(np.mean(np.maximum(x - stored, 0) ** 2))
    tail = Tail(np.array([end]), np.array([excess]))
    assert tail.error(stored) == pytest.approx(measured, rel=0.02, abs=1e-3 * excess**2)


def test_what_never_varies_has_no_tail() -> None:
    tail = ends_of(np.full((10, 3), 2.5)).tail()
    assert not tail.excess.any() and tail.error(2.5) == 0
    assert not ends_of(np.array([[1.0, 2.0]])).tail().excess.any(), "one sample tells nothing"


def test_a_largest_value_of_two_samples_is_a_bound() -> None:
    pixels = np.array([[255.0, 3.0], [200.0, 4.0], [255.0, 9.0]])
    excess = ends_of(pixels).tail().excess
    assert excess[0] == 0 and excess[1] > 0


def observed(samples: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Observed:
    """Return what calibration sees of samples [number, values, channels]."""
    low, high = float(samples.min()), float(samples.max())
    counts = np.histogram(samples, BINS, (low, high))[0]
    above, below = joined([ends_of(samples.max(1))]), joined([ends_of(-samples.min(1))])
    return Observed(low, high, counts, above, below, bounds)


def test_few_samples_widen_the_range_and_many_do_not() -> None:
    random = np.random.default_rng(0)
    loud = random.lognormal(0, 0.5, (500, 1, 1))
    samples = np.abs(random.normal(size=(500, 40, 16))) * loud
    few, many = observed(samples[:8]), observed(samples)
    widened = [range_of(one, "mse")[1] / one.high for one in (few, many)]
    assert widened[0] > 1.2 and widened[1] < 1.1
    assert range_of(few, "minmax") == (few.low, few.high)


def test_no_range_is_wider_than_values_can_be() -> None:
    samples = np.clip(np.random.default_rng(0).normal(2, 1, (8, 2, 16)), 0, 6)
    assert mse(observed(samples))[1] > 6
    low, high = mse(observed(samples, (0.0, 6.0)))
    assert (low, high) == (0.0, pytest.approx(6.0))
