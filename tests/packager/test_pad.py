"""Inputs between the sizes of the buckets: filled up where the model makes nothing of it, and refused where it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import ingot
from cli.models import save, value
from ingot.cli.options import parse_pads
from ingot.errors import IngotError, InputError, UnsupportedError

pytest.importorskip("onnxruntime")
node = helper.make_node
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((50, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and their mask -> a state for each token, and the mean of those that the mask keeps."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Tanh", ["e"], ["states"]),
        node("Cast", ["mask"], ["m"], to=1),
        node("Unsqueeze", ["m", "last"], ["column"]),
        node("Mul", ["states", "column"], ["kept"]),
        node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
        node("ReduceSum", ["m", "one"], ["count"], keepdims=1),
        node("Add", ["count", "little"], ["least"]),
        node("Div", ["sum", "least"], ["mean"]),
    ]
    inputs = [value(name, ["B", "S"], TensorProto.INT64) for name in ("ids", "mask")]
    outputs = [value("states", ["B", "S", 4]), value("mean", ["B", 4])]
    weights = {"table": TABLE, "last": np.array([-1]), "one": np.array([1]), "little": np.array([1e-3], np.float32)}
    return save(tmp_path_factory.mktemp("pad") / "masked.onnx", nodes, inputs, outputs, weights)


SHAPE = {"ids": (2, [4, 9])}


def test_every_size_up_to_the_largest_agrees_with_onnxruntime(masked: Path, tmp_path: Path) -> None:
    import onnxruntime

    judge = onnxruntime.InferenceSession(str(masked), providers=["CPUExecutionProvider"])
    artifact = ingot.compile(masked, shape=SHAPE, pad={"ids": 7, "mask": 0})
    assert len(artifact.metadata["shapes"]) == 8
    with ingot.load(artifact.save(tmp_path / "masked.so"), threads=1) as net:
        assert net.selftest() < 1e-4
        for size in (5, 9, 1, 4, 3, 8):
            ids, mask = RANDOM.integers(0, 50, (2, size)), RANDOM.integers(0, 2, (2, size))
            found = net(ids, mask)
            for a, b in zip(found, judge.run(None, {"ids": ids, "mask": mask}), strict=True):
                assert a.shape == b.shape
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for size in (0, 10):
            with pytest.raises(InputError, match="none of the compiled shapes"):
                net(np.zeros((2, size), np.int64), np.zeros((2, size), np.int64))


def test_the_command_line_reads_values() -> None:
    assert parse_pads(["ids=7", "mask=-1.5"]) == {"ids": 7, "mask": -1.5}
    for bad in (["ids"], ["=3"], ["ids=x"], ["ids=1,2"], ["ids=1", "ids=2"]):
        with pytest.raises(IngotError, match="--pad"):
            parse_pads(bad)


def test_padding_that_changes_the_model_is_refused(masked: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="padding changes what the model computes") as caught:
        ingot.compile(masked, shape=SHAPE, pad={"ids": 0, "mask": 1})
    assert "output 'mean'" in str(caught.value)
    nodes = [node("Cast", ["ids"], ["f"], to=1), node("Softmax", ["f"], ["y"], axis=1)]
    inputs = [value("ids", [1, "S"], TensorProto.INT64)]
    path = save(tmp_path / "all.onnx", nodes, inputs, [value("y", [1, "S"])], {})
    with pytest.raises(UnsupportedError, match="padding changes"):
        ingot.compile(path, shape={"ids": (1, [4, 8])}, pad={"ids": 0})


@pytest.mark.parametrize(
    ("shape", "pad", "word"),
    [
        (SHAPE, {"ids": 0}, "a value for each"),
        (SHAPE, {"ids": 0, "mask": 0, "who": 0}, "a value for each"),
        (SHAPE, {"ids": 0.5, "mask": 0}, "does not fit"),
        ({"ids": (2, 4)}, {"ids": 0, "mask": 0}, "several buckets"),
        ({"ids": ([1, 2], [4, 8])}, {"ids": 0, "mask": 0}, "along one axis"),
        ({"ids": (2, [4, 900])}, {"ids": 0, "mask": 0}, "one size"),
        ({"ids": (range(1, 4), 4)}, {"ids": 0, "mask": 0}, "does not go together"),
    ],
)
def test_padding_that_makes_no_sense_is_refused(masked: Path, shape: dict, pad: dict, word: str) -> None:
    with pytest.raises(IngotError, match=word):
        ingot.compile(masked, shape=shape, pad=pad, selftest=False)
