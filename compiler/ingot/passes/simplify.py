"""Remove operators that do nothing, and write the rest one way."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, Visit, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import State


def _view(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Cases 1, 2 and 3: see `simplify`."""
    shape, source = shape_of(call), args[0]
    inner = rewriter.value_of(source)
    while op_name(inner) == "relax.reshape":  # case 2
        source = inner.args[0]
        inner = rewriter.value_of(source)
    if shape_of(source) == shape:  # case 1
        return source
    return relax.op.reshape(source, shape)


def _permute_dims(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Cases 4, 5 and 6: see `simplify`."""
    source, ndim = args[0], len(shape_of(call))
    axes = _axes(call, ndim)
    inner = rewriter.value_of(source)
    if op_name(inner) == "relax.permute_dims":  # case 5
        first = _axes(inner, ndim)
        axes = tuple(first[a] for a in axes)
        source = inner.args[0]
    if axes == tuple(range(ndim)):  # case 4
        return source
    shape = shape_of(source)
    moved = [a for a in axes if shape[a] != 1]
    if moved == sorted(moved):  # case 6
        view = relax.op.reshape(source, tuple(shape[a] for a in axes))
        return _view(rewriter, rewriter.builder.normalize(view), [source])
    return relax.op.permute_dims(source, list(axes))


def _axes(call: Any, ndim: int) -> tuple[int, ...]:  # noqa: ANN401
    axes = call.attrs.axes
    return tuple(reversed(range(ndim))) if axes is None else tuple(int(a) % ndim for a in axes)


def _astype(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Cases 7 and 11."""
    source, dtype = dtype_of(args[0]), dtype_of(call)
    if source in ("int8", "uint8") and dtype == "float32":
        one, zero = relax.const(1.0, "float32"), relax.const(0, "int32")
        return relax.op.dequantize(args[0], one, zero, axis=0, out_dtype=dtype)
    return args[0] if source == dtype else None


def _identity_with(neutral: float, right_only: bool) -> Visit:
    """Case 8: build a visitor for x + 0, x - 0, x * 1, x / 1."""

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        for i, other in ((1, 0),) if right_only else ((1, 0), (0, 1)):
            value = rewriter.weight(args[i])
            if value is not None and np.all(value == neutral) and shape_of(args[other]) == shape_of(call):
                return args[other]
        return None

    return visit


def _first_argument(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 9."""
    return args[0]


def _dropout(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 9, as TVM writes it: (data, mask)."""
    return relax.Tuple([args[0], args[0]])


def _relu_of_clip(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
    """Case 10."""
    inner = rewriter.value_of(args[0])
    return args[0] if op_name(inner) == "relax.nn.relu" else None


_TABLE: dict[str, Visit] = {
    "relax.reshape": _view,
    "relax.squeeze": _view,
    "relax.expand_dims": _view,
    "relax.flatten": _view,
    "relax.permute_dims": _permute_dims,
    "relax.astype": _astype,
    "relax.add": _identity_with(0.0, right_only=False),
    "relax.subtract": _identity_with(0.0, right_only=True),
    "relax.multiply": _identity_with(1.0, right_only=False),
    "relax.divide": _identity_with(1.0, right_only=True),
    "relax.nn.dropout": _dropout,
    "relax.nn.relu": _relu_of_clip,
}


def simplify(state: State) -> State:
    """Remove operators that do nothing, and write the rest one way.

    Case 1: a reshape to the same shape goes.
    Case 2: a reshape of a reshape is one reshape.
    Case 3: squeeze, expand_dims and flatten are written as reshape.
    Case 4: a transpose that moves nothing goes.
    Case 5: a transpose of a transpose is one transpose.
    Case 6: a transpose that only moves dimensions of size 1 is a reshape (no data moves).
    Case 7: a cast to the same dtype goes.
    Case 8: x + 0, x - 0, x * 1 and x / 1 are x, where no broadcast hides in them.
    Case 9: dropout, at inference, is its input.
    Case 10: relu of relu is relu.
    Case 11: a cast of 8-bit integers to float32 is a dequantize by 1, which later passes know how to fuse.
    """
    return rewrite(state, _TABLE)
