"""Importing TFLite: tiny handmade files, judged by LiteRT where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.errors import ModelError, ShapeError, UnsupportedError
from ingot.frontend import Imported, Quantization, import_model
from ingot.frontend.normal_form import check_normal_form

from .tiny_models import Op, Tensor, small_tflite, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]
_RNG = np.random.default_rng(5)


def litert(path: Path, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of LiteRT's reference kernels."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    kind = interpreter.OpResolverType.BUILTIN_REF
    runner = interpreter.Interpreter(model_path=str(path), experimental_op_resolver_type=kind)
    for detail, array in zip(runner.get_input_details(), arrays, strict=True):
        if tuple(detail["shape"]) != array.shape:
            runner.resize_tensor_input(detail["index"], array.shape)
    runner.allocate_tensors()
    for detail, array in zip(runner.get_input_details(), arrays, strict=True):
        runner.set_tensor(detail["index"], array)
    runner.invoke()
    return [runner.get_tensor(detail["index"]) for detail in runner.get_output_details()]


def _weights(name: str, *shape: int, dtype: str = "float32", **quantization: Any) -> Tensor:
    if dtype == "float32":
        data = _RNG.standard_normal(shape).astype(np.float32)
    elif dtype == "int32":
        data = _RNG.integers(-900, 900, shape).astype(np.int32)
    else:
        info = np.iinfo(dtype)
        data = _RNG.integers(max(info.min, -127), info.max + 1, shape).astype(dtype)
    return Tensor(name, shape, dtype, data, **quantization)


def _constant(name: str, *values: int) -> Tensor:
    return Tensor(name, (len(values),), "int32", np.array(values, np.int32))


def test_the_description_is_the_users(write: Write) -> None:
    imported = import_model(write(small_tflite(), "net.tflite"))
    check_normal_form(imported)
    assert imported.source_format == "tflite" and imported.name == "net"
    assert [(spec.name, spec.shape) for spec in imported.inputs] == [("x", (1, 8, 8, 3))]
    assert [(spec.name, spec.shape) for spec in imported.outputs] == [("y", (1, 5))]
    assert len(imported.notices) == 1
    # conv (1x4x4x4 floats, shared with its reshape) and logits (5 floats) are live at once.
    assert imported.source_peak_bytes == 64 * 4 + 5 * 4


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_values_agree_with_litert_for_any_batch(write: Write, run_imported: Build, batch: int) -> None:
    path = write(small_tflite(), "net.tflite")
    imported = import_model(path, {"x": (batch, 8, 8, 3)} if batch > 1 else None)
    x = _RNG.standard_normal((batch, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(run_imported(imported)(x)[0], litert(path, [x])[0], rtol=1e-5, atol=1e-6)


def test_names_may_be_missing_or_doubled(write: Write, run_imported: Build) -> None:
    tensors = [Tensor("", (2, 2)), Tensor("", (2, 2)), Tensor("same", (2, 2)), Tensor("same", (2, 2))]
    ops = [Op("ABS", (0,), (1,)), Op("EXP", (1,), (2,)), Op("NEG", (2,), (3,))]
    imported = import_model(write(tflite_of(tensors, ops, [0], [3]), "net.tflite"))
    x = np.array([[-1, 2], [0, -3]], np.float32)
    np.testing.assert_allclose(run_imported(imported)(x)[0], -np.exp(np.abs(x)), rtol=1e-6)
    assert imported.inputs[0].name == "#0"


def _quantized(dtype: str, multiplier: float, activation: int, per_channel: bool, depthwise: bool) -> bytes:
    zero = 3 if dtype == "int8" else 131
    channels = 6 if depthwise else 5
    shape = (1, 3, 3, channels) if depthwise else (channels, 3, 3, 3)
    count = channels if per_channel else 1
    scales = tuple(float(value) for value in _RNG.uniform(0.5, 1.5, count) * 0.01)
    weight_zero = (0,) * count if dtype == "int8" else (120,)
    kernel = _weights("k", *shape, dtype=dtype, scale=scales, zero_point=weight_zero, axis=3 if depthwise else 0)
    bias_scale = tuple(0.02 * scale for scale in scales)
    tensors = [
        Tensor("x", (1, 7, 7, 3), dtype, scale=(0.02,), zero_point=(zero,)),
        kernel,
        _weights("b", channels, dtype="int32", scale=bias_scale, zero_point=(0,) * count),
        Tensor("y", (1, 4, 4, channels), dtype, scale=(0.02 * 0.01 / multiplier,), zero_point=(zero - 2,)),
    ]
    options = {
        "StrideH": 2,
        "StrideW": 2,
        "FusedActivationFunction": activation,
        "DilationHFactor": 1,
        "DilationWFactor": 1,
    }
    kind = "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions"
    if depthwise:
        options["DepthMultiplier"] = 2
    return tflite_of(
        tensors, [Op("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", (0, 1, 2), (3,), kind, options)], [0], [3]
    )


@pytest.mark.parametrize("activation", [0, 1, 3])
@pytest.mark.parametrize(
    ("dtype", "per_channel", "depthwise"),
    [
        ("int8", True, False),
        ("int8", True, True),
        ("int8", False, False),
        ("uint8", False, False),
        ("uint8", False, True),
    ],
)
def test_quantised_convolutions_round_as_litert_does(
    write: Write, run_imported: Build, dtype: str, per_channel: bool, depthwise: bool, activation: int
) -> None:
    for multiplier in (0.003, 0.02):
        path = write(_quantized(dtype, multiplier, activation, per_channel, depthwise), "net.tflite")
        imported = import_model(path)
        check_normal_form(imported)
        info = np.iinfo(dtype)
        x = _RNG.integers(info.min, info.max + 1, (1, 7, 7, 3)).astype(dtype)
        found, wanted = run_imported(imported)(x)[0], litert(path, [x])[0]
        np.testing.assert_array_equal(found, wanted)
        assert len(np.unique(wanted)) > 3, "the case saturates and judges nothing"


def test_a_quantised_dense_layer_and_pool_are_exact(write: Write, run_imported: Build) -> None:
    scale, zero = (0.05,), (-4,)
    tensors = [
        Tensor("x", (1, 6, 6, 4), "int8", scale=scale, zero_point=zero),
        Tensor("pool", (1, 2, 2, 4), "int8", scale=scale, zero_point=zero),
        _constant("shape", 1, 16),
        Tensor("flat", (1, 16), "int8", scale=scale, zero_point=zero),
        _weights("w", 7, 16, dtype="int8", scale=(0.01,), zero_point=(0,)),
        _weights("b", 7, dtype="int32", scale=(0.0005,), zero_point=(0,)),
        Tensor("y", (1, 7), "int8", scale=(0.07,), zero_point=(5,)),
    ]
    pool = {"StrideH": 4, "StrideW": 4, "FilterHeight": 2, "FilterWidth": 2, "Padding": 1}
    ops = [
        Op("AVERAGE_POOL_2D", (0,), (1,), "Pool2DOptions", pool),
        Op("RESHAPE", (1, 2), (3,)),
        Op("FULLY_CONNECTED", (3, 4, 5), (6,), "FullyConnectedOptions", {"FusedActivationFunction": 0}),
    ]
    path = write(tflite_of(tensors, ops, [0], [1, 6]), "net.tflite")
    imported = import_model(path)
    run = run_imported(imported)
    for _ in range(5):
        x = _RNG.integers(-128, 128, (1, 6, 6, 4)).astype(np.int8)
        for found, wanted in zip(run(x), litert(path, [x]), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert imported.inputs[0].quantization == Quantization((np.float32(0.05).item(),), (-4,), 0)


def test_moves_agree_with_litert(write: Write, run_imported: Build) -> None:
    q = {"dtype": "int8", "scale": (0.1,), "zero_point": (2,)}
    tensors = [
        Tensor("x", (2, 4, 6), **q),
        _constant("order", 2, 0, 1),
        Tensor("turned", (6, 2, 4), **q),
        _constant("axis", 0),
        Tensor("part0", (3, 2, 4), **q),
        Tensor("part1", (3, 2, 4), **q),
        Tensor("padding", (3, 2), "int32", np.array([[0, 1], [2, 0], [0, 0]], np.int32)),
        Tensor("padded", (4, 4, 4), **q),
        Tensor("joined", (3, 4, 4), **q),
        Tensor("packed", (2, 3, 2, 4), **q),
        _constant("begin", 0, 0, 1),
        _constant("end", 3, 2, 4),
        _constant("strides", 2, 1, 2),
        Tensor("sliced", (2, 2, 2), **q),
        Tensor("rescaled", (2, 2, 2), "int8", scale=(0.3,), zero_point=(-1,)),
    ]
    ops = [
        Op("TRANSPOSE", (0, 1), (2,)),
        Op("SPLIT", (3, 2), (4, 5), "SplitOptions", {"NumSplits": 2}),
        Op("PAD", (4, 6), (7,)),
        Op("CONCATENATION", (4, 5), (8,), "ConcatenationOptions", {"Axis": 1}),
        Op("PACK", (4, 5), (9,), "PackOptions", {"ValuesCount": 2, "Axis": 0}),
        Op("STRIDED_SLICE", (4, 10, 11, 12), (13,), "StridedSliceOptions"),
        Op("QUANTIZE", (13,), (14,)),
    ]
    path = write(tflite_of(tensors, ops, [0], [2, 7, 8, 9, 13, 14]), "net.tflite")
    imported = import_model(path)
    check_normal_form(imported)
    x = _RNG.integers(-128, 128, (2, 4, 6)).astype(np.int8)
    for found, wanted in zip(run_imported(imported)(x), litert(path, [x]), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("index", [-(2**31), -1, 0, 4, 5, 2**31 - 1])
def test_gather_never_reads_outside(write: Write, run_imported: Build, index: int) -> None:
    tensors = [_weights("table", 5, 3), Tensor("i", (2,), "int32"), Tensor("y", (2, 3))]
    ops = [Op("GATHER", (0, 1), (2,), "GatherOptions", {"Axis": 0})]
    imported = import_model(write(tflite_of(tensors, ops, [1], [2]), "net.tflite"))
    found = run_imported(imported)(np.full(2, index, np.int32))[0]
    table = tensors[0].data
    assert table is not None
    np.testing.assert_array_equal(found, table[[min(max(index, 0), 4)] * 2])


def test_everything_unsupported_is_listed_with_its_tensor(write: Write) -> None:
    tensors = [
        Tensor("x", (2, 2)), Tensor("a", (2, 2)), Tensor("b", (2, 2)), Tensor("c", (2, 2)), Tensor("y", (2, 2)),
    ]  # fmt: skip
    ops = [
        Op("CUSTOM", (0,), (1,), custom="Sparkle"),
        Op("CUSTOM", (1,), (2,), custom="Sparkle"),
        Op("ABS", (2,), (3,)),
        Op("RANDOM_UNIFORM", (3,), (4,)),
    ]
    with pytest.raises(UnsupportedError) as caught:
        import_model(write(tflite_of(tensors, ops, [0], [4]), "net.tflite"))
    for word in (
        "3 nodes",
        "custom Sparkle (#0 -> a, #1 -> b)",
        "RANDOM_UNIFORM, which makes random numbers (#3 -> y)",
    ):
        assert word in str(caught.value)
    assert "ABS" not in str(caught.value)


def test_hybrid_layers_are_said_to_be_float(write: Write, run_imported: Build) -> None:
    weights = _weights("w", 4, 32, dtype="int8", scale=(0.01,), zero_point=(0,))
    tensors = [Tensor("x", (1, 32)), weights, Tensor("y", (1, 4))]
    ops = [Op("FULLY_CONNECTED", (0, 1), (2,), "FullyConnectedOptions", {"FusedActivationFunction": 0})]
    imported = import_model(write(tflite_of(tensors, ops, [0], [2]), "net.tflite"))
    assert any("int8 weights and float activations" in notice for notice in imported.notices)
    x = _RNG.standard_normal((1, 32)).astype(np.float32)
    assert weights.data is not None
    wanted = x @ (weights.data.astype(np.float32) * np.float32(0.01)).T
    np.testing.assert_allclose(run_imported(imported)(x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_without_zero_point_and_a_scale_on_floats(write: Write, run_imported: Build) -> None:
    tensors = [
        Tensor("x", (4,), "int8", scale=(0.5,), zero_point=None),
        Tensor("y", (4,), scale=(0.25,), zero_point=(3,)),
        Tensor("z", (4,)),
    ]
    ops = [Op("DEQUANTIZE", (0,), (1,)), Op("NEG", (1,), (2,))]
    imported = import_model(write(tflite_of(tensors, ops, [0], [2]), "net.tflite"))
    assert imported.inputs[0].quantization == Quantization((0.5,), (0,), 0)
    x = np.array([-128, -1, 0, 127], np.int8)
    np.testing.assert_array_equal(run_imported(imported)(x)[0], -0.5 * x.astype(np.float32))


def test_a_fixed_batch_cannot_change(write: Write) -> None:
    tensors = [Tensor("x", (2, 2)), Tensor("y", (2, 2))]
    path = write(tflite_of(tensors, [Op("ABS", (0,), (1,))], [0], [1]), "net.tflite")
    with pytest.raises(ShapeError, match="contradicts"):
        import_model(path, {"x": (3, 2)})


@pytest.mark.parametrize(
    ("tensors", "ops", "inputs", "outputs", "kind", "word"),
    [
        ([Tensor("x", (2,)), Tensor("y", (2,))], [Op("ABS", (7,), (1,))], [0], [1], ModelError, "does not exist"),
        ([Tensor("x", (2,)), Tensor("y", (2,))], [Op("ABS", (0,), (9,))], [0], [1], ModelError, "does not exist"),
        ([Tensor("x", (2,)), Tensor("y", (2,))], [Op("ABS", (0,), (1,))], [5], [1], ModelError, "no tensor"),
        ([Tensor("x", (2,)), Tensor("y", (2,))], [Op("ABS", (0,), (1,))], [0], [-3], ModelError, "no tensor"),
        ([Tensor("x", (2,)), Tensor("y", (2,))], [Op("ABS", (1,), (1,))], [0], [1], ModelError, "nothing computes"),
        ([Tensor("x", (2,)), Tensor("y", (2,))], [], [0], [1], ModelError, "not computed"),
        ([Tensor("x", (2,)), Tensor("y", (-2,))], [Op("ABS", (0,), (1,))], [0], [1], ModelError, "negative"),
        ([Tensor("x", (2,)), Tensor("y", (2**30,) * 3)], [Op("ABS", (0,), (1,))], [0], [1], ModelError, "too large"),
        (
            [Tensor("x", (2,)), Tensor("c", (3,), data=np.ones(2, np.float32)), Tensor("y", (2,))],
            [Op("ADD", (0, 1), (2,), "AddOptions")], [0], [2], ModelError, "does not fit its shape",
        ),
        (
            [Tensor("x", (2,), "int8", scale=(0.1, 0.2, 0.3)), Tensor("y", (2,))],
            [Op("DEQUANTIZE", (0,), (1,))], [0], [1], ModelError, "scales do not fit",
        ),
        (
            [Tensor("x", (2,), "int8", scale=(0.1,), zero_point=(128,)), Tensor("y", (2,))],
            [Op("DEQUANTIZE", (0,), (1,))], [0], [1], ModelError, "zero point is outside",
        ),
        (
            [Tensor("x", (2,), "int8", scale=(float("nan"),)), Tensor("y", (2,))],
            [Op("DEQUANTIZE", (0,), (1,))], [0], [1], ModelError, "positive number",
        ),
        (
            [Tensor("x", (2,)), Tensor("s", (2,), variable=True), Tensor("y", (2,))],
            [Op("ADD", (0, 1), (2,), "AddOptions")], [0], [2], UnsupportedError, "state variable",
        ),
        ([Tensor("x", (2,)), Tensor("y", (3,))], [Op("ABS", (0,), (1,))], [0], [1], UnsupportedError, "declares"),
    ],
)  # fmt: skip
def test_lies_are_refused(
    write: Write, tensors: list[Tensor], ops: list[Op], inputs: list[int], outputs: list[int], kind: type, word: str
) -> None:
    with pytest.raises(kind, match=word):
        import_model(write(tflite_of(tensors, ops, inputs, outputs), "net.tflite"))
