"""Transposes by squares of registers, over sizes at the edges of squares."""

from __future__ import annotations

import pytest

from ingot.schedules.transpose import TransposeWorkload, default_config, workload_of
from ingot.target import load_target
from passes.build import kernel_functions, onnx_state, run_steps
from schedules.common import TARGETS, Branches, check

EDGES = (8, 9, 15, 16, 17, 31, 33)


@pytest.mark.parametrize("target", TARGETS)
def test_sizes(tmp_path, target):
    branches = Branches()
    for i, size in enumerate(EDGES):
        x = branches.input((1 + 2 * (i % 2), 300 - i, size))
        branches.output(branches.node("Transpose", [x], perm=[0, 2, 1]))
    nhwc = branches.node("Transpose", [branches.input((2, 19, 8, 15))], perm=[0, 2, 3, 1])
    branches.output(branches.node("Relu", [branches.node("Neg", [nhwc])]))
    branches.output(branches.node("Transpose", [branches.input((40, 3, 60))], perm=[1, 2, 0]))
    branches.output(branches.node("Transpose", [branches.input((16, 3, 60))], perm=[2, 0, 1]))
    check(branches, tmp_path, target, (1, 3, 7))


def test_what_counts_as_a_transpose_of_matrices():
    assert workload_of((2, 3, 5, 7), (0, 2, 3, 1)) == TransposeWorkload(2, 3, 35, (2, 3, 5, 7), (2, 5, 7, 3))
    assert workload_of((3, 5, 7), (2, 0, 1)) == TransposeWorkload(1, 15, 7, (3, 5, 7), (7, 3, 5))
    assert workload_of((1, 3, 1, 7), (0, 3, 2, 1)) == TransposeWorkload(1, 3, 7, (1, 3, 1, 7), (1, 7, 1, 3))
    assert workload_of((2, 1, 3, 5), (1, 0, 3, 2)) == TransposeWorkload(2, 3, 5, (2, 1, 3, 5), (1, 2, 5, 3))
    for axes in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        assert workload_of((3, 5, 7), axes) is None


def test_few_columns_and_few_elements_keep_their_operator(tmp_path):
    target = load_target("x86-64-v3")
    assert default_config(TransposeWorkload(1, 5000, 7, (5000, 7), (7, 5000)), target) is None
    assert default_config(TransposeWorkload(1, 16, 16, (16, 16), (16, 16)), target) is None
    config = default_config(TransposeWorkload(1, 5000, 16, (5000, 16), (16, 5000)), target)
    assert config is not None
    assert config.parts == 16  # one stripe, shared by its rows
    for shape, count in (((7, 500), 0), ((80, 64), 1)):
        branches = Branches()
        branches.output(branches.node("Transpose", [branches.input(shape)], perm=[1, 0]))
        state = run_steps(onnx_state(branches.bytes(), tmp_path), "simplify", "select_transposes")
        assert len(kernel_functions(state)) == count
