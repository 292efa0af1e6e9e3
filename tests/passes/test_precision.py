"""Which layers become half precision, which tensors are stored so, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import ingot
from ingot.errors import OptionError
from ingot.passes.lower import Call
from ingot.passes.pipeline import run
from passes.build import normal, onnx_bytes, onnx_state, onnxruntime_outputs
from passes.execute import Executable
from schedules.common import Branches


def chain() -> bytes:
    """conv, relu, depthwise, conv, add of the first result, max pool, conv, mean over the image, product."""
    weights = {
        "w0": normal((16, 4, 3, 3), 0) / 6,
        "wd": normal((16, 1, 3, 3), 1) / 3,
        "w1": normal((16, 16, 1, 1), 2) / 4,
        "w2": normal((32, 16, 3, 3), 3) / 12,
        "wm": normal((32, 10), 4) / 6,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "wd"], ["c"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("Conv", ["c", "w1"], ["d"]),
        helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("MaxPool", ["e"], ["f"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["f", "w2"], ["g"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["g"], ["h"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["h", "wm"], ["y"]),
    ]
    return onnx_bytes(nodes, {"x": (1, 4, 16, 16)}, ["y", "e"], weights)


def state_of(model: bytes, folder, target: str, precision: str):
    return run(onnx_state(model, folder, target).having(precision=precision))


def test_tensors_between_layers_are_half_and_nothing_converts_alone(tmp_path):
    state = state_of(chain(), tmp_path, "znver4", "bf16")
    assert [layer.arithmetic for layer in state.layers] == ["bf16", "fp32", "bf16", "bf16", "bf16"]
    calls = [call for call in state.lowered.calls if isinstance(call, Call)]
    plain = state_of(chain(), tmp_path, "znver4", "fp32")
    assert len(calls) == len(plain.lowered.calls)
    temporary = {v.id: v.dtype for call in calls for v in call.args if v.kind == "temp"}
    # What the depthwise layer and the pool read and write; "e" is an output, and stays float32.
    assert sum(dtype == "uint16" for dtype in temporary.values()) >= 5
    assert state.program.arena_bytes < plain.program.arena_bytes
    assert len(state.program.weights) < 0.7 * len(plain.program.weights)


@pytest.mark.parametrize("target", ["znver4", "graviton-3", "sapphirerapids"])
def test_the_numbers_are_near_float32(tmp_path, target):
    x = normal((1, 4, 16, 16), 9)
    wanted = onnxruntime_outputs(chain(), {"x": x})
    state = state_of(chain(), tmp_path, target, "bf16")
    host = onnx_state(chain(), tmp_path).target
    for got, want in zip(Executable(state.having(target=host), tmp_path).run([x], 3), wanted, strict=True):
        assert got.dtype == np.float32
        error = np.abs(got - want).max() / np.abs(want).max()
        assert 1e-5 < error < 2e-2  # bfloat16 has 8 bits: an error of nothing would mean that nothing was rounded


def test_fp32_changes_nothing(tmp_path):
    state = state_of(chain(), tmp_path, "znver4", "fp32")
    assert state.layers == ()
    assert {v.dtype for call in state.lowered.calls for v in call.args} == {"float32"}


@pytest.mark.parametrize(("target", "precision"), [("x86-64-v3", "bf16"), ("raspberry-pi-4", "fp16")])
def test_a_target_without_the_arithmetic_stays_float32_and_says_why(tmp_path, target, precision):
    state = state_of(chain(), tmp_path, target, precision)
    assert {layer.arithmetic for layer in state.layers} == {"fp32"}
    assert any("has no" in layer.why for layer in state.layers)
    assert {v.dtype for call in state.lowered.calls for v in call.args} == {"float32"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_row_times_a_matrix_beyond_the_cache_stores_half_weights(tmp_path, precision):
    branches = Branches()
    branches.matmul((1,), 1024, 3000, "relu")
    branches.matmul((1,), 64, 64, "relu")
    state = state_of(branches.bytes(), tmp_path, "x86-64-v3", precision)
    assert [layer.arithmetic for layer in state.layers] == ["stored", "fp32"]
    feeds = branches.feeds()
    outputs = Executable(state.having(target=onnx_state(branches.bytes(), tmp_path).target), tmp_path).run(
        list(feeds.values())
    )
    for got, want in zip(outputs, onnxruntime_outputs(branches.bytes(), feeds), strict=True):
        assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()


def test_weights_that_would_be_infinite_stay_float32(tmp_path):
    branches = Branches()
    branches.matmul((1,), 1024, 3000)
    name = next(iter(branches.weights))
    branches.weights[name] = branches.weights[name] * np.float32(1e5)
    state = state_of(branches.bytes(), tmp_path, "x86-64-v3", "fp16")
    assert [layer.arithmetic for layer in state.layers] == ["fp32"]


def test_the_artifact_says_what_half_precision_did(tmp_path):
    (tmp_path / "m.onnx").write_bytes(chain())
    artifact = ingot.compile(tmp_path / "m.onnx", target="znver4", precision="bf16")
    half = artifact.metadata["half"]
    assert artifact.metadata["precision"] == "bf16"
    assert (half["layers"], half["multiplied"], half["stored"]) == (5, 4, 0)
    assert half["tensors"] > 0
    assert [error["name"] for error in half["errors"]] == ["y", "e"]
    for error in half["errors"]:
        assert 30 < error["sqnr_db"] < 80
        assert 0 < error["max_error"] < 0.02 * error["max_reference"]
    assert any("1 of 5 layers multiplies in float32" in notice for notice in artifact.notices)


def test_nothing_to_gain_is_said(tmp_path):
    (tmp_path / "m.onnx").write_bytes(chain())
    artifact = ingot.compile(tmp_path / "m.onnx", target="x86-64-v3", precision="bf16", selftest=False)
    assert artifact.metadata["half"]["multiplied"] == 0
    assert any("no layer gains by bf16" in notice for notice in artifact.notices)


@pytest.mark.parametrize(("target", "precision"), [("x86-64-v2", "fp16"), ("native", "half")])
def test_what_cannot_be_is_refused(tmp_path, target, precision):
    (tmp_path / "m.onnx").write_bytes(chain())
    with pytest.raises(OptionError, match=r"precision|convert") as refusal:
        ingot.compile(tmp_path / "m.onnx", target=target, precision=precision)
    assert "fp32" in refusal.value.allowed
