"""Operators of com.microsoft against ONNX Runtime's own kernels: one graph for each family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from ingot.errors import UnsupportedError
from ingot.frontend import import_model
from ingot.frontend.onnx_read import read_onnx
from ingot.frontend.onnx_static import TensorType, make_static
from ingot.frontend.source import read_source

from .test_onnx_ops import OpCase

_RNG = np.random.default_rng(5)
B, S, H, D = 2, 5, 3, 8  # batches, tokens, heads, width of a head
E = H * D
G = 16  # width of a head that is shared


def _w(*shape: int, scale: float = 0.3) -> np.ndarray:
    return (_RNG.standard_normal(shape) * scale).astype(np.float32)


def _bytes(*shape: int, signed: bool = False) -> np.ndarray:
    return _RNG.integers(-128, 128, shape).astype(np.int8) if signed else _RNG.integers(0, 256, shape).astype(np.uint8)


def _f(*values: float) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, np.float32)


def _i(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


U8, I8 = np.uint8, np.int8
INPUTS: dict[str, np.ndarray] = {
    "x": _w(1, 4, 7, 6, scale=1),
    "m": _w(5, 12, scale=2),
    "t": _w(3, 4, 5, 6, scale=1),
    "s": _w(B, S, E, scale=1),
    "k": _w(B, S + 2, E, scale=1),
    "v": _w(B, S + 2, E, scale=1),
    "q4": _w(B, H, S, D, scale=1),
    "kv": _w(B, S + 2, H, 2, D, scale=1),
    "qkv": _w(B, S, H, 3, D, scale=1),
    "g1": _w(B, 1, 4 * G, scale=1),
    "gk": _w(B, 1, 2 * G, scale=1),
    "gs": _w(B, S, 4 * G, scale=1),
    "gks": _w(B, S, 2 * G, scale=1),
    "cache": _w(B, 2, 7, G, scale=1),
    "cache2": _w(B, 2, 7, G, scale=1),
    "past": _w(2, B, H, 3, D, scale=1),
    "pastk": _w(B, H, 3, D, scale=1),
    "ids": _RNG.integers(0, 11, (B, S)).astype(np.int32),
    "segments": _RNG.integers(0, 2, (B, S)).astype(np.int32),
    "flags": np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.int32),
    "lengths": _i(4, 2),
    "valid": _i(3, 5),
    "prompt": _i(S - 1, S - 3),
    "a": _bytes(5, 12),
    "b": _bytes(5, 12),
    "n": _bytes(1, 6, 6, 4),
    "c": _bytes(1, 4, 6, 6),
    "qs": _bytes(B, S, E),
    "w16": _RNG.integers(-9999, 9999, (5, 12)).astype(np.int16),
    "cond": _RNG.integers(0, 2, (5, 1)).astype(bool),
}
ONE = (_f(0.05), np.array(120, U8))
TWO = (_f(0.03), np.array(7, U8))
NEW = (_f(0.04), np.array(100, U8))
COS2, SIN2 = np.cos(_w(9, G // 2, scale=2)), np.sin(_w(9, G // 2, scale=2))
COS, SIN = np.cos(_w(9, D // 2, scale=2)), np.sin(_w(9, D // 2, scale=2))


def _nbits(bits: int, n: int, k: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = -(-k // block)
    zero = _bytes(n * -(-blocks * bits // 8))
    return _bytes(n, blocks, block * bits // 8), _w(n * blocks), zero


def _wide_conv() -> tuple[Any, ...]:
    weight = (_bytes(3, 4, 3, 3, signed=True), _f(0.02), np.array(0, I8))
    return ("n", *ONE, *weight, *NEW, np.arange(3, dtype=np.int32) * 50)


FOUR, EIGHT = _nbits(4, 8, 40, 16), _nbits(8, 8, 40, 16)
TALL = _w(5, 40, scale=1)
FAMILIES: dict[str, list[OpCase]] = {
    "fused": [
        OpCase("Gelu", ("m",)),
        OpCase("BiasGelu", ("m", _w(12))),
        OpCase("FastGelu", ("m",)),
        OpCase("FastGelu", ("m", _w(12))),
        OpCase("QuickGelu", ("m",), {"alpha": 1.5}),
        OpCase("FusedConv", ("x", _w(3, 4, 3, 3), _w(3)), {"activation": "Relu", "pads": [1, 1, 1, 1]}),
        OpCase("FusedConv", ("x", _w(4, 1, 3, 3)), {"activation": "Sigmoid", "group": 4}),
        OpCase(
            "FusedConv",
            ("x", _w(4, 4, 1, 1), _w(4), "x"),
            {"activation": "LeakyRelu", "activation_params": [0.2]},
        ),
        OpCase("FusedConv", ("x", _w(4, 4, 1, 1)), {"activation": "Clip", "activation_params": [-0.1, 0.4]}),
        OpCase("FusedConv", ("x", _w(4, 4, 1, 1)), {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}),
        OpCase("FusedConv", ("x", _w(4, 4, 1, 1)), {"activation": "Tanh"}),
        OpCase("FusedGemm", ("m", _w(4, 12), _w(4)), {"transB": 1, "activation": "LeakyRelu", "activation_alpha": 0.1}),
        OpCase("FusedGemm", ("m", _w(12, 4), _w(4)), {"alpha": 0.5, "activation": "Relu"}),
        OpCase("FusedMatMul", ("m", _w(4, 12)), {"transB": 1, "alpha": 0.25}),
        OpCase("FusedMatMul", ("t", _w(3, 4, 5, 2)), {"transA": 1, "alpha": 2.0}),
        OpCase("FusedMatMul", ("t", _w(4, 5, 6, 2)), {"transBatchA": 1}),
        OpCase("FusedMatMul", ("t", _w(2, 4, 5, 3)), {"transBatchA": 1, "transA": 1, "transBatchB": 1, "transB": 1}),
        OpCase("TransposeMatMul", ("m", _w(5, 2)), {"transA": 1}),
        OpCase(
            "ConvTransposeWithDynamicPads", ("x", _w(4, 2, 3, 3), np.array([1, 0, 1, 1]), _w(2)), {"strides": [2, 1]}
        ),
    ],
    "norms": [
        OpCase("SkipLayerNormalization", ("s", _w(B, S, E), _w(E), _w(E), _w(E)), {"epsilon": 1e-5}, 4),
        OpCase("SkipLayerNormalization", ("s", _w(S, E), _w(E))),
        OpCase("SkipSimplifiedLayerNormalization", ("s", "s", _w(E), _w(E)), {"epsilon": 1e-5}, 4),
        OpCase(
            "EmbedLayerNormalization",
            ("ids", "segments", _w(11, 8), _w(S + 1, 8), _w(2, 8), _w(8), _w(8), "flags"),
            {},
            3,
        ),
        OpCase("EmbedLayerNormalization", ("ids", None, _w(11, 8), _w(S, 8), None, _w(8), _w(8)), {}, 2),
    ],
    "attention": [
        OpCase("Attention", ("s", _w(E, 3 * E), _w(3 * E)), {"num_heads": H}),
        OpCase("Attention", ("s", _w(E, 3 * E), _w(3 * E), "flags"), {"num_heads": H}),
        OpCase("Attention", ("s", _w(E, 3 * E), _w(3 * E), "lengths"), {"num_heads": H, "scale": 0.2}),
        OpCase("Attention", ("s", _w(E, 3 * E), _w(3 * E), _i(5, 4, 1, 0)), {"num_heads": H}),
        OpCase("Attention", ("s", _w(E, 3 * E), _w(3 * E)), {"num_heads": H, "unidirectional": 1}),
        OpCase(
            "Attention",
            ("s", _w(E, 3 * E), _w(3 * E), None, "past"),
            {"num_heads": H, "unidirectional": 1},
            2,
        ),
        OpCase("Attention", ("s", _w(E, 2 * E + 6), _w(2 * E + 6)), {"num_heads": H, "qkv_hidden_sizes": [E, E, 6]}),
        OpCase("Attention", ("s", _w(E, 3 * E), _w(3 * E), None, None, _w(1, H, S, S)), {"num_heads": H}),
        OpCase("MultiHeadAttention", ("s", "k", "v", _w(3 * E)), {"num_heads": H}),
        OpCase("MultiHeadAttention", ("s", "k", "v"), {"num_heads": H, "scale": 0.3}),
        OpCase("MultiHeadAttention", ("s", "q4", "q4"), {"num_heads": H}),
        OpCase("MultiHeadAttention", ("s", "s", "s", None, "flags", _w(1, 1, S, S)), {"num_heads": H}),
        OpCase("MultiHeadAttention", ("s", "s", "s", None, None, None, "pastk", "pastk"), {"num_heads": H}, 3),
        OpCase("MultiHeadAttention", ("s", "s", "s"), {"num_heads": H, "unidirectional": 1}),
    ],
    "rotary": [
        OpCase("RotaryEmbedding", ("q4", np.array([2]), COS, SIN)),
        OpCase("RotaryEmbedding", ("s", np.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]), COS, SIN), {"interleaved": 1}),
        OpCase(
            "RotaryEmbedding",
            ("s", np.array([1]), COS[:, :2], SIN[:, :2]),
            {"num_heads": H, "rotary_embedding_dim": 4},
        ),
        OpCase("GroupQueryAttention", ("gs", "gks", "gks", None, None, "prompt", np.array(S, np.int32)), {}, 3),
        OpCase(
            "GroupQueryAttention",
            ("g1", "gk", "gk", "cache", "cache2", "valid", np.array(6, np.int32)),
            {"scale": 0.4},
            3,
        ),
        OpCase(
            "GroupQueryAttention",
            ("g1", "gk", "gk", "cache", "cache2", "valid", np.array(7, np.int32), COS2, SIN2),
            {"do_rotary": 1, "local_window_size": 3},
            3,
        ),
        OpCase(
            "GroupQueryAttention",
            (_w(B, S, 8 * G, scale=1), None, None, None, None, "prompt", np.array(S, np.int32), COS2, SIN2),
            {"do_rotary": 1, "rotary_interleaved": 1, "softcap": 2.0},
            3,
        ),
    ],
    "packed": [
        OpCase("MatMulNBits", (TALL, *FOUR[:2]), {"bits": 4, "K": 40, "N": 8, "block_size": 16}),
        OpCase("MatMulNBits", (TALL, *FOUR), {"bits": 4, "K": 40, "N": 8, "block_size": 16}),
        OpCase("MatMulNBits", (TALL, *EIGHT), {"bits": 8, "K": 40, "N": 8, "block_size": 16}),
        # With a g_idx ONNX Runtime's kernel does not read packed zero points: none, and float ones.
        OpCase(
            "MatMulNBits",
            (TALL, *FOUR[:2], None, (np.arange(40) % 3).astype(np.int32)),
            {"bits": 4, "K": 40, "N": 8, "block_size": 16},
        ),
        OpCase(
            "MatMulNBits",
            (TALL, *FOUR[:2], _w(8, 3, scale=3), (np.arange(40) % 3).astype(np.int32)),
            {"bits": 4, "K": 40, "N": 8, "block_size": 16},
        ),
        OpCase(
            "MatMulNBits",
            (TALL, *FOUR[:2], _w(8, 3, scale=3), None, _w(8)),
            {"bits": 4, "K": 40, "N": 8, "block_size": 16},
        ),
        OpCase(
            "MatMulBnb4",
            (TALL, _bytes(40 * 8 // 2), np.abs(_w(20))),
            {"K": 40, "N": 8, "block_size": 16, "quant_type": 1},
        ),
        OpCase(
            "MatMulBnb4",
            (TALL, _bytes(40 * 8 // 2), np.abs(_w(20))),
            {"K": 40, "N": 8, "block_size": 16, "quant_type": 0},
        ),
        OpCase(
            "GatherBlockQuantized",
            (_bytes(11, 16), "ids", _w(11, 2)),
            {"block_size": 16, "bits": 4, "quantize_axis": 1, "gather_axis": 0},
        ),
        OpCase(
            "GatherBlockQuantized",
            (_bytes(11, 32), "ids", _w(11, 2), _bytes(11, 2)),
            {"block_size": 16, "bits": 8, "quantize_axis": 1, "gather_axis": 0},
        ),
        OpCase("MatMulIntegerToFloat", ("a", _bytes(12, 4, signed=True), _f(0.02), _w(4), ONE[1], None, _w(4))),
        OpCase("DynamicQuantizeMatMul", ("m", _bytes(12, 4), _w(4), _bytes(4), _w(4))),
        OpCase("DynamicQuantizeMatMul", ("m", _bytes(12, 4, signed=True), _f(0.01))),
        OpCase(
            "QAttention",
            ("qs", _bytes(E, 3 * E, signed=True), _w(3 * E), _f(0.02), _f(0.01), "flags", ONE[1], np.array(3, I8)),
            {"num_heads": H},
        ),
        OpCase(
            "QAttention",
            ("qs", _bytes(E, 3 * E), _w(3 * E), _f(0.02), _w(3 * E, scale=0.01), None, ONE[1], _bytes(3 * E), "past"),
            {"num_heads": H, "unidirectional": 1},
            2,
        ),
    ],
    "quantized": [
        OpCase("QLinearAdd", ("a", *ONE, "b", *TWO, *NEW)),
        OpCase("QLinearMul", ("a", *ONE, _bytes(12), *TWO, *NEW)),
        OpCase("QLinearSigmoid", ("a", *ONE, _f(1 / 256), np.array(0, U8))),
        OpCase("QLinearLeakyRelu", ("a", *ONE, *NEW), {"alpha": 0.3}),
        OpCase("QLinearSoftmax", ("c", *ONE, _f(1 / 256), np.array(0, U8)), {"axis": 1, "opset": 13}),
        OpCase("QLinearSoftmax", ("c", *ONE, _f(1 / 256), np.array(0, U8)), {"axis": 2, "opset": 11}),
        OpCase("QLinearConcat", (*NEW, "a", *ONE, "b", *TWO), {"axis": 1}),
        OpCase("QLinearWhere", ("cond", "a", *ONE, "b", *TWO, *NEW)),
        OpCase("QLinearAveragePool", ("c", *ONE, *NEW), {"kernel_shape": [3, 3], "pads": [1, 1, 0, 0]}),
        OpCase(
            "QLinearAveragePool", ("n", *ONE, *NEW), {"kernel_shape": [2, 2], "strides": [2, 2], "channels_last": 1}
        ),
        OpCase("QLinearGlobalAveragePool", ("n", *ONE, *NEW), {"channels_last": 1}),
        OpCase("NhwcMaxPool", ("n",), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0]}),
        OpCase("QLinearConv", _wide_conv(), {"channels_last": 1, "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        OpCase(
            "QGemm",
            ("a", *ONE, _bytes(4, 12, signed=True), _w(4) ** 2, np.zeros(4, I8), _i(300, -20, 0, 5), *NEW),
            {"transB": 1, "alpha": 0.5},
        ),
        OpCase("QGemm", ("a", *ONE, _bytes(12, 4), *TWO, _i(300, -20, 0, 5)), {}),
    ],
}
# Steps of a quantised output that may differ: what is exactly between two steps is rounded by float32 noise.
_STEPS = 1


def _model(cases: list[OpCase], opset: int) -> onnx.ModelProto:
    nodes, outputs, weights, used = [], [], {}, set()
    for number, case in enumerate(cases):
        names = case.operands(number, weights, used)
        made = [f"{case.op}_{number}_{index}" for index in range(case.outputs)]
        attributes = case.attributes
        if case.op == "GroupQueryAttention":
            attributes = {"num_heads": 4, "kv_num_heads": 2, **attributes}
        if case.op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization") and case.outputs == 4:
            made[1:3] = ["", ""]  # ONNX Runtime's kernel does not write them
        nodes.append(helper.make_node(case.op, names, made, domain="com.microsoft", **attributes))
        outputs += [name for name in made if name]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(INPUTS[name].dtype), INPUTS[name].shape)
        for name in INPUTS
        if name in used
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _by_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    # Exact sums of 8-bit products on x86 without VNNI, where they would saturate in 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def _written_out(path: Path, inputs: dict[str, TensorType]) -> onnx.ModelProto:
    """The model as the frontend sees it: static, in ONNX's operators."""
    graph = make_static(read_onnx(read_source(path)), inputs, {})
    made = helper.make_graph(
        [node for node, _ in graph.nodes],
        "test",
        [helper.make_tensor_value_info(name, kind.elem, kind.shape) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(n, graph.types[n].elem, graph.types[n].shape) for n in graph.outputs],
        [onnx.numpy_helper.from_array(np.asarray(value, order="C"), n) for n, value in graph.constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=8)


def _saved(model: onnx.ModelProto, folder: Path) -> tuple[dict[str, TensorType], Path]:
    """The types of the model's inputs, and the file it was saved to."""
    onnx.save(model, folder / "model.onnx")
    types = {v.name: v.type.tensor_type for v in model.graph.input}
    kinds = {n: TensorType(t.elem_type, tuple(d.dim_value for d in t.shape.dim)) for n, t in types.items()}
    return kinds, folder / "model.onnx"


def _both(model: onnx.ModelProto, tmp_path: Path) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """The outputs' names, what ONNX Runtime makes of the model written out, and of the model."""
    kinds, path = _saved(model, tmp_path)
    feeds = {name: INPUTS[name] for name in kinds}
    found = _by_onnxruntime(_written_out(path, kinds), feeds)
    return [value.name for value in model.graph.output], found, _by_onnxruntime(model, feeds)


@pytest.mark.parametrize(
    ("family", "opset"), [(family, 17) for family in FAMILIES] + [("quantized", 12), ("norms", 21)]
)
def test_written_out_it_computes_the_same(family: str, opset: int, tmp_path: Path) -> None:
    for name, left, right in zip(*_both(_model(FAMILIES[family], opset), tmp_path), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape, name
        if right.dtype.kind == "f":
            np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-5, err_msg=name)
        else:
            apart = np.abs(left.astype(np.int64) - right.astype(np.int64))
            assert apart.max() <= _STEPS and (apart > 0).mean() < 0.02, name


def test_16_bit_quantisation(tmp_path: Path, run_imported: Callable[..., Any]) -> None:
    cases = [
        OpCase("QuantizeLinear", ("m", _f(0.001), np.array(7, np.int16))),
        OpCase("QuantizeLinear", ("m", _w(12) ** 2 + _f(1e-4), np.arange(12).astype(np.uint16)), {"axis": 1}),
        OpCase("DequantizeLinear", ("w16", _f(0.01), np.array(5, np.int16))),
    ]
    model = _model(cases, opset=17)
    onnx.save(model, tmp_path / "model.onnx")
    imported = import_model(tmp_path / "model.onnx")
    feeds = {spec.name: INPUTS[spec.name] for spec in imported.inputs}
    for left, right in zip(run_imported(imported)(*feeds.values()), _by_onnxruntime(model, feeds), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left.astype(np.float64), right.astype(np.float64), rtol=1e-6)


def test_a_quantised_lstm_is_one_of_real_numbers(tmp_path: Path) -> None:
    # ONNX Runtime rounds the inputs and states of every step to 8 bits; so a looser bound.
    weights = [_bytes(1, 24, 16, signed=True) // 2, _bytes(1, 4, 16, signed=True) // 2, _w(1, 32)]
    scales = [_f(0.01).reshape(1), np.zeros(1, I8), _f(0.02).reshape(1), np.zeros(1, I8)]
    inputs = ("s", *weights, None, None, None, None, *scales)
    model = _model([OpCase("DynamicQuantizeLSTM", inputs, {"hidden_size": 4}, 3)], opset=17)
    for name, left, right in zip(*_both(model, tmp_path), strict=True):
        assert np.abs(right).max() > 0.1
        np.testing.assert_allclose(left, right, atol=0.03, err_msg=name)


def _softmax(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    powers = np.exp(x - x.max(axes, keepdims=True))
    return powers / powers.sum(axes, keepdims=True)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """On (batch, tokens, heads, width)."""
    weights = _softmax(np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1]), (-1,))
    return np.einsum("bhst,bthd->bshd", weights, v).reshape(*q.shape[:2], -1)


def test_operators_without_a_kernel_to_compare_with_follow_their_definition(tmp_path: Path) -> None:
    q, kv, qkv = INPUTS["s"].reshape(B, S, H, D), INPUTS["kv"], INPUTS["qkv"]
    bias, wide = _w(3, 1, 5, 6), _w(5, 6)
    mean = ((INPUTS["c"].astype(np.float32) - 120) * 0.05).mean((2, 3))
    wanted = [
        (OpCase("MultiHeadAttention", ("s", "kv"), {"num_heads": H}), _attention(q, kv[..., 0, :], kv[..., 1, :])),
        (OpCase("MultiHeadAttention", ("qkv",), {"num_heads": H}), _attention(*(qkv[..., i, :] for i in range(3)))),
        (OpCase("BiasSoftmax", ("t", wide), {"axis": 3, "is_inner_broadcast": 0}), _softmax(INPUTS["t"] + wide, (3,))),
        (
            OpCase("BiasSoftmax", ("t", bias), {"axis": 2, "is_inner_broadcast": 1}),
            _softmax(INPUTS["t"] + bias, (2, 3)),
        ),
        (OpCase("QLinearReduceMean", ("c", *ONE, *NEW), {"axes": [2, 3], "keepdims": 0}), np.round(mean / 0.04) + 100),
    ]
    for case, result in wanted:
        kinds, path = _saved(_model([case], opset=17), tmp_path)
        found = _by_onnxruntime(_written_out(path, kinds), {name: INPUTS[name] for name in kinds})
        np.testing.assert_allclose(found[0].astype(np.float64), result, rtol=1e-4, atol=1e-5, err_msg=case.op)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "words"),
    [
        ("MatMulNBits", ("m", "a", _f(1)), {"bits": 4, "K": 12, "N": 8, "block_size": 16}, "a constant matrix"),
        ("FusedConv", ("x", _w(4, 4, 1, 1)), {"activation": "Sine"}, "'Sine'"),
        ("Attention", ("s", _w(E, 3 * E)), {"num_heads": H, "do_rotary": 1}, "do_rotary"),
        ("QOrderedGelu", ("a", _f(1), _f(1)), {}, "com.microsoft:QOrderedGelu"),
    ],
)
def test_forms_that_are_refused_say_so(
    op: str, inputs: tuple[Any, ...], attributes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    onnx.save(_model([OpCase(op, inputs, attributes)], opset=17), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match=re.escape(words)):
        import_model(tmp_path / "model.onnx")


def test_norms_under_onnx_own_domain(tmp_path: Path) -> None:
    # As ONNX Runtime's optimiser writes them into models of opsets that have no such operator.
    model = _model(
        [
            OpCase("LayerNormalization", ("s", _w(E), _w(E)), {"axis": -1}),
            OpCase("SimplifiedLayerNormalization", ("s", _w(E)), {"axis": -1}),
        ],
        opset=13,
    )
    for node in model.graph.node:
        node.domain = ""
    del model.opset_import[1:]
    for name, left, right in zip(*_both(model, tmp_path), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5, err_msg=name)


def _small_network() -> onnx.ModelProto:
    """Convolutions with a residual, a pool, and a block with Gelu, a skip and a norm, as exporters write them."""
    nodes: list[onnx.NodeProto] = []

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    first = add("Relu", add("Conv", "image", "w1", "b1", pads=[1, 1, 1, 1]))
    second = add("Relu", add("Add", add("Conv", first, "w2", "b1", pads=[1, 1, 1, 1]), first))
    flat = add("Flatten", add("GlobalAveragePool", second))
    wide = add("Add", add("MatMul", flat, "m1"), "b3")
    spread = add("Add", add("Erf", add("Div", wide, "root")), "one")
    gelu = add("Mul", add("Mul", wide, spread), "half")
    norm = add("LayerNormalization", add("Add", add("MatMul", gelu, "m2"), flat), "b1", "b1")
    nodes.append(helper.make_node("Softmax", [norm], ["y"]))
    weights = {"w1": _w(8, 4, 3, 3), "w2": _w(8, 8, 3, 3), "b1": _w(8), "m1": _w(8, 16), "m2": _w(16, 8), "b3": _w(16)}
    weights |= {"root": np.sqrt(_f(2)), "one": _f(1), "half": _f(0.5)}
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", 1, (1, 4, 8, 8))],
        [helper.make_tensor_value_info("y", 1, (1, 8))],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("optimised", {"FusedConv"}),
        ("static", {"QLinearAdd", "QLinearGlobalAveragePool", "QLinearSoftmax"}),
        ("dynamic", {"DynamicQuantizeMatMul"}),
    ],
)
def test_what_onnx_runtime_writes(kind: str, expected: set[str], tmp_path: Path) -> None:
    from onnxruntime import quantization

    image = _w(1, 4, 8, 8, scale=1)

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]  # has no types
        def __init__(self) -> None:
            self.left = [{"image": image}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    source, path = tmp_path / "source.onnx", tmp_path / "model.onnx"
    onnx.save(_small_network(), source)
    if kind == "static":
        static = quantization.QuantFormat.QOperator
        quantization.quantize_static(source, path, Samples(), static, reduce_range=True)
    else:
        if kind == "dynamic":
            quantization.quantize_dynamic(source, tmp_path / "dynamic.onnx", weight_type=quantization.QuantType.QUInt8)
            source = tmp_path / "dynamic.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath, options.log_severity_level = str(path), 4
        onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    model = onnx.load(path)
    assert expected <= {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
    found = _by_onnxruntime(_written_out(path, {"image": TensorType(1, image.shape)}), {"image": image})
    wanted = _by_onnxruntime(model, {"image": image})
    np.testing.assert_allclose(found[0], wanted[0], atol=0.006 if kind == "static" else 1e-4)
