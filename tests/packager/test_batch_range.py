"""A batch of any size within a range in one library, for models whose items are independent: proved, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import ingot
from cli.models import save, value
from ingot.cli.options import parse_shapes
from ingot.errors import IngotError, InputError, UnsupportedError
from ingot.frontend import import_model
from ingot.passes.batch_items import check_items

node = helper.make_node
RANDOM = np.random.default_rng(0)
WEIGHTS: dict[str, np.ndarray] = {
    "w": RANDOM.standard_normal((6, 3, 3, 3)).astype(np.float32),
    "d": RANDOM.standard_normal((6, 5)).astype(np.float32),
    "start": RANDOM.standard_normal((1, 1, 5)).astype(np.float32),
    "flat": np.array([-1, 6]),
    "rows": np.array([0, -1, 6]),
    "mixed": np.array([6, -1]),
    "first": np.array([0]),
    "one": np.array([1]),
    "two": np.array([1, 2]),
    "five": np.array([5]),
}


def model(path: Path, *nodes: Any, output: str = "y", shape: list[Any] | None = None) -> Path:
    """x [N, 3, 8, 8] and a scale that all items share -> one output."""
    inputs = [value("x", ["N", 3, 8, 8]), value("scale", [1])]
    used = {name for item in nodes for name in item.input}
    weights = {name: array for name, array in WEIGHTS.items() if name in used}
    return save(path, list(nodes), inputs, [value(output, shape)], weights)


#: Convolution, pooling, a start token for each item, a softmax over tokens, a flattening, a matrix product.
CONV = (
    node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
    node("Mul", ["c", "scale"], ["m"]),
    node("GlobalAveragePool", ["m"], ["p"]),
    node("Reshape", ["p", "flat"], ["f"]),
    node("MatMul", ["f", "d"], ["g"]),
)
TOKENS = (
    node("Shape", ["g"], ["s"]),
    node("Gather", ["s", "first"], ["n"]),
    node("Concat", ["n", "one", "five"], ["to"], axis=0),
    node("Expand", ["start", "to"], ["token"]),
    node("Unsqueeze", ["g", "one"], ["u"]),
    node("Concat", ["token", "u"], ["t"], axis=1),
    node("Softmax", ["t"], ["y"], axis=1),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("batch") / "good.onnx", *CONV, *TOKENS, shape=["N", 2, 5])


def test_every_size_agrees_with_onnxruntime(good: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    artifact = ingot.compile(good, shape={"x": (range(1, 14), 3, 8, 8)})
    meta = artifact.metadata
    assert meta["batch"] == {"smallest": 1, "largest": 13, "programs": [1, 8]}
    assert meta["inputs"][0]["shape"] == [13, 3, 8, 8]
    single = ingot.compile(good, shape={"x": (1, 3, 8, 8)}, selftest=False)
    assert meta["weights_bytes"] <= 1.3 * single.metadata["weights_bytes"], "one copy of the weights"
    judge = onnxruntime.InferenceSession(str(good), providers=["CPUExecutionProvider"])
    scale = np.array([0.7], np.float32)
    with ingot.load(artifact.save(tmp_path / "good.so"), threads=2) as net:
        assert net.selftest() < 1e-4
        for size in (13, 1, 7, 8, 9):
            x = RANDOM.standard_normal((size, 3, 8, 8)).astype(np.float32)
            (wanted,) = judge.run(None, {"x": x, "scale": scale})
            found = net(x, scale)
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        for size in (0, 14):
            with pytest.raises(InputError, match="none of the compiled shapes"):
                net(np.zeros((size, 3, 8, 8), np.float32), scale)
    assert "x [1..13,3,8,8], scale [1]" in artifact.entry_c
    assert "a batch of 1 to 13 items" in artifact.header


BROKEN = {
    "a mean over the batch": ((node("ReduceMean", ["g"], ["y"], axes=[0], keepdims=1),), "combines different items"),
    "a softmax over the batch": ((node("Softmax", ["g"], ["y"], axis=0),), "combines different items"),
    "items in pairs": ((node("Transpose", ["g"], ["a"], perm=[1, 0]), node("MatMul", ["g", "a"], ["y"])), "combines"),
    "a share of the batch": (
        (node("Shape", ["g"], ["s"]), node("Gather", ["s", "first"], ["n"]), node("Cast", ["n"], ["k"], to=1),
         node("Div", ["g", "k"], ["y"])),
        "depends on the batch's size",
    ),
    "the place in the batch": (
        (node("Shape", ["g"], ["s"]), node("Gather", ["s", "zero"], ["n"]), node("Range", ["zero", "n", "eins"], ["r"]),
         node("Cast", ["r"], ["k"], to=1), node("Unsqueeze", ["k", "one"], ["u"]), node("Add", ["g", "u"], ["y"])),
        "differs from item to item",
    ),
    "the batch taken apart": (
        (node("Transpose", ["g"], ["a"], perm=[1, 0]), node("Reshape", ["a", "flat1"], ["y"])), "apart",
    ),
    "no item at all": ((node("Mul", ["scale", "scale"], ["y"]),), "no entry for each item"),
    "items along another axis": ((node("Transpose", ["g"], ["y"], perm=[1, 0]),), "no entry for each item"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_items_that_depend_on_one_another_are_refused_with_the_node(kind: str, tmp_path: Path) -> None:
    nodes, words = BROKEN[kind]
    extra = {"zero": np.array(0), "eins": np.array(1), "flat1": np.array([-1])}
    WEIGHTS.update(extra)
    path = model(tmp_path / "bad.onnx", *CONV, *nodes)
    imports = [import_model(path, {"x": (size, 3, 8, 8)}) for size in (2, 3)]
    with pytest.raises(UnsupportedError) as caught:
        check_items(imports, (2, 3))
    assert words in str(caught.value)
    assert "'y'" in str(caught.value) or "weight" in str(caught.value) or "node" in str(caught.value)


def test_the_proof_follows_batches_through_usual_layers(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *CONV, *TOKENS, node("Reshape", ["y", "mixed1"], ["z"]), output="z")
    WEIGHTS["mixed1"] = np.array([-1, 5])
    path = model(tmp_path / "m.onnx", *CONV, *TOKENS, node("Reshape", ["y", "mixed1"], ["z"]), output="z")
    imports = [import_model(path, {"x": (size, 3, 8, 8)}) for size in (2, 3)]
    with pytest.raises(UnsupportedError, match="no entry for each item"):
        check_items(imports, (2, 3))  # two rows an item
    path = model(tmp_path / "n.onnx", *CONV, *TOKENS)
    assert check_items([import_model(path, {"x": (n, 3, 8, 8)}) for n in (2, 3)], (2, 3)) == (True, False)


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((range(1, 1), 3, 8, 8), "not a range"),
        ((range(0, 4), 3, 8, 8), "not a range"),
        ((range(1, 4000), 3, 8, 8), "not a range"),
        ((range(1, 9, 2), 3, 8, 8), "not a range"),
        ((1, range(1, 4), 8, 8), "not along the batch"),
        ((range(1, 4), [3], 8, 8), "a range and lists"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(good: Path, shape: tuple, word: str) -> None:
    with pytest.raises(IngotError, match=word):
        ingot.compile(good, shape={"x": shape})


def test_what_does_not_go_together_with_a_range(good: Path) -> None:
    for options in ({"precision": "bf16"}, {"keep_going": True}):
        with pytest.raises(IngotError, match="does not go together"):
            ingot.compile(good, shape={"x": (range(1, 4), 3, 8, 8)}, target="znver4", **options)
    fixed = save(good.with_name("f.onnx"), [node("Relu", ["x"], ["y"])], [value("x", [1, 3])], [value("y", [1, 3])], {})
    with pytest.raises(IngotError, match="contradicts the model"):
        ingot.compile(fixed, shape={"x": (range(1, 4), 3)})


def test_the_command_line_reads_ranges() -> None:
    assert parse_shapes(["x=1..32x3x224x224"]) == {"x": (range(1, 33), 3, 224, 224)}
    assert parse_shapes(["x=2..4,3"]) == {"x": (range(2, 5), 3)}
    for text in ("x=1..x3", "x=..4x3", "x=1...4x3", "x=1..4..5"):
        with pytest.raises(IngotError):
            parse_shapes([text])
    with pytest.raises(IngotError):
        parse_shapes(["x=1..4x3"], buckets=False)


def test_integers_and_types_stay_what_they_are(tmp_path: Path) -> None:
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("ReduceSum", ["e", "one"], ["y"], keepdims=0)]
    weights = {"table": np.arange(40, dtype=np.float32).reshape(10, 4), "one": np.array([1])}
    path = save(
        tmp_path / "g.onnx", nodes, [value("ids", ["N", 3], TensorProto.INT64)], [value("y", ["N", 4])], weights
    )
    artifact = ingot.compile(path, shape={"ids": (range(2, 6), 3)}, selftest=False)
    ids = RANDOM.integers(0, 10, (5, 3))
    with ingot.load(artifact.save(tmp_path / "g.so")) as net:
        np.testing.assert_array_equal(net(ids), weights["table"][ids].sum(1))
        np.testing.assert_array_equal(net(ids[:3]), weights["table"][ids[:3]].sum(1))
        with pytest.raises(InputError):
            net(ids[:1])
