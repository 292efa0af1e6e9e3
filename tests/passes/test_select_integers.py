"""Integer kernels between quantised layers: no float arithmetic in the machine code, answers of ONNX Runtime."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from frontend.tiny_models import model_of
from ingot.frontend import import_model
from ingot.packager.codegen import generate_object
from passes.execute import Executable, compile_state
from targets.isa import llvm_objdump

#: Float arithmetic and conversions on x86.
FLOAT = re.compile(r"\bv?(mul|add|sub|div|fmadd\w*|cvt\w*)(ps|ss|dq|pd)\b|\bv?fn?m(add|sub)\w+")


def layers(after: str = "Relu", kind: str = "uint8") -> tuple[bytes, dict[str, np.ndarray]]:
    """A convolution, a depthwise one and a product between QuantizeLinear and DequantizeLinear."""
    random = np.random.default_rng(11)
    weights: dict[str, np.ndarray] = {"zx": np.array(3, kind)}
    nodes = []

    def quantised(name: str, value: str, scale: float) -> str:
        weights[f"{name}_s"] = np.float32(scale)
        nodes.append(helper.make_node("QuantizeLinear", [value, f"{name}_s", "zx"], [f"{name}_q"]))
        return dequantised(f"{name}_q", f"{name}_s", "zx", f"{name}_d")

    def dequantised(value: str, scale: str, zero_point: str, name: str, **options: int) -> str:
        nodes.append(helper.make_node("DequantizeLinear", [value, scale, zero_point], [name], **options))
        return name

    def constant(name: str, shape: tuple[int, ...], scales: np.ndarray, dtype: str, axis: int) -> str:
        top = 127 if dtype == "int8" else 2000
        weights[name] = random.integers(-top, top + 1, shape).astype(dtype)
        weights[f"{name}_s"], weights[f"{name}_z"] = scales, np.zeros(scales.shape, dtype)
        return dequantised(name, f"{name}_s", f"{name}_z", f"{name}_d", axis=axis)

    x_scale = 0.02
    scales = random.uniform(0.001, 0.003, 16).astype(np.float32)
    weights["x_s"] = np.float32(x_scale)
    x = dequantised("x", "x_s", "zx", "x_d")
    for name, shape, group in (("a", (16, 8, 3, 3), 1), ("b", (16, 1, 3, 3), 16)):
        w = constant(f"w{name}", shape, scales, "int8", 0)
        b = constant(f"b{name}", (16,), scales * np.float32(x_scale), "int32", 0)
        nodes.append(helper.make_node("Conv", [x, w, b], [name], pads=[1, 1, 1, 1], group=group))
        value = name
        if after == "Relu":
            nodes.append(helper.make_node("Relu", [name], [f"{name}_r"]))
            value = f"{name}_r"
        if after == "Clip":
            weights["low"], weights["high"] = np.float32(-0.3), np.float32(0.4)
            nodes.append(helper.make_node("Clip", [name, "low", "high"], [f"{name}_r"]))
            value = f"{name}_r"
        x = quantised(name, value, x_scale)
    nodes.append(helper.make_node("Flatten", [x], ["flat"]))
    w = constant("wc", (16 * 25, 10), np.float32(0.002).reshape(()), "int8", 0)
    nodes.append(helper.make_node("MatMul", ["flat", w], ["c"]))
    quantised("c", "c", 0.05)
    nodes.pop()
    model = model_of(nodes, {"x": (kind, (1, 8, 5, 5))}, ["c_q"], weights)
    info = np.iinfo(kind)
    feeds = {"x": random.integers(info.min, info.max + 1, (1, 8, 5, 5)).astype(kind)}
    return model.SerializeToString(), feeds


def operator_by_operator(model: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """ONNX Runtime without its integer kernels, which saturate 16-bit sums on CPUs without VNNI."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return np.asarray(onnxruntime.InferenceSession(model, options).run(None, feeds)[0])


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("after", ["", "Relu", "Clip"])
def test_layers_between_quantisations_are_within_a_step(tmp_path: Path, after: str, kind: str) -> None:
    model, feeds = layers(after, kind)
    path = tmp_path / "net.onnx"
    path.write_bytes(model)
    state = compile_state(import_model(path))
    got = Executable(state, tmp_path).run(list(feeds.values()))[0]
    wanted = operator_by_operator(model, feeds)
    assert len(np.unique(wanted)) > 4, "the case saturates and judges nothing"
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1
    assert state.lowered is not None
    labels = " ".join(call.label for call in state.lowered.calls)
    assert len(re.findall("conv2d_int8|depthwise_int8|matmul_int8", labels)) == 3 and "quantize" in labels


def test_the_machine_code_holds_no_float_arithmetic(tmp_path: Path) -> None:
    tool = llvm_objdump()
    if tool is None:
        pytest.skip("llvm-objdump is not installed")
    path = tmp_path / "net.onnx"
    path.write_bytes(layers()[0])
    for target, integer in (("x86-64-v3", "pmaddwd"), ("x86-64-v4", "pmaddwd"), ("sapphirerapids", "vpdpbusd")):
        state = compile_state(import_model(path), target)
        assert state.lowered is not None
        code, _ = generate_object({k.symbol: k.function for k in state.lowered.kernels}, state.target)
        (tmp_path / "k.o").write_bytes(code)
        text = subprocess.run(
            [tool, "-d", "--no-show-raw-insn", str(tmp_path / "k.o")], capture_output=True, text=True, check=True
        ).stdout
        assert integer in text
        found = sorted({match[0] for match in FLOAT.finditer(text)})
        assert not found, f"{target}: {found}"
