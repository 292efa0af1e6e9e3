"""A sample of random graphs against ONNX Runtime; scripts/differential runs thousands."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.bisect_passes import first_wrong_step
from conformance.random_graphs import check, difference, random_graph, reference

pytestmark = pytest.mark.slow


@given(seed=st.integers(0, 2**31))
@settings(max_examples=5, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_graphs_compute_what_onnx_runtime_computes(tmp_path_factory, seed):
    assert check(seed, tmp_path_factory.mktemp("random")) == ""


#: Graphs that went wrong once. 307: a convolution whose windows lie in the padding alone.
FOUND = [307]


@pytest.mark.parametrize("seed", FOUND)
def test_graphs_that_went_wrong_once(tmp_path, seed):
    assert check(seed, tmp_path) == ""


@pytest.mark.qemu
def test_a_random_graph_on_an_arm_board(tmp_path, qemu):
    qemu("aarch64")
    assert check(7, tmp_path, "raspberry-pi-4") == ""


def test_graphs_are_valid_of_the_promised_size_and_repeatable():
    for seed in range(50):
        model, _ = random_graph(random.Random(seed))
        assert 2 <= len(model.graph.node) <= 25
        onnx.checker.check_model(model, full_check=True)
        assert model == random_graph(random.Random(seed))[0]


def test_a_difference_is_seen():
    right = np.ones((2, 3), np.float32)
    wrong = right.copy()
    wrong[1, 2] += 0.01
    assert difference([right], [right]) == ""
    assert "of the largest" in difference([wrong], [right])
    assert "NaN" in difference([right * np.nan], [right])
    assert "instead of" in difference([right.T], [right])


def test_bisecting_names_the_step_from_which_on_outputs_are_wrong(tmp_path):
    model, feeds = random_graph(random.Random(3))
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    wanted = reference(path.read_bytes(), feeds)
    assert first_wrong_step(path, feeds, wanted) == ""
    assert first_wrong_step(path, feeds, [value + 1 for value in wanted]) == "import"
