"""Layers between QuantizeLinear and DequantizeLinear: on whole numbers, with what they store in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from passes.build import calls, normal, numbers, onnx_bytes, onnx_state, onnxruntime_outputs, run_steps

node = helper.make_node


def test_a_gemm_of_transposed_weights_multiplies_integers(tmp_path):
    """What quantisation tools write for a classifier: transB and one scale for each row of the weights."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-64, 65, (10, 32), np.int8),
        "ws": rng.uniform(0.01, 0.02, 10).astype(np.float32),
        "wz": np.zeros(10, np.int8),
        "xs": np.float32(0.02),
        "xz": np.uint8(120),
        "b": normal((10,), 1),
    }
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], axis=0),
        node("Gemm", ["d", "dw", "b"], ["y"], transB=1),
    ]
    model = onnx_bytes(nodes, {"x": (3, 32)}, ["y"], weights)
    feeds = {"x": normal((3, 32), 2)}
    state = run_steps(onnx_state(model, tmp_path), "simplify", "rows_as_images", "whole_numbers", "fold_constants")
    packed = run_steps(state, "fold_batch_norm", "nhwc_layout", "simplify", "fold_constants", "select_templates")
    assert sorted(v.dtype.name for v in packed.weights.values() if v.size >= 320) == ["int8"]
    found = numbers(state, list(feeds.values()), tmp_path, "fold_batch_norm")
    np.testing.assert_allclose(found[0], onnxruntime_outputs(model, feeds)[0], atol=1e-5)


@pytest.mark.parametrize(("scales", "stored"), [(1, "int8"), (50, "float32")])
def test_an_embedding_stays_in_8_bits(tmp_path, scales, stored):
    """With one scale, gathered rows are what is converted; with one for each row, the table is."""
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.01, 0.02, scales).astype(np.float32)
    weights = {
        "w": rng.integers(-128, 128, (50, 24), np.int8),
        "s": scale if scales > 1 else scale[0],
        "z": np.zeros(scales, np.int8) if scales > 1 else np.int8(-3),
        "at": np.array([[3, 49, 0], [7, 7, 1]], np.int64),
    }
    nodes = [
        node("DequantizeLinear", ["w", "s", "z"], ["table"], axis=0),
        node("Gather", ["table", "rows"], ["taken"]),
        node("Add", ["taken", "x"], ["y"]),
    ]
    nodes.insert(1, node("Add", ["at", "more"], ["rows"]))
    nodes.insert(1, node("Cast", ["shift"], ["more"], to=7))
    model = onnx_bytes(nodes, {"x": (2, 3, 24), "shift": (1,)}, ["y"], weights)
    feeds = {"x": normal((2, 3, 24), 4), "shift": np.zeros(1, np.float32)}
    state = run_steps(onnx_state(model, tmp_path), "simplify", "rows_as_images", "whole_numbers", "fold_constants")
    assert [v.dtype.name for v in state.weights.values() if v.size == 50 * 24] == [stored]
    assert len(calls(state, "dequantize")) == (stored == "int8")
    found = numbers(state, list(feeds.values()), tmp_path, "fold_batch_norm")
    np.testing.assert_allclose(found[0], onnxruntime_outputs(model, feeds)[0], atol=1e-6)
