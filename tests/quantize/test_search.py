"""The search for layers that must stay in float."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ingot.quantize.search import accuracy, fewest, relative_error


@given(st.integers(1, 60), st.data())
def test_the_fewest_layers_are_found_with_few_models(count: int, data: st.DataObject) -> None:
    order = [f"layer{i}" for i in range(count)]
    enough = data.draw(st.integers(0, count))
    tried: list[int] = []

    def within(names: frozenset[str]) -> bool:
        assert names == frozenset(order[: len(names)])
        tried.append(len(names))
        return len(names) >= enough

    assert fewest(order, within) == frozenset(order[:enough])
    assert len(tried) <= 1 + math.ceil(math.log2(count)) + 1


def test_the_error_of_an_output_does_not_depend_on_its_size() -> None:
    small, large = np.ones(10, np.float32), np.full(1000, 100, np.float32)
    reference = [[small, large, np.array([3])]]
    assert relative_error(reference, reference) == 0
    assert abs(relative_error(reference, [[small * 1.1, large, np.array([4])]]) - 0.1 / math.sqrt(2)) < 1e-6
    assert abs(relative_error(reference, [[small * 1.1, large * 1.1, np.array([4])]]) - 0.1) < 1e-6


def test_accuracy_counts_the_largest() -> None:
    outputs = [[np.array([[0.1, 0.9]])], [np.array([[0.8, 0.2]])]]
    assert accuracy(outputs, np.array([1, 1])) == 0.5
