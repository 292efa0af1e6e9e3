"""The float model with switches, and the few layers that are left in float for their harm."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.driver import _build_here
from ingot.frontend import import_model
from ingot.quantize import sensitivity
from ingot.quantize.affine import from_range
from ingot.quantize.graph import Graph, place
from ingot.quantize.prepare import prepare
from ingot.quantize.samples import ArraySamples
from ingot.quantize.sensitivity import Sensitivity, cost_most
from ingot.target import load_target
from quantize.models import small_net, small_samples


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    net = small_net(tmp_path_factory.mktemp("net") / "net.onnx")
    return Graph(prepare(import_model(net), load_target("native")))


def test_a_switch_rounds_what_it_stands_for_and_nothing_else(graph: Graph, tmp_path: Path) -> None:
    placement = place(graph)
    affine = {var: from_range(-20, 20, "uint8") for var in placement.stored}
    affine[placement.stored[0]] = from_range(-0.01, 0.01, "uint8")  # the input: next to nothing is left of it
    samples = ArraySamples({"x": small_samples(20)}, graph.state.imported.inputs)
    seen = Sensitivity(graph, placement, affine, samples, lambda model: _build_here(model, tmp_path))
    assert seen.error(()) == 0
    fine, coarse = seen.error(placement.stored[1:]), seen.error(placement.stored[:1])
    assert 1e-4 < fine < coarse / 3
    assert seen.error(placement.stored) > coarse * 0.9


def layer_reading(graph: Graph, name: str) -> str:
    """Return the name of the only layer that reads what a node computed."""
    (found,) = (layer.name for layer in graph.layers.values() if layer.data.name == name)
    return found


def test_the_most_harmful_layers_stay_in_float_while_they_are_small(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = dict.fromkeys(place(graph).stored, 1.0)
    worst = layer_reading(graph, "r2")
    noise[graph.layers[worst].data] = 100.0

    def error(stored: Collection[Any]) -> float:
        return float(np.sqrt(sum(noise[var] for var in stored)))

    every = error(noise)
    monkeypatch.setattr(sensitivity, "_SHARE", 0.3)
    assert cost_most(graph, (), error, enough=every / 2) == {worst}
    assert not cost_most(graph, (), error, enough=every), "the error is small enough"
    assert worst not in cost_most(graph, {worst}, error, enough=0.0), "it is in float already"
    monkeypatch.setattr(sensitivity, "_SHARE", 0.01)
    assert worst not in cost_most(graph, (), error, enough=0.0), "it is too large"
