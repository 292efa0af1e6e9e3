"""Calibrators on histograms whose best range is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.quantize.affine import from_range
from ingot.quantize.calibrators import BINS, CALIBRATORS, Observed, range_of, squared_error


def seen(values: np.ndarray) -> Observed:
    low, high = float(values.min()), float(values.max())
    return Observed(low, high, np.histogram(values, BINS, (low, high))[0])


def error(values: np.ndarray, calibrator: str) -> float:
    affine = from_range(*range_of(seen(values), calibrator), "uint8")
    return float(np.mean((affine.rounded(values) - values) ** 2))


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_a_range_lies_within_what_was_seen(calibrator: str) -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 50_000).astype(np.float32)
    low, high = range_of(seen(values), calibrator)
    assert values.min() <= low < -2 < 4 < high <= values.max()


def test_one_outlier_does_not_set_the_range_of_a_percentile() -> None:
    values = np.random.default_rng(0).normal(0.0, 1.0, 100_000).astype(np.float32)
    values[0] = 40.0
    assert range_of(seen(values), "percentile")[1] < 5
    assert error(values[1:], "percentile") < error(values, "minmax") / 4


def test_mse_finds_the_least_error_of_all() -> None:
    values = np.random.default_rng(0).laplace(0.0, 1.0, 100_000).astype(np.float32)
    errors = {name: error(values, name) for name in CALIBRATORS}
    assert min(errors, key=errors.__getitem__) == "mse", errors


def test_the_estimated_error_is_the_error() -> None:
    values = np.random.default_rng(0).normal(0.0, 1.0, 100_000).astype(np.float32)
    histogram = seen(values)
    for span in ((-4.0, 4.0), (-2.0, 3.0), (0.0, 1.0)):
        measured = float(np.sum((from_range(*span, "uint8").rounded(values) - values) ** 2))
        assert squared_error(histogram.centres, histogram.counts.astype(float), span) == pytest.approx(
            measured, rel=0.05
        )


@given(st.floats(-1e6, 1e6, width=32), st.sampled_from(["uint8", "int8"]))
def test_a_constant_is_stored_exactly(value: float, dtype: str) -> None:
    x = np.full(4, value, np.float32)
    histogram = Observed(float(x[0]), float(x[0]), np.zeros(BINS, np.int64))
    for calibrator in CALIBRATORS:
        affine = from_range(*range_of(histogram, calibrator), dtype)
        np.testing.assert_allclose(affine.dequantize(affine.quantize(x)), x, rtol=1e-6, atol=1e-30)


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), st.sampled_from(["uint8", "int8"]))
def test_zero_is_stored_exactly_and_the_ends_within_a_step(a: float, b: float, dtype: str) -> None:
    low, high = min(a, b), max(a, b)
    affine = from_range(low, high, dtype)
    ends = np.array([0.0, low, high], np.float32)
    found = affine.dequantize(affine.quantize(ends))
    assert found[0] == 0
    assert np.abs(found - ends).max() <= affine.scale * 0.51 + 1e-6 * np.abs(ends).max()
    np.testing.assert_allclose(affine.rounded(ends), found, rtol=1e-5, atol=1e-30)
