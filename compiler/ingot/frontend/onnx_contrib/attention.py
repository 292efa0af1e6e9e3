"""Attention, MultiHeadAttention and GroupQueryAttention: products, a mask, softmax, a product.

Shapes: b batches, h heads, s queries, t keys (those of the past and the new ones), d the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ingot.frontend.onnx_contrib.body import Body, expands
from ingot.frontend.onnx_contrib.rotary import rotated


def _heads(body: Body, x: str, shape: tuple[int, int, int, int]) -> str:
    """(b, s, h * d) as (b, h, s, d), for shape (b, s, h, d)."""
    return body.transpose(body.reshape(x, shape), (0, 2, 1, 3))


def _joined(body: Body, x: str, batch: int, length: int, width: int) -> str:
    """(b, h, s, d) as (b, s, h * d)."""
    return body.reshape(body.transpose(x, (0, 2, 1, 3)), (batch, length, width))


def _attend(body: Body, q: str, k: str, v: str, scale: float, biases: Sequence[str], softcap: float = 0.0) -> str:
    """softmax(scale * q k^T + biases) v on (b, h, s or t, d)."""
    scores = body.op("MatMul", q, body.transpose(k, (0, 1, 3, 2)))
    scores = body.op("Mul", scores, body.scalar(scale))
    if softcap:
        inner = body.op("Tanh", body.op("Mul", scores, body.scalar(1 / softcap)))
        scores = body.op("Mul", inner, body.scalar(softcap))
    for bias in biases:
        scores = body.op("Add", scores, bias)
    return body.op("MatMul", body.softmax(scores, 4), v)


def _where(body: Body, condition: str, low: float) -> str:
    """0 where the condition holds, `low` elsewhere."""
    return body.op("Where", condition, body.scalar(0.0), body.scalar(low))


def _padding(body: Body, index: int, batch: int, length: int, low: float) -> str:
    """The mask at input `index` as numbers to add to (b, h, s, t): lengths, ends and starts, or flags."""
    shape, mask = body.shape(index), body.cast(body.input(index), "int32")
    places = body.constant(np.arange(length, dtype=np.int32).reshape(1, 1, 1, length))
    if shape in ((batch,), (3 * batch + 2,)):
        ends = body.reshape(body.slice(mask, 0, 0, batch), (batch, 1, 1, 1))
        return _where(body, body.op("Less", places, ends), low)
    if shape == (2 * batch,):
        ends, starts = (body.reshape(body.slice(mask, 0, i * batch, (i + 1) * batch), (batch, 1, 1, 1)) for i in (0, 1))
        late = body.op("Less", places, starts)
        return _where(body, body.op("And", body.op("Less", places, ends), body.op("Not", late)), low)
    if len(shape) in (2, 3) and shape[-1] == length:
        flags = body.reshape(mask, (shape[0], 1, 1 if len(shape) == 2 else shape[1], length))
        return _where(body, body.op("Greater", flags, body.constant(np.array(0, np.int32))), low)
    raise body.unsupported(f"a mask of shape {list(shape)}", f"[{batch}], [{2 * batch}], or flags for {length} keys")


def _causal(body: Body, queries: int, keys: int, low: float) -> str:
    """The numbers that keep each of the last `queries` of `keys` from what follows it."""
    later = np.arange(keys)[None] > np.arange(keys - queries, keys)[:, None]
    return body.constant(np.where(later, low, 0.0).astype(body.kind).reshape(1, 1, queries, keys))


@expands("Attention")
def _attention(body: Body) -> None:
    """Projections by one weight matrix [in, h * d of q, k and v], then attention. A past is [2, b, h, t, d]."""
    for name, allowed in (("do_rotary", "0"), ("past_present_share_buffer", "0")):
        if body.attr(name, 0):
            raise body.unsupported(f"{name} = 1", allowed)
    batch, length, _ = body.shape()
    heads, columns = int(body.attr("num_heads")), body.shape(1)[1]
    sizes = [int(size) for size in body.attr("qkv_hidden_sizes", ())] or [columns // 3] * 3
    parts = []
    for number, size in enumerate(sizes):
        start, stop = sum(sizes[:number]), sum(sizes[: number + 1])
        part = body.op("MatMul", body.real(0), _columns(body, 1, start, stop))
        if body.has(2):
            part = body.op("Add", part, _columns(body, 2, start, stop))
        parts.append(_heads(body, part, (batch, length, heads, size // heads)))
    attend_with_past(body, parts, sizes[2], mask=3, bias=5, past=4)


def _columns(body: Body, index: int, start: int, stop: int) -> str:
    """Columns of input `index` (the last axis); a constant's are cut here."""
    value = body.value(index)
    if value is not None:
        return body.constant(np.ascontiguousarray(value[..., start:stop]).astype(body.kind))
    return body.slice(body.real(index), len(body.shape(index)) - 1, start, stop)


