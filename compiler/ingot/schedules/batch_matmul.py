"""Matrix products of two matrices that are both computed at run time, one or many at a time.

A tile keeps `rows` x `vectors` registers of the result and walks down the common axis, one row of B a step. B is read
where it lies if its rows are contiguous and whole vectors long; else a kernel before packs it as [N / block][K][block],
which also transposes it and pads its last block. A may lie transposed: its elements are broadcast one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from ingot.schedules.conv2d import uses_lanes
from ingot.schedules.lanes import mark_lanes
from ingot.schedules.vector import annotate_block, ceil_div, lanes_for, largest_divisor, registers
from ingot.schedules.views import View, reader
from ingot.target import Target

#: The name of the block that packs B.
PACKED = "pack_matrix"
#: With fewer rows than this, packing B costs more than it saves.
MIN_PACKED_ROWS = 4
#: A tile is at most so many registers wide.
MAX_VECTORS = 4
_LATENCY_FMAS = 8
#: Steps of the common axis in one pass of the inner loop, at most.
UNROLL = 4


@dataclass(frozen=True)
class BatchMatmulWorkload:
    """[*batch, m, k] x [*batch, k, n]; `contiguous` says that the rows of B lie contiguous in memory."""

    batch: tuple[int, ...]
    m: int
    k: int
    n: int
    contiguous: bool


@dataclass(frozen=True)
class BatchMatmulConfig:
    """The register tile: `rows` x `vectors` registers of `lanes`, `unroll` steps of the common axis at once.

    B is `packed` (1) or read where it lies (0).
    """

    rows: int
    vectors: int
    lanes: int
    unroll: int
    packed: int


def default_config(workload: BatchMatmulWorkload, target: Target) -> BatchMatmulConfig | None:
    """Return the tile of least cost that fits the register file, or None where the template does not fit.

    Case 1: B's rows are contiguous and vectors divide them: B is read where it lies.
    Case 2: else, with enough rows to pay for it, B is packed.
    A single row of A takes as much of a row of B a step as the registers hold.
    """
    w, regs = workload, registers(target)
    lanes, few = lanes_for(target, "float32", w.n), w.m < MIN_PACKED_ROWS
    full = lanes == regs.lanes or w.n < regs.lanes
    unroll = largest_divisor(w.k, UNROLL)
    if w.contiguous and lanes >= 4 and (few or full):
        whole, packed = w.n // lanes, 0
        if w.m == 1:
            return BatchMatmulConfig(1, largest_divisor(whole, regs.count - 4), lanes, unroll, packed)
        widths = [v for v in range(1, MAX_VECTORS + 1) if whole % v == 0]
    elif not few and w.n >= 4:
        lanes = min(regs.lanes, 1 << (w.n.bit_length() - 1))
        packed, widths = 1, list(range(1, min(MAX_VECTORS, ceil_div(w.n, lanes)) + 1))
    else:
        return None
    tiles = [(r, v) for v in widths for r in range(1, min(w.m, regs.count) + 1) if r * v + v + 1 <= regs.count]
    rows, vectors = min(tiles, key=lambda tile: (_cost(w, tile[0], tile[1], lanes), *tile))
    return BatchMatmulConfig(rows, vectors, lanes, unroll, packed)


def _cost(workload: BatchMatmulWorkload, rows: int, vectors: int, lanes: int) -> float:
    """Return the estimated cycles of one product: of a core with two FMA pipes and two loads a cycle."""
    tiles = ceil_div(workload.m, rows) * ceil_div(workload.n, lanes * vectors)
    step = max(rows * vectors, rows + vectors, _LATENCY_FMAS) / 2 + (rows + vectors) / 16
    return tiles * (workload.k * step + 2 * rows * vectors + 12)


def compute(workload: BatchMatmulWorkload, config: BatchMatmulConfig, views: tuple[View, View]) -> list[Any]:
    """Return the TE tensors [a, b, output [*batch, m, n]] in float32; `views` read A and B."""
    w, c = workload, config
    rank, zero = len(w.batch), tirx.const(0, "float32")
    stored = [te.placeholder(view.shape, "float32", name=name) for view, name in zip(views, "ab", strict=True)]
    a, b = (reader(t, view) for t, view in zip(stored, views, strict=True))
    block = c.vectors * c.lanes
    blocks, tall = ceil_div(w.n, block), ceil_div(w.m, c.rows) * c.rows
    rk = te.reduce_axis((0, w.k), "rk")

    def left(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        m = i[rank] if tall == w.m else tirx.min(i[rank], tirx.IntImm("int64", w.m - 1))
        return a(*i[:rank], m, rk)

    def pack(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
        n = i[rank] * block + i[rank + 2]
        load = b(*i[:rank], i[rank + 1], n)
        return load if blocks * block == w.n else te.if_then_else(n < w.n, load, zero)

    if c.packed:
        packed: Any = te.compute((*w.batch, blocks, w.k, block), pack, name=PACKED)

        def right(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
            return packed(*i[:rank], i[-1] // block, rk, i[-1] % block)

    else:

        def right(*i: Any) -> Any:  # noqa: ANN401 - TE expressions
            return b(*i[:rank], rk, i[-1])

    product = te.compute(
        (*w.batch, tall, blocks * block),
        lambda *i: te.sum(left(*i) * right(*i), axis=[rk]),
        name="product",
        attrs=annotate_block("batch_matmul", "batch_matmul", config),
    )
    return [*stored, te.compute((*w.batch, w.m, w.n), lambda *i: product(*i), name="batch_matmul")]


def schedule(sch: Any, anchor: Any, output: Any, config: BatchMatmulConfig, target: Target) -> None:  # noqa: ANN401
    """Schedule the tile; the packing of B stays a nest of its own."""
    c = config
    *batch, row, column = sch.get_loops(output)
    width = int(sch.get(column).extent)
    tile, rows = sch.split(row, [None, c.rows])
    columns, inner = sch.split(column, [None, c.vectors * c.lanes])
    vectors, lanes = sch.split(inner, [None, min(c.lanes, width & -width)])
    sch.reorder(*batch, columns, tile, rows, vectors, lanes)
    task = sch.fuse(*batch, columns, tile)
    register_tile(sch, anchor, task, c.vectors, c.lanes)
    for loop in (rows, vectors):
        sch.unroll(loop)
    sch.vectorize(lanes)
    sch.parallel(task)
    decompose(sch, anchor)


def finish(function: Any, block: str, config: BatchMatmulConfig, target: Target) -> Any:  # noqa: ANN401
    """Load four elements of A at once where the target multiplies by lanes."""
    return mark_lanes(function, block + "_update") if uses_lanes(target, config.unroll) else function


def register_tile(sch: Any, block: Any, loop: Any, vectors: int, lanes: int) -> None:  # noqa: ANN401
    """Compute a product below `loop`: its reduction outside, rows and vectors unrolled inside."""
    sch.compute_at(block, loop, preserve_unit_loops=True)
    sch.set_scope(block, 0, "global")
    *_, row, column, depth = sch.get_loops(block)
    registers_, lane = sch.split(column, [vectors, lanes])
    outer, step = sch.split(depth, [None, largest_divisor(int(sch.get(depth).extent), UNROLL)])
    sch.reorder(outer, step, row, registers_, lane)
    for item in (step, row, registers_):
        sch.unroll(item)
    sch.vectorize(lane)


def decompose(sch: Any, block: Any) -> None:  # noqa: ANN401
    """Put the zeros of a product that `register_tile` placed before its reduction; no primitive may follow."""
    sch.decompose_reduction(block, sch.get_loops(block)[-5])
