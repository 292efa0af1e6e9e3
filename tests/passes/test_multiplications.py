"""Quantised models multiply integers only: by what the compiler counts in its loops, and by the machine code."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from tvm import te

import ingot
from frontend.tiny_models import Op, Tensor, small_tflite, tflite_of
from ingot.passes.multiplications import multiply_adds
from targets.isa import llvm_objdump

#: Arithmetic on floating-point numbers, and conversions; moves between registers have no type.
_FLOAT = {
    "x86-64-v3": re.compile(r"\sv?((add|sub|mul|div|max|min|sqrt)[ps][sd]|fn?m(add|sub)\w*[ps][sd]|cvt\w+)\s"),
    "raspberry-pi-4": re.compile(r"\s(f(add|sub|mul|div|mla|mls|madd|msub|max|min)\w*|[us]cvtf|fcvt\w+)\s"),
    "raspberry-pi-4-32bit": re.compile(r"\sv\w+\.(f(32|64)|[us]32\.f\d+)\s"),
}


def _network() -> bytes:
    """A convolution, a depthwise one, a sum, a pool, a dense layer and softmax, all int8."""
    random = np.random.default_rng(4)

    def weights(*shape: int, scales: int = 1, axis: int = 0) -> Tensor:
        data = random.integers(-127, 128, shape).astype(np.int8)
        return Tensor("w", shape, "int8", data, (0.01,) * scales, (0,) * scales, axis)

    def bias(count: int, scales: int) -> Tensor:
        data = random.integers(-900, 900, count).astype(np.int32)
        return Tensor("b", (count,), "int32", data, (0.0005,) * scales, (0,) * scales)

    def stored(*shape: int, scale: float = 0.05, zero: int = 3) -> Tensor:
        return Tensor("t", shape, "int8", scale=(scale,), zero_point=(zero,))

    tensors = [
        stored(1, 9, 9, 8),
        weights(8, 3, 3, 8, scales=8),
        bias(8, 8),
        stored(1, 9, 9, 8, scale=0.3),
        weights(1, 3, 3, 8, scales=8, axis=3),
        bias(8, 8),
        stored(1, 9, 9, 8, scale=0.2),
        stored(1, 9, 9, 8, scale=0.4, zero=-7),
        stored(1, 1, 1, 8, scale=0.4, zero=-7),
        Tensor("shape", (2,), "int32", np.array([1, 8], np.int32)),
        stored(1, 8, scale=0.4, zero=-7),
        weights(5, 8),
        bias(5, 1),
        stored(1, 5),
        stored(1, 5, scale=1 / 256, zero=-128),
    ]
    layer = {"StrideH": 1, "StrideW": 1, "DilationHFactor": 1, "DilationWFactor": 1}
    pool = {"StrideH": 9, "StrideW": 9, "FilterHeight": 9, "FilterWidth": 9, "Padding": 1}
    ops = [
        Op("CONV_2D", (0, 1, 2), (3,), "Conv2DOptions", dict(layer)),
        Op("DEPTHWISE_CONV_2D", (3, 4, 5), (6,), "DepthwiseConv2DOptions", {**layer, "DepthMultiplier": 1}),
        Op("ADD", (0, 6), (7,), "AddOptions"),
        Op("AVERAGE_POOL_2D", (7,), (8,), "Pool2DOptions", pool),
        Op("RESHAPE", (8, 9), (10,)),
        Op("FULLY_CONNECTED", (10, 11, 12), (13,), "FullyConnectedOptions"),
        Op("SOFTMAX", (13,), (14,), "SoftmaxOptions", {"Beta": 1.0}),
    ]
    return tflite_of(tensors, ops, [0], [14])


def _float_instructions(artifact: ingot.Artifact, target: str, folder) -> list[str]:
    tool = llvm_objdump()
    if tool is None:
        pytest.skip("llvm-objdump is not installed")
    found, lines = [], 0
    for i, code in enumerate(artifact.sources.objects):
        path = folder / f"{target}-{i}.o"
        path.write_bytes(code)
        text = subprocess.run([tool, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True)
        lines += text.stdout.count("\n")
        found += [line for line in text.stdout.splitlines() if _FLOAT[target].search(line + " ")]
    assert lines > 100
    return found


@pytest.mark.parametrize("target", sorted(_FLOAT))
def test_no_float_is_left_between_quantised_layers(tmp_path, target):
    for name, model in (("whole", _network()), ("real", small_tflite())):
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(model)
        artifact = ingot.compile(path, target=target, selftest=False)
        floats = _float_instructions(artifact, target, tmp_path)
        if name == "whole":
            assert artifact.metadata["integer_macs"] == artifact.metadata["macs"] == 81 * 8 * (72 + 9) + 40
            assert not floats, floats[:5]
        else:
            assert artifact.metadata["integer_macs"] == 0 and floats


@pytest.mark.parametrize(("dtype", "total", "wanted"), [("int8", "int32", (60, 0)), ("float32", "float32", (0, 60))])
def test_products_are_counted_by_their_sums(dtype, total, wanted):
    a, b = te.placeholder((3, 5), dtype, name="a"), te.placeholder((5, 4), dtype, name="b")
    k = te.reduce_axis((0, 5), "k")
    out = te.compute((3, 4), lambda i, j: te.sum(a[i, k].astype(total) * b[k, j].astype(total), axis=[k]), name="out")
    scaled = te.compute((3, 4), lambda i, j: out[i, j] * out[i, j], name="scaled")
    assert multiply_adds(te.create_prim_func([a, b, scaled])) == wanted
