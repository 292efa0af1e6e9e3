"""Layers of odd sizes compiled for ARM boards and run on their emulated CPUs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import ingot
from frontend.tiny_models import model_of
from ingot.emulator import run_under_qemu
from ingot.target import load_target
from passes.build import onnxruntime_outputs
from schedules import test_conv2d, test_depthwise, test_generic, test_matmul
from schedules.common import CHANNELS, Branches, compare

pytestmark = [pytest.mark.slow, pytest.mark.qemu]


def convolutions() -> Branches:
    some = CHANNELS[::2]
    return test_conv2d.model(
        *[{"channels": 5, "out_channels": c} for c in some],
        *[{"channels": c, "out_channels": 6, "kernel": (1, 1), "pads": (0, 0, 0, 0)} for c in some],
        {"channels": 8, "out_channels": 33, "strides": (2, 2), "pads": (0, 1, 2, 0), "size": (13, 14)},
        {"channels": 8, "out_channels": 17, "dilations": (2, 2), "kernel": (3, 5), "pads": (2, 4, 2, 4)},
        {"channels": 4, "out_channels": 6, "group": 2},
        epilogue="relu",
    )


def depthwise() -> Branches:
    return test_depthwise.model(
        *[{"channels": c} for c in CHANNELS],
        {"kernel": (5, 3), "strides": (2, 2), "pads": (1, 0, 2, 3), "size": (13, 27)},
        {"dilations": (2, 2), "pads": (2, 2, 2, 2), "batch": 3},
        epilogue="clip",
    )


def products() -> Branches:
    layers = [((m,), 9, n, "bias") for m, n in zip((1, 2, 6, 7, 8, 13, 15), CHANNELS[1::2], strict=True)]
    return test_matmul.model(*layers, ((2, 3), 8, 17, "sigmoid"))


def rest() -> Branches:
    branches = test_generic.unary([(3, 17)])
    branches.output(branches.node("Softmax", [branches.input((3, 33))], axis=-1))
    branches.output(branches.node("MaxPool", [branches.input((1, 5, 7, 9))], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    branches.output(branches.node("GlobalAveragePool", [branches.input((1, 17, 7, 9))]))
    branches.output(branches.node("Transpose", [branches.input((3, 5, 7))], perm=[2, 0, 1]))
    return branches


@pytest.mark.parametrize("target", ["raspberry-pi-4", "raspberry-pi-4-32bit", "graviton-3"])
@pytest.mark.parametrize("make", [convolutions, depthwise, products, rest], ids=lambda make: make.__name__)
def test_layers_on_a_board(tmp_path, qemu, target, make):
    board = load_target(target)
    qemu(board.arch)  # skips where no emulator is installed
    branches = make()
    (tmp_path / "layers.onnx").write_bytes(branches.bytes())
    path = ingot.compile(tmp_path / "layers.onnx", target=target, selftest=False).save(tmp_path / "layers.so")
    feeds = branches.feeds()
    got = run_under_qemu(path, list(feeds.values()), board, threads=3)
    compare(got, onnxruntime_outputs(branches.bytes(), feeds), branches.outputs)


def test_products_of_32_bit_integers_on_a_board(tmp_path, qemu):
    """What DynamicQuantizeLinear and MatMulInteger make: the template of floats on integers, without NEON's lanes."""
    board = load_target("raspberry-pi-4")
    qemu(board.arch)
    # No larger: where ONNX Runtime has no VNNI, its sums of two products saturate in 16 bits.
    weight = np.random.default_rng(0).integers(-63, 64, (64, 64), np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["m"]),
        helper.make_node("Cast", ["m"], ["c"], to=1),
        helper.make_node("Mul", ["c", "s"], ["y"]),
    ]
    model = model_of(nodes, {"x": ("float32", (1, 8, 64))}, ["y"], {"w": weight})
    onnx.save(model, tmp_path / "m.onnx")
    library = ingot.compile(tmp_path / "m.onnx", target=board.name, selftest=False).save(tmp_path / "m.so")
    x = np.random.default_rng(1).standard_normal((1, 8, 64)).astype(np.float32)
    (found,) = run_under_qemu(library, [x], board, threads=1)
    (wanted,) = onnxruntime_outputs(model.SerializeToString(), {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
