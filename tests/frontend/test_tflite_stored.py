"""Constants that TFLite stores in another form: sparse, in blocks, as 4-bit integers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.errors import IngotError, ModelError
from ingot.frontend import import_model

from .tiny_models import Op, Sparsity, Tensor, tflite_of

Write = Callable[..., Path]
_DENSE = np.array([[0, 1, 0, 2], [0, 0, 0, 0], [3, 0, 0, 4]], np.float32)


def sparse_tensor(dense: np.ndarray, dtype: str = "int32") -> Tensor:
    """Rows dense, columns compressed."""
    segments = np.concatenate([[0], np.cumsum(np.count_nonzero(dense, axis=1))]).astype(dtype)
    indices = np.nonzero(dense)[1].astype(dtype)
    tables = Sparsity((0, 1), (), (dense.shape[0], (segments, indices)))
    return Tensor("w", dense.shape, str(dense.dtype), dense[dense != 0], sparsity=tables)


def weights_of(path: Path) -> np.ndarray:
    """The weights (as rows of units) of a model with one dense layer."""
    imported = import_model(path)
    found = [value for value in imported.weights.values() if value.ndim == 2]
    if found:
        return found[0].T
    calls = [binding.value for binding in imported.module["main"].body.blocks[0].bindings]
    return np.asarray(
        next(arg.value.numpy() for call in calls for arg in getattr(call, "args", []) if hasattr(arg, "value")).T
    )


def dense_layer(weights: Tensor) -> bytes:
    units, depth = weights.shape
    tensors = [Tensor("x", (2, depth)), weights, Tensor("y", (2, units))]
    return tflite_of(
        tensors,
        [Op("FULLY_CONNECTED", (0, 1), (2,), "FullyConnectedOptions", {"FusedActivationFunction": 0})],
        [0],
        [2],
    )


@pytest.mark.parametrize("dtype", ["int32", "uint16", "uint8"])
def test_sparse_weights_are_written_out(write: Write, dtype: str) -> None:
    found = weights_of(write(dense_layer(sparse_tensor(_DENSE, dtype)), "m.tflite"))
    np.testing.assert_array_equal(found, _DENSE)


def test_litert_reads_the_same_sparse_weights(write: Write) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    tensors = [sparse_tensor(_DENSE), Tensor("d", _DENSE.shape), Tensor("x", (2, 4)), Tensor("y", (2, 3))]
    ops = [
        Op("DENSIFY", (0,), (1,)),
        Op("FULLY_CONNECTED", (2, 1), (3,), "FullyConnectedOptions", {"FusedActivationFunction": 0}),
    ]
    data = tflite_of(tensors, ops, [2], [3])
    kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(model_content=data, experimental_op_resolver_type=kind)
    runner.allocate_tensors()
    x = np.eye(4, dtype=np.float32)[:2]
    runner.set_tensor(runner.get_input_details()[0]["index"], x)
    runner.invoke()
    wanted = runner.get_tensor(runner.get_output_details()[0]["index"])
    np.testing.assert_array_equal(wanted, x @ _DENSE.T)
    np.testing.assert_array_equal(weights_of(write(data, "m.tflite")), _DENSE)


@given(
    rows=st.integers(1, 4), columns=st.integers(1, 4), block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_blocks_are_put_in_their_places(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    held = random.integers(0, 2, (rows, columns)).astype(bool)
    held.reshape(-1)[0] = True
    cells = random.uniform(1, 2, (rows, columns, *block)).astype(np.float32) * held[:, :, None, None]
    dense = cells.transpose(0, 2, 1, 3).reshape(rows * block[0], columns * block[1])
    segments = np.concatenate([[0], np.cumsum(held.sum(axis=1))]).astype(np.int32)
    levels = (rows, (segments, np.nonzero(held)[1].astype(np.int32)), *block)
    tables = Sparsity((0, 1, 2, 3), (0, 1), levels)
    tensor = Tensor("w", dense.shape, "float32", np.ascontiguousarray(cells[held]), sparsity=tables)
    path = tmp_path_factory.mktemp("m") / "m.tflite"
    path.write_bytes(dense_layer(tensor))
    np.testing.assert_array_equal(weights_of(path), dense)


_SEGMENTS, _INDICES = np.array([0, 2, 2, 4], np.int32), np.array([1, 3, 0, 3], np.int32)


@pytest.mark.parametrize(
    "tables",
    [
        Sparsity((0, 0), (), (3, (_SEGMENTS, _INDICES))),
        Sparsity((0, 1), (), (3,)),
        Sparsity((0, 1), (), (4, (_SEGMENTS, _INDICES))),
        Sparsity((0, 1), (), (2**31 - 1, (_SEGMENTS, _INDICES))),
        Sparsity((0, 1), (), (3, (_SEGMENTS[:3], _INDICES))),
        Sparsity((0, 1), (), (3, (_SEGMENTS, _INDICES[:3]))),
        Sparsity((0, 1), (), (3, (_SEGMENTS, np.array([1, 4, 0, 3], np.int32)))),
        Sparsity((0, 1), (), (3, (_SEGMENTS, np.array([1, -1, 0, 3], np.int32)))),
        Sparsity((0, 1), (), (3, (np.array([0, 3, 2, 4], np.int32), _INDICES))),
        Sparsity((0, 1, 2), (5,), (3, (_SEGMENTS, _INDICES), 1)),
        Sparsity((0, 1, 2), (0,), (3, (_SEGMENTS, _INDICES), 2)),
        Sparsity((0, 1, 2), (0,), (3, (_SEGMENTS, _INDICES), 0)),
    ],
)
def test_tables_that_lie_are_refused(write: Write, tables: Sparsity) -> None:
    tensor = sparse_tensor(_DENSE)
    tensor.sparsity = tables
    with pytest.raises(ModelError, match="contradict"):
        import_model(write(dense_layer(tensor), "m.tflite"))


def test_every_cut_of_a_sparse_model_is_refused(write: Write) -> None:
    data = dense_layer(sparse_tensor(_DENSE))
    for size in range(8, len(data), 16):
        with pytest.raises(IngotError):
            import_model(write(data[:size], "m.tflite"))


def test_changed_bytes_of_a_sparse_model_make_no_other_error(write: Write) -> None:
    data = bytearray(dense_layer(sparse_tensor(_DENSE)))
    random = np.random.default_rng(4)
    for _ in range(60):
        changed = bytearray(data)
        changed[int(random.integers(8, len(data)))] = int(random.integers(256))
        with contextlib.suppress(IngotError):
            import_model(write(bytes(changed), "m.tflite"))


def test_four_bit_weights_are_two_to_a_byte(write: Write) -> None:
    values = np.array([[-8, 7, 0], [1, -1, 3], [5, -4, 2]], np.int8)
    flat = np.append(values.reshape(-1), np.int8(0)).astype(np.int8).view(np.uint8) & 15
    packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
    weights = Tensor("w", (3, 3), "int4", packed, (0.5,), (0,))
    found = weights_of(write(dense_layer(weights), "m.tflite"))
    np.testing.assert_array_equal(found, values)
