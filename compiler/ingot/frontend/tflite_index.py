"""TFLite operators that read or write at indices, or choose elements. No index may reach outside its tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.loops import call_loops
from ingot.frontend.tflite_borrow import onnx_operator
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter, Wrapper

_REDUCTIONS = {
    "SEGMENT_SUM": "add",
    "UNSORTED_SEGMENT_SUM": "add",
    "UNSORTED_SEGMENT_PROD": "mul",
    "UNSORTED_SEGMENT_MAX": "max",
    "UNSORTED_SEGMENT_MIN": "min",
}


def _shape(expr: Expr) -> tuple[int, ...]:
    return tuple(int(dim) for dim in expr.ty.shape)


def _dtype(converter: TfliteConverter, tensor: Wrapper) -> str:
    return str(converter.get_tensor_type_str(tensor.tensor.Type()))


def _one(converter: TfliteConverter, tensor: Wrapper, meaning: str) -> int:
    """A constant of one element."""
    return int(converter.constant(tensor, meaning).reshape(-1)[0])


def _axis(axis: int, rank: int) -> int:
    found = axis + rank if axis < 0 else axis
    if not 0 <= found < rank:
        raise UnsupportedError("an axis is outside the tensor", found=str(axis), allowed=f"below {rank}")
    return found


@handles("ARG_MAX", "ARG_MIN")
def _arg(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, along = converter.get_input_tensors(operator)
    output = converter.get_output_tensors(operator)[0]
    value = converter.get_tensor_expr(source)
    if _dtype(converter, source) == "bool":
        value = relax.op.astype(value, "int8")
    axis = _axis(_one(converter, along, "axis"), len(converter.shape_of(source)))
    find = relax.op.argmax if converter.name_of(operator) == "ARG_MAX" else relax.op.argmin
    return relax.op.astype(find(value, axis=axis, keepdims=False), _dtype(converter, output))


@handles("TOPK_V2")
def _top_k(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    from tvm import relax

    source, number = converter.get_input_tensors(operator)
    places = converter.get_output_tensors(operator)[1]
    shape, count = converter.shape_of(source), _one(converter, number, "number of results")
    if not 0 < count <= shape[-1]:
        raise UnsupportedError("more results than elements", found=str(count), allowed=f"1 to {shape[-1]}")
    ends = [((*shape[:-1], count), dtype) for dtype in (_dtype(converter, source), "int64")]
    value = converter.get_tensor_expr(source)
    values, indices = onnx_operator(converter, "TopK", [value, None], ends, {"axis": -1})
    return [values, relax.op.astype(indices, _dtype(converter, places))]


@handles("CUMSUM")
def _cumsum(converter: TfliteConverter, operator: Operator) -> Expr:
    source, along = converter.get_input_tensors(operator)
    options = converter.options(operator, "CumsumOptions")
    axis = np.array(_one(converter, along, "axis"), np.int64)
    ends = [(converter.shape_of(source), _dtype(converter, source))]
    attributes = {"exclusive": int(options.Exclusive()), "reverse": int(options.Reverse())}
    value = converter.get_tensor_expr(source)
    return onnx_operator(converter, "CumSum", [value, None], ends, attributes, {1: axis})


@handles("ONE_HOT")
def _one_hot(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import te, tirx

    indices, depth, on, off = converter.get_input_tensors(operator)
    axis = converter.options(operator, "OneHotOptions").Axis()
    shape = converter.shape_of(indices)
    axis = _axis(axis, len(shape) + 1)
    result = (*shape[:axis], _one(converter, depth, "depth"), *shape[axis:])

    def define(places: Any, one: Any, zero: Any) -> Any:  # noqa: ANN401
        def at(*index: Any) -> Any:  # noqa: ANN401
            place = places(*index[:axis], *index[axis + 1 :])
            return tirx.if_then_else(place.equal(index[axis].astype(place.ty.dtype)), one(), zero())

        return te.compute(result, at, name="one_hot")

    values = [converter.get_tensor_expr(item) for item in (indices, on, off)]
    return converter.bb.call_te(define, *values, primfunc_name_hint="one_hot")


@handles("GATHER")
def _gather(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax, te, tirx

    source, indices = converter.get_input_tensors(operator)
    options = converter.options(operator, "GatherOptions")
    shape, places = converter.shape_of(source), converter.shape_of(indices)
    axis = _axis(options.Axis(), len(shape))
    batch = options.BatchDims() + len(places) if options.BatchDims() < 0 else options.BatchDims()
    value, where = converter.get_tensor_expr(source), converter.get_tensor_expr(indices)
    if batch == 0:
        # Indices may be user data: keep every read inside the tensor.
        return relax.op.take(value, where, axis, mode="clip")
    if not 0 < batch <= min(axis, len(places)) or shape[:batch] != places[:batch]:
        raise UnsupportedError("batch dimensions do not fit", found=str(batch), allowed=f"at most {axis}")
    inner = len(places) - batch

    def define(x: Any, at: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            place = at(*index[:batch], *index[axis : axis + inner]).astype("int64")
            bounded = tirx.max(tirx.min(place, tirx.const(shape[axis] - 1, "int64")), tirx.const(0, "int64"))
            return x(*index[:axis], bounded, *index[axis + inner :])

        return te.compute((*shape[:axis], *places[batch:], *shape[axis + 1 :]), element, name="gather")

    return converter.bb.call_te(define, value, where, primfunc_name_hint="gather")


@handles("EMBEDDING_LOOKUP")
def _embedding(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    indices, table = converter.get_input_tensors(operator)
    return relax.op.take(converter.get_tensor_expr(table), converter.get_tensor_expr(indices), 0, mode="clip")


@handles("GATHER_ND")
def _gather_nd(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import te, tirx

    source, indices = converter.get_input_tensors(operator)
    shape, places = converter.shape_of(source), converter.shape_of(indices)
    depth = places[-1]
    if depth > len(shape):
        raise UnsupportedError("an index has too many parts", found=str(depth), allowed=f"at most {len(shape)}")

    def define(x: Any, where: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            parts = []
            for part in range(depth):
                place = where(*index[: len(places) - 1], part).astype("int64")
                last = tirx.const(shape[part] - 1, "int64")
                parts.append(tirx.max(tirx.min(place, last), tirx.const(0, "int64")))
            return x(*parts, *index[len(places) - 1 :])

        return te.compute((*places[:-1], *shape[depth:]), element, name="gather_nd")

    values = [converter.get_tensor_expr(item) for item in (source, indices)]
    return converter.bb.call_te(define, *values, primfunc_name_hint="gather_nd")


def _scatter(
    converter: TfliteConverter,
    values: tuple[Expr, Expr, Expr],
    reduction: str,
    grid: tuple[int, ...],
    place: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]],
    update: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]],
) -> Expr:
    """`values` are data, indices, updates: data with each update written in or combined, except those outside."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    shape, dtype = _shape(values[0]), str(values[0].ty.dtype.dtype)
    combine: dict[str, Callable[[Any, Any], Any]] = {
        "none": lambda _, new: new,
        "or": tirx.Or,
        "add": lambda old, new: old + new,
        "mul": lambda old, new: old * new,
        "max": tirx.max,
        "min": tirx.min,
    }

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        data, where, new = ins
        (out,) = outs
        with T.grid(*shape) as point:
            at = tuple(point) if len(shape) > 1 else (point,)
            out[at] = data[at]
        with T.grid(*grid) as point:
            at = tuple(point) if len(grid) > 1 else (point,)
            target = place(where, at)
            inside = [
                condition
                for part, size in zip(target, shape, strict=True)
                if part not in at
                for condition in (part >= T.int64(0), part < T.int64(size))
            ]
            with T.If(tirx.all(*inside) if inside else tirx.const(True, "bool")), T.Then():
                out[target] = combine[reduction](out[target], new[update(new, at)])

    return call_loops(converter.bb, "scatter", list(values), [(shape, dtype)], body)[0]


