"""Attention, softmax(chain(Q K^T)) V, as one kernel: a tile of rows at a time, its scores never leave the cache.

A task takes R rows of one head. It computes their scores by register tiles against the packed keys, turns each row
into exponentials, and multiplies those with the values, again by register tiles; the division by a row's sum waits
for the last store. The keys are packed as [N / block][K][block] before (one more kernel), padded to whole blocks.

Q, K, V and the result are read and written where they lie: a transpose of heads is an index here, not a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ingot.schedules.batch_matmul import UNROLL, decompose, register_tile
from ingot.schedules.conv2d import uses_lanes
from ingot.schedules.lanes import mark_lanes
from ingot.schedules.rows import STAGE, Row, RowsConfig, at_row, schedule_stage, vectorize_row
from ingot.schedules.vector import annotate_block, ceil_div, lanes_for, largest_divisor, registers
from ingot.schedules.vector_math import decay
from ingot.schedules.views import View, reader
from ingot.target import Target

Expr = Any  # TVM ships no types; a TE expression
#: Scores and exponentials of a tile share the stack with the accumulators.
STACK_BYTES = 48 * 1024
MIN_ROWS = 4
PACKED = "pack_keys"


@dataclass(frozen=True)
class AttentionWorkload:
    """Q [*batch, m, k], K^T [*batch, k, n], V [*batch, n, d]; `operands` are the shapes of the chain's tensors.

    out_axes: dimension i of the result is dimension out_axes[i] of [*batch, m, d].
    """

    batch: tuple[int, ...]
    m: int
    k: int
    n: int
    d: int
    out_axes: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class AttentionConfig:
    """`rows` of a tile; `vectors` of `lanes` scores and `mixed` of `out_lanes` results a register tile is wide.

    row_axis: the dimension of the stored result that counts the rows. key_unroll, value_unroll:
    steps of each product at once. row_lanes, row_vectors: `RowsConfig` of a row.
    """

    rows: int
    vectors: int
    lanes: int
    mixed: int
    out_lanes: int
    row_axis: int
    key_unroll: int
    value_unroll: int
    row_lanes: int
    row_vectors: int


def default_config(workload: AttentionWorkload, row: RowsConfig, target: Target) -> AttentionConfig | None:
    """Return the tile that fills the register file, or None where the template does not fit."""
    w, regs = workload, registers(target)
    out_lanes = min(regs.lanes, lanes_for(target, "float32", w.d))
    if w.m < MIN_ROWS or out_lanes < 4 or w.n < regs.lanes or w.out_axes[-1] != len(w.batch) + 1:
        return None
    widest = 4 if regs.lanes == 4 and regs.count >= 32 else 2
    vectors = min(widest, ceil_div(w.n, regs.lanes))
    mixed = max(v for v in range(1, widest + 1) if w.d % (out_lanes * v) == 0)
    limit = min((regs.count - 1 - v) // v for v in (vectors, mixed))
    wide = ceil_div(w.n, regs.lanes * vectors) * regs.lanes * vectors
    limit = min(limit, 12, w.m, STACK_BYTES // (2 * 4 * wide))
    if limit < MIN_ROWS:
        return None
    rows = min(range(MIN_ROWS, limit + 1), key=lambda r: (ceil_div(w.m, r) * (r + 2), -r))
    row_axis = w.out_axes.index(len(w.batch))
    unroll = (largest_divisor(w.k, UNROLL), largest_divisor(w.n, UNROLL))
    return AttentionConfig(rows, vectors, regs.lanes, mixed, out_lanes, row_axis, *unroll, row.lanes, row.vectors)


def compute(
    workload: AttentionWorkload,
    config: AttentionConfig,
    views: tuple[View, View, View],
    chain: Callable[[Expr, Sequence[Any], Sequence[Expr]], Expr],
) -> list[Any]:
    """Return the TE tensors [q, k, v, *operands, output], all float32 but for the operands' own types.

    views: of Q, K^T and V. chain(score, operands, (*batch, i, j)) is what softmax sees.
    """
    w, c = workload, config
    rank = len(w.batch)
    stored = [te.placeholder(view.shape, "float32", name=name) for view, name in zip(views, "qkv", strict=True)]
    q, k, v = (reader(t, view) for t, view in zip(stored, views, strict=True))
    operands = [te.placeholder(shape, "float32", name=f"operand{i}") for i, shape in enumerate(w.operands)]
    block = c.vectors * c.lanes
    blocks, tall = ceil_div(w.n, block), ceil_div(w.m, c.rows) * c.rows

    def inside(m: Expr) -> Expr:
        return m if tall == w.m else tirx.min(m, tirx.IntImm("int64", w.m - 1))

    def key(*i: Expr) -> Expr:
        n = i[rank] * block + i[rank + 2]
        load = k(*i[:rank], i[rank + 1], n)
        return load if blocks * block == w.n else te.if_then_else(n < w.n, load, tirx.const(0, "float32"))

    keys = te.compute((*w.batch, blocks, w.k, block), key, name=PACKED)
    rk = te.reduce_axis((0, w.k), "rk")
    scores = te.compute(
        (*w.batch, tall, blocks * block),
        lambda *i: te.sum(
            q(*i[:rank], inside(i[rank]), rk) * keys(*i[:rank], i[-1] // block, rk, i[-1] % block), axis=[rk]
        ),
        name=f"{STAGE}scores",
    )

    def seen(*i: Expr) -> Expr:
        return chain(scores(*i), operands, [*i[:rank], inside(i[rank]), i[-1]])

    row = Row((*w.batch, tall), w.n, RowsConfig(c.row_lanes, c.row_vectors))
    # Exponentials of padding, which nothing reads, make whole vectors of scores; a mask has none for them.
    wide = w.n if any(len(shape) > 0 and shape[-1] != 1 for shape in w.operands) else blocks * block
    top = row.reduce("max", seen, te.max, lambda a, b: tirx.max(a, b))
    powers = te.compute((*w.batch, tall, wide), lambda *i: decay(seen(*i) - at_row(top, i[:-1])), name=f"{STAGE}exp")
    one = tirx.const(1, "float32")
    scale = row.reduce("sum", lambda *i: powers(*i), te.sum, lambda a, b: a + b, lambda s: one / s)
    rn = te.reduce_axis((0, w.n), "rn")
    mix = te.compute(
        (*w.batch, tall, w.d),
        lambda *i: te.sum(powers(*i[:-1], rn) * v(*i[:rank], rn, i[-1]), axis=[rn]),
        name=f"{STAGE}mix",
        attrs=annotate_block("attention", "attention", config),
    )
    whole = (*w.batch, w.m, w.d)

    def result(*i: Expr) -> Expr:
        j = [i[w.out_axes.index(axis)] for axis in range(rank + 2)]
        return mix(*j) * at_row(scale, tuple(j[:-1]))

    out = te.compute(tuple(whole[axis] for axis in w.out_axes), result, name="attention")
    return [*stored, *operands, out]


def schedule(sch: Any, anchor: Any, output: Any, config: AttentionConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule all stages below the loop over tiles of rows; the packing of the keys stays a nest of its own."""
    c = config
    by_name = {str(sch.get(b).name_hint): b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    loops = sch.get_loops(output)
    rows, last = loops[c.row_axis], loops[-1]
    tile, inner = sch.split(rows, [None, c.rows])
    others = [loop for i, loop in enumerate(loops[:-1]) if i != c.row_axis]
    d_tile, d_vectors, d_lanes = sch.split(last, [None, c.mixed, c.out_lanes])
    sch.reorder(*others, tile, d_tile, inner, d_vectors, d_lanes)
    task = sch.fuse(*others, tile)
    register_tile(sch, anchor, d_tile, c.mixed, c.out_lanes)
    sch.unroll(inner)
    sch.unroll(d_vectors)
    sch.vectorize(d_lanes)
    row = RowsConfig(c.row_lanes, c.row_vectors)
    _row_stages(sch, by_name, "sum", task)
    powers = by_name[f"{STAGE}exp"]
    sch.compute_at(powers, task, preserve_unit_loops=True)
    _row_stages(sch, by_name, "max", sch.get_loops(powers)[-2])
    scores = by_name[f"{STAGE}scores"]
    copy = sch.cache_write(scores, 0, "global")
    sch.compute_at(copy, task, preserve_unit_loops=True)
    *_, height, width = sch.get_loops(copy)
    n_tile, n_vectors, n_lanes = sch.split(width, [None, c.vectors, c.lanes])
    sch.reorder(n_tile, height, n_vectors, n_lanes)
    register_tile(sch, scores, n_tile, c.vectors, c.lanes)
    sch.unroll(height)
    sch.unroll(n_vectors)
    sch.vectorize(n_lanes)
    sch.parallel(task)
    for name in ("max", "sum"):
        for suffix in ("_lanes", "_register"):
            if f"{STAGE}{name}{suffix}" in by_name:
                schedule_stage(sch, by_name[f"{STAGE}{name}{suffix}"], row, target)
    vectorize_row(sch, powers, row, target)
    for block in (scores, anchor):
        decompose(sch, block)


def _row_stages(sch: Any, by_name: dict[str, Any], name: str, loop: Any) -> None:  # noqa: ANN401
    """Compute a reduction along rows below `loop`, and what it is made of below its own loop over rows."""
    total = by_name[f"{STAGE}{name}"]
    sch.compute_at(total, loop, preserve_unit_loops=True)
    below = sch.get_loops(total)[-1]
    for suffix in ("_register", "_lanes"):
        if f"{STAGE}{name}{suffix}" in by_name:
            sch.compute_at(by_name[f"{STAGE}{name}{suffix}"], below, preserve_unit_loops=True)


def finish(function: Any, block: str, config: AttentionConfig, target: Target) -> Any:  # noqa: ANN401
    """Load four elements of Q and of the exponentials at once where the target multiplies by lanes."""
    if uses_lanes(target, config.key_unroll):
        function = mark_lanes(function, f"{STAGE}scores_update")
    return mark_lanes(function, block + "_update") if uses_lanes(target, config.value_unroll) else function