def attend_with_past(body: Body, parts: Sequence[str], width: int, mask: int, bias: int, past: int) -> None:
    """The outputs of Attention for q, k and v as (b, h, s, d); mask, bias and past are input numbers."""
    q, k, v = parts
    (batch, length, _), heads = body.shape(), int(body.attr("num_heads"))
    total, low = length, float(body.attr("mask_filter_value", -10000.0))
    if body.has(past):
        shape = body.shape(past)
        total += shape[3]
        halves = [body.reshape(body.slice(body.real(past), 0, i, i + 1), shape[1:]) for i in (0, 1)]
        k, v = body.op("Concat", halves[0], k, axis=2), body.op("Concat", halves[1], v, axis=2)
    depth = width // heads
    biases = [_padding(body, mask, batch, total, low)] if body.has(mask) else []
    if body.attr("unidirectional", 0):
        biases.append(_causal(body, length, total, low))
    if body.has(bias):
        biases.append(body.real(bias))
    scale = float(body.attr("scale", 0.0)) or 1 / math.sqrt(_depth(body, depth))
    result = _attend(body, q, k, v, scale, biases)
    body.real_result(0, _joined(body, result, batch, length, width))
    if body.wants(1):
        both = [body.reshape(part, (1, batch, heads, total, depth)) for part in (k, v)]
        body.real_result(1, body.op("Concat", *both, axis=0))


def _depth(body: Body, default: int) -> int:
    """The width of a query's head."""
    sizes = body.attr("qkv_hidden_sizes", ())
    return int(sizes[0]) // int(body.attr("num_heads")) if len(sizes) else default


@expands("MultiHeadAttention")
def _multi_head(body: Body) -> None:
    """Attention on q, k and v that come projected: apart, with k and v packed, or all packed."""
    if body.has(8) or body.has(9) or body.wants(3):
        raise body.unsupported("beams, or the scores as an output", "the result and the keys and values")
    heads, low = int(body.attr("num_heads")), float(body.attr("mask_filter_value", -10000.0))
    batch, length = body.shape()[:2]
    if len(body.shape()) == 5:  # (b, s, h, 3, d)
        depth = deep = body.shape()[4]
        q, k, v = (
            body.transpose(body.reshape(body.slice(body.real(0), 3, i, i + 1), (batch, length, heads, depth)), _SWAP)
            for i in range(3)
        )
        keys = length
    else:
        depth = body.shape()[2] // heads
        q = _heads(body, _biased(body, 0, 0, heads * depth), (batch, length, heads, depth))
        keys, deep = body.shape(1)[2 if len(body.shape(1)) == 4 else 1], depth
        if len(body.shape(1)) == 5:  # (b, t, h, 2, d)
            k, v = (
                body.transpose(body.reshape(body.slice(body.real(1), 3, i, i + 1), (batch, keys, heads, depth)), _SWAP)
                for i in range(2)
            )
        elif len(body.shape(1)) == 4:  # (b, h, t, d), of another sequence
            k, v, deep = body.real(1), body.real(2), body.shape(2)[3]
        else:
            deep = body.shape(2)[2] // heads
            start = heads * depth
            k = _heads(body, _biased(body, 1, start, start + heads * depth), (batch, keys, heads, depth))
            v = _heads(body, _biased(body, 2, 2 * start, 2 * start + heads * deep), (batch, keys, heads, deep))
    if body.has(6):
        k, v = body.op("Concat", body.real(6), k, axis=2), body.op("Concat", body.real(7), v, axis=2)
        keys += body.shape(6)[2]
    biases = [_padding(body, 4, batch, keys, low)] if body.has(4) else []
    if body.attr("unidirectional", 0):
        biases.append(_causal(body, length, keys, low))
    if body.has(5):
        biases.append(body.real(5))
    scale = float(body.attr("scale", 0.0)) or 1 / math.sqrt(depth)
    result = _attend(body, q, k, v, scale, biases)
    body.real_result(0, _joined(body, result, batch, length, heads * deep))
    body.real_result(1, k)
    body.real_result(2, v)


_SWAP = (0, 2, 1, 3)


def _biased(body: Body, index: int, start: int, stop: int) -> str:
    """Input `index` plus its part of the bias, which is one for q, k and v."""
    return body.op("Add", body.real(index), _columns(body, 3, start, stop)) if body.has(3) else body.real(index)


