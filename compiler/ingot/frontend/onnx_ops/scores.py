"""What the models of ai.onnx.ml do with their scores: post_transform, and the choice of a class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ingot.frontend.onnx_ops.context import Context
from ingot.frontend.tvm_types import Expr

DOMAIN = "ai.onnx.ml"
_NAMES = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


def post_transform(ctx: Context) -> str:
    """The node's post_transform by name."""
    found = ctx.attr("post_transform", "NONE")
    name = _NAMES[found] if isinstance(found, int) and 0 <= found < len(_NAMES) else str(found)
    if name not in _NAMES:
        raise ctx.unsupported(f"post_transform {name!r}", ", ".join(_NAMES))
    return name


def transformed(ctx: Context, scores: Expr, name: str, dtype: str = "float32") -> Expr:
    """scores [rows, n] after the transform of this name, in their dtype."""
    from tvm import relax

    def number(value: float) -> Expr:
        return ctx.const(value, dtype)

    if name == "LOGISTIC":
        return ctx.emit(relax.op.sigmoid(scores))
    if name == "SOFTMAX":
        return ctx.emit(relax.op.nn.softmax(scores, -1))
    if name == "SOFTMAX_ZERO":
        # Scores of zero stay zero.
        largest = ctx.emit(relax.op.max(scores, [-1], keepdims=True))
        real = ctx.emit(relax.op.greater(relax.op.abs(scores), number(1e-7)))
        powers = ctx.emit(relax.op.exp(relax.op.subtract(scores, largest)))
        kept = ctx.emit(relax.op.where(real, powers, number(0)))
        total = ctx.emit(relax.op.sum(kept, [-1], keepdims=True))
        rest = relax.op.multiply(scores, relax.op.exp(relax.op.negative(largest)))
        return ctx.emit(relax.op.divide(relax.op.where(real, powers, rest), total))
    if name == "PROBIT":
        # sqrt(2) erfinv(2 x - 1), by Winitzki's approximation of erfinv, as ONNX Runtime.
        x = ctx.emit(relax.op.subtract(relax.op.multiply(scores, number(2)), number(1)))
        square = relax.op.multiply(relax.op.subtract(number(1), x), relax.op.add(number(1), x))
        log = ctx.emit(relax.op.log(square))
        half = ctx.emit(relax.op.add(relax.op.multiply(log, number(0.5)), number(2 / (3.14159 * 0.147))))
        inner = relax.op.subtract(relax.op.multiply(half, half), relax.op.multiply(log, number(1 / 0.147)))
        size = relax.op.sqrt(relax.op.subtract(relax.op.sqrt(inner), half))
        signed = relax.op.where(relax.op.less(x, number(0)), relax.op.negative(size), size)
        return ctx.emit(relax.op.multiply(signed, number(math.sqrt(2))))
    return scores


def joined(ctx: Context, parts: Sequence[Expr]) -> Expr:
    """Columns [rows, 1] next to each other."""
    from tvm import relax

    return ctx.emit(relax.op.concat([ctx.emit(part) for part in parts], 1))


def labels(ctx: Context, *names: str) -> np.ndarray:
    """The class labels as integers; UnsupportedError if they are text and the label is used."""
    for name in names:
        found = ctx.attr(name)
        if found and isinstance(found[0], int):
            return np.array(found, dtype=np.int64)
        if found and ctx.node.output[0] in ctx.types:
            raise ctx.unsupported(
                "labels that are text",
                "integers",
                "train on numbers, or remove this output from the model and take the largest score",
            )
        if found:
            return np.arange(len(found), dtype=np.int64)
    raise ctx.unsupported("no class labels", "integers")


def choose(ctx: Context, scores: Expr, names: np.ndarray) -> Expr:
    """The label of the largest of scores [rows, n]; the first of several."""
    from tvm import relax

    place = ctx.emit(relax.op.argmax(scores, 1))
    return ctx.emit(relax.op.take(ctx.array("labels", names), place, 0, mode="clip"))


def choose_by(ctx: Context, positive: Expr, names: np.ndarray) -> Expr:
    """names[1] where positive [rows, 1] holds, else names[0]."""
    from tvm import relax

    rows = ctx.emit(relax.op.reshape(ctx.emit(positive), (-1,)))
    return ctx.emit(relax.op.where(rows, ctx.const(int(names[1]), "int64"), ctx.const(int(names[0]), "int64")))
