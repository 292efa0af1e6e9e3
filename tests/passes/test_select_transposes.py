"""Phases of an image become pixels in the kernel of the operators that follow."""

from __future__ import annotations

import pytest
from onnx import helper

from ingot.passes.pipeline import STEPS
from passes.build import close, normal, numbers, onnx_bytes, onnx_state, onnxruntime_outputs, run_steps

node = helper.make_node
UP_TO = STEPS[: STEPS.index("fuse") + 1]


@pytest.mark.parametrize(("pads", "channels", "joined"), [(0, 16, True), (1, 16, True), (1, 5, False)])
def test_case_2_phases_become_pixels_with_a_bias(tmp_path, pads, channels, joined):
    nodes = [
        node("ConvTranspose", ["x", "w", "b"], ["t"], strides=[2, 3], pads=[pads] * 4),
        node("Relu", ["t"], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    weights = {"w": normal((3, channels, 4, 3), 1), "b": normal((channels,), 2), "v": normal((2, channels, 1, 1), 3)}
    model = onnx_bytes(nodes, {"x": (1, 3, 5, 7)}, ["y"], weights)
    x = normal((1, 3, 5, 7), 4)
    state = run_steps(onnx_state(model, tmp_path), *UP_TO)
    (got,) = numbers(state, [x], tmp_path, STEPS[len(UP_TO)])
    close(got, onnxruntime_outputs(model, {"x": x})[0], 1e-5)
    names = [str(gvar.name_hint) for gvar in state.module.functions]
    kernels = [name for name in names if "pixels" in name]
    assert [("add" in name, "relu" in name) for name in kernels] == [(True, True)] * joined
