"""Rule-based schedules for everything without a template: inline, fuse, vectorise, run in parallel."""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir.schedule import ScheduleError

from ingot.schedules import pieces
from ingot.schedules.indices import ravel
from ingot.schedules.vector import (
    DTYPE_BYTES,
    interleaved,
    interleaved_lanes,
    lanes_for,
    largest_divisor,
    registers,
)
from ingot.schedules.vector_math import kept
from ingot.target import Target

# A local buffer up to this size may live on the stack of the thread that computes it.
STACK_BYTES = 16 * 1024
# Vectors narrower than this are not worth a branch each where parts of a concatenation meet ...
SEAM_LANES = 8
# ... if the axis is at most so long that it can be unrolled.
MAX_UNROLLED = 128
# Edge of the squares in which a transpose moves its elements: a line of a cache.
SQUARE = 16
# Unrolled accumulators of a reduction without a template: of products, and of one tensor, whose lines from memory come
# the faster, the more of each row is read at once.
REDUCTION_VECTORS, SUM_VECTORS = 4, 8
# A row of sums up to this size stays in the first-level cache while the reduction passes over it.
ROW_BYTES = 16 * 1024
# Rows of plain copies from this length on are left to LLVM, which makes them calls of memcpy.
COPIED_ROW = 32
# The annotation of a block that has joined so many last axes of its tensors, of those it reads in order along them.
FLAT = "ingot.flat"
# The annotation of a block that moves float32 data by loops of vectors, even if LLVM would rather call memcpy.
COPIED = "ingot.copied"
# Planes of so many elements, 4 KiB, are moved so on x86: from there on glibc's memcpy is `rep movsb`, which on Zen 3 is
# no faster than vectors, and was measured 5 times slower where the addresses of the two meet badly.
REP_MOVS = 1024
# With fewer rows than this the contiguous axis is divided among threads too.
MIN_ROWS = 16


def is_reduction(sch: Any, block: Any) -> bool:  # noqa: ANN401
    """Say whether the block has a reduction axis."""
    return any(int(var.iter_type) == 2 for var in sch.get(block).iter_vars)


def inline_producers(sch: Any, keep: set[str]) -> None:  # noqa: ANN401
    """Inline every elementwise block that is not an output or in `keep` (by name) into its readers.

    A block with several readers, or read by a reduction, is computed again by each reader; that is done only if it
    holds no call (exp, tanh, ...).
    """
    outputs = {str(sch.get(block).name_hint) for block in sch.get_output_blocks(sch.get_sblock("root"))}
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        node = sch.get(block)
        name = str(node.name_hint)
        if name in outputs or name in keep or is_reduction(sch, block):
            continue
        consumers = sch.get_consumers(block)
        repeated = len(consumers) > 1 or any(is_reduction(sch, reader) for reader in consumers)
        if repeated and is_expensive(node):
            continue
        try:
            sch.compute_inline(block)
        except ScheduleError:
            continue  # an opaque block: it stays a loop nest of its own


def is_expensive(node: Any) -> bool:  # noqa: ANN401
    """Say whether a block calls a function that takes many instructions."""
    text = str(node.body)
    return any(
        word in text for word in ("T.exp", "T.tanh", "T.erf", "T.sigmoid", "T.log", "T.pow", "T.sqrt", "ingot_decay")
    )


