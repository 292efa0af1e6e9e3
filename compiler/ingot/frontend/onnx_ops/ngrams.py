"""TfIdfVectorizer on numbers: how often each n-gram of a pool occurs in a row, weighted."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr


@converts("TfIdfVectorizer")
def _tf_idf(ctx: Context) -> Expr:
    from tvm import relax, tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    pool = ctx.attr("pool_int64s")
    if not pool:
        raise ctx.unsupported("a pool of strings", "pool_int64s")
    starts, places = [*ctx.attr("ngram_counts"), len(pool)], ctx.attr("ngram_indexes")
    low, high, skips = (int(ctx.attr(n)) for n in ("min_gram_length", "max_gram_length", "max_skip_count"))
    mode, weights = ctx.attr("mode"), ctx.attr("weights")
    if mode not in ("TF", "IDF", "TFIDF"):
        raise ctx.unsupported(f"mode {mode!r}", "TF, IDF or TFIDF")
    shape, width = ctx.shape(), ctx.out_shape()[-1]
    rows, length = (1, shape[0]) if len(shape) == 1 else shape
    source = ctx.emit(relax.op.reshape(relax.op.astype(ctx.inputs[0], "int64"), (rows, length)))
    factor = np.ones(len(places)) if mode == "TF" or not weights else np.asarray(weights)
    first, tables = 0, []
    for size in range(1, len(starts)):
        grams = np.asarray(pool[starts[size - 1] : starts[size]], np.int64).reshape(-1, size)
        if low <= size <= high and len(grams):
            columns = np.asarray(places[first : first + len(grams)], np.int64)
            if columns.min() < 0 or columns.max() >= width:
                raise ctx.unsupported("a place outside the output", f"0 to {width - 1}")
            share = factor[first : first + len(grams)].astype(np.float32)
            tables.append((size, ctx.array(f"grams{size}", grams), ctx.array(f"columns{size}", columns),
                           ctx.array(f"weights{size}", share)))  # fmt: skip
        first += len(grams)

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        x, (out,) = ins[0], outs
        count, same = scalar("float32"), scalar("bool")
        with T.grid(rows, width) as (r, j):
            out[r, j] = T.float32(0)
        for number, (size, *_) in enumerate(tables):
            grams, columns, share = ins[1 + 3 * number : 4 + 3 * number]
            with T.grid(rows, int(grams.shape[0])) as (r, g):
                count[0] = T.float32(0)
                for skip in range(1 if size == 1 else skips + 1):
                    reach = (size - 1) * (skip + 1)
                    if reach >= length:
                        continue
                    with T.serial(0, length - reach) as i:
                        same[0] = tirx.const(True, "bool")
                        for k in range(size):
                            same[0] = tirx.all(same[0], x[r, i + k * (skip + 1)].equal(grams[g, k]))
                        count[0] = count[0] + T.Cast("float32", same[0])
                value = count[0]
                if mode == "IDF":
                    value = tirx.if_then_else(count[0] > T.float32(0), T.float32(1), T.float32(0))
                out[r, columns[g]] = out[r, columns[g]] + value * share[g]

    inputs = [source, *(part for _, *parts in tables for part in parts)]
    found = call_loops(ctx.bb, "ngrams", inputs, [((rows, width), "float32")], body)[0]
    return relax.op.reshape(found, ctx.out_shape())
