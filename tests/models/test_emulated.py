"""Shared models compiled for boards and run on their emulated CPUs: 64-bit ARM and 32-bit ARM with hard float."""

from __future__ import annotations

import numpy as np
import pytest

from ingot.emulator import run_under_qemu
from ingot.target import load_target
from models.conftest import case_of, error
from models.test_shared_models import STEPS, TOLERANCE

pytestmark = [pytest.mark.slow, pytest.mark.qemu]

SMALL = (
    "mnist.onnx",
    "iris_mlp",
    "kws_ref_model_int8",
    "vww_96_int8",
    "ic_resnet8/resnet8_float.onnx",
    "ad01_fp32",
    "keypoint",
)
RUNS = [
    *[("raspberry-pi-4", name) for name in (*SMALL, "squeezenet_fp32")],
    *[("raspberry-pi-4-32bit", name) for name in SMALL],
    ("graviton-3", "mnist.onnx"),
    ("graviton-3", "vww_96_int8"),
    ("visionfive-2", "mnist.onnx"),
    ("visionfive-2", "keypoint"),
]


@pytest.mark.parametrize(("target", "name"), RUNS)
def test_reproduces_the_reference(build, shared_models, qemu, target, name):
    board, case = load_target(target), case_of(name)
    qemu(board.arch)  # skips where no emulator is installed
    built = build(case, target)
    assert built.metadata["target"]["name"] == target
    outputs = run_under_qemu(built.path, case.inputs(shared_models, 0), board, threads=2)
    for got, want in zip(outputs, case.reference(shared_models, 0), strict=True):
        if case.quantized:
            assert np.abs(got.astype(int).reshape(want.shape) - want.astype(int)).max() <= STEPS[case.file]
        else:
            assert error(got, want) <= TOLERANCE