@handles("SCATTER_ND")
def _scatter_nd(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    indices, updates, size = converter.get_input_tensors(operator)
    shape = tuple(int(dim) for dim in converter.constant(size, "shape").reshape(-1))
    places, dtype = converter.shape_of(indices), _dtype(converter, updates)
    depth, count = places[-1], int(np.prod(places[:-1], dtype=np.int64))
    bb, op = converter.bb, relax.op
    new = bb.emit(op.reshape(converter.get_tensor_expr(updates), (count, *shape[depth:])))
    where = bb.emit(op.astype(op.reshape(converter.get_tensor_expr(indices), (count, depth)), "int64"))
    data = bb.emit(op.zeros(shape, dtype))

    def place(at: Any, point: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        return (*(at[point[0], part] for part in range(depth)), *point[1:])

    # Updates of one place add up; of bools, one that is true wins.
    reduction = "or" if dtype == "bool" else "add"
    return _scatter(converter, (data, where, new), reduction, (count, *shape[depth:]), place, lambda _, point: point)


@handles("SPARSE_TO_DENSE")
def _sparse_to_dense(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    indices, size, values, default = converter.get_input_tensors(operator)
    shape = tuple(int(dim) for dim in converter.constant(size, "shape").reshape(-1))
    places = converter.shape_of(indices)
    count = places[0] if places else 1
    bb, op = converter.bb, relax.op
    where = bb.emit(op.astype(op.reshape(converter.get_tensor_expr(indices), (count, len(shape))), "int64"))
    new = converter.get_tensor_expr(values)
    new = bb.emit(op.broadcast_to(op.reshape(new, (-1,)), (count,)))
    data = bb.emit(op.broadcast_to(converter.get_tensor_expr(default), shape))

    def place(at: Any, point: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        return tuple(at[point[0], part] for part in range(len(shape)))

    return _scatter(converter, (data, where, new), "none", (count,), place, lambda _, point: point)


@handles(*_REDUCTIONS)
def _segments(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, ids, *more = converter.get_input_tensors(operator)
    shape, places, dtype = converter.shape_of(source), converter.shape_of(ids), _dtype(converter, source)
    name = converter.name_of(operator)
    if more:
        segments = _one(converter, more[0], "number of segments")
    else:
        fixed = converter.constant(ids, "segment")
        if fixed.size and np.any(np.diff(fixed.reshape(-1)) < 0):
            raise UnsupportedError("segments are not in order", found=str(fixed.reshape(-1)[:8]))
        segments = int(fixed.reshape(-1)[-1]) + 1
    count = int(np.prod(places, dtype=np.int64))
    result = (segments, *shape[len(places) :])
    bb, op = converter.bb, relax.op
    new = bb.emit(op.reshape(converter.get_tensor_expr(source), (count, *result[1:])))
    where = bb.emit(op.astype(op.reshape(converter.get_tensor_expr(ids), (count,)), "int64"))
    kind = np.dtype(dtype)
    limits = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
    first = {"add": 0, "mul": 1, "max": limits.min, "min": limits.max}[_REDUCTIONS[name]]
    data = bb.emit(op.full(result, relax.const(np.array(first, kind), dtype), dtype))

    def place(at: Any, point: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
        return (at[point[0]], *point[1:])

    values = (data, where, new)
    return _scatter(converter, values, _REDUCTIONS[name], (count, *result[1:]), place, lambda _, point: point)


@handles("DYNAMIC_UPDATE_SLICE")
def _update_slice(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import te, tirx

    source, update, begin = converter.get_input_tensors(operator)
    shape, window = converter.shape_of(source), converter.shape_of(update)
    if any(small > large for small, large in zip(window, shape, strict=True)):
        raise UnsupportedError("an update is larger than its tensor", found=str(window), allowed=str(shape))

    def define(x: Any, new: Any, first: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            inside, places = [], []
            for axis, (small, large) in enumerate(zip(window, shape, strict=True)):
                start = tirx.min(first(axis).astype("int64"), tirx.const(large - small, "int64"))
                place = index[axis] - tirx.max(start, tirx.const(0, "int64"))
                inside += [place >= 0, place < small]
                places.append(tirx.max(tirx.min(place, tirx.const(small - 1, "int64")), tirx.const(0, "int64")))
            return tirx.if_then_else(tirx.all(*inside), new(*places), x(*index))

        return te.compute(shape, element, name="update_slice")

    values = [converter.get_tensor_expr(item) for item in (source, update, begin)]
    return converter.bb.call_te(define, *values, primfunc_name_hint="update_slice")


@handles("REVERSE_SEQUENCE")
def _reverse_sequence(converter: TfliteConverter, operator: Operator) -> Expr:
    source, lengths = converter.get_input_tensors(operator)
    options = converter.options(operator, "ReverseSequenceOptions")
    attributes = {"time_axis": options.SeqDim(), "batch_axis": options.BatchDim()}
    ends = [(converter.shape_of(source), _dtype(converter, source))]
    values = [converter.get_tensor_expr(item) for item in (source, lengths)]
    return onnx_operator(converter, "ReverseSequence", values, ends, attributes)


@handles("SELECT", "SELECT_V2")
def _select(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    condition, yes, no = converter.get_input_tensors(operator)
    shape, test = converter.shape_of(condition), converter.get_tensor_expr(condition)
    rank = len(converter.shape_of(yes))
    if converter.name_of(operator) == "SELECT" and len(shape) == 1 and rank > 1:
        # One condition for each row.
        test = relax.op.reshape(test, (*shape, *(1,) * (rank - 1)))
    return relax.op.where(test, converter.get_tensor_expr(yes), converter.get_tensor_expr(no))
