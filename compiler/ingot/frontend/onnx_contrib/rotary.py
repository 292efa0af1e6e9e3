"""Rotary embedding: pairs of a head's entries, turned by an angle that grows with the place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingot.frontend.onnx_contrib.body import Body, expands


def rotated(
    body: Body,
    x: str,
    shape: Sequence[int],
    places: str,
    table_shape: Sequence[int],
    tables: tuple[int, int],
    interleaved: bool,
) -> str:
    """x of this shape, of rank 4 with heads of `shape[3]` entries, turned.

    `places` is (b, s); the cosines and sines at the inputs `tables` are [places, n], and their rows at `places` are
    brought to `table_shape`. A head's first 2 n entries are turned: neighbours are pairs if interleaved, else halves.
    """
    half = body.shape(tables[0])[1]
    cos, sin = (body.reshape(body.op("Gather", body.real(i), places, axis=0), table_shape) for i in tables)
    if interleaved:
        pairs = (*shape[:3], shape[3] // 2, 2)
        whole = body.reshape(x, pairs)
        left, right = (
            body.reshape(body.slice(body.slice(whole, 3, 0, half), 4, i, i + 1), (*shape[:3], half)) for i in (0, 1)
        )
    else:
        left, right = body.slice(x, 3, 0, half), body.slice(x, 3, half, 2 * half)
    first = body.op("Sub", body.op("Mul", left, cos), body.op("Mul", right, sin))
    second = body.op("Add", body.op("Mul", right, cos), body.op("Mul", left, sin))
    if interleaved:
        parts = [body.reshape(part, (*shape[:3], half, 1)) for part in (first, second)]
        turned = body.reshape(body.op("Concat", *parts, axis=4), (*shape[:3], 2 * half))
    else:
        turned = body.op("Concat", first, second, axis=3)
    if 2 * half == shape[3]:
        return turned
    return body.op("Concat", turned, body.slice(x, 3, 2 * half, shape[3]), axis=3)


@expands("RotaryEmbedding")
def _rotary(body: Body) -> None:
    """On (b, s, h * d) or (b, h, s, d); input 1 is each token's place, or that of the first one."""
    if body.attr("is_packed_batching", 0):
        raise body.unsupported("packed batches", "one sequence in each batch entry")
    shape, half, apart = body.shape(), body.shape(2)[1], len(body.shape()) == 4
    x = body.real(0)
    if apart:
        batch, heads, length, depth = shape
        table = (batch, 1, length, half)
    else:
        batch, length, width = shape
        heads = int(body.attr("num_heads", 0))
        depth = width // heads if int(body.attr("rotary_embedding_dim", 0)) else 2 * half
        shape, table = (batch, length, width // depth, depth), (batch, length, 1, half)
        x = body.reshape(x, shape)
    places = body.input(1)
    if body.shape(1) != (batch, length):
        steps = body.constant(np.broadcast_to(np.arange(length, dtype=np.int64), (batch, length)))
        places = body.op("Add", places, steps)
    result = rotated(body, x, shape, places, table, (2, 3), bool(body.attr("interleaved", 0)))
    body.real_result(0, result if apart else body.reshape(result, body.shape()))
