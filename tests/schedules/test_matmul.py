"""Matrix products with a constant right side (the convolution template) and of two computed sides (rules)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.common import CHANNELS, EPILOGUES, TARGETS, Branches, check, property_settings

PIECES = (1, 2, 3, 7)
ROWS = (1, 2, 5, 6, 7, 8, 13, 14, 15, 64)


def model(*layers):
    branches = Branches()
    for lead, k, n, epilogue in layers:
        branches.matmul(lead, k, n, epilogue)
    return branches


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 7])
def test_columns_and_depths(tmp_path, target, rows):
    layers = [((rows,), 20, n, "bias") for n in CHANNELS] + [((rows,), k, 10, "none") for k in CHANNELS]
    check(model(*layers), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_rows(tmp_path, target):
    layers = [((m,), 9, 33, "relu") for m in ROWS] + [((2, m), 8, 16, "none") for m in ROWS]
    check(model(*layers, ((2, 1, 3), 8, 17, "bias"), ((1, 1), 640, 128, "relu")), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(tmp_path, target, epilogue):
    layers = [((1,), 33, 10, epilogue), ((7,), 16, 64, epilogue), ((2, 3), 5, 17, epilogue)]
    check(model(*layers), tmp_path, target, PIECES)


def products(*shapes):
    branches = Branches()
    for left, right in shapes:
        a, b = branches.input(left), branches.input(right)
        branches.output(branches.node("MatMul", [a, b]))
    return branches


@pytest.mark.parametrize("target", TARGETS)
def test_two_computed_sides(tmp_path, target):
    shapes = [((m, k), (k, n)) for m, k, n in ((1, 7, 9), (3, 8, 16), (4, 15, 33), (6, 64, 1), (8, 1, 8), (17, 5, 32))]
    shapes += [((2, 3, 5), (2, 5, 16)), ((4, 2, 64, 8), (4, 2, 8, 64)), ((2, 3, 5), (5, 8)), ((3, 1, 5), (3, 5, 1))]
    check(products(*shapes), tmp_path, target, PIECES)


@st.composite
def layers(draw):
    lead = tuple(draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=2)))
    return lead, draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(EPILOGUES))


@property_settings
@given(st.lists(layers(), min_size=1, max_size=4), st.sampled_from(TARGETS), st.sampled_from(PIECES))
def test_any_product(tmp_path_factory, drawn, target, pieces):
    check(model(*drawn), tmp_path_factory.mktemp("matmul"), target, (pieces,))