@expands("GroupQueryAttention")
def _group_query(body: Body) -> None:
    """Causal attention of h heads on g keys and values, each of which h / g heads share, with a cache.

    The cache is written from the place that the number of valid keys (input 5, plus 1) tells, so it may be larger than
    what is in it. The total length (input 6) must be constant, as it decides the size of the new cache.
    """
    for name in ("kv_cache_bit_width", "qk_output"):
        if body.attr(name, 0):
            raise body.unsupported(f"{name} = {body.attr(name)}", "0")
    heads, groups = int(body.attr("num_heads")), int(body.attr("kv_num_heads"))
    batch, length, width = body.shape()
    packed = not body.has(1)
    depth = width // (heads + 2 * groups) if packed else width // heads
    if packed:
        cuts = (0, heads * depth, (heads + groups) * depth, (heads + 2 * groups) * depth)
        q, k, v = (body.slice(body.real(0), 2, start, stop) for start, stop in pairwise(cuts))
    else:
        q, k, v = body.real(0), body.real(1), body.real(2)
    q = _heads(body, q, (batch, length, heads, depth))
    k, v = (_heads(body, x, (batch, length, groups, depth)) for x in (k, v))
    past = body.shape(3)[2] if body.has(3) else 0
    total = int(body.need(6, "total sequence length").reshape(-1)[0])
    keys = max(past, total)
    one = body.constant(np.array(1, np.int32))
    valid = body.op("Add", body.cast(body.input(5), "int32"), one)
    valid = body.reshape(valid, (batch, 1))
    # The first new token's place. In a prompt of several sentences the shorter ones begin at 0, too.
    first = body.op("Sub", valid, body.constant(np.array(length, np.int32)))
    if past == 0 or length == total:
        first = body.constant(np.zeros((batch, 1), np.int32))
    places = body.op("Add", first, body.constant(np.arange(length, dtype=np.int32).reshape(1, length)))
    if body.attr("do_rotary", 0):
        where = body.input(9) if body.has(9) else body.cast(places, "int64")
        where = body.reshape(where, (batch, length))
        turned = bool(body.attr("rotary_interleaved", 0))
        table = (batch, 1, length, body.shape(7)[1])
        q, k = (
            rotated(body, x, (batch, number, length, depth), where, table, (7, 8), turned)
            for x, number in ((q, heads), (k, groups))
        )
    if past:
        k, v = (_written(body, 3 + i, x, first, keys, length) for i, x in enumerate((k, v)))
    elif keys > length:
        empty = body.constant(np.zeros((batch, groups, keys - length, depth), body.kind))
        k, v = (body.op("Concat", x, empty, axis=2) for x in (k, v))
    body.real_result(1, k)
    body.real_result(2, v)
    shared = heads // groups
    if shared > 1:
        shape = (batch, groups, 1, keys, depth)
        size = body.constant(np.array((batch, groups, shared, keys, depth), np.int64))
        k, v = (
            body.reshape(body.op("Expand", body.reshape(x, shape), size), (batch, heads, keys, depth)) for x in (k, v)
        )
    low = float(np.finfo(np.float32).min)
    # What pads a prompt sees the sentence before it.
    seen = places if length == 1 else body.op("Min", places, body.op("Sub", valid, one))
    own = body.reshape(seen, (batch, 1, length, 1))
    places = body.constant(np.arange(keys, dtype=np.int32).reshape(1, 1, 1, keys))
    ahead = body.op("Greater", places, own)
    window = int(body.attr("local_window_size", -1))
    if window > 0:
        oldest = body.op("Sub", own, body.constant(np.array(window - 1, np.int32)))
        ahead = body.op("Or", ahead, body.op("Less", places, oldest))
    biases = [_where(body, body.op("Not", ahead), low)]
    if body.has(10):
        biases.append(body.slice(body.real(10), 3, 0, keys) if body.shape(10)[3] > keys else body.real(10))
    if body.has(11) or body.attr("smooth_softmax", 0):
        raise body.unsupported("a softmax with a sink", "plain softmax")
    scale = float(body.attr("scale", 0.0)) or 1 / math.sqrt(depth)
    result = _attend(body, q, k, v, scale, biases, float(body.attr("softcap", 0.0)))
    body.real_result(0, _joined(body, result, batch, length, heads * depth))


def _written(body: Body, index: int, new: str, first: str, keys: int, length: int) -> str:
    """The cache at input `index` up to `first`, the new entries from there on, and zeros, in `keys` places."""
    batch, groups, past, depth = body.shape(index)
    old = body.real(index)
    if keys > past:
        old = body.op("Concat", old, body.constant(np.zeros((batch, groups, keys - past, depth), body.kind)), axis=2)
    step = body.op("Sub", body.constant(np.arange(keys, dtype=np.int32).reshape(1, keys)), first)
    zero, last = (body.constant(np.array(value, np.int32)) for value in (0, length - 1))
    shape = (batch, 1, keys, 1)
    before, after = body.op("Less", step, zero), body.op("Greater", step, last)
    kept = body.op("Where", body.reshape(before, shape), old, body.scalar(0.0))
    inside = body.reshape(body.op("Not", body.op("Or", before, after)), shape)
    if length > 1:
        entry = body.cast(body.op("Max", body.op("Min", step, last), zero), "int64")
        size = body.constant(np.array((batch, groups, keys, depth), np.int64))
        new = body.op("GatherElements", new, body.op("Expand", body.reshape(entry, shape), size), axis=2)
    return body.op("Where", inside, new, kept)
