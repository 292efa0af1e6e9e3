"""Which layers gain by 8 bits, by the cost formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from frontend.tiny_models import model_of
from ingot.frontend import import_model
from ingot.quantize.graph import Graph, place
from ingot.quantize.prepare import prepare
from ingot.quantize.speed import Estimate, estimate, slower
from ingot.target import load_target


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two depthwise convolutions between two of 1x1."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.standard_normal((64, 32, 1, 1)).astype(np.float32),
        "w2": random.standard_normal((64, 1, 3, 3)).astype(np.float32),
        "w3": random.standard_normal((64, 1, 3, 3)).astype(np.float32),
        "w4": random.standard_normal((32, 64, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("Conv", ["c1", "w2"], ["c2"], pads=[1, 1, 1, 1], group=64),
        helper.make_node("Conv", ["c2", "w3"], ["c3"], pads=[1, 1, 1, 1], strides=[2, 2], group=64),
        helper.make_node("Conv", ["c3", "w4"], ["y"]),
    ]
    path = tmp_path_factory.mktemp("speed") / "net.onnx"
    onnx.save(model_of(nodes, {"x": ("float32", (1, 32, 28, 28))}, ["y"], weights), path)
    return path


@pytest.mark.parametrize(
    ("board", "faster"),
    [("x86-64-v3", "pointwise"), ("sapphirerapids", "pointwise"), ("raspberry-pi-5", "all")],
)
def test_products_that_must_be_widened_stay_in_float(board: str, faster: str, net: Path) -> None:
    """x86 has no instruction that multiplies 8-bit lanes and adds to wide ones; AArch64 can have."""
    target = load_target(board)
    graph = Graph(prepare(import_model(net), target))
    for layer in graph.layers.values():
        found = estimate(layer, target)
        if layer.kind != "depthwise":
            assert found is not None and found.pays and found.int8 < found.float32
        elif faster == "all":
            assert found is None
        else:
            assert found is not None and not found.pays and found.moved > 0


def test_what_float_layers_read_is_not_stored_in_8_bits(net: Path) -> None:
    target = load_target("x86-64-v3")
    graph = Graph(prepare(import_model(net), target))
    first, *_, last = graph.layers.values()
    stored = place(graph, [layer.name for layer in graph.layers.values() if layer.kind == "depthwise"]).stored
    assert set(stored) == {first.data, last.data}


def test_layers_that_read_the_same_are_decided_on_together(net: Path) -> None:
    graph = Graph(prepare(import_model(net), load_target("x86-64-v3")))
    first, second, *rest = graph.layers.values()
    together = [first, replace(second, data=first.data), *rest]
    gains, loses = Estimate(float32=100, int8=80, moved=10), Estimate(float32=100, int8=130, moved=10)
    others = dict.fromkeys((layer.name for layer in rest), None)
    assert slower(together, {first.name: gains, second.name: gains, **others}) == frozenset()
    assert slower(together, {first.name: loses, second.name: None, **others}) == {first.name, second.name}
    assert slower(together, {first.name: gains, second.name: loses, **others}) == frozenset()
    much = Estimate(float32=1000, int8=1300, moved=10)
    assert slower(together, {first.name: gains, second.name: much, **others}) == {first.name, second.name}
    assert slower(graph.layers.values(), {first.name: gains, second.name: much, **others}) == {second.name}
