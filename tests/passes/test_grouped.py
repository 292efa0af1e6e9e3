"""Convolutions of several groups: in the template, whether they fill registers or not, alone or joined."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import ingot
from ingot.emulator import run_under_qemu
from ingot.schedules import conv2d
from ingot.schedules.groups import join_weight
from ingot.target import load_target
from passes.build import (
    close,
    kernel_functions,
    normal,
    numbers,
    onnx_bytes,
    onnx_state,
    onnxruntime_outputs,
    run_steps,
)

node = helper.make_node
#: Input, weights (output channels, input channels of a group, window), groups, attributes.
FORMS = (
    ((1, 32, 9, 11), (64, 8, 3, 3), 4, {"pads": [1, 1, 1, 1]}),
    ((2, 24, 7, 8), (48, 8, 3, 3), 3, {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    ((1, 32, 8, 8), (32, 4, 1, 1), 8, {}),
    ((1, 12, 6, 7), (24, 1, 3, 3), 12, {"pads": [1, 1, 1, 1]}),  # depthwise, two results a channel
    ((1, 6, 6, 7), (96, 1, 3, 3), 6, {}),
    ((1, 128, 1, 1), (128, 4, 1, 1), 32, {}),
    ((1, 8, 20), (32, 2, 5), 4, {"dilations": [2], "pads": [4, 4]}),
    ((1, 60, 9, 7), (60, 20, 3, 3), 3, {"pads": [1, 1, 1, 1]}),  # groups that fill no whole registers
    ((1, 120, 5, 7), (120, 60, 1, 1), 2, {}),
    ((2, 15, 6, 7), (21, 5, 3, 2), 3, {"strides": [2, 1]}),
    ((1, 30, 1, 1), (33, 10, 1, 1), 3, {}),
    ((1, 195, 4, 9), (3, 65, 3, 3), 3, {"pads": [1, 1, 1, 1]}),  # one result each
    ((1, 66, 4, 5), (2, 33, 1, 1), 2, {}),
    ((1, 96, 6, 5), (24, 8, 1, 1), 12, {"strides": [2, 2]}),
)


def _model(forms):
    nodes, inputs, weights = [], {}, {}
    for i, (shape, weight, groups, attributes) in enumerate(forms):
        inputs[f"x{i}"], weights[f"w{i}"], weights[f"b{i}"] = shape, normal(weight, i), normal(weight[:1], i)
        nodes.append(node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"c{i}"], group=groups, **attributes))
        nodes.append(node("Relu", [f"c{i}"], [f"y{i}"]))
    outputs = [f"y{i}" for i in range(len(forms))]
    return onnx_bytes(nodes, inputs, outputs, weights), {
        name: normal(s, i) for i, (name, s) in enumerate(inputs.items())
    }


def test_groups_are_what_onnxruntime_computes(tmp_path):
    model, feeds = _model(FORMS)
    state = run_steps(onnx_state(model, tmp_path), "simplify", "rows_as_images", "whole_numbers", "fold_constants")
    found = numbers(state, list(feeds.values()), tmp_path, "fold_batch_norm")
    for mine, wanted in zip(found, onnxruntime_outputs(model, feeds), strict=True):
        close(mine, wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_groups_have_the_template(tmp_path, form):
    steps = ("simplify", "rows_as_images", "fold_constants", "nhwc_layout", "select_templates")
    state = run_steps(onnx_state(_model([form])[0], tmp_path), *steps)
    assert any(name.startswith("conv2d") for name in kernel_functions(state))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_joined_groups_are_the_same_weights_and_zeros(count):
    weight = normal((8 * 4, 3, 3, 5), 1)
    wide = join_weight(weight, 8, count)
    assert wide.shape == (32, 3, 3, 5 * count)
    assert np.count_nonzero(wide) == np.count_nonzero(weight)


@pytest.mark.parametrize(
    ("of_group", "inputs", "count"), [(8, 8, 1), (16, 4, 1), (4, 4, 2), (2, 1, 4), (60, 60, 1), (20, 20, 1)]
)
def test_groups_are_joined_where_that_is_less_work(of_group, inputs, count):
    workload = conv2d.Conv2DWorkload(
        1, 14, 14, inputs, 12 * of_group, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "float32", 12
    )
    assert conv2d.groups_to_join(workload, load_target("x86-64-v3")) == count


def test_the_last_block_of_each_group_is_filled_with_zeros():
    weight = normal((3 * 5, 1, 1, 2), 1)
    packed = conv2d.pack_weight(weight, 8, groups=3)
    assert packed.shape == (3, 1, 1, 2, 8)
    assert np.array_equal(packed[..., :5], weight.reshape(3, 5, 1, 1, 2).transpose(0, 2, 3, 4, 1))
    assert not packed[..., 5:].any()


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize("board", ["raspberry-pi-4", "raspberry-pi-4-32bit"])
def test_groups_on_a_board(tmp_path, qemu, board):
    qemu(load_target(board).arch)
    model, feeds = _model(FORMS)
    path = tmp_path / "m.onnx"
    path.write_bytes(model)
    library = ingot.compile(path, target=board, selftest=False).save(tmp_path / "m.so")
    found = run_under_qemu(library, list(feeds.values()), load_target(board), threads=1)
    for mine, wanted in zip(found, onnxruntime_outputs(model, feeds), strict=True):
        close(mine, wanted, 1e-5)
