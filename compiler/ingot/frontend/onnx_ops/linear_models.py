"""Linear models of ai.onnx.ml, and what they share with support vector machines."""

from __future__ import annotations

import numpy as np

from ingot.frontend.custom import OpNode, Shapes
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.scores import DOMAIN, choose, choose_by, joined, labels, post_transform, transformed
from ingot.frontend.tvm_types import Expr


def rows_of(node: OpNode) -> int:
    """The rows of input 0, of which a vector is one."""
    return node.shapes[0][0] if len(node.shapes[0]) > 1 else 1


def matrix_of(ctx: Context) -> Expr:
    """The input as float32 [rows, features]."""
    from tvm import relax

    shape = ctx.shape()
    x = ctx.inputs[0] if ctx.dtype() == "float32" else ctx.emit(relax.op.astype(ctx.inputs[0], "float32"))
    return x if len(shape) == 2 else ctx.emit(relax.op.reshape(x, (1, shape[-1])))


def floats(ctx: Context, name: str, count: int, default: bool = False) -> np.ndarray:
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
    matrix = floats(ctx, "coefficients", count * features).reshape(count, features)
    shift = floats(ctx, "intercepts", count, default=True)
    product = relax.op.matmul(matrix_of(ctx), ctx.array("coefficients", np.ascontiguousarray(matrix.T)))
    return ctx.emit(relax.op.add(ctx.emit(product), ctx.array("intercepts", shift)))


@converts(
    "LinearRegressor",
    domain=DOMAIN,
    types=lambda node: [((rows_of(node), int(node.attributes.get("targets", 1))), "float32")],
)
def _linear_regressor(ctx: Context) -> Expr:
    targets, name = int(ctx.attr("targets", 1)), post_transform(ctx)
    if targets == 1 and name != "NONE":
        raise ctx.unsupported(f"post_transform {name} of one target", "NONE", "apply it behind the model")
    return transformed(ctx, _product(ctx, targets), name)


def class_types(node: OpNode) -> Shapes:
    """A label for each row, and a score for each class."""
    names = node.attributes.get("classlabels_ints") or node.attributes.get("classlabels_strings") or ()
    return [((rows_of(node),), "int64"), ((rows_of(node), max(len(names), 1)), "float32")]


@converts("LinearClassifier", domain=DOMAIN, types=class_types)
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
