"""Running sums and the k largest against ONNX Runtime, at the edges of their loops."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from ingot.frontend import import_model
from passes.execute import Executable, compile_state

from .tiny_models import model_of

_RNG = np.random.default_rng(5)
#: The last of them is cut along its contiguous axis.
_SHAPES = ((7,), (4, 1), (2, 5, 3), (1, 6, 256))


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    onnx.save(model, folder / "m.onnx")
    program = Executable(compile_state(import_model(folder / "m.onnx")), folder)
    return program.run(list(feeds.values()))


def _compare(model: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in model.graph.output]
    for name, found, wanted in zip(names, _run(model, feeds, folder), session.run(None, feeds), strict=True):
        assert found.dtype == wanted.dtype, name
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6, err_msg=name)


def test_running_sums(tmp_path: Path) -> None:
    nodes, feeds, outputs, weights = [], {}, [], {}
    for number, shape in enumerate(_SHAPES):
        feeds[f"x{number}"] = _RNG.integers(-9, 9, shape).astype("int32" if number % 2 == 0 else "float32")
        for axis, exclusive in itertools.product(range(len(shape)), (0, 1)):
            outputs.append(f"y{len(nodes)}")
            weights[f"a{axis}"] = np.array(axis)
            attributes = {"exclusive": exclusive, "reverse": len(nodes) % 3 % 2}
            nodes.append(helper.make_node("CumSum", [f"x{number}", f"a{axis}"], outputs[-1:], **attributes))
    inputs = {name: (str(value.dtype), value.shape) for name, value in feeds.items()}
    _compare(model_of(nodes, inputs, outputs, weights), feeds, tmp_path)


def test_the_k_largest(tmp_path: Path) -> None:
    """Many are equal: of those the first come first."""
    nodes, feeds, outputs, weights = [], {}, [], {}
    for number, shape in enumerate(_SHAPES):
        feeds[f"x{number}"] = _RNG.integers(-9, 9, shape).astype("int64" if number % 2 == 0 else "float32")
        for axis, size in enumerate(shape):
            for count in {size // 2 or 1, size} if size < 99 else {5}:
                ends = [f"{part}{len(nodes)}" for part in "vi"]
                weights[f"k{count}"] = np.array([count])
                attributes = {"axis": axis, "largest": len(nodes) % 3 % 2}
                nodes.append(helper.make_node("TopK", [f"x{number}", f"k{count}"], ends, **attributes))
                outputs += ends
    inputs = {name: (str(value.dtype), value.shape) for name, value in feeds.items()}
    _compare(model_of(nodes, inputs, outputs, weights), feeds, tmp_path)


@pytest.mark.parametrize("count", [1, 5])
def test_the_k_largest_of_sorted_values_and_of_nan(count: int, tmp_path: Path) -> None:
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "i"])]
    model = model_of(nodes, {"x": ("float32", (3, 40))}, ["v", "i"], {"k": np.array([count])})
    rows = np.arange(40, dtype=np.float32)
    _compare(model, {"x": np.stack([rows, rows[::-1], np.full_like(rows, -np.inf)])}, tmp_path)
    x = _RNG.standard_normal((3, 40)).astype(np.float32)
    x[0, 3:9], x[1] = np.nan, np.nan
    values, places = _run(model, {"x": x}, tmp_path)
    for row, found, where in zip(x, values, places, strict=True):
        assert len(set(where.tolist())) == count
        assert where.min() >= 0
        np.testing.assert_array_equal(row[where], found)
