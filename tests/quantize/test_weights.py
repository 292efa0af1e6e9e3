"""Rounding of weights: per channel, with and without the inputs' moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.quantize.graph import Layer
from ingot.quantize.patches import Moments
from ingot.quantize.weights import passed_on, symmetric_scales


def whole(values: np.ndarray, _: int) -> np.ndarray:
    """What int8 can store."""
    return np.clip(np.rint(values), -127, 127)


def test_a_row_of_zeros_has_a_scale_of_one() -> None:
    rows = np.array([[0.0, 0.0], [1.0, -2.54]], np.float32)
    assert symmetric_scales(rows).tolist() == [1.0, np.float32(2.54 / 127)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 130), st.integers(0, 1000))
def test_passing_errors_on_lowers_the_output_error(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((400, size)) @ random.standard_normal((size, size))
    rows = random.uniform(-20, 20, (6, size))
    covariance = np.cov(inputs.T).reshape(size, size)
    stored = passed_on(rows, covariance, whole)
    assert np.array_equal(stored, np.rint(stored)) and np.abs(stored).max() <= 127

    def output_error(rounded: np.ndarray) -> float:
        return float(np.einsum("ok,kl,ol->", rows - rounded, covariance, rows - rounded))

    assert output_error(stored) <= output_error(np.rint(rows)) * 1.02


def test_independent_inputs_are_rounded_to_nearest() -> None:
    rows = np.random.default_rng(0).uniform(-100, 100, (3, 70))
    assert np.array_equal(passed_on(rows, np.eye(70), whole), np.rint(rows))


@pytest.mark.parametrize("size", [1, 9])
def test_inputs_that_never_vary_are_rounded_to_nearest(size: int) -> None:
    rows = np.random.default_rng(0).uniform(-100, 100, (3, size))
    assert np.array_equal(passed_on(rows, np.zeros((size, size)), whole), np.rint(rows))


@pytest.mark.parametrize("kind", ["matmul", "depthwise"])
def test_inputs_far_from_zero_and_close_together_keep_their_covariance(kind: str) -> None:
    """As a network without norms has them after some layers: products of the values are all rounding."""
    random = np.random.default_rng(0)
    weight = np.zeros((9, 4) if kind == "matmul" else (4, 1, 3, 3), np.float32)
    layer = Layer("layer", kind, None, None, None, weight, "IO" if kind == "matmul" else "OIHW", 1)
    moments, parts = Moments(layer), []
    for _ in range(4):
        patches = (1000 + 0.01 * random.standard_normal((50, 9) if kind == "matmul" else (50, 4, 9))).astype(np.float32)
        moments.add(patches, patches)
        parts.append(patches.astype(np.float64).reshape(50, -1, 9)[:, 0])
    covariance = moments.covariance()
    assert covariance is not None
    wanted = np.cov(np.concatenate(parts).T, bias=True)
    found = covariance if kind == "matmul" else covariance[0]
    assert np.allclose(found, wanted, atol=1e-2 * wanted.max())
    rows = random.uniform(-20, 20, (6, 9))
    assert np.array_equal(passed_on(rows, found, whole), np.rint(passed_on(rows, found, whole)))
