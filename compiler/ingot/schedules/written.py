"""Operators whose loop nests are written statement by statement: their PrimFuncs, and the epilogue inside them.

`primitive` puts nests and a last block that only copies the result into one PrimFunc. It is right as it is. FuseOps may
append elementwise blocks to it; `finish` applies them where the nest stores, so that the operator's own result is never
in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm_ffi
from tvm import ir, s_tir, tirx

from ingot.schedules import generic
from ingot.schedules.statements import Expr, Stmt, integer, realized, whole
from ingot.target import Target

#: The annotation of a scheduled function's root that names buffers of the arena used in one nest only.
WORKSPACE = "ingot.workspace"
#: Names of unrolled loops over stores, which an epilogue of much code makes loops again.
STORE_ROW, STORE_COLUMN = "store_row", "store_column"
#: Annotations of a nest that multiplies by machine forms: its multiply-adds into integer sums, and into others.
WHOLE_PRODUCTS, REAL_PRODUCTS = "ingot.whole_products", "ingot.real_products"


def primitive(given: Sequence[Expr], nests: Sequence[Stmt], result: Expr, temporary: Sequence[Expr] = ()) -> Expr:
    """Return the PrimFunc (given..., copy of result) of `nests`; the last one writes the buffer `result`.

    temporary: buffers that one nest hands to another, or whose parts its tasks share out.
    """
    out = tirx.decl_buffer(list(result.shape), str(result.dtype), f"{result.name}_out", layout=None)
    body = tirx.SeqStmt([*nests, _copy(result, out)])
    root = s_tir.SBlock([], [], [], "root", body, None, [result, *temporary])
    return tirx.PrimFunc([*given, out], realized(root)).with_attr("s_tir", True)


def nest(reads: list[Expr], writes: list[Expr], name: str, body: Stmt, notes: Mapping[str, str] | None = None) -> Stmt:
    """Return a block around a loop nest, which `finish` will take out of it."""
    regions = [[whole(buffer) for buffer in group] for group in (reads, writes)]
    return realized(s_tir.SBlock([], *regions, name, body, None, [], [], dict(notes or {})))


def _copy(source: Expr, destination: Expr) -> Stmt:
    """Return the plain elementwise block that stores the result."""
    shape = list(source.shape)
    loops = [tirx.Var(f"i{k}", "int64") for k in range(len(shape))]
    axes = [tirx.Var(f"v{k}", "int64") for k in range(len(shape))]
    domains = [ir.Range.from_min_extent(integer(0), d) for d in shape]
    iters = [tirx.IterVar(d, v, tirx.IterVar.DataPar) for d, v in zip(domains, axes, strict=True)]
    points = [ir.Range.from_min_extent(v, integer(1)) for v in axes]
    regions = [[tirx.BufferRegion(buffer, points)] for buffer in (source, destination)]
    store = tirx.BufferStore(destination, tirx.BufferLoad(source, axes), axes)
    block = s_tir.SBlock(iters, *regions, str(destination.name), store)
    statement: Stmt = s_tir.SBlockRealize(loops, tirx.const(True, "bool"), block)
    for loop, extent in reversed(list(zip(loops, shape, strict=True))):
        statement = tirx.For(loop, integer(0), extent, tirx.ForKind.SERIAL, statement)
    return statement


def schedule(sch: Expr, anchor: Expr, output: Expr, config: object, target: Target) -> None:
    """Schedule the block that stores the result as a nest of its own, in case `finish` has to leave it one."""
    generic.schedule_elementwise(sch, output, target, keep_axes=True)


def finish(function: Expr, anchor: str, config: object, target: Target) -> Expr:
    """Store through the epilogue, and put the loops over tasks outermost.

    Case 1: the one block after the anchor stores an elementwise function of its result: that function is applied to
    the vectors the anchor would store, and the anchor's own result is never in memory.
    Case 2: otherwise the blocks after it stay.
    """
    root = function.body.block
    statements = list(root.body.seq)
    (place,) = (k for k, item in enumerate(statements) if _is_nest(item) and str(item.block.name_hint) == anchor)
    conv, *workspace = (region.source for region in statements[place].block.writes)
    buffers = list(root.alloc_buffers)
    last = _elementwise(statements[-1], conv)
    if last is not None and place == len(statements) - 2:
        statements[place] = _with_epilogue(statements[place], conv, last)
        statements.pop()
        buffers = [buffer for buffer in buffers if not buffer.same_as(conv)]
    nests = [_turn_inside_out(item) if _is_nest(item) else item for item in statements]
    body = nests[0] if len(nests) == 1 else tirx.SeqStmt(nests)
    block = s_tir.SBlock([], [], [], "root", body, None, buffers, [], {WORKSPACE: workspace})
    return function.with_body(realized(block))


def _is_nest(statement: Stmt) -> bool:
    """Say whether a statement is one of `primitive`'s own nests."""
    if not isinstance(statement, s_tir.SBlockRealize):
        return False
    body = statement.block.body
    return isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL


