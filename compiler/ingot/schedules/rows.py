"""Softmax, norms, sums and dot products along rows: one kernel, a row at a time, nothing of it in the arena.

Every stage of a row (its maximum, its exponentials, their sum, ...) is computed while the row lies in the first-level
cache. A reduction along the row keeps one partial result per vector lane, in up to four registers, which are added as a
tree at the end, with the registers and the last `length % lanes` elements that are left. So float sums are made in
another order than the definition's, which is as exact or better.

Layer norm takes the mean first and then the mean of (x - mean)^2: the one-pass E[x^2] - E[x]^2 cancels where the mean
is large against the deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ingot.schedules import pieces
from ingot.schedules.batch_matmul import BatchMatmulWorkload
from ingot.schedules.vector import annotate_block, interleaved, lanes_for, registers
from ingot.schedules.vector_math import decay
from ingot.schedules.views import View, reader
from ingot.target import Target

#: Blocks whose name begins so are stages of a row, computed inside the row's loop.
STAGE = "row_"
#: Stages with one value a row.
_SCALARS = ("_max", "_sum", "_mean", "_scale")
#: A row of exponentials up to this length lives on the stack; those of a longer row are computed twice.
MAX_STACK_ROW = 4096

Expr = Any  # TVM ships no types; a TE expression
Combine = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class RowsConfig:
    """`lanes` partial results of one register, `vectors` registers of them; lanes = 1 means no vector fits the row.

    single: 1 if a row gives a single value, 0 if it gives another row.
    """

    lanes: int
    vectors: int
    single: int = 0


def default_config(length: int, dtype: str, target: Target, *, single: bool = False) -> RowsConfig:
    """Return as many partial results as hide the latency of an addition."""
    lanes = min(registers(target).lanes, lanes_for(target, dtype, 1 << 30))
    while lanes > length:
        lanes //= 2
    if lanes < 4:
        return RowsConfig(1, 1, int(single))
    vectors = max(v for v in (1, 2, 4) if v == 1 or length // lanes >= 2 * v)
    return RowsConfig(lanes, vectors, int(single))


def _tree(values: Sequence[Expr], combine: Combine) -> Expr:
    """Combine the values in pairs, half with half, as a vector's halves are added."""
    items = list(values)
    while len(items) > 1:
        half = (len(items) + 1) // 2
        items = [combine(items[i], items[i + half]) if i + half < len(items) else items[i] for i in range(half)]
    return items[0]