def schedule_elementwise(sch: Any, block: Any, target: Target, *, keep_axes: bool = False) -> None:  # noqa: ANN401
    """Schedule a loop nest without reduction: outer loops in parallel, the contiguous one vectorised.

    keep_axes: the block's own axes stay, for somebody who reads it later.
    """
    loops = sch.get_loops(block)
    if not loops:
        return
    node = sch.get(block)
    out = node.writes[0].source
    innermost = int(sch.get(loops[-1]).extent)
    if len(loops) == len(node.iter_vars) > 1 and (times := _repeats(node)):
        *others, last = loops
        if innermost % times == 0 and times <= MAX_UNROLLED:
            _, inner = sch.split(last, [None, times])
            sch.unroll(inner)  # LLVM interleaves the copies of a vector
        sch.parallel(sch.fuse(*others))
        return
    shape = [int(d) for d in out.shape]
    if not keep_axes and _schedule_planes(sch, block, target):
        return
    flat = all([int(d) for d in region.source.shape] == shape for region in node.reads)
    dtype = str(out.dtype)
    lanes = lanes_for(target, dtype, innermost)
    seams = _seams(node)
    while any(seam % lanes for seam in seams):
        lanes //= 2
    if seams and lanes < SEAM_LANES and innermost <= MAX_UNROLLED:
        # Every condition is then a constant, and LLVM joins neighbouring copies.
        sch.unroll(loops[-1])
        sch.parallel(sch.fuse(*loops[:-1]) if len(loops) > 1 else sch.add_unit_loop(loops[-1]))
        return
    in_place = not keep_axes and flat and len(loops) == len(shape) > 1 and _in_place(node, shape)
    ragged = in_place and interleaved_lanes(node, lanes, innermost, target) < interleaved_lanes(node, lanes, 0, target)
    if (lanes < 4 or ragged) and flat and len(loops) > 1:
        if in_place:
            joined = tirx.IndexMap.from_func(lambda *i: [ravel(i, shape)], ndim=len(shape), index_dtype="int64")
            sch.transform_block_layout(block, joined)
            sch.annotate(block, FLAT, len(shape))
            loops, node = sch.get_loops(block), sch.get(block)
        else:
            loops = [sch.fuse(*loops)]
        lanes = lanes_for(target, dtype, _extent(sch, loops[0]))
    last = loops[-1]
    across = _read_across(node) if len(loops) == len(node.iter_vars) else None
    if across is not None and lanes > 1:
        # Squares: what a line of the cache holds is used before it leaves.
        *others, _ = loops
        others[across], rows = sch.split(others[across], [None, largest_divisor(_extent(sch, others[across]), SQUARE)])
        last_outer, last_inner, vector = sch.split(
            last, [None, largest_divisor(innermost // lanes, SQUARE // lanes), lanes]
        )
        sch.reorder(*others, last_outer, rows, last_inner, vector)
        sch.vectorize(vector)
        sch.parallel(sch.fuse(*others, last_outer))
        return
    whole = _fits_rows(node, innermost, lanes, target) or (lanes < registers(target).lanes and _looks_up(node))
    if len(loops) > 1 and _count(sch, loops[:-1]) >= MIN_ROWS and whole:
        sch.parallel(sch.fuse(*loops[:-1]))
        return
    if lanes > 1:
        outer, inner = sch.split(last, [None, interleaved_lanes(node, lanes, _extent(sch, last), target)])
        sch.vectorize(inner)
        task = sch.fuse(*loops[:-1], outer)
    elif len(loops) > 1:
        task = sch.fuse(*loops[:-1])  # the contiguous loop stays whole: LLVM vectorises it where it can
    else:
        task = last
    chunk = _chunk(int(sch.get(task).extent)) if lanes > 1 or len(loops) == 1 else 1
    if chunk > 1:
        task, _ = sch.split(task, [None, chunk])
    sch.parallel(task)


def _schedule_planes(sch: Any, block: Any, target: Target) -> bool:  # noqa: ANN401
    """Schedule planes whose elements meet one element of an operand (a channel's bias), or come from one of its planes.

    The axes of a plane become one, so that nothing is to find out about each vector of it, and lengths that no vector
    divides are gone through in pieces. Planes that are moved are left to LLVM. Returns whether it was done.
    """
    node, loops = sch.get(block), sch.get_loops(block)
    out = node.writes[0].source
    shape = [int(d) for d in out.shape]
    lanes = lanes_for(target, str(out.dtype), 0)
    group = lanes * interleaved(node, target)
    joined = _joinable(node, shape) if len(loops) == len(shape) == len(node.iter_vars) else 0
    plane, rows = (math.prod(part) for part in (shape[len(shape) - joined :], shape[: len(shape) - joined]))
    moved = not _computes(node)
    parts = next((n for n in range(1, MAX_UNROLLED) if plane % n == 0 and rows * n >= MIN_ROWS), 0)
    if not joined or not parts or plane // parts < lanes or (joined == 1 and (moved or plane % group == 0)):
        return False
    if joined > 1:
        lead = len(shape) - joined
        plain = tirx.IndexMap.from_func(
            lambda *i: [*i[:lead], ravel(i[lead:], shape[lead:])], ndim=len(shape), index_dtype="int64"
        )
        sch.transform_block_layout(block, plain)
        sch.annotate(block, FLAT, joined)
    *others, last = sch.get_loops(block)
    if parts > 1:
        part, last = sch.split(last, [parts, None])
        others.append(part)
    by_vectors = target.arch == "x86_64" and str(out.dtype) == "float32" and plane // parts >= REP_MOVS
    if moved and by_vectors:
        sch.annotate(block, COPIED, 1)
    if by_vectors or not moved:
        pieces.mark(sch, last, lanes, group // lanes)
    sch.parallel(sch.fuse(*others))
    return True


def _computes(node: Any) -> bool:  # noqa: ANN401 - a block
    """Say whether a block does more than choose an element."""

    def chosen(value: Any) -> bool:  # noqa: ANN401
        if str(getattr(getattr(value, "op", None), "name", "")).endswith(".if_then_else"):
            return chosen(value.args[1]) and chosen(value.args[2])
        return isinstance(value, (ir.TensorLoad, tirx.IntImm, tirx.FloatImm))

    return not chosen(node.body.value)


def _joinable(node: Any, shape: list[int]) -> int:  # noqa: ANN401 - a block
    """Return how many last axes of a block are one to all it reads: passed in order, or not looked at."""
    if not isinstance(node.body, tirx.BufferStore):
        return 0
    accesses: list[Any] = [node.body]
    tvm_ffi.structural_walk(node.body, [(ir.TensorLoad, accesses.append)])
    axes = [item.var for item in node.iter_vars]

    def in_order(access: Any, count: int) -> bool:  # noqa: ANN401
        indices = list(access.indices)[-count:]
        source = access.buffer if isinstance(access, tirx.BufferStore) else access.source
        return [int(d) for d in source.shape][-count:] == shape[-count:] and all(
            size == 1 or index.same_as(axis)
            for index, axis, size in zip(indices, axes[-count:], shape[-count:], strict=True)
        )

    def one(count: int) -> bool:
        uses = _uses(node.body, axes[-count:])
        seen = sum(sum(_uses(index, axes[-count:]) for index in access.indices) for access in accesses)
        return uses == seen and all(
            in_order(access, count) or not any(_uses(index, axes[-count:]) for index in access.indices)
            for access in accesses
        )

    return next((count for count in range(len(shape), 0, -1) if one(count)), 0)


def _uses(expr: Any, axes: list[Any]) -> int:  # noqa: ANN401
    """Return how often an expression or a statement names one of the axes."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, [(ir.Var, found.append)])
    return sum(var.same_as(axis) for var in found for axis in axes)


def _in_place(node: Any, shape: list[int]) -> bool:  # noqa: ANN401 - a block
    """Say whether each element is made of elements at its own place in other tensors of its shape."""
    if not isinstance(node.body, tirx.BufferStore):
        return False
    accesses: list[Any] = [node.body]
    tvm_ffi.structural_walk(node.body, [(ir.TensorLoad, accesses.append)])
    axes = [item.var for item in node.iter_vars]
    return len(axes) == len(shape) and all(
        size == 1 or index.same_as(axis)
        for access in accesses
        for index, axis, size in zip(access.indices, axes, shape, strict=True)
    )


def flatten(function: Any) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Return the function with marked blocks rewritten: COPIED, and FLAT, whose elements are addressed by position.

    TVM does not always see that the axes which such a block takes apart again join to that position.
    """

    def block(node: Any) -> Any:  # noqa: ANN401
        if COPIED in node.annotations:
            body = tirx.BufferStore(node.body.buffer, kept(node.body.value), node.body.indices)
            notes = {key: value for key, value in node.annotations.items() if key != COPIED}
            node = s_tir.SBlock(node.iter_vars, node.reads, node.writes, node.name_hint, body, annotations=notes)
        if FLAT not in node.annotations:
            return node
        item, joined = node.iter_vars[-1], int(node.annotations[FLAT])

        def place(access: Any) -> list[Any]:  # noqa: ANN401
            lead, rest = list(access.indices)[:-joined], list(access.indices)[-joined:]
            if not any(_uses(index, [item.var]) for index in rest):
                return [*lead, *rest]
            return [*lead, *[tirx.IntImm(str(item.var.ty.dtype), 0)] * (len(rest) - 1), item.var]

        def load(access: Any) -> Any:  # noqa: ANN401
            return tirx.BufferLoad(access.source, place(access))

        def store(access: Any) -> Any:  # noqa: ANN401
            return tirx.BufferStore(access.buffer, access.value, place(access))

        body = tvm_ffi.structural_map(node.body, [(ir.TensorLoad, load), (tirx.BufferStore, store)])
        return s_tir.SBlock(node.iter_vars, node.reads, node.writes, node.name_hint, body)

    return tvm_ffi.structural_map(function, [(s_tir.SBlock, block)])


def _repeats(node: Any) -> int:  # noqa: ANN401 - a block
    """Return how often a block that only moves data reads each element along its last axis, 1 if a table says which.

    0 for all other blocks.
    """
    value = node.body.value if isinstance(node.body, tirx.BufferStore) else None
    if not isinstance(value, ir.TensorLoad) or not value.indices:
        return 0
    last = value.indices[-1]
    if isinstance(last, tirx.FloorDiv) and last.a.same_as(node.iter_vars[-1].var) and isinstance(last.b, tirx.IntImm):
        return int(last.b)
    return 1 if isinstance(last, ir.TensorLoad) and last.indices[-1].same_as(node.iter_vars[-1].var) else 0


def _looks_up(node: Any) -> bool:  # noqa: ANN401 - a block
    """Say whether a block finds the place of an element in its row by a table: short vectors of those gain nothing."""
    found: list[Any] = []

    def load(expr: Any) -> None:  # noqa: ANN401
        if expr.indices and isinstance(expr.indices[-1], ir.TensorLoad):
            found.append(expr)

    tvm_ffi.structural_walk(node.body, [(ir.TensorLoad, load)])
    return bool(found)


def _fits_rows(node: Any, innermost: int, lanes: int, target: Target) -> bool:  # noqa: ANN401 - a block
    """Say whether LLVM does a contiguous axis better alone: a plain copy, or a length that no full vector divides."""
    value = node.body.value if isinstance(node.body, tirx.BufferStore) else None
    if (
        not isinstance(value, ir.TensorLoad)
        or not value.indices
        or not value.indices[-1].same_as(node.iter_vars[-1].var)
    ):
        return False
    return innermost >= COPIED_ROW or lanes < registers(target).lanes <= innermost


def _count(sch: Any, loops: list[Any]) -> int:  # noqa: ANN401
    """Return the iterations of a nest of loops."""
    total = 1
    for loop in loops:
        total *= _extent(sch, loop)
    return total


def _extent(sch: Any, loop: Any) -> int:  # noqa: ANN401
    return int(sch.get(loop).extent)


def _read_across(node: Any) -> int | None:  # noqa: ANN401 - a block
    """Return which axis of the block, not its last, some operand is contiguous along: that of a transpose."""
    axes = [item.var for item in node.iter_vars]
    for region in node.reads:
        for i, axis in enumerate(axes[:-1]):
            if len(region.region) > 1 and region.region[-1].min.same_as(axis):
                return i
    return None


def _seams(node: Any) -> set[int]:  # noqa: ANN401 - a block
    """Return the constants that conditions compare the contiguous axis with: where a concatenation's parts meet."""
    last = node.iter_vars[-1].var
    found: set[int] = set()

    def compare(expr: Any) -> None:  # noqa: ANN401
        for side, other in ((expr.a, expr.b), (expr.b, expr.a)):
            if side.same_as(last) and isinstance(other, tirx.IntImm):
                found.add(int(other))

    tvm_ffi.structural_walk(node.body, [((tirx.LT, tirx.LE, tirx.GT, tirx.GE), compare)])
    return found


def _chunk(total: int) -> int:
    """Return how many iterations one parallel step takes: a divisor of `total` near 64."""
    return max(d for d in range(1, 65) if total % d == 0)


def schedule_reduction(sch: Any, block: Any, target: Target) -> None:  # noqa: ANN401
    """Schedule a reduction: a register tile over the contiguous output axis, the reduction around it.

    With no output axis to vectorise (a sum over the last dimension) the reduction stays scalar and in order. What
    finishes each sum (the division of a mean) joins the nest.
    """
    loops = sch.get_loops(block)
    kinds = [int(var.iter_type) for var in sch.get(block).iter_vars]
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 2]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 2]
    if not spatial:
        task = sch.add_unit_loop(block)
        sch.parallel(task)
        sch.decompose_reduction(block, reduction[0])
        return
    node = sch.get(block)
    dtype = str(node.writes[0].source.dtype)
    *lead, last = spatial
    extent = int(sch.get(last).extent)
    lanes = lanes_for(target, dtype, extent)
    ragged = lanes < registers(target).lanes <= extent and extent * DTYPE_BYTES.get(dtype, 4) <= ROW_BYTES
    if ragged and lead and len(loops) == len(kinds) and _reads_contiguously(node):
        _schedule_rows(sch, block, lead, reduction, last)
        return
    if len(loops) != len(kinds) or lanes == 1 or not _reads_contiguously(node):
        consumer = _finishing_block(sch, block)
        task = sch.fuse(*spatial)
        sch.parallel(task)
        if consumer is not None:
            sch.reverse_compute_at(consumer, task)
        sch.decompose_reduction(block, reduction[0])
        return
    consumer = _finishing_block(sch, block)
    most = SUM_VECTORS if len(node.reads) == 1 and extent >= 2 * lanes * SUM_VECTORS else REDUCTION_VECTORS
    vectors = max(v for v in (1, 2, 4, 8) if v <= most and extent % (lanes * v) == 0)
    last_outer, last_vectors, last_lanes = sch.split(last, [None, vectors, lanes])
    tile = [last_vectors, last_lanes]
    rows = None
    if lead and _rows_share_operand(node) and registers(target).count >= 32:
        height = int(sch.get(lead[-1]).extent)
        factor = max(f for f in (1, 2, 4) if height % f == 0)
        if factor > 1:
            row_outer, rows = sch.split(lead[-1], [None, factor])
            lead = [*lead[:-1], row_outer]
            tile = [rows, *tile]
    sch.reorder(*lead, last_outer, *reduction, *tile)
    task = sch.fuse(*lead, last_outer)
    sch.parallel(task)
    copy = sch.cache_write(block, 0, "global") if consumer is None else consumer
    sch.reverse_compute_at(copy, task)
    sch.vectorize(last_lanes)
    for loop in tile[:-1]:
        sch.unroll(loop)
    *_, copy_last = sch.get_loops(copy)
    _, copy_lanes = sch.split(copy_last, [None, lanes])
    sch.vectorize(copy_lanes)
    sch.decompose_reduction(block, reduction[0])


def _schedule_rows(sch: Any, block: Any, lead: list[Any], reduction: list[Any], last: Any) -> None:  # noqa: ANN401
    """Schedule a reduction whose contiguous axis no full vector divides: row by row, for LLVM to vectorise.

    The sums of a row are in the first-level cache; every step of the reduction adds a row to them.
    """
    consumer = _finishing_block(sch, block)
    sch.reorder(*lead, *reduction, last)
    task = sch.fuse(*lead)
    sch.parallel(task)
    copy = sch.cache_write(block, 0, "global") if consumer is None else consumer
    sch.reverse_compute_at(copy, task)
    sch.decompose_reduction(block, reduction[0])


def _finishing_block(sch: Any, block: Any) -> Any:  # noqa: ANN401
    """Return the one elementwise block that reads the reduction's results, each where it writes its own, or None."""
    consumers = sch.get_consumers(block)
    if len(consumers) != 1 or is_reduction(sch, consumers[0]):
        return None
    node, made = sch.get(consumers[0]), sch.get(block).writes[0].source
    axes = [item.var for item in node.iter_vars]
    reads = [region for region in node.reads if region.source.same_as(made)]
    same = [int(d) for d in node.writes[0].source.shape] == [int(d) for d in made.shape]
    if not same or len(reads) != 1 or len(axes) != len(made.shape) or len(node.writes) != 1:
        return None
    for region in (reads[0], node.writes[0]):
        for item, axis, size in zip(region.region, axes, made.shape, strict=True):
            if int(size) != 1 and not item.min.same_as(axis):
                return None
    return consumers[0]


def _reads_contiguously(node: Any) -> bool:  # noqa: ANN401
    """Say whether some read's last index is the block's last spatial axis."""
    spatial = [var.var for var in node.iter_vars if int(var.iter_type) != 2]
    last = spatial[-1]
    return any(region.region and region.region[-1].min.same_as(last) for region in node.reads if len(region.region) > 0)


def _rows_share_operand(node: Any) -> bool:  # noqa: ANN401
    """Say whether some read does not depend on the second-last spatial axis (as in a matrix product)."""
    spatial = [var.var for var in node.iter_vars if int(var.iter_type) != 2]
    if len(spatial) < 2:
        return False
    row = spatial[-2]
    reads = [region for region in node.reads if not region.source.same_as(node.writes[0].source)]
    return any(all(not axis.min.same_as(row) for axis in region.region) for region in reads) and len(reads) > 1
