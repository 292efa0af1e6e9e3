"""How TFLite stores tensors, undone at import: sparse weights, 4-bit weights, tensors that stand for others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.errors import ModelError, UnsupportedError
from ingot.frontend.tflite_verify import tensor_name

if TYPE_CHECKING:
    import tflite

FLOAT32, INT16, INT8, INT4 = 0, 7, 9, 17
DTYPES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 8: "complex64", 9: "int8",
    10: "float64", 12: "uint64", 15: "uint32", 16: "uint16",
}  # fmt: skip
_DENSE, _SPARSE = 0, 1
_INDEX_VECTORS = {1: "Int32Vector", 2: "Uint16Vector", 3: "Uint8Vector"}


class Disguised:
    """A tensor of the file that is looked at as one of another type."""

    def __init__(self, tensor: Any, type_: int) -> None:  # noqa: ANN401 - a tflite.Tensor, or one in disguise
        self._tensor, self._type = tensor, type_

    def Type(self) -> int:  # noqa: N802 - the schema's own name
        """The type that it is looked at as."""
        return self._type

    def Sparsity(self) -> None:  # noqa: N802
        """No table: the values are whole."""
        return None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Whatever else the tensor has."""
        return getattr(self._tensor, name)


class Held:
    """A value in the form of a buffer of the file."""

    def __init__(self, value: np.ndarray) -> None:
        self._bytes = np.frombuffer(value.tobytes(), np.uint8)

    def DataLength(self) -> int:  # noqa: N802 - the schema's own name
        """Bytes of the value."""
        return len(self._bytes)

    def DataAsNumpy(self) -> np.ndarray:  # noqa: N802
        """The value's bytes."""
        return self._bytes


def plain_values(model: tflite.Model, graph: tflite.SubGraph) -> dict[int, np.ndarray]:
    """The constants of a graph that are stored sparse or as 4-bit integers (int8 here), by tensor.

    Raises ModelError for tables that contradict the tensor, UnsupportedError for a type without such forms.
    """
    found = {}
    for index in range(graph.TensorsLength()):
        tensor = graph.Tensors(index)
        sparse = tensor.Sparsity()
        if sparse is None and tensor.Type() != INT4:
            continue
        data = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if isinstance(data, int) or data.size == 0:
            continue
        where = f"tensor {tensor_name(graph, index)!r}"
        shape = tuple(int(tensor.Shape(axis)) for axis in range(tensor.ShapeLength()))
        values = _items(data, tensor.Type(), where)
        if sparse is None:
            count = int(np.prod(shape, dtype=np.int64))
            found[index] = values[:count].reshape(shape)
        else:
            found[index] = dense(values, shape, sparse, where)
    return found


def _items(data: np.ndarray, kind: int, where: str) -> np.ndarray:
    if kind == INT4:
        # The lower half first; both are signed.
        pairs = np.stack([data << 4, data], axis=1).reshape(-1).view(np.int8)
        return pairs >> 4
    if kind not in DTYPES:
        raise UnsupportedError("a tensor of this type cannot be sparse", where=where, found=f"type {kind}")
    dtype = np.dtype(DTYPES[kind])
    if data.size % dtype.itemsize:
        raise ModelError("a tensor's data does not fit its type", where=where, found=f"{data.size} bytes")
    return np.frombuffer(data.tobytes(), dtype)


def dense(values: np.ndarray, shape: tuple[int, ...], sparse: tflite.SparsityParameters, where: str) -> np.ndarray:
    """A sparse tensor written out: `values` in the order of its levels, which are its dimensions and their blocks.

    Level k walks dimension order[k]; from the tensor's rank on that is a block, inside dimension block_map[k - rank].
    A dense level has all its places; a compressed one lists, for each place of the levels before it, the segment of
    places that it has.
    """
    rank = len(shape)
    order = [int(sparse.TraversalOrder(i)) for i in range(sparse.TraversalOrderLength())]
    blocks = [int(sparse.BlockMap(i)) for i in range(sparse.BlockMapLength())]
    if sorted(order) != list(range(rank + len(blocks))) or sparse.DimMetadataLength() != len(order):
        raise _damaged(where, f"levels {order} for {rank} dimensions and {len(blocks)} blocks")
    if any(not 0 <= axis < rank for axis in blocks) or len(set(blocks)) != len(blocks):
        raise _damaged(where, f"blocks of dimensions {blocks}")
    levels = [sparse.DimMetadata(i) for i in range(len(order))]
    inner = {}
    for level, which in zip(levels, order, strict=True):
        if which >= rank:
            size = int(level.DenseSize())
            if level.Format() != _DENSE or size < 1 or shape[blocks[which - rank]] % size:
                raise _damaged(where, f"a block of {size} in a dimension of {shape[blocks[which - rank]]}")
            inner[blocks[which - rank]] = size
    # No level has more places than there are values, or segments of a compressed level after it.
    tables = [_index_vector(level, "Segments", where).size for level in levels if level.Format() == _SPARSE]
    most = max([values.size, *tables])
    # For each place that is stored so far, its position along every dimension.
    places = np.zeros((1, rank), np.int64)
    for level, which in zip(levels, order, strict=True):
        axis = which if which < rank else blocks[which - rank]
        extent = shape[axis] // inner.get(axis, 1) if which < rank else inner[axis]
        step = inner.get(axis, 1) if which < rank else 1
        if level.Format() == _DENSE:
            if int(level.DenseSize()) != extent or len(places) * extent > most:
                raise _damaged(where, f"a level of {level.DenseSize()} places for {extent}")
            rows, offsets = np.repeat(np.arange(len(places)), extent), np.tile(np.arange(extent), len(places))
        elif level.Format() == _SPARSE:
            segments, indices = _index_vector(level, "Segments", where), _index_vector(level, "Indices", where)
            fits = len(segments) == len(places) + 1 and segments[0] == 0 and segments[-1] == len(indices)
            counts = np.diff(segments)
            if not fits or np.any(counts < 0) or np.any(indices < 0) or np.any(indices >= extent):
                raise _damaged(where, "segments or indices outside their level")
            rows, offsets = np.repeat(np.arange(len(places)), counts), indices
        else:
            raise _damaged(where, f"a level of format {level.Format()}")
        places = places[rows]
        places[:, axis] += offsets * step
    if len(places) > values.size:
        raise _damaged(where, f"{values.size} values for {len(places)} places")
    result = np.zeros(shape, values.dtype)
    result[tuple(places.T)] = values[: len(places)]
    return result


def _index_vector(level: tflite.DimensionMetadata, which: str, where: str) -> np.ndarray:
    import tflite

    table = getattr(level, f"Array{which}")()
    kind = _INDEX_VECTORS.get(getattr(level, f"Array{which}Type")())
    if table is None or kind is None:
        raise _damaged(where, "a compressed level without segments or indices")
    vector = getattr(tflite, kind)()
    vector.Init(table.Bytes, table.Pos)
    values = vector.ValuesAsNumpy()
    return np.zeros(0, np.int64) if isinstance(values, int) else values.astype(np.int64)


def _damaged(where: str, found: str) -> ModelError:
    return ModelError(
        "a sparse tensor's tables contradict each other",
        where=where,
        found=found,
        hint="the file is damaged; fetch or export it again",
    )
