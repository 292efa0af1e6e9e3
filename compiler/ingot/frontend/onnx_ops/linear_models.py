"""Linear models and support vector machines of ai.onnx.ml."""

from __future__ import annotations

import numpy as np

from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.scores import DOMAIN, choose, choose_by, joined, labels, post_transform, transformed
from ingot.frontend.tvm_types import Expr


def _rows(node: OpNode) -> int:
    return node.shapes[0][0] if len(node.shapes[0]) > 1 else 1


def _input(ctx: Context) -> Expr:
    """The input as float32 [rows, features]."""
    from tvm import relax

    shape = ctx.shape()
    x = ctx.inputs[0] if ctx.dtype() == "float32" else ctx.emit(relax.op.astype(ctx.inputs[0], "float32"))
    return x if len(shape) == 2 else ctx.emit(relax.op.reshape(x, (1, shape[-1])))


def _floats(ctx: Context, name: str, count: int, default: bool = False) -> np.ndarray:
    """`count` floats of an attribute; zeros if it is missing and `default` says so."""
    found = np.array(ctx.attr(name, ()), dtype=np.float32)
    if not found.size and default:
        return np.zeros(count, dtype=np.float32)
    if found.size != count:
        raise ctx.unsupported(f"{found.size} {name}", f"{count}, as the input's shape asks for")
    return found


def _product(ctx: Context, count: int) -> Expr:
    """x @ coefficients of shape [count, features], transposed, plus intercepts."""
    from tvm import relax

    features = ctx.shape()[-1]
    matrix = _floats(ctx, "coefficients", count * features).reshape(count, features)
    shift = _floats(ctx, "intercepts", count, default=True)
    product = relax.op.matmul(_input(ctx), ctx.array("coefficients", np.ascontiguousarray(matrix.T)))
    return ctx.emit(relax.op.add(ctx.emit(product), ctx.array("intercepts", shift)))


@converts(
    "LinearRegressor",
    domain=DOMAIN,
    types=lambda node: [((_rows(node), int(node.attributes.get("targets", 1))), "float32")],
)
def _linear_regressor(ctx: Context) -> Expr:
    targets, name = int(ctx.attr("targets", 1)), post_transform(ctx)
    if targets == 1 and name != "NONE":
        raise ctx.unsupported(f"post_transform {name} of one target", "NONE", "apply it behind the model")
    return transformed(ctx, _product(ctx, targets), name)


def _class_types(node: OpNode) -> Shapes:
    names = node.attributes.get("classlabels_ints") or node.attributes.get("classlabels_strings") or ()
    return [((_rows(node),), "int64"), ((_rows(node), max(len(names), 1)), "float32")]


@converts("LinearClassifier", domain=DOMAIN, types=_class_types)
def _linear_classifier(ctx: Context) -> list[Expr]:
    """One score for each class; or one for two classes, whose sign decides."""
    from tvm import relax

    names, name = labels(ctx, "classlabels_ints", "classlabels_strings"), post_transform(ctx)
    count = len(ctx.attr("coefficients", ())) // ctx.shape()[-1]
    if count != len(names) and (count, len(names)) != (1, 2):
        raise ctx.unsupported(f"coefficients for {count} classes", f"for {len(names)}, as the labels say")
    scores = _product(ctx, count)
    if count == len(names):
        return [choose(ctx, scores, names), transformed(ctx, scores, name)]
    if name == "PROBIT":
        raise ctx.unsupported("PROBIT of one score for two classes", "NONE, LOGISTIC or SOFTMAX")
    label = choose_by(ctx, relax.op.greater(scores, ctx.const(0, "float32")), names)
    if name == "LOGISTIC":
        return [label, transformed(ctx, joined(ctx, [relax.op.negative(scores), scores]), name)]
    return [label, joined(ctx, [relax.op.subtract(ctx.const(1, "float32"), scores), scores])]


@converts("SVMRegressor", domain=DOMAIN, types=lambda node: [((_rows(node), 1), "float32")])
def _svm_regressor(ctx: Context) -> Expr:
    """coefficients . kernel(support vectors, x) + rho; the sign of it if `one_class`."""
    from tvm import relax

    features, count, x = ctx.shape()[-1], int(ctx.attr("n_supports", 0)), _input(ctx)
    if post_transform(ctx) != "NONE":
        raise ctx.unsupported(f"post_transform {post_transform(ctx)}", "NONE", "apply it behind the model")
    if count == 0:
        kernel, weights = x, _floats(ctx, "coefficients", features)
    else:
        vectors = _floats(ctx, "support_vectors", count * features).reshape(count, features)
        kernel, weights = _kernel(ctx, x, vectors), _floats(ctx, "coefficients", count)
    total = ctx.emit(relax.op.matmul(kernel, ctx.array("coefficients", weights.reshape(-1, 1))))
    score = ctx.emit(relax.op.add(total, ctx.const(float(_floats(ctx, "rho", 1)[0]), "float32")))
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
