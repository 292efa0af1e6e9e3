"""Layers between QuantizeLinear and DequantizeLinear: on whole numbers, with what they store in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from tvm import relax

from ingot.passes.rewriter import dtype_of
from passes.build import (
    calls,
    normal,
    numbers,
    onnx_bytes,
    onnx_state,
    onnxruntime_outputs,
    ops,
    relax_state,
    run_steps,
)

node = helper.make_node
op = relax.op


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


def pooled(pad: int, second: float, size: int = 3, **attrs):
    """A pool between quantised tensors; the second has its own scale."""

    def body(e, x):
        def numbers_of(scale):
            return relax.const(np.float32(scale), "float32"), relax.const(np.int8(-3), "int8")

        first = e(op.dequantize(e(op.quantize(x, *numbers_of(0.1), out_dtype="int8")), *numbers_of(0.1)))
        pool = e(op.nn.max_pool2d(first, (size, size), (2, 2), (pad, pad), **attrs))
        return [e(op.dequantize(e(op.quantize(pool, *numbers_of(second), out_dtype="int8")), *numbers_of(second)))]

    return run_steps(relax_state({"x": (1, 5, 9, 9)}, {}, body), "simplify", "whole_numbers")


def expected(x, pad: int, second: float):
    stored = np.clip(np.rint(x / np.float32(0.1)) - 3, -128, 127)
    real = np.float32(0.1) * (stored + 3).astype(np.float32)
    padded = np.pad(real, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    again = np.clip(np.rint(windows.max((4, 5)) / np.float32(second)) - 3, -128, 127)
    return np.float32(second) * (again + 3).astype(np.float32)


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("second", [0.1, 0.23])
def test_cases_5_and_6_a_maximum_is_that_of_the_stored_numbers(tmp_path, pad, second):
    state = pooled(pad, second)
    assert dtype_of(calls(state, "nn.max_pool2d")[0]) == "int8"
    assert ops(state).count("quantize") == (1 if second == 0.1 else 2)
    x = normal((1, 5, 9, 9)) * 6
    found = numbers(state, [x], tmp_path)[0]
    np.testing.assert_allclose(found, expected(x, pad, second), rtol=1e-6)


def test_case_5_a_window_that_may_hold_padding_alone_stays_as_it_is():
    for state in (pooled(1, 0.1, size=1), pooled(1, 0.1, ceil_mode=True)):
        assert dtype_of(calls(state, "nn.max_pool2d")[0]) == "float32"
