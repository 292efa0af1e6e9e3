"""Shared models in bfloat16: what the compiler says of the error, and an emulated board with the instruction."""

from __future__ import annotations

import pytest

import ingot
from ingot.emulator import run_under_qemu
from ingot.target import load_target
from models.conftest import case_of, error

pytestmark = [pytest.mark.slow]


@pytest.mark.qemu
def test_a_board_with_bf16(tmp_path, shared_models, qemu):
    board, case = load_target("graviton-3"), case_of("ic_resnet8/resnet8_float.onnx")
    qemu(board.arch)  # skips where no emulator is installed
    artifact = ingot.compile(shared_models / case.file, target=board.name, precision="bf16", shape=case.shape)
    half = artifact.metadata["half"]
    assert half["multiplied"] >= 5
    assert all(e["sqnr_db"] > 20 for e in half["errors"])
    path = artifact.save(tmp_path / "m.so")
    outputs = run_under_qemu(path, case.inputs(shared_models, 0), board, threads=2)
    for got, want in zip(outputs, case.reference(shared_models, 0), strict=True):
        assert 1e-5 < error(got, want) < 3e-2


def test_what_the_compiler_measures_for_another_cpu(shared_models):
    case = case_of("ic_resnet8/resnet8_float.onnx")
    artifact = ingot.compile(shared_models / case.file, target="znver4", precision="bf16", shape=case.shape)
    assert artifact.metadata["half"]["multiplied"] >= 8
    (measured,) = artifact.metadata["half"]["errors"]
    assert measured["sqnr_db"] > 20
    assert measured["max_error"] < 0.05 * measured["max_reference"]
