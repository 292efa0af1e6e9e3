"""GridSample against ONNX Runtime: inside the image, at its borders, far outside, and where the grid says nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from ingot.frontend import import_model
from passes.execute import Executable, compile_state

from .tiny_models import model_of

CASES = [*itertools.product(("linear", "nearest"), ("zeros", "border"), (0, 1)), ("linear", "reflection", 0)]


def test_pixels_of_a_grid(tmp_path: Path) -> None:
    outputs = [f"y{i}" for i in range(len(CASES))]
    nodes = [
        helper.make_node("GridSample", ["x", "g"], [name], mode=mode, padding_mode=padding, align_corners=aligned)
        for name, (mode, padding, aligned) in zip(outputs, CASES, strict=True)
    ]
    nodes.append(helper.make_node("Relu", [outputs[0]], ["after"]))  # fused to what reads the pixels
    inputs = {"x": ("float32", (2, 3, 5, 7)), "g": ("float32", (2, 4, 9, 2))}
    model = model_of(nodes, inputs, [*outputs, "after"], opset=20)
    onnx.save(model, tmp_path / "m.onnx")
    program = Executable(compile_state(import_model(tmp_path / "m.onnx")), tmp_path)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(7)
    x = random.standard_normal((2, 3, 5, 7)).astype(np.float32)
    grid = random.uniform(-1.4, 1.4, (2, 4, 9, 2)).astype(np.float32)
    grid[0, 0] = np.array([(-1, -1), (1, 1), (-1, 1), (0, 0), (9, 0.1), (0.1, -9), (1e6, -1e6), (1, 0.3), (0.2, -1)])
    results, wanted = program.run([x, grid]), session.run(None, {"x": x, "g": grid})
    for case, left, right in zip([*CASES, "after"], results, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5, err_msg=str(case))
    # What is outside counts as zero, whatever the image has at its border; nothing is read there.
    x[:, :, 0], x[:, :, -1] = np.inf, np.nan
    grid[:] = random.choice([np.nan, np.inf, -np.inf, 3e38, -5.0], grid.shape)
    results = program.run([x, grid])
    for (_, padding, _), found in zip(CASES, results, strict=False):
        if padding == "zeros":
            assert not found.any()
