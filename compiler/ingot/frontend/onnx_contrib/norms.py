"""Norms of com.microsoft: a norm with what ONNX Runtime's optimiser puts before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingot.frontend.onnx_contrib.body import Body, expands


def _norm(
    body: Body, x: str, axes: Sequence[int], scale: str, shift: str = "", centred: bool = True, epsilon: float = 1e-12
) -> tuple[str, str, str]:
    """The norm of x over some axes: the result, the mean ("" if it is not taken), and 1 / the deviation.

    `epsilon` holds where the node has none of its own.
    """
    mean = body.mean(x, axes) if centred else ""
    rest = body.op("Sub", x, mean) if centred else x
    variance = body.mean(body.op("Mul", rest, rest), axes)
    small = body.scalar(float(body.attr("epsilon", epsilon)))
    inverse = body.op("Div", body.scalar(1.0), body.op("Sqrt", body.op("Add", variance, small)))
    result = body.op("Mul", body.op("Mul", rest, inverse), scale)
    return body.op("Add", result, shift) if shift else result, mean, inverse


@expands("LayerNormalization", "SimplifiedLayerNormalization")
def _layer_norm(body: Body) -> None:
    """Both take any first axis; the simplified one has no mean and no shift."""
    rank = len(body.shape())
    axes = range(int(body.attr("axis", -1)) % rank, rank)
    centred = body.node.op_type == "LayerNormalization"
    shift = body.real(2) if centred else ""
    result, mean, inverse = _norm(body, body.real(0), axes, body.real(1), shift, centred, 1e-5)
    body.real_result(0, result)
    if centred:
        body.result(1, mean)
    body.result(2 if centred else 1, inverse)


@expands("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip_norm(body: Body) -> None:
    """The norm over the last axis of x + skip + bias, and that sum."""
    centred = body.node.op_type == "SkipLayerNormalization"
    bias = 4 if centred else 3
    total = body.op("Add", body.real(0), body.real(1))
    if body.has(bias):
        total = body.op("Add", total, body.real(bias))
    last, shift = [len(body.shape()) - 1], body.real(3) if centred else ""
    result, mean, inverse = _norm(body, total, last, body.real(2), shift, centred)
    body.real_result(0, result)
    if centred:
        body.result(1, mean)
    elif body.wants(1):
        raise body.unsupported("the mean as an output", "the norm, 1 / deviation and the sum")
    body.result(2, inverse)
    body.real_result(3, total)


@expands("EmbedLayerNormalization")
def _embed_norm(body: Body) -> None:
    """The norm of the sum of a word's, a position's and a segment's row."""
    (batch, length), ids = body.shape(), body.input(0)
    if body.attr("mask_index_type", 1 if body.has(7) else 0) not in (0, 1) and body.wants(1):
        raise body.unsupported("this mask_index_type", "0 or 1")
    total = body.op("Gather", body.input(2), ids, axis=0)
    if body.has(8):
        position = body.op("Gather", body.input(3), body.input(8), axis=0)
    else:
        position = body.reshape(body.slice(body.input(3), 0, 0, length), (1, length, body.shape(3)[1]))
    total = body.op("Add", total, position)
    if body.has(4):
        total = body.op("Add", total, body.op("Gather", body.input(4), body.input(1), axis=0))
    wide = body.dtype(2) == "float16"
    scale, shift = (body.cast(body.input(index), "float32") if wide else body.input(index) for index in (5, 6))
    real = body.cast(total, "float32") if wide else total
    result, _, _ = _norm(body, real, [2], scale, shift)
    body.result(0, result, body.dtype(2) if wide else "")
    if body.wants(1):
        if body.has(7):
            counts = body.cast(body.mean(body.cast(body.input(7), "float32"), [1]), "float32")
            whole = body.op("Round", body.op("Mul", counts, body.constant(np.array(length, np.float32))))
            body.result(1, body.reshape(whole, (batch,)), "int32")
        else:
            body.result(1, body.constant(np.zeros(batch, dtype=np.int32)))
    body.result(2, total)
