"""Support vector machines of ai.onnx.ml: kernels of every row and vector, then matrix products."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np

from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.loops import call_loops
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.linear_models import class_types, floats, matrix_of, rows_of
from ingot.frontend.onnx_ops.scores import DOMAIN, choose, joined, labels, post_transform, transformed
from ingot.frontend.tvm_types import Expr

# Rounds of the iteration that joins the probabilities of pairs, as in LIBSVM.
_ROUNDS = 100


@converts("SVMRegressor", domain=DOMAIN, types=lambda node: [((rows_of(node), 1), "float32")])
def _svm_regressor(ctx: Context) -> Expr:
    """coefficients . kernel(support vectors, x) + rho; the sign of it if `one_class`."""
    from tvm import relax

    features, count, x = ctx.shape()[-1], int(ctx.attr("n_supports", 0)), matrix_of(ctx)
    if post_transform(ctx) != "NONE":
        raise ctx.unsupported(f"post_transform {post_transform(ctx)}", "NONE", "apply it behind the model")
    if count == 0:
        kernel, weights = x, floats(ctx, "coefficients", features)
    else:
        vectors = floats(ctx, "support_vectors", count * features).reshape(count, features)
        kernel, weights = _kernel(ctx, x, vectors), floats(ctx, "coefficients", count)
    total = ctx.emit(relax.op.matmul(kernel, ctx.array("coefficients", weights.reshape(-1, 1))))
    score = ctx.emit(relax.op.add(total, ctx.const(float(floats(ctx, "rho", 1)[0]), "float32")))
    if not ctx.attr("one_class", 0):
        return score
    one = ctx.const(1, "float32")
    return relax.op.where(relax.op.greater(score, ctx.const(0, "float32")), one, ctx.const(-1, "float32"))


def _kernel(ctx: Context, x: Expr, vectors: np.ndarray) -> Expr:
    """The kernel function of every row of x and every support vector: [rows, vectors]."""
    from tvm import relax

    gamma, shift, degree = (*(float(value) for value in ctx.attr("kernel_params", ())), 0.0, 0.0, 0.0)[:3]
    kind = ctx.attr("kernel_type", "LINEAR")

    def number(value: float) -> Expr:
        return ctx.const(value, "float32")

    if kind == "RBF":
        # The differences themselves: |x|^2 - 2 x v + |v|^2 would cancel.
        rows = ctx.emit(relax.op.expand_dims(x, 1))
        apart = ctx.emit(relax.op.subtract(rows, ctx.array("vectors", vectors[None])))
        squares = ctx.emit(relax.op.sum(relax.op.multiply(apart, apart), [2]))
        return ctx.emit(relax.op.exp(relax.op.multiply(squares, number(-gamma))))
    product = ctx.emit(relax.op.matmul(x, ctx.array("vectors", np.ascontiguousarray(vectors.T))))
    if kind == "LINEAR":
        return product
    inner = ctx.emit(relax.op.add(relax.op.multiply(product, number(gamma)), number(shift)))
    if kind == "SIGMOID":
        return ctx.emit(relax.op.tanh(inner))
    if kind != "POLY":
        raise ctx.unsupported(f"kernel_type {kind!r}", "LINEAR, POLY, RBF or SIGMOID")
    if degree == int(degree) and 1 <= degree <= 8:
        power = inner
        for _ in range(int(degree) - 1):
            power = ctx.emit(relax.op.multiply(power, inner))
        return power
    return ctx.emit(relax.op.power(inner, number(degree)))


def _svm_types(node: OpNode) -> Shapes:
    """Without probabilities, three and more classes have a score for each pair."""
    label, (shape, dtype) = class_types(node)
    classes = len(node.attributes.get("vectors_per_class") or ())
    if classes > 2 and not node.attributes.get("prob_a"):
        shape = (shape[0], math.comb(classes, 2))
    return [label, (shape, dtype)]


@converts("SVMClassifier", domain=DOMAIN, types=_svm_types)
def _svm_classifier(ctx: Context) -> list[Expr]:
    """Each pair of classes votes by the sign of its score; probabilities, if there are any, do not choose the label."""
    from tvm import relax

    names, name = labels(ctx, "classlabels_ints", "classlabels_strings"), post_transform(ctx)
    counts, classes = [int(count) for count in ctx.attr("vectors_per_class", ())], len(names)
    if not counts:
        return _linear(ctx, names, name)
    if len(counts) != classes or classes < 2 or min(counts) < 0 or name == "PROBIT":
        raise ctx.unsupported(
            f"{len(counts)} classes of vectors, {classes} labels, {name}", "two or more classes, no PROBIT"
        )
    pairs = list(combinations(range(classes), 2))
    total, features = sum(counts), ctx.shape()[-1]
    vectors = floats(ctx, "support_vectors", total * features).reshape(total, features)
    given = floats(ctx, "coefficients", (classes - 1) * total).reshape(classes - 1, total)
    matrix, starts = np.zeros((total, len(pairs)), dtype=np.float32), np.cumsum([0, *counts])
    for place, (first, second) in enumerate(pairs):
        for own, other in ((first, second - 1), (second, first)):
            part = slice(starts[own], starts[own + 1])
            matrix[part, place] = given[other, part]
    product = ctx.emit(relax.op.matmul(_kernel(ctx, matrix_of(ctx), vectors), ctx.array("coefficients", matrix)))
    scores = ctx.emit(relax.op.add(product, ctx.array("rho", floats(ctx, "rho", len(pairs)))))
    ballots = np.zeros((2, len(pairs), classes), dtype=np.float32)
    for place, pair in enumerate(pairs):
        ballots[0, place, pair[0]] = ballots[1, place, pair[1]] = 1
    won = ctx.emit(relax.op.astype(relax.op.greater(scores, ctx.const(0, "float32")), "float32"))
    lost = ctx.emit(relax.op.subtract(ctx.const(1, "float32"), won))
    ahead = ctx.emit(relax.op.matmul(won, ctx.array("first", ballots[0])))
    votes = ctx.emit(relax.op.add(ahead, ctx.emit(relax.op.matmul(lost, ctx.array("second", ballots[1])))))
    label = choose(ctx, votes, names)
    if ctx.attr("prob_a"):
        return [label, transformed(ctx, _probabilities(ctx, scores, pairs, classes), name)]
    if classes > 2:
        return [label, transformed(ctx, scores, name)]
    if name not in ("NONE", "LOGISTIC"):
        raise ctx.unsupported(f"{name} of one score for two classes", "NONE or LOGISTIC")
    return [label, transformed(ctx, joined(ctx, [relax.op.negative(scores), scores]), name)]


def _linear(ctx: Context, names: np.ndarray, name: str) -> list[Expr]:
    """Without vectors: a score for each class, all of them shifted by the first rho."""
    from tvm import relax

    features = ctx.shape()[-1]
    matrix = floats(ctx, "coefficients", len(names) * features).reshape(len(names), features)
    shift = np.array(ctx.attr("rho", (0.0,)), dtype=np.float32)[:1]
    product = ctx.emit(relax.op.matmul(matrix_of(ctx), ctx.array("coefficients", np.ascontiguousarray(matrix.T))))
    scores = ctx.emit(relax.op.add(product, ctx.array("rho", shift)))
    return [choose(ctx, scores, names), transformed(ctx, scores, name)]


def _probabilities(ctx: Context, scores: Expr, pairs: list[tuple[int, int]], classes: int) -> Expr:
    """The classes' probabilities from those of the pairs (Wu, Lin and Weng, 2004, method 2; as LIBSVM iterates it)."""
    from tvm import relax, tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    rows = ctx.out_shape(1)[0]
    slope, shift = (ctx.array(name, floats(ctx, name, len(pairs))) for name in ("prob_a", "prob_b"))
    line = ctx.emit(relax.op.add(relax.op.multiply(scores, slope), shift))
    pair = ctx.emit(relax.op.clip(relax.op.sigmoid(relax.op.negative(line)), 1e-7, 1 - 1e-7))
    number = {key: place for place, key in enumerate(pairs)}
    limit = tirx.const(0.005 / classes, "float32")

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        (won,), (p, q, qp, rest) = ins, outs

        def chance(n: Any, i: int, j: int) -> Any:  # noqa: ANN401
            """How probable class i is if it is one of i and j."""
            return won[n, number[(i, j)]] if i < j else tirx.const(1, "float32") - won[n, number[(j, i)]]

        total, apart, step = (0, 1, 2)  # places in `rest`
        with T.serial(0, rows) as n:
            for t in range(classes):
                p[n, t] = tirx.const(1 / classes, "float32")
                q[t, t] = tirx.const(0, "float32")
                for j in range(classes):
                    if j != t:
                        q[t, t] = q[t, t] + chance(n, j, t) * chance(n, j, t)
                        q[t, j] = tirx.const(0, "float32") - chance(n, j, t) * chance(n, t, j)
            rest[apart] = limit
            with T.serial(0, max(_ROUNDS, classes)), T.If(rest[apart] >= limit), T.Then():
                rest[total] = tirx.const(0, "float32")
                with T.serial(0, classes) as t:
                    qp[t] = tirx.const(0, "float32")
                    with T.serial(0, classes) as j:
                        qp[t] = qp[t] + q[t, j] * p[n, j]
                    rest[total] = rest[total] + p[n, t] * qp[t]
                rest[apart] = tirx.const(0, "float32")
                with T.serial(0, classes) as t:
                    rest[apart] = tirx.max(rest[apart], tirx.abs(qp[t] - rest[total]))
                with T.If(rest[apart] >= limit), T.Then(), T.serial(0, classes) as t:
                    one = tirx.const(1, "float32")
                    rest[step] = (rest[total] - qp[t]) / q[t, t]
                    p[n, t] = p[n, t] + rest[step]
                    more = rest[step] * (rest[step] * q[t, t] + tirx.const(2, "float32") * qp[t])
                    rest[total] = (rest[total] + more) / (one + rest[step]) / (one + rest[step])
                    with T.serial(0, classes) as j:
                        qp[j] = (qp[j] + rest[step] * q[t, j]) / (one + rest[step])
                        p[n, j] = p[n, j] / (one + rest[step])

    outputs = [
        ((rows, classes), "float32"),
        ((classes, classes), "float32"),
        ((classes,), "float32"),
        ((3,), "float32"),
    ]
    return call_loops(ctx.bb, "probabilities", [pair], outputs, body)[0]
