"""Tensors whose size depends on data, through machine code and next to ONNX Runtime: counts, chains, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from frontend.tiny_models import model_of
from ingot.errors import OptionError, UnsupportedError
from ingot.frontend import import_model
from ingot.frontend.normal_form import check_normal_form
from passes.execute import Executable, compile_state

node = helper.make_node


def judge(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def build(folder: Path, *arguments: Any, **options: Any) -> tuple[Path, Executable]:
    path = folder / "model.onnx"
    onnx.save(model_of(*arguments, **options), path)
    imported = import_model(path)
    check_normal_form(imported)
    return path, Executable(compile_state(imported), folder)


def agree(path: Path, program: Executable, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    found = program.run([feeds[spec.name] for spec in program.imported.inputs])
    for spec, left, right in zip(program.imported.user_outputs, found, judge(path, feeds), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape, (spec.name, left.shape, right.shape)
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6, err_msg=spec.name)
    return found


CHAINS = [
    node("NonZero", ["x"], ["z"]),
    node("Transpose", ["z"], ["t"], perm=[1, 0]),
    node("GatherND", ["x", "t"], ["values"]),
    node("Relu", ["values"], ["positive"]),
    node("Cast", ["t"], ["f"], to=1),
    node("MatMul", ["f", "w"], ["points"]),
    node("Add", ["points", "b"], ["moved"]),
    node("Concat", ["moved", "f"], ["both"], axis=1),
    node("ReduceMax", ["both"], ["most"], axes=[1], keepdims=0),
    node("Unsqueeze", ["most", "one"], ["column"]),
    node("Mul", ["both", "column"], ["scaled"]),
    node("Softmax", ["scaled"], ["soft"], axis=-1),
    node("Slice", ["soft", "zero", "two", "one"], ["cut"]),
    node("Reshape", ["cut", "flat"], ["same"]),
    node("Squeeze", ["column", "one"], ["line"]),
    node("Gather", ["z", "first"], ["row"], axis=0),
    node("Gather", ["table", "row"], ["looked_up"], axis=0),
    node("Gemm", ["f", "w", "b"], ["g"]),
]
CHAIN_WEIGHTS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3) - 2,
    "b": np.array([1, 2, 3], np.float32),
    "one": np.array([1]),
    "zero": np.array([0]),
    "two": np.array([2]),
    "flat": np.array([-1, 2, 1]),
    "first": np.array(0),
    "table": np.arange(12, dtype=np.float32).reshape(6, 2),
}


def test_chains_keep_the_count(tmp_path: Path) -> None:
    outputs = ["z", "t", "values", "positive", "soft", "same", "line", "row", "looked_up", "g"]
    path, program = build(tmp_path, CHAINS, {"x": ("float32", (6, 4))}, outputs, CHAIN_WEIGHTS, opset=13)
    assert len(program.program.counters) == 1, "one counter serves all that follow one another"
    random = np.random.default_rng(3)
    for share in (0.0, 0.1, 0.5, 1.0):
        x = np.where(random.random((6, 4)) < share, random.standard_normal((6, 4)), 0).astype(np.float32)
        found = agree(path, program, {"x": x})
        assert found[0].shape == (2, np.count_nonzero(x))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (1, 1, 2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_non_zero(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    path, program = build(tmp_path, [node("NonZero", ["x"], ["y"])], {"x": (dtype, shape)}, ["y"])
    agree(path, program, {"x": np.random.default_rng(1).integers(0, 2, shape).astype(dtype)})


def test_compress(tmp_path: Path) -> None:
    nodes = [
        node("Compress", ["x", "c"], ["rows"], axis=0),
        node("Compress", ["x", "c"], ["columns"], axis=-1),
        node("Compress", ["x", "c"], ["flat"]),
        node("Compress", ["x", "known"], ["fixed"], axis=1),
    ]
    inputs = {"x": ("float32", (3, 4)), "c": ("bool", (3,))}
    weights = {"known": np.array([True, False, True])}
    path, program = build(tmp_path, nodes, inputs, ["rows", "columns", "flat", "fixed"], weights)
    assert program.imported.user_outputs[3].shape == (3, 2), "a constant condition leaves nothing open"
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for flags in ([True, False, True], [False] * 3, [True] * 3):
        agree(path, program, {"x": x, "c": np.array(flags)})


@pytest.mark.parametrize("options", [{"sorted": 1}, {"sorted": 0}, {"axis": 0}, {"axis": 1, "sorted": 0}])
def test_unique(options: dict[str, int], tmp_path: Path) -> None:
    nodes = [node("Unique", ["x"], ["y", "where", "inverse", "times"], **options)]
    path, program = build(tmp_path, nodes, {"x": ("float32", (6, 3))}, ["y", "where", "inverse", "times"])
    assert program.imported.outputs[2].shape == (
        (18,) if "axis" not in options else (program.imported.outputs[1].shape)
    )
    for seed in range(3):
        agree(path, program, {"x": np.random.default_rng(seed).integers(0, 2, (6, 3)).astype(np.float32)})


@pytest.mark.parametrize("dtype", ["float32", "int64", "float64", "int8"])
def test_unique_among_many(dtype: str, tmp_path: Path) -> None:
    path, program = build(
        tmp_path, [node("Unique", ["x"], ["y", "where", "inverse", "times"])], {"x": (dtype, (301,))},
        ["y", "where", "inverse", "times"],
    )  # fmt: skip
    random = np.random.default_rng(2)
    for most in (1, 30, 120):
        agree(path, program, {"x": random.integers(-most, most, 301).astype(dtype)})
    if dtype == "float32":
        x = random.permutation(np.repeat(np.array([np.nan, 1.5, -np.inf], np.float32), (3, 200, 98)))
        values, where, inverse, times = program.run([x])
        np.testing.assert_array_equal(values, [-np.inf, 1.5, np.nan, np.nan, np.nan])
        np.testing.assert_array_equal(values[inverse], x)
        np.testing.assert_array_equal(x[where], values)
        assert times.tolist() == [98, 200, 1, 1, 1]


@pytest.mark.parametrize(("centred", "floor"), [(0, 0.3), (1, 0.3), (0, None)])
def test_non_max_suppression(centred: int, floor: float | None, tmp_path: Path) -> None:
    weights = {"most": np.array([5]), "overlap": np.array([0.4], np.float32)}
    names = ["boxes", "scores", "most", "overlap"]
    if floor is not None:
        weights["floor"] = np.array([floor], np.float32)
        names.append("floor")
    nodes = [node("NonMaxSuppression", names, ["kept"], center_point_box=centred)]
    inputs = {"boxes": ("float32", (2, 40, 4)), "scores": ("float32", (2, 3, 40))}
    path, program = build(tmp_path, nodes, inputs, ["kept"], weights)
    assert program.imported.outputs[0].shape == (30, 3)
    for seed in range(5):
        random = np.random.default_rng(seed)
        scores = (random.integers(0, 20, (2, 3, 40)) / 20).astype(np.float32)  # many are equal
        if floor is not None:
            scores[random.random(scores.shape) < 0.1] = np.nan  # above no limit
        agree(path, program, {"boxes": random.random((2, 40, 4)).astype(np.float32), "scores": scores})
    agree(path, program, {"boxes": np.zeros((2, 40, 4), np.float32), "scores": np.zeros((2, 3, 40), np.float32)})


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_k_of_top_k_may_be_computed(axis: int, tmp_path: Path) -> None:
    nodes = [
        node("TopK", ["x", "k"], ["v", "i"], axis=axis),
        node("Cast", ["i"], ["f"], to=1),
        node("Mul", ["f", "v"], ["y"]),
    ]
    names = ["v", "i", "y"]
    inputs = {"x": ("float32", (3, 5)), "k": ("int64", (1,))}
    path, program = build(tmp_path, nodes, inputs, names)
    x = np.random.default_rng(4).integers(0, 4, (3, 5)).astype(np.float32)  # with equal values
    for k in (0, 1, 3):
        found = agree(path, program, {"x": x, "k": np.array([k])})
        assert found[-1].shape[axis] == k


def test_a_count_of_top_k_stays_inside(tmp_path: Path) -> None:
    """ONNX Runtime refuses a k beyond the axis; a compiled model cannot, and gives all there are, or none."""
    inputs = {"x": ("float32", (4,)), "k": ("int64", (1,))}
    _, program = build(tmp_path, [node("TopK", ["x", "k"], ["v", "i"])], inputs, ["v", "i"])
    x = np.array([3, 1, 2, 0], np.float32)
    assert program.run([x, np.array([9])])[0].tolist() == [3, 2, 1, 0]
    assert program.run([x, np.array([-1])])[0].tolist() == []


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ([node("Shape", ["z"], ["y"])], "Shape"),
        ([node("ReduceSum", ["z"], ["y"])], "ReduceSum"),
        ([node("Reshape", ["z", "flat"], ["y"])], "Reshape"),
        ([node("NonZero", ["z"], ["y"])], "NonZero"),
        ([node("Concat", ["z", "z"], ["y"], axis=1)], "Concat"),
        ([node("Softmax", ["f"], ["y"], axis=1)], "Softmax"),
        ([node("NonZero", ["w"], ["v"]), node("Add", ["z", "v"], ["y"])], "Add"),
        ([node("CumSum", ["z", "one"], ["y"])], "CumSum"),
    ],
)
def test_an_operator_that_needs_the_size_is_refused(more: list[Any], word: str, tmp_path: Path) -> None:
    nodes = [node("NonZero", ["x"], ["z"]), node("Cast", ["z"], ["f"], to=1), *more]
    inputs = {"x": ("float32", (3, 4)), "w": ("float32", (3, 4))}
    weights = {"flat": np.array([-1]), "one": np.array(1)}
    onnx.save(model_of(nodes, inputs, ["y"], weights), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="depends on data") as caught:
        import_model(tmp_path / "m.onnx")
    assert word in str(caught.value)


def test_a_limit_must_be_known(tmp_path: Path) -> None:
    inputs = {"boxes": ("float32", (1, 9, 4)), "scores": ("float32", (1, 1, 9)), "most": ("int64", (1,))}
    onnx.save(model_of([node("NonMaxSuppression", list(inputs), ["y"])], inputs, ["y"]), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="--bind most=NUMBER"):
        import_model(tmp_path / "m.onnx")
    assert import_model(tmp_path / "m.onnx", bind={"most": 2}).outputs[0].shape == (2, 3)


def test_a_state_has_a_fixed_size(tmp_path: Path) -> None:
    nodes = [node("NonZero", ["h"], ["z"]), node("Neg", ["x"], ["y"])]
    inputs = {"x": ("int64", (2,)), "h": ("int64", (1, 4))}
    onnx.save(model_of(nodes, inputs, ["y", "z"]), tmp_path / "m.onnx")
    with pytest.raises(OptionError, match="depends on data"):
        import_model(tmp_path / "m.onnx", state={"h": "z"})
