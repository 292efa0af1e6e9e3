"""Several input shapes in one library: weights are stored once, each shape computes what a library of its own would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import ingot
from cli.models import save, value
from ingot.errors import IngotError, InputError, ShapeError
from ingot.packager.buckets import join
from ingot.program import BufferRef, CopyStep, Program
from runtime.test_state import parts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ids [1, S] -> a row of a table each, mixed by a matrix, normalised along S: entries depend on one another."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((200, 96)).astype(np.float32) for name in ("table",)}
    weights["w"] = random.standard_normal((96, 160)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Mul", ["e", "mask"], ["m"]),
        helper.make_node("MatMul", ["m", "w"], ["h"]),
        helper.make_node("Softmax", ["h"], ["y"], axis=1),
    ]
    inputs = [value("ids", [1, "S"], TensorProto.INT64), value("mask", [1, "S", 1])]
    path = tmp_path_factory.mktemp("buckets") / "rows.onnx"
    return save(path, nodes, inputs, [value("y", [1, "S", 160])], weights)


def test_every_bucket_agrees_with_onnxruntime_on_one_copy_of_the_weights(model: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    artifact = ingot.compile(model, shape={"ids": (1, [64, 4, 16])})
    single = ingot.compile(model, shape={"ids": (1, 64)}, selftest=False)
    meta = artifact.metadata
    assert [bucket["inputs"] for bucket in meta["shapes"]] == [[[1, 4], [1, 4, 1]], [[1, 16], [1, 16, 1]]]
    assert meta["inputs"][0]["shape"] == [1, 64], "the largest is the one that everybody sees"
    assert meta["weights_bytes"] <= 1.1 * single.metadata["weights_bytes"]
    assert meta["arena_bytes"] == single.metadata["arena_bytes"]
    judge = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    with ingot.load(artifact.save(tmp_path / "rows.so"), threads=2) as net:
        assert net.selftest() < 1e-4
        for size in (4, 64, 16, 4):
            ids = random.integers(0, 200, (1, size))
            mask = random.random((1, size, 1), np.float32)
            (wanted,) = judge.run(None, {"ids": ids, "mask": mask})
            found = net(ids, mask)
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
        with pytest.raises(InputError, match="none of the compiled shapes") as caught:
            net(np.zeros((1, 5), np.int64), np.zeros((1, 5, 1), np.float32))
        assert "ids [1, 4], mask [1, 4, 1]; ids [1, 16]" in str(caught.value)
        with pytest.raises(InputError, match="none of the compiled shapes"):
            net(np.zeros((1, 4), np.int64), np.zeros((1, 16, 1), np.float32))


def test_the_same_model_gives_the_same_bytes(model: Path) -> None:
    first, second = (ingot.compile(model, shape={"ids": (1, [4, 8])}, selftest=False).library for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ({"ids": (1, [4, 4])}, "the same input shapes"),
        ({"ids": (1, [])}, "no sizes"),
        ({"ids": (1, list(range(1, 40)))}, "too many"),
        ({"ids": (1, [4, 8]), "mask": (1, [4, 8, 16], 1)}, "different lengths"),
        ({"ids": (1, [4, 8]), "mask": (1, [8, 4], 1)}, "contradicts"),
        ({"ids": (1, [4, 0])}, "not a positive number"),
        ({"ids": (1, ["a"])}, "not a positive number"),
        ({"who": (1, [4, 8])}, "does not have"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(model: Path, shape: dict[str, tuple], word: str) -> None:
    with pytest.raises(IngotError, match=word):
        ingot.compile(model, shape=shape, selftest=False)


def test_what_is_not_a_shape_is_the_same_for_all_buckets() -> None:
    program, imported, _ = parts()
    smaller = replace(imported, inputs=tuple(replace(spec, shape=(2,)) for spec in imported.inputs))
    other_state = replace(smaller, states=(replace(smaller.states[0], initial=np.zeros(2, np.float32)),))
    fewer = replace(smaller, outputs=smaller.outputs[:1], states=(), counts=())
    for odd in (other_state, fewer):
        with pytest.raises(ShapeError, match="differ in more"):
            join([program, program], [odd, imported])
    with pytest.raises(ShapeError, match="the same input shapes"):
        join([program, program], [imported, imported])


def test_weights_are_joined_by_their_bytes() -> None:
    _, imported, _ = parts(np.zeros(3, np.float32))
    smaller = replace(imported, inputs=tuple(replace(spec, shape=(2,)) for spec in imported.inputs))

    def program(*weights: bytes) -> Program:
        size = len(weights[0])
        steps = tuple(
            CopyStep(BufferRef("weight", 0, i * 64, size), BufferRef("output", 0, 0, size), size, "copy")
            for i in range(len(weights))
        )
        blob = b"".join(data + bytes(64 - size) for data in weights)
        return Program(steps=steps, objects=(), weights=blob, arena_bytes=size, macs=0)

    a, b, c = (bytes([n]) * 8 for n in (1, 2, 3))
    joined = join([program(a, b), program(b, c)], [replace(smaller, states=()), replace(imported, states=())])
    assert len(joined.weights) == 3 * 64

    def read(steps: tuple) -> list[bytes]:
        return [joined.weights[s.source.offset : s.source.offset + s.source.bytes] for s in steps]

    assert read(joined.buckets[0].steps) == [a, b]
    assert read(joined.steps) == [b, c]
