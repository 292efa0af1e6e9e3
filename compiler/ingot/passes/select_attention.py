"""Turn matmul, softmax, matmul into one PrimFunc."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, tirx

from ingot.passes.matrix_views import view_of
from ingot.passes.rewriter import Rewriter, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import call_template
from ingot.schedules import attention, rows
from ingot.schedules.attention import AttentionWorkload
from ingot.schedules.views import View

_CHAIN = {"relax.add", "relax.subtract", "relax.multiply", "relax.divide"}


@dataclass(frozen=True)
class _Link:
    """One elementwise operator between the scores and softmax: a constant, or the operand's position."""

    name: str
    constant: float | None
    operand: int
    shape: tuple[int, ...]

    def apply(self, score: Any, operands: Sequence[Any], where: Sequence[Any]) -> Any:  # noqa: ANN401
        """Return the score after this operator."""
        if self.constant is not None:
            other: Any = tirx.const(self.constant, "float32")
        else:
            own = where[len(where) - len(self.shape) :]
            zero = tirx.IntImm("int64", 0)
            other = operands[self.operand](*[zero if s == 1 else i for s, i in zip(self.shape, own, strict=True)])
        if self.name == "relax.add":
            return score + other
        if self.name == "relax.subtract":
            return score - other
        return score * other if self.name == "relax.multiply" else score / other


@dataclass(frozen=True)
class _Found:
    """What an attention call was made of, to make it again with a transposed result."""

    workload: AttentionWorkload
    views: tuple[View, View, View]
    links: tuple[_Link, ...]
    args: tuple[Any, ...]


def select_attention(state: State) -> State:
    """Turn matmul, softmax, matmul into one PrimFunc.

    Case 1: softmax(chain(q @ k)) @ v in float32, where the chain adds, subtracts, multiplies or divides by constants
            and by tensors that broadcast to the scores (masks), and every matrix is computed at run time.
    Case 2: q, k and v that are transposes, or repeat the heads of what they take, are read where they lie.
    Case 3: a transpose of the result is how the result is written.
    Others, and shapes that `schedules.attention` does not fit, keep their operators.
    """
    found: dict[Any, _Found] = {}

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        name = op_name(call)
        if name == "relax.matmul":
            item = _match(rewriter, args)
            if item is None:
                return None
            result = _emit(rewriter, item, state.target)
            if result is not None:
                found[result] = item
            return result
        if name == "relax.permute_dims" and args[0] in found and call.attrs.axes is not None:
            item = found[args[0]]
            axes = tuple(item.workload.out_axes[int(a)] for a in call.attrs.axes)
            return _emit(
                rewriter, replace(item, workload=replace(item.workload, out_axes=axes)), state.target
            )  # case 3
        return None

    return rewrite(state, visit)


def _emit(rewriter: Rewriter, item: _Found, target: Any) -> Any:  # noqa: ANN401
    """Return the variable of a new call, or None where the template does not fit."""
    work = item.workload
    config = attention.default_config(work, rows.default_config(work.n, "float32", target), target)
    if config is None:
        return None

    def chain(score: Any, operands: Sequence[Any], where: Sequence[Any]) -> Any:  # noqa: ANN401
        for link in item.links:
            score = link.apply(score, operands, where)
        return score

    whole = (*work.batch, work.m, work.d)
    ty = relax.TensorType([whole[axis] for axis in work.out_axes], "float32")
    tensors = attention.compute(work, config, item.views, chain)
    return rewriter.emit(call_template(rewriter, "attention", tensors, list(item.args), ty))


def _match(rewriter: Rewriter, args: list[Any]) -> _Found | None:
    """Case 1."""
    softmax = rewriter.value_of(args[0])
    if op_name(softmax) != "relax.nn.softmax" or dtype_of(args[0]) != "float32" or dtype_of(args[1]) != "float32":
        return None
    shape = shape_of(args[0])
    if len(shape) < 3 or int(softmax.attrs.axis) % len(shape) != len(shape) - 1:
        return None
    links: list[_Link] = []
    operands: list[Any] = []
    inner = softmax.args[0]
    while op_name(rewriter.value_of(inner)) in _CHAIN:
        value = rewriter.value_of(inner)
        left, right = value.args
        if shape_of(left) != shape and op_name(value) in ("relax.add", "relax.multiply"):
            left, right = right, left
        if shape_of(left) != shape or not _leads_to_matmul(rewriter, left):
            if shape_of(right) != shape or op_name(value) not in ("relax.add", "relax.multiply"):
                return None
            left, right = right, left
        if dtype_of(right) != "float32":
            return None
        constant = rewriter.weight(right)
        if constant is not None and constant.size == 1:
            links.append(_Link(op_name(value), float(constant.reshape(())), 0, ()))
        else:
            links.append(_Link(op_name(value), None, len(operands), shape_of(right)))
            operands.append(right)
        inner = left
    product = rewriter.value_of(inner)
    if op_name(product) != "relax.matmul" or shape_of(inner) != shape:
        return None
    q, k, v = product.args[0], product.args[1], args[1]
    if any(rewriter.weight(x) is not None or len(shape_of(x)) != len(shape) for x in (q, k, v)):
        return None
    if dtype_of(q) != "float32" or dtype_of(k) != "float32":
        return None
    workload = AttentionWorkload(
        batch=shape[:-2],
        m=shape[-2],
        k=shape_of(q)[-1],
        n=shape[-1],
        d=shape_of(v)[-1],
        out_axes=tuple(range(len(shape))),
        operands=tuple(shape_of(x) for x in operands),
    )
    stored, views = zip(*(view_of(rewriter, x) for x in (q, k, v)), strict=True)
    return _Found(workload, views, tuple(reversed(links)), (*stored, *operands))


def _leads_to_matmul(rewriter: Rewriter, expr: Any) -> bool:  # noqa: ANN401
    value = rewriter.value_of(expr)
    while op_name(value) in _CHAIN:
        value = rewriter.value_of(value.args[0])
    return op_name(value) == "relax.matmul"
