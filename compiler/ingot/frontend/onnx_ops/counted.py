"""Operators that choose how many results they have: NonZero, Compress, Unique (`suppression` has NonMaxSuppression).

Each has one more output than in ONNX, an int64[1] that counts the results; the others have their largest size, and
zeros behind the last result. What runs in order (compaction) is one kernel on one thread; all else is
computed for every element on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr

# Comparisons of one Unique, and the size of its largest table of pairs.
_MAX_COMPARISONS, _MAX_PAIRS = 2**31, 2**22


class _Code:
    """Statements of a kernel that runs in order, over buffers."""

    @staticmethod
    def loop(extent: int | Any, body: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - TIR
        from tvm import tirx

        index = tirx.Var("i", "int64")
        count = tirx.const(extent, "int64") if isinstance(extent, int) else extent
        return tirx.For(index, tirx.const(0, "int64"), count, tirx.ForKind.SERIAL, body(index))

    @staticmethod
    def store(buffer: Any, indices: Sequence[Any], value: Any) -> Any:  # noqa: ANN401
        from tvm import tirx

        return tirx.BufferStore(buffer, value, [integer(index) for index in indices])

    @staticmethod
    def load(buffer: Any, *indices: Any) -> Any:  # noqa: ANN401
        from tvm import tirx

        return tirx.BufferLoad(buffer, [integer(index) for index in indices])

    @staticmethod
    def when(condition: Any, then: Any) -> Any:  # noqa: ANN401
        from tvm import tirx

        return tirx.IfThenElse(condition, then, None)

    @staticmethod
    def steps(*statements: Any) -> Any:  # noqa: ANN401
        from tvm import tirx

        return tirx.SeqStmt(list(statements))


def integer(value: int | Any) -> Any:  # noqa: ANN401 - TIR
    """A number as int64, for indices."""
    from tvm import tirx

    return tirx.const(value, "int64") if isinstance(value, int) else value


def _in_order(
    ctx: Context,
    inputs: Sequence[Expr],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    body: Callable[[Sequence[Any], Sequence[Any]], Any],
    name: str,
) -> list[Expr]:
    """The results of a kernel that `body(inputs, outputs)` writes as statements."""
    import tvm
    from tvm import relax, s_tir, tirx

    types = [(tuple(int(d) for d in tensor.ty.shape), str(tensor.ty.dtype.dtype)) for tensor in inputs]
    ins = [tirx.decl_buffer(shape, dtype, f"in{i}") for i, (shape, dtype) in enumerate(types)]
    outs = [
        tirx.decl_buffer(shape, dtype, f"out{i}") for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]

    def whole(buffer: Any) -> Any:  # noqa: ANN401
        return tirx.BufferRegion(buffer, [tvm.ir.Range(0, int(extent)) for extent in buffer.shape])

    def block(name: str, reads: Sequence[Any], writes: Sequence[Any], statement: Any) -> Any:  # noqa: ANN401
        regions = [[whole(buffer) for buffer in side] for side in (reads, writes)]
        return s_tir.SBlockRealize([], tirx.const(True, "bool"), s_tir.SBlock([], *regions, name, statement))

    inner = block(name, [*ins, *outs], outs, body(ins, outs))
    function = tirx.PrimFunc([*ins, *outs], block("root", [], [], inner))
    # 8 is FuseOps' kind for what nothing is fused with.
    for key, value in (("op_pattern", 8), ("tirx.noalias", True), ("s_tir", True)):
        function = function.with_attr(key, value)
    gvar = ctx.bb.add_func(function, name)
    results = [relax.TensorType(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    made = ctx.emit(relax.call_tir(gvar, relax.Tuple(list(inputs)), results))
    return [ctx.emit(relax.TupleGetItem(made, index)) for index in range(len(shapes))]


def _places(ctx: Context, mask: Expr, length: int) -> tuple[Expr, Expr]:
    """Indices of the true entries of mask[length] in order, zeros behind them, and their number."""

    def body(ins: Sequence[Any], outs: Sequence[Any]) -> Any:  # noqa: ANN401
        (flags,), (places, count) = ins, outs
        here = _Code.load(count, 0)

        def note(i: Any) -> Any:  # noqa: ANN401
            found = _Code.steps(_Code.store(places, [here], i), _Code.store(count, [0], here + integer(1)))
            return _Code.when(_Code.load(flags, i), found)

        return _Code.steps(
            _Code.store(count, [0], integer(0)),
            _Code.loop(length, lambda i: _Code.store(places, [i], integer(0))),
            _Code.loop(length, note),
        )

    places, count = _in_order(ctx, [mask], [(length,), (1,)], ["int64", "int64"], body, "places")
    return places, count


@converts("NonZero")
def _non_zero(ctx: Context) -> list[Expr]:
    from tvm import relax, te, tirx

    shape = ctx.shape() or (1,)
    length = int(np.prod(shape, dtype=np.int64))
    flat = ctx.emit(relax.op.reshape(ctx.inputs[0], (length,)))
    mask = flat if ctx.dtype() == "bool" else ctx.emit(relax.op.not_equal(flat, ctx.const(0)))
    places, count = _places(ctx, mask, length)
    if len(shape) == 1:
        return [relax.op.reshape(places, (1, length)), count]
    rows = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    parts = []
    for stride, size in zip(rows, shape, strict=True):
        coordinate = ctx.bb.call_te(
            lambda p, stride=stride, size=size: te.compute(
                (1, length),
                lambda _, k: tirx.floormod(tirx.floordiv(p(k), integer(stride)), integer(size)),
                name="coordinate",
            ),
            places,
            primfunc_name_hint="coordinate",
        )
        parts.append(ctx.emit(coordinate))
    return [relax.op.concat(parts, axis=0), count]


@converts("Compress")
def _compress(ctx: Context) -> list[Expr]:
    from tvm import relax

    axis = ctx.attr("axis")
    shape, data = ctx.shape(), ctx.inputs[0]
    if axis is None:
        shape = (int(np.prod(shape, dtype=np.int64)),)
        data = ctx.emit(relax.op.reshape(data, shape))
    axis = normal_axis(int(axis or 0), len(shape))
    length, fixed, mask = ctx.out_shape()[axis], ctx.value(1), ctx.inputs[1]
    if fixed is not None:
        chosen = np.flatnonzero(fixed[: shape[axis]])
        return [relax.op.take(data, ctx.array("places", chosen), axis, mode="clip")]
    if ctx.shape(1)[0] > length:
        mask = ctx.emit(relax.op.strided_slice(mask, [0], [0], [length], [1]))
    places, count = _places(ctx, mask, length)
    return [relax.op.take(data, places, axis, mode="clip"), count]


@converts("Unique")
def _unique(ctx: Context) -> list[Expr]:
    """Quadratic: each entry is compared with every other one, in parallel; nothing is sorted in place."""
    from tvm import relax, te, tirx

    axis, shape, data = ctx.attr("axis"), ctx.shape(), ctx.inputs[0]
    if axis is None:
        entries, width = int(np.prod(shape, dtype=np.int64)), 1
        rows = ctx.emit(relax.op.reshape(data, (entries, 1)))
    else:
        axis = normal_axis(int(axis), len(shape))
        entries = shape[axis]
        width = int(np.prod(shape, dtype=np.int64)) // entries
        order = [axis, *(i for i in range(len(shape)) if i != axis)]
        rows = ctx.emit(relax.op.reshape(relax.op.permute_dims(data, order), (entries, width)))
    total = entries * entries * width
    if total > _MAX_COMPARISONS or (width > 1 and entries * entries > _MAX_PAIRS):
        raise ctx.unsupported(f"{total} comparisons of {entries} entries", f"at most {_MAX_COMPARISONS}")

    # Where two entries differ first (`width` if nowhere); for single values the values themselves tell.
    differs = rows
    if width > 1:

        def first_difference(x: Any) -> Any:  # noqa: ANN401
            k = te.reduce_axis((0, width), "k")
            end = tirx.const(width, "int64")
            return te.compute(
                (entries, entries),
                lambda i, j: te.min(tirx.Select(x(i, k).equal(x(j, k)), end, k.astype("int64")), axis=k),
                name="differs",
            )

        differs = ctx.emit(ctx.bb.call_te(first_difference, rows, primfunc_name_hint="unique_differs"))

    def same(x: Any, d: Any, i: Any, j: Any) -> Any:  # noqa: ANN401
        return d(i, j).equal(tirx.const(width, "int64")) if width > 1 else x(i, integer(0)).equal(x(j, integer(0)))

    def before(x: Any, d: Any, i: Any, j: Any) -> Any:  # noqa: ANN401
        if width == 1:
            return x(i, integer(0)) < x(j, integer(0))
        place = tirx.min(d(i, j), tirx.const(width - 1, "int64"))
        return x(i, place) < x(j, place)

    zero, one = tirx.const(0, "int64"), tirx.const(1, "int64")

    def total_of(value: Callable[..., Any], extent: int, name: str) -> Callable[..., Any]:
        def define(*tensors: Any) -> Any:  # noqa: ANN401
            k = te.reduce_axis((0, entries), "k")
            return te.compute((extent,), lambda i: te.sum(value(i, k, *tensors), axis=k), name=name)

        return define

    def call(define: Callable[..., Any], *tensors: Expr, name: str) -> Expr:
        return ctx.emit(ctx.bb.call_te(define, *tensors, primfunc_name_hint=f"unique_{name}"))

    # The place of the first entry like this one.
    def leader(x: Any, d: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, entries), "k")
        end = tirx.const(entries, "int64")
        found = te.compute(
            (entries,),
            lambda i: te.min(tirx.Select(same(x, d, i, k), k.astype("int64"), end), axis=k),
            name="leader",
        )
        # A NaN is like no other entry, not even itself.
        return te.compute((entries,), lambda i: tirx.min(found(i), i.astype("int64")), name="leader_or_self")

    leaders = call(leader, rows, differs, name="leader")

    def leads(lead: Any, k: Any) -> Any:  # noqa: ANN401
        return lead(k).equal(k.astype("int64"))

    def ahead(i: Any, k: Any, x: Any, d: Any, lead: Any) -> Any:  # noqa: ANN401
        """Whether leader k comes before the leader of entry i in the result."""
        if not ctx.attr("sorted", 1):
            return tirx.Select(tirx.And(leads(lead, k), k.astype("int64") < lead(i)), one, zero)
        return tirx.Select(tirx.And(leads(lead, k), before(x, d, k, i)), one, zero)

    ranks = call(total_of(ahead, entries, "rank"), rows, differs, leaders, name="rank")
    count = call(total_of(lambda _, k, lead: tirx.Select(leads(lead, k), one, zero), 1, "count"), leaders, name="count")
    where = call(
        total_of(
            lambda i, k, lead, rank: tirx.Select(tirx.And(leads(lead, k), rank(k).equal(i)), k.astype("int64"), zero),
            entries,
            "where",
        ),
        leaders,
        ranks,
        name="where",
    )
    times = call(
        total_of(lambda i, k, rank: tirx.Select(rank(k).equal(i), one, zero), entries, "times"), ranks, name="times"
    )
    if axis is None:
        values = relax.op.take(relax.op.reshape(data, (entries,)), where, 0, mode="clip")
    else:
        values = relax.op.take(data, where, axis, mode="clip")
    return [ctx.emit(values), where, ranks, times, count]
