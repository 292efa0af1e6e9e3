"""Padding without a padded copy: border tiles are compiled apart, rows outside the image are not visited.

A windowed operator is written in TE with its padding as two nested conditions on each load,

    if_then_else(row inside, if_then_else(column inside, image[...], 0), 0)       (or what else padding holds)

and scheduled with two loops marked: the reduction over window rows (`ROWS`) and the loop over tiles of columns
(`COLUMNS`). `specialise` then rewrites the scheduled function:

Case 1: the loop over window rows visits only rows inside the image, and the row condition goes.
Case 2: tiles of columns that touch the left or right border are peeled off the loop. In them the tile's position is a
        constant, so that after unrolling every column condition is a constant too; in the others it is true and goes.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from ingot.errors import CompilerError

ROWS = "ingot.rows"
COLUMNS = "ingot.columns"

#: More border tiles than this on a row are not worth their code.
MAX_BORDER_TILES = 6


def guarded_load(image: Any, n: Any, y: Any, x: Any, c: Any, filler: float = 0) -> Any:  # noqa: ANN401 - TE expressions
    """Return image[n, y, x, c] (NHWC), or `filler` outside the image."""
    _, height, width, _ = (int(d) for d in image.shape)
    outside = tirx.const(filler, str(image.dtype))
    columns = tirx.if_then_else(tirx.all(x >= 0, x < width), image[n, y, x, c], outside)
    return tirx.if_then_else(tirx.all(y >= 0, y < height), columns, outside)


def mark(
    sch: Any,  # noqa: ANN401
    rows: Any,  # noqa: ANN401
    columns: Any,  # noqa: ANN401
    *,
    tile: int,
    height: tuple[int, int, int, int],
    width: tuple[int, int, int, int],
) -> None:
    """Mark the two loops for `specialise`.

    tile: output columns of one tile. height: (image rows, stride, dilation, padding above); width: (image columns,
    stride, extent of the window in input columns, padding to the left).
    """
    image_rows, row_stride, row_dilation, top = height
    image_columns, stride, span, left = width
    tiles = int(sch.get(columns).extent)

    def touches_no_border(t: int) -> bool:
        return t * tile * stride >= left and ((t + 1) * tile - 1) * stride - left + span <= image_columns

    interior = [t for t in range(tiles) if touches_no_border(t)]
    first, end = (interior[0], interior[-1] + 1) if interior else (tiles, tiles)
    sch.annotate(rows, ROWS, [image_rows, row_stride, row_dilation, top])
    if tiles - (end - first) <= MAX_BORDER_TILES:
        sch.annotate(columns, COLUMNS, [first, end])


def specialise(function: Any) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Apply both cases to the marked loops of a scheduled function."""
    root = function.body.block
    local = _of_one_nest(root)
    added: list[Any] = []

    def visit(loop: Any) -> Any:  # noqa: ANN401
        if ROWS in loop.annotations:
            return _clip_rows(loop)
        if COLUMNS in loop.annotations:
            return _peel_columns(loop, local, added)
        return loop

    body = tvm_ffi.structural_map(root.body, [(tirx.For, visit)])
    if body.same_as(root.body):
        return function
    block = s_tir.SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        body,
        root.init,
        [*root.alloc_buffers, *added],
        [],
        root.annotations,
    )
    return function.with_body(s_tir.SBlockRealize([], tirx.const(True, "bool"), block))


def _of_one_nest(root: Any) -> list[Any]:  # noqa: ANN401
    """Return the buffers that one loop nest alone uses; what one nest hands to another must stay one buffer."""
    nests = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    used: list[list[Any]] = []
    for nest in nests:
        found: list[Any] = []
        tvm_ffi.structural_walk(nest, [(ir.Var, found.append)])
        used.append(found)

    def count(buffer: Any) -> int:  # noqa: ANN401
        return sum(any(var.same_as(buffer) for var in found) for found in used)

    return [buffer for buffer in root.alloc_buffers if count(buffer) < 2]


def _loop(old: Any, begin: Any, extent: Any, body: Any) -> Any:  # noqa: ANN401
    """Return the loop with another range and body, and without marks."""
    return tirx.For(old.loop_var, begin, extent, old.kind, body)


def _clip_rows(loop: Any) -> Any:  # noqa: ANN401
    """Case 1."""
    height, stride, dilation, top = (int(v) for v in loop.annotations[ROWS])
    realize = first_block(loop.body)
    dtype = str(loop.loop_var.ty.dtype)
    first_row = realize.iter_values[1].astype(dtype) * stride - top
    size = int(loop.extent)

    def steps(distance: Any) -> Any:  # noqa: ANN401
        """Return how many window rows fit before `distance` input rows, rounded up."""
        return tirx.floordiv(distance + (dilation - 1), tirx.IntImm(dtype, dilation))

    zero, all_rows = tirx.IntImm(dtype, 0), tirx.IntImm(dtype, size)
    begin = tirx.min(tirx.max(steps(zero - first_row), zero), all_rows)
    end = tirx.max(tirx.min(steps(tirx.IntImm(dtype, height) - first_row), all_rows), begin)
    return _loop(loop, begin, end - begin, _strip(loop.body, 1))


