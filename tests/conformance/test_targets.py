"""One real model for every target: it compiles, links, and holds no instruction outside the target's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import ingot
from ingot.packager import link as linker
from ingot.target import Target, list_targets
from passes.build import normal, onnx_bytes
from targets.isa import foreign_instructions, missing_tools

pytestmark = pytest.mark.slow


def small_net() -> bytes:
    """A net with every family of kernels: convolutions, depthwise, pooling, matrix product, exp, quantised values."""
    node, weights = (
        helper.make_node,
        {
            "w1": normal((16, 3, 3, 3), 1),
            "b1": normal((16,), 2),
            "w2": normal((16, 1, 3, 3), 3),
            "w3": normal((24, 16, 1, 1), 4),
            "w4": normal((24, 10), 5),
            "scale": np.float32(0.05),
            "zero": np.int8(3),
        },
    )
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], group=16),
        node("Add", ["c2", "r1"], ["s2"]),
        node("QuantizeLinear", ["s2", "scale", "zero"], ["q2"]),
        node("DequantizeLinear", ["q2", "scale", "zero"], ["d2"]),
        node("MaxPool", ["d2"], ["p2"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p2", "w3"], ["c3"]),
        node("Sigmoid", ["c3"], ["g3"]),
        node("Mul", ["c3", "g3"], ["m3"]),
        node("GlobalAveragePool", ["m3"], ["a3"]),
        node("Flatten", ["a3"], ["f3"]),
        node("MatMul", ["f3", "w4"], ["y4"]),
        node("Softmax", ["y4"], ["y"], axis=-1),
    ]
    return onnx_bytes(nodes, {"x": (1, 3, 18, 20)}, ["y"], weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("conformance") / "small_net.onnx"
    path.write_bytes(small_net())
    return path


TARGETS = {target.name: target for target in list_targets()}


def test_there_are_targets():
    assert len(TARGETS) >= 25


#: The runtime asks for the register state that the kernel saves only after CPUID has said that the question exists.
ASKED_FOR_FIRST = {"x86_64": ("xgetbv",)}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_instruction_outside_the_features(monkeypatch, model, name):
    target: Target = TARGETS[name]
    missing = missing_tools(target.arch)
    if missing:
        pytest.skip(f"cannot disassemble {target.arch}: install {', '.join(missing)}")
    if target.arch == "arm":  # without symbols, code there cannot be told from the constants in it
        monkeypatch.setattr(linker, "_LINK", tuple(flag for flag in linker._LINK if flag != "-s"))
    artifact = ingot.compile(model, target=name, selftest=False)
    described = artifact.metadata["target"]
    assert (described["name"], described["arch"]) == (name, target.arch)
    assert set(described["features"]) <= set(target.features)
    allowed = ASKED_FOR_FIRST.get(target.arch, ())
    foreign = foreign_instructions(artifact.library, target)
    assert [text for text in foreign if text.split(": ", 1)[1].split()[0] not in allowed] == []