def _turn_inside_out(realize: Stmt) -> Stmt:
    """Return the nest's parallel loop around its block: lowering expects a loop over tasks outermost."""
    block, loop = realize.block, realize.block.body
    inner = s_tir.SBlock([], block.reads, block.writes, block.name_hint, loop.body)
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, realized(inner))


def _elementwise(statement: Stmt, conv: Expr) -> Stmt | None:
    """Return the block of case 1, or None."""
    while isinstance(statement, tirx.For):
        statement = statement.body
    if not isinstance(statement, s_tir.SBlockRealize):
        return None
    block = statement.block
    axes = [item.var for item in block.iter_vars]
    if block.init is not None or not isinstance(block.body, tirx.BufferStore) or len(axes) != len(conv.shape):
        return None

    def plain(indices: Sequence[Expr]) -> bool:
        return len(indices) == len(axes) and all(a.same_as(b) for a, b in zip(indices, axes, strict=True))

    loads: list[bool] = []

    def visit(load: Expr) -> None:
        if load.source.same_as(conv):
            loads.append(plain(load.indices))

    tvm_ffi.structural_walk(block.body.value, [(ir.TensorLoad, visit)])
    return block if loads and all(loads) and plain(block.body.indices) else None


def _with_epilogue(realize: Stmt, conv: Expr, last: Stmt) -> Stmt:
    """Return the anchor's nest with each store of a result replaced by the last block's store of its function."""
    anchor, axes = realize.block, [item.var for item in last.iter_vars]

    def store(node: Stmt) -> Stmt:
        if not node.buffer.same_as(conv):
            return node
        place = dict(zip(axes, node.indices, strict=True))

        def load(item: Expr) -> Expr:
            return node.value if item.source.same_as(conv) else item

        body = tvm_ffi.structural_map(last.body, [(ir.TensorLoad, load)])
        return tvm_ffi.structural_map(body, [(ir.Var, lambda var: place.get(var, var))])

    def loop(node: Stmt) -> Stmt:
        if str(node.loop_var.name) not in (STORE_ROW, STORE_COLUMN):
            return node
        return tirx.For(node.loop_var, node.min, node.extent, tirx.ForKind.SERIAL, node.body)

    body = tvm_ffi.structural_map(anchor.body, [(tirx.BufferStore, store)])
    if generic.is_expensive(last):  # much code: once is enough
        body = tvm_ffi.structural_map(body, [(tirx.For, loop)])
    reads = [*anchor.reads, *(whole(region.source) for region in last.reads if not region.source.same_as(conv))]
    kept = [region for region in anchor.writes if not region.source.same_as(conv)]
    writes = [*(whole(region.source) for region in last.writes), *kept]
    return realized(s_tir.SBlock([], reads, writes, anchor.name_hint, body, None, [], [], anchor.annotations))
