"""Inputs bound to values: they become constants, vanish from the interface, and are held against the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import pytest
from onnx import helper

from ingot.errors import IngotError, OptionError, ShapeError
from ingot.frontend import Imported, import_model
from ingot.frontend.normal_form import check_normal_form

from .tiny_models import Op, Tensor, model_of, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]


def reshaping() -> Any:
    """x [2, 6] in the shape s, times k, a scalar; t [N, 2] has an open dimension."""
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["r"]),
        helper.make_node("Mul", ["r", "k"], ["m"]),
        helper.make_node("ReduceSum", ["t"], ["u"], keepdims=0),
        helper.make_node("Add", ["m", "u"], ["y"]),
    ]
    inputs = {"x": ("float32", (2, 6)), "s": ("int64", (2,)), "k": ("float32", ()), "t": ("float32", ("N", 2))}
    return model_of(nodes, inputs, ["y"])


def reference(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0])


@pytest.mark.parametrize("shape", [[3, 4], (12, 1), np.array([2, 6]), [4.0, 3]])
def test_a_bound_shape_decides_the_output(write: Write, run_imported: Build, shape: Any) -> None:
    model = reshaping()
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    imported = import_model(write(model), bind={"s": shape, "k": 0.5, "t": table})
    check_normal_form(imported)
    assert [spec.name for spec in imported.inputs] == ["x"]
    assert [(b.spec.name, b.position, b.spec.dtype) for b in imported.bound] == [
        ("s", 1, "int64"),
        ("k", 2, "float32"),
        ("t", 3, "float32"),
    ]
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    feeds = {"x": x, "s": np.array(shape, np.int64), "k": np.float32(0.5), "t": table}
    wanted = reference(model, {name: np.asarray(value) for name, value in feeds.items()})
    found = run_imported(imported)(x)[0]
    assert found.shape == tuple(int(n) for n in shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_bound_value_fixes_a_dimension_that_others_share(write: Write) -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    path = write(model_of(nodes, {"a": ("float32", ("N", 3)), "b": ("float32", ("N", 3))}, ["y"]))
    imported = import_model(path, bind={"b": np.ones((5, 3), np.float32)})
    assert imported.inputs[0].shape == (5, 3) and imported.notices == ()
    with pytest.raises(ShapeError, match="contradicts"):
        import_model(path, {"a": (4, 3)}, {"b": np.ones((5, 3), np.float32)})


def test_an_empty_value_is_a_value(write: Write, run_imported: Build) -> None:
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    path = write(model_of(nodes, {"x": ("float32", (2, 3)), "axes": ("int64", ("n",))}, ["y"]))
    imported = import_model(path, bind={"axes": []})
    assert run_imported(imported)(np.ones((2, 3), np.float32))[0] == 6


def test_a_number_fits_any_shape_of_one_element(write: Write) -> None:
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "i"])]
    path = write(model_of(nodes, {"x": ("float32", (2, 9)), "k": ("int64", (1,))}, ["v", "i"]))
    assert import_model(path, bind={"k": 4}).outputs[0].shape == (2, 4)


def bound_tflite() -> bytes:
    """x reshaped to the shape in `s`, plus `a`; both are inputs."""
    tensors = [
        Tensor("x", (2, 6)),
        Tensor("s", (2,), "int32"),
        Tensor("a", (4,)),
        Tensor("r", (3, 4)),
        Tensor("y", (3, 4)),
    ]
    ops = [Op("RESHAPE", (0, 1), (3,)), Op("ADD", (3, 2), (4,), "AddOptions")]
    return tflite_of(tensors, ops, [0, 1, 2], [4])


def test_tflite_inputs_are_bound_too(write: Write, run_imported: Build) -> None:
    path = write(bound_tflite(), "net.tflite")
    addend = np.arange(4, dtype=np.float32)
    imported = import_model(path, bind={"s": [3, 4], "a": addend})
    check_normal_form(imported)
    assert [spec.name for spec in imported.inputs] == ["x"]
    x = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    np.testing.assert_array_equal(run_imported(imported)(x)[0], x.reshape(3, 4) + addend)


@pytest.mark.parametrize(
    ("bind", "error", "word"),
    [
        ({"q": 1}, ShapeError, "does not have"),
        ({"s": 3}, ShapeError, "number of dimensions"),
        ({"s": [3, 4, 1]}, ShapeError, "contradicts"),
        ({"s": [3.5, 4]}, OptionError, "does not fit"),
        ({"s": [2**63, 4]}, OptionError, "does not fit"),
        ({"s": [2**80, 4]}, OptionError, "no array"),
        ({"s": [float("nan"), 4]}, OptionError, "does not fit"),
        ({"s": ["3", "4"]}, OptionError, "no array"),
        ({"s": [[3], [4, 5]]}, OptionError, "no array"),
        ({"s": None}, OptionError, "no array"),
        ({"s": np.array([3, 4], np.int32)}, OptionError, "dtype"),
        ({"k": 1e300}, OptionError, "does not fit"),
        ({"k": {"a": 1}}, OptionError, "no array"),
        ({"t": np.ones((3, 5), np.float32)}, ShapeError, "contradicts"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(
    write: Write, bind: dict[str, Any], error: type[IngotError], word: str
) -> None:
    with pytest.raises(error, match=word):
        import_model(write(reshaping()), bind=bind)


def test_a_value_and_a_shape_exclude_each_other(write: Write) -> None:
    with pytest.raises(OptionError, match="both"):
        import_model(write(reshaping()), {"t": (3, 2)}, {"t": np.ones((3, 2), np.float32)})