def _peel_columns(loop: Any, local: list[Any], added: list[Any]) -> Any:  # noqa: ANN401
    """Case 2."""
    first, end = (int(v) for v in loop.annotations[COLUMNS])
    tiles, dtype = int(loop.extent), str(loop.loop_var.ty.dtype)

    def at(tile: int) -> Any:  # noqa: ANN401
        value = tirx.IntImm(dtype, tile)
        return tvm_ffi.structural_map(loop.body, [(ir.Var, lambda var: value if var.same_as(loop.loop_var) else var)])

    pieces = [at(tile) for tile in range(min(first, tiles))]
    if end > first:
        middle = _strip(loop.body, 2)
        pieces.append(_loop(loop, tirx.IntImm(dtype, first), tirx.IntImm(dtype, end - first), middle))
        pieces.extend(at(tile) for tile in range(end, tiles))
    if len(pieces) == 1:
        return pieces[0]
    return tirx.SeqStmt([pieces[0], *(renewed(piece, local, added) for piece in pieces[1:])])


def renewed(statement: Any, local: list[Any], added: list[Any]) -> Any:  # noqa: ANN401
    """Return a copy of the statement with definitions of its own: TIR wants each variable defined once.

    Loop and block variables are new, and so are the local buffers (the accumulators), which are put on `added`:
    shared ones would be as large as all pieces together.
    """
    fresh: dict[Any, Any] = {}

    def define(node: Any) -> None:  # noqa: ANN401
        variables = [node.loop_var] if isinstance(node, tirx.For) else [item.var for item in node.iter_vars]
        for var in variables:
            fresh[var] = tirx.Var(str(var.name), str(var.ty.dtype))

    def use(var: Any) -> None:  # noqa: ANN401
        if var not in fresh and any(var.same_as(buffer) for buffer in local):
            fresh[var] = tirx.decl_buffer(list(var.shape), str(var.dtype), str(var.name))
            added.append(fresh[var])

    tvm_ffi.structural_walk(statement, [((tirx.For, s_tir.SBlock), define), (ir.Var, use)])
    return tvm_ffi.structural_map(statement, [(ir.Var, lambda var: fresh.get(var, var))])


def _strip(statement: Any, axis: int) -> Any:  # noqa: ANN401
    """Drop the terms on one axis of the block (1: rows, 2: columns) from the conditions of guarded loads."""

    def block(node: Any) -> Any:  # noqa: ANN401
        if not str(node.name_hint).endswith("_update"):
            return node
        position = node.iter_vars[axis].var

        def call(load: Any) -> Any:  # noqa: ANN401
            if not str(getattr(load.op, "name", "")).endswith(".if_then_else"):
                return load
            left = [term for term in _terms(load.args[0]) if not _uses(term, position)]
            if not left:
                return load.args[1]
            condition = left[0]
            for term in left[1:]:
                condition = tirx.And(condition, term)
            return tirx.if_then_else(condition, load.args[1], load.args[2])

        body = tvm_ffi.structural_map(node.body, [(ir.Call, call)])
        # A reduction whose range depends on the task would keep its accumulators out of the task's loop (TVM allocates
        # a buffer above every loop its reduction depends on). The schedule is final: the kind is of no more use.
        spatial = [tirx.IterVar(item.dom, item.var, tirx.IterVar.DataPar, item.thread_tag) for item in node.iter_vars]
        return s_tir.SBlock(
            spatial, node.reads, node.writes, node.name_hint, body, None, node.alloc_buffers, [], node.annotations
        )

    return tvm_ffi.structural_map(statement, [(s_tir.SBlock, block)])


def _terms(condition: Any) -> list[Any]:  # noqa: ANN401
    """Return the terms of a conjunction."""
    if isinstance(condition, tirx.And):
        return [*_terms(condition.a), *_terms(condition.b)]
    return [condition]


def _uses(expr: Any, var: Any) -> bool:  # noqa: ANN401
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, [(ir.Var, lambda v: found.append(v) if v.same_as(var) else None)])
    return bool(found)


def first_block(statement: Any) -> Any:  # noqa: ANN401
    """Return the block inside a nest of loops. Raises CompilerError where something else is."""
    while isinstance(statement, tirx.For):
        statement = statement.body
    if not isinstance(statement, s_tir.SBlockRealize):
        raise CompilerError("a marked loop holds no block", found=type(statement).__name__)
    return statement


__all__ = ["COLUMNS", "ROWS", "guarded_load", "mark", "specialise"]