class Row:
    """Builds the stages of one row: tensors of shape (*rows, ...) named `row_...`."""

    def __init__(self, rows: tuple[int, ...], length: int, config: RowsConfig) -> None:
        self.rows, self.length, self.config = rows, length, config

    def reduce(
        self,
        name: str,
        value: Callable[..., Expr],
        reducer: Callable[..., Expr],
        combine: Combine,
        finish: Callable[[Expr], Expr] = lambda total: total,
        attrs: dict[str, str] | None = None,
    ) -> Any:  # noqa: ANN401 - a TE tensor of shape rows
        """Return finish(reduction of value(*row, i) over i); value takes the row's indices and the element's."""
        lanes, vectors, length = self.config.lanes, self.config.vectors, self.length
        step = lanes * vectors
        whole = length // step * step if lanes > 1 else 0
        parts: Any = None
        if whole:
            k = te.reduce_axis((0, whole // step), f"k_{name}")
            parts = te.compute(
                (*self.rows, step),
                lambda *i: reducer(value(*i[:-1], k * step + i[-1]), axis=[k]),
                name=f"{STAGE}{name}_lanes",
            )
        begins = range(whole, length // lanes * lanes, lanes) if lanes > 1 else range(0)
        if (vectors > 1 and whole) or begins:
            wide, held = parts, vectors if whole else 0
            parts = te.compute(
                (*self.rows, lanes),
                lambda *i: _tree(
                    [
                        *(wide(*i[:-1], i[-1] + v * lanes) for v in range(held)),
                        *(value(*i[:-1], i[-1] + begin) for begin in begins),
                    ],
                    combine,
                ),
                name=f"{STAGE}{name}_register",
            )
            whole = length // lanes * lanes

        def total(*row: Expr) -> Expr:
            sums = [_tree([parts(*row, lane) for lane in range(lanes)], combine)] if whole else []
            tail = [value(*row, tirx.IntImm("int64", i)) for i in range(whole, length)]
            return finish(_tree([*sums, _tree(tail, combine)] if tail else sums, combine))

        shape = self.rows or (1,)
        body = total if self.rows else (lambda _: total())
        return te.compute(shape, body, name=f"{STAGE}{name}", attrs=attrs or {})


def at_row(tensor: Any, row: tuple[Expr, ...]) -> Expr:  # noqa: ANN401
    """Return the row's element of a tensor that `Row.reduce` made."""
    return tensor(*row) if row else tensor[0]


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _max(a: Expr, b: Expr) -> Expr:
    return tirx.max(a, b)


def _min(a: Expr, b: Expr) -> Expr:
    return tirx.min(a, b)


def compute_softmax(shape: tuple[int, ...], dtype: str, config: RowsConfig, *, logarithm: bool = False) -> list[Any]:
    """Return the TE tensors [data, output] of softmax over the last axis, or of its logarithm."""
    *rows, length = shape
    row = Row(tuple(rows), length, config)
    data = te.placeholder(shape, dtype, name="data")
    top = row.reduce("max", lambda *i: data(*i), te.max, _max)

    def power(*i: Expr) -> Expr:
        return decay(data(*i) - at_row(top, i[:-1]))

    anchor = annotate_block("softmax", "rows", config)
    if logarithm:
        shift = row.reduce("sum", power, te.sum, _add, lambda s: te.log(s), anchor)
        out = te.compute(shape, lambda *i: data(*i) - at_row(top, i[:-1]) - at_row(shift, i[:-1]), name="softmax")
        return [data, out]
    powers: Any = te.compute(shape, power, name=f"{STAGE}exp") if length <= MAX_STACK_ROW else power
    scale = row.reduce("sum", lambda *i: powers(*i), te.sum, _add, lambda s: tirx.const(1, dtype) / s, anchor)
    return [data, te.compute(shape, lambda *i: powers(*i) * at_row(scale, i[:-1]), name="softmax")]


def compute_layer_norm(
    shape: tuple[int, ...], dtype: str, epsilon: float, config: RowsConfig, *, scaled: bool = True
) -> list[Any]:
    """Return the TE tensors [data, gamma, beta, output] of layer norm over the last axis.

    scaled: false for gamma 1 and beta 0, which are then no operands.
    """
    *rows, length = shape
    row = Row(tuple(rows), length, config)
    data = te.placeholder(shape, dtype, name="data")
    gamma = te.placeholder((length,), dtype, name="gamma")
    beta = te.placeholder((length,), dtype, name="beta")
    over = tirx.const(1.0 / length, dtype)
    mean = row.reduce("mean", lambda *i: data(*i), te.sum, _add, lambda s: s * over)

    def squared(*i: Expr) -> Expr:
        centred = data(*i) - at_row(mean, i[:-1])
        return centred * centred

    anchor = annotate_block("layer_norm", "rows", config)
    scale = row.reduce("scale", squared, te.sum, _add, lambda s: _inverse_root(s * over, epsilon, dtype), anchor)

    def normal(*i: Expr) -> Expr:
        return (data(*i) - at_row(mean, i[:-1])) * at_row(scale, i[:-1])

    if not scaled:
        return [data, te.compute(shape, normal, name="layer_norm")]
    out = te.compute(shape, lambda *i: normal(*i) * gamma[i[-1]] + beta[i[-1]], name="layer_norm")
    return [data, gamma, beta, out]


def compute_rms_norm(shape: tuple[int, ...], dtype: str, epsilon: float, config: RowsConfig) -> list[Any]:
    """Return the TE tensors [data, weight, output] of RMS norm over the last axis."""
    *rows, length = shape
    row = Row(tuple(rows), length, config)
    data = te.placeholder(shape, dtype, name="data")
    weight = te.placeholder((length,), dtype, name="weight")
    over = tirx.const(1.0 / length, dtype)
    anchor = annotate_block("rms_norm", "rows", config)
    scale = row.reduce(
        "scale", lambda *i: data(*i) * data(*i), te.sum, _add, lambda s: _inverse_root(s * over, epsilon, dtype), anchor
    )
    out = te.compute(shape, lambda *i: data(*i) * at_row(scale, i[:-1]) * weight[i[-1]], name="rms_norm")
    return [data, weight, out]


def compute_reduction(
    shape: tuple[int, ...], out_shape: tuple[int, ...], kind: str, dtype: str, config: RowsConfig
) -> list[Any]:
    """Return the TE tensors [data, output] of the sum, mean, max or min along the last axis.

    out_shape: the dimensions of the rows, perhaps with ones after them.
    """
    *rows, length = shape
    data = te.placeholder(shape, dtype, name="data")
    combine: Combine = {"max": _max, "min": _min}.get(kind, _add)
    reducer: Callable[..., Expr] = te.sum
    if kind in ("max", "min"):
        # From infinity, not from the largest finite number: a masked row of attention is all -inf.
        start = float("-inf" if kind == "max" else "inf")
        reducer = te.comm_reducer(lambda x, y: combine(x, y), lambda t: tirx.const(start, t), name=kind)
    over = tirx.const(1.0 / length if kind == "mean" else 1.0, dtype)

    def finish(total: Expr) -> Expr:
        return total * over if kind == "mean" else total

    anchor = annotate_block(kind, "rows", config)
    total = Row(tuple(rows), length, config).reduce("scale", lambda *i: data(*i), reducer, combine, finish, anchor)
    return [data, te.compute(out_shape, lambda *i: at_row(total, i[: len(rows)]), name=kind)]


def compute_dots(workload: BatchMatmulWorkload, views: tuple[View, View], config: RowsConfig) -> list[Any]:
    """Return the TE tensors [a, b, output] of a matrix product, each element by itself.

    That is fast where few rows of A meet a B whose columns are contiguous: it is read once, in order.
    """
    w, rank = workload, len(workload.batch)
    stored = [te.placeholder(view.shape, "float32", name=name) for view, name in zip(views, "ab", strict=True)]
    a, b = (reader(t, view) for t, view in zip(stored, views, strict=True))

    def product(*i: Expr) -> Expr:
        return a(*i[:rank], i[rank], i[-1]) * b(*i[:rank], i[-1], i[rank + 1])

    anchor = annotate_block("dots", "rows", config)
    shape = (*w.batch, w.m, w.n)
    total = Row(shape, w.k, config).reduce("scale", product, te.sum, _add, attrs=anchor)
    return [*stored, te.compute(shape, lambda *i: total(*i), name="dots")]


def _inverse_root(value: Expr, epsilon: float, dtype: str) -> Expr:
    return tirx.const(1, dtype) / te.sqrt(value + tirx.const(epsilon, dtype))


def schedule(sch: Any, anchor: Any, output: Any, config: RowsConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule every stage below the loop over rows of `output`; `anchor` is the row's last reduction."""
    loops = sch.get_loops(output)
    rows, last = loops[:-1], loops[-1]
    if config.single:  # what follows may spread the value along a row again, or not
        depth = len(sch.get(anchor).writes[0].source.shape)
        spread = any(int(sch.get(loop).extent) > 1 for loop in loops[depth:])
        rows, last = (loops[:depth], loops[-1]) if spread else (loops, None)
    task = sch.fuse(*rows) if rows else sch.add_unit_loop(last)
    stages = [
        block
        for block in sch.get_child_blocks(sch.get_sblock("root"))
        if str(sch.get(block).name_hint).startswith(STAGE)
    ]
    for block in reversed(stages):
        sch.compute_at(block, task, preserve_unit_loops=True)
    sch.parallel(task)
    for block in stages:
        schedule_stage(sch, block, config, target)
    if last is not None:
        vectorize_row(sch, output, config, target)


def schedule_stage(sch: Any, block: Any, config: RowsConfig, target: Target) -> None:  # noqa: ANN401
    """Vectorise one stage, already below the loop over rows."""
    loops = sch.get_loops(block)
    name = str(sch.get(block).name_hint)
    if name.endswith("_lanes"):
        *_, lane, k = loops
        outer, lane = sch.split(lane, [config.vectors, config.lanes])
        sch.reorder(k, outer, lane)
        sch.unroll(outer)
        sch.vectorize(lane)
        sch.decompose_reduction(block, k)
    elif name.endswith("_register"):
        sch.vectorize(loops[-1])
    elif not name.endswith(_SCALARS):
        vectorize_row(sch, block, config, target)


def vectorize_row(sch: Any, block: Any, config: RowsConfig, target: Target) -> None:  # noqa: ANN401
    """Vectorise a block's loop along the row.

    A stage is stored to the stack, apart from all it is made of: its last elements may be computed twice.
    """
    if config.lanes > 1:
        loop, overlap = sch.get_loops(block)[-1], str(sch.get(block).name_hint).startswith(STAGE)
        pieces.mark(sch, loop, config.lanes, interleaved(sch.get(block), target), overlap=overlap)
