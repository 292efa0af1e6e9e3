"""Matrix products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr


def _scaled(ctx: Context, index: int, factor: float) -> Expr:
    """Input `index` times a number; in numpy if it is a constant."""
    from tvm import relax

    if factor == 1.0:
        return ctx.inputs[index]
    value = ctx.value(index)
    if value is not None:
        return ctx.array(f"scaled{index}", (value * value.dtype.type(factor)).astype(value.dtype))
    return relax.op.multiply(ctx.inputs[index], ctx.const(factor))


@converts("Gemm")
def _gemm(ctx: Context) -> Expr:
    from tvm import relax

    a, b = ctx.inputs[0], ctx.inputs[1]
    alpha = float(ctx.attr("alpha", 1.0))
    if alpha != 1.0:
        # On the weights if there are any: then it costs nothing at run time.
        a, b = (a, _scaled(ctx, 1, alpha)) if ctx.value(1) is not None else (_scaled(ctx, 0, alpha), b)
    if ctx.attr("transA", 0):
        a = relax.op.permute_dims(a, [1, 0])
    if ctx.attr("transB", 0):
        b = relax.op.permute_dims(b, [1, 0])
    result = relax.op.matmul(a, b)
    if not ctx.has(2):
        return result
    beta = float(ctx.attr("beta", 1.0))
    value = ctx.value(2)
    if beta == 0.0 or (value is not None and not np.any(value)):
        return result
    return relax.op.add(result, _scaled(ctx, 2, beta))


@converts("Einsum")
def _einsum(ctx: Context) -> Expr:
    from tvm import relax

    equation = ctx.attr("equation").replace(" ", "")
    product = _as_product(ctx, equation)
    return relax.op.einsum(tuple(ctx.inputs), equation) if product is None else product


def _as_product(ctx: Context, equation: str) -> Expr | None:
    """An einsum of two float tensors as a product of matrices, or None where it is none.

    Labels of both operands and the result count matrices, those of both operands alone are summed; the rest are rows
    and columns. What one operand alone knows is summed first.
    """
    from tvm import relax

    terms, _, result = equation.partition("->")
    labels = terms.split(",")
    if len(labels) != 2 or "." in equation or not ctx.dtype().startswith("float"):
        return None
    if "->" not in equation:
        result = "".join(sorted(label for label in set("".join(labels)) if terms.count(label) == 1))
    shapes = [ctx.shape(0), ctx.shape(1)]
    size = {
        label: dim for term, shape in zip(labels, shapes, strict=True) for label, dim in zip(term, shape, strict=True)
    }
    whole = all([size[label] for label in term] == list(shape) for term, shape in zip(labels, shapes, strict=True))
    if not whole or 0 in size.values() or any(len(set(term)) < len(term) for term in labels):
        return None
    sides = list(zip(labels, ctx.inputs, strict=True))
    if result and result[-1] not in labels[1]:
        sides.reverse()  # the result's last axis is that of the columns
    (left, a), (right, b) = sides
    batch = [label for label in result if label in left and label in right]
    summed = [label for label in left if label in right and label not in result]
    rows, columns = ([label for label in result if label in term and label not in batch] for term in (left, right))
    along = "".join(summed)
    if not summed or (not rows and not right.endswith(along)) or (not columns and not left.endswith(along)):
        return None

    def arranged(x: Expr, term: str, *groups: list[str]) -> Expr:
        """The axes of one operand: the matrices, then each group as one axis."""
        known = [label for label in term if label in result or label in summed]
        if len(known) < len(term):
            x = ctx.emit(relax.op.sum(x, [axis for axis, label in enumerate(term) if label not in known]))
        order = [known.index(label) for label in (*batch, *groups[0], *groups[1])]
        if order != sorted(order):
            x = ctx.emit(relax.op.permute_dims(x, order))
        if all(len(group) == 1 for group in groups):
            return x
        joined = [math.prod(size[label] for label in group) for group in groups]
        return ctx.emit(relax.op.reshape(x, [*(size[label] for label in batch), *joined]))

    product = ctx.emit(relax.op.matmul(arranged(a, left, rows, summed), arranged(b, right, summed, columns)))
    order = [*batch, *rows, *columns]
    if len(rows) != 1 or len(columns) != 1:
        product = ctx.emit(relax.op.reshape(product, [size[label] for label in order]))
    if order == list(result):
        return product
    return relax.op.permute_dims(product, [order.index(label) for label in result])


@converts("Det")
def _determinant(ctx: Context) -> Expr:
    """The product of the pivots of Gaussian elimination with row exchanges, in double precision."""
    from tvm import relax, tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    size, batch = ctx.shape()[-1], math.prod(ctx.shape()[:-2])
    flat = ctx.emit(relax.op.reshape(ctx.inputs[0], (batch, size, size)))

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        (x,), (out, m) = ins, outs
        result, kept, best = scalar("float64"), scalar("float64"), scalar("int64")
        with T.serial(0, batch) as n:
            result[0] = T.float64(1)
            with T.grid(size, size) as (i, j):
                m[i, j] = T.Cast("float64", x[n, i, j])
            with T.serial(0, size) as k:
                best[0] = T.Cast("int64", k)
                with T.serial(0, size - k) as i, T.If(tirx.abs(m[k + i, k]) > tirx.abs(m[best[0], k])), T.Then():
                    best[0] = T.Cast("int64", k + i)
                with T.If(best[0] != k), T.Then():
                    result[0] = T.float64(0) - result[0]
                    with T.serial(0, size) as j:
                        kept[0] = m[k, j]
                        m[k, j] = m[best[0], j]
                        m[best[0], j] = kept[0]
                result[0] = result[0] * m[k, k]
                with T.If(m[k, k] != T.float64(0)), T.Then(), T.serial(0, size - 1 - k) as i:
                    kept[0] = m[k + 1 + i, k] / m[k, k]
                    with T.serial(0, size) as j:
                        m[k + 1 + i, j] = m[k + 1 + i, j] - kept[0] * m[k, j]
            out[n] = T.Cast(ctx.dtype(), result[0])

    outputs = [((batch,), ctx.dtype()), ((size, size), "float64")]
    return relax.op.reshape(call_loops(ctx.bb, "determinant", [flat], outputs, body)[0], ctx.out_shape())
