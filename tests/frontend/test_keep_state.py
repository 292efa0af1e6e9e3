"""Pairs of inputs and outputs kept as state: found by name, held against each other, and refused where they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from ingot.errors import IngotError, OptionError
from ingot.frontend import import_model

from .tiny_models import Op, Tensor, model_of, tflite_of

Write = Callable[..., Path]


def cell() -> Any:
    """h_out = tanh(h + x), g_out = g + 1 (int64), y = h_out * 2; `other` has another shape."""
    nodes = [
        helper.make_node("Add", ["h", "x"], ["a"]),
        helper.make_node("Tanh", ["a"], ["h_out"]),
        helper.make_node("Add", ["g", "one"], ["g_out"]),
        helper.make_node("Mul", ["h_out", "two"], ["y"]),
        helper.make_node("ReduceSum", ["y"], ["other"], keepdims=1),
    ]
    inputs = {"x": ("float32", (1, 4)), "h": ("float32", (1, 4)), "g": ("int64", (2,))}
    weights = {"one": np.array(1, np.int64), "two": np.array(2, np.float32)}
    return model_of(nodes, inputs, ["y", "h_out", "g_out", "other"], weights)


def test_a_pair_leaves_the_interface(write: Write) -> None:
    imported = import_model(write(cell()), state={"g": ("g_out", [3, 4]), "h": "h_out"})
    assert [spec.name for spec in imported.user_inputs] == ["x"]
    assert [spec.name for spec in imported.user_outputs] == ["y", "other"]
    assert [(s.input, s.output, s.initial.tolist()) for s in imported.states] == [(1, 1, [[0] * 4]), (2, 2, [3, 4])]
    assert [spec.name for spec in imported.inputs] == ["x", "h", "g"], "the passes see all of them"


def test_positions_count_bound_inputs_too(write: Write) -> None:
    imported = import_model(write(cell()), bind={"x": np.zeros((1, 4), np.float32)}, state={"g": "g_out"})
    assert [imported.source_position(i) for i in range(2)] == [1, 2]


def test_a_first_value_gives_an_open_shape(write: Write) -> None:
    nodes = [helper.make_node("Add", ["h", "x"], ["h_out"]), helper.make_node("Neg", ["h_out"], ["y"])]
    path = write(model_of(nodes, {"x": ("float32", ("T",)), "h": ("float32", ("T",))}, ["y", "h_out"]))
    imported = import_model(path, state={"h": ("h_out", np.ones(5, np.float32))})
    assert imported.inputs[0].shape == (5,)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"q": "h_out"}, "an input the model does not have"),
        ({"h": "h_ou"}, "did you mean 'h_out'"),
        ({"h": "other"}, "differ"),
        ({"h": "g_out"}, "differ"),
        ({"h": "h_out", "x": "h_out"}, "two states"),
        ({"h": ("h_out", np.zeros((1, 5), np.float32))}, "contradicts"),
        ({"h": ("h_out", np.zeros((1, 4)))}, "dtype"),
        ({"h": ("h_out", [1, 2])}, "wrong shape"),
        ({"h": ("h_out", "zeros")}, "no array"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(write: Write, state: dict[str, Any], word: str) -> None:
    with pytest.raises(IngotError, match=word):
        import_model(write(cell()), state=state)


def test_one_output_must_be_left(write: Write) -> None:
    path = write(model_of([helper.make_node("Neg", ["h"], ["y"])], {"h": ("float32", (3,))}, ["y"]))
    with pytest.raises(OptionError, match="no output is left"):
        import_model(path, state={"h": "y"})


def test_quantised_states_start_at_their_zero_point_and_share_a_scale(write: Write) -> None:
    def model(scale: float) -> bytes:
        tensors = [
            Tensor("h", (1, 4), "int8", scale=(0.5,), zero_point=(3,)),
            Tensor("h_out", (1, 4), "int8", scale=(scale,), zero_point=(3,)),
            Tensor("y", (4,), "int8", scale=(0.5,), zero_point=(3,)),
            Tensor("shape", (1,), "int32", np.array([4], np.int32)),
        ]
        ops = [Op("RELU", (0,), (1,)), Op("RESHAPE", (0, 3), (2,))]
        return tflite_of(tensors, ops, [0], [1, 2])

    imported = import_model(write(model(0.5), "same.tflite"), state={"h": "h_out"})
    assert imported.states[0].initial.tolist() == [[3] * 4]
    with pytest.raises(OptionError, match="scale"):
        import_model(write(model(0.25), "other.tflite"), state={"h": "h_out"})
