"""Discrete Fourier transforms of a known length, for every model format: products with constant matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tvm_types import Builder, Expr

# Elements of a matrix: the definition is quadratic in the length.
MAX_MATRIX = 2**24


def matrices(length: int, rows: int, *, inverse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [length, rows] of a transform, in float64; an inverse one is divided by the length.

    The product `i * k` is reduced by the length before it becomes an angle. Raises UnsupportedError beyond MAX_MATRIX.
    """
    if length * rows > MAX_MATRIX:
        raise UnsupportedError(
            "a transform of this length is not supported",
            found=f"{length} to {rows}",
            allowed=f"at most {MAX_MATRIX} factors",
        )
    turns = np.outer(np.arange(length), np.arange(rows)) % length / length
    angles = 2 * np.pi * turns * (1 if inverse else -1)
    factor = 1 / length if inverse else 1.0
    return np.cos(angles) * factor, np.sin(angles) * factor


def real_transform(builder: Builder, make: Callable[[str, np.ndarray], Expr], x: Expr, dtype: str) -> tuple[Expr, Expr]:
    """Real and imaginary parts [..., N / 2 + 1] of the transform of real rows [..., N]; `make` makes a weight.

    Cosines are even around N / 2 and sines odd, so that half of the sums do: of y[n] = x[n] + x[N - n] and
    z[n] = x[n] - x[N - n]. Around N / 4 those of even k are what those of odd k are not, which halves them again: a
    quarter of the products. This is how a fast transform begins (Cooley and Tukey, 1965); what is left are matrices.
    """
    from tvm import relax

    *_, length = (int(dim) for dim in x.ty.shape)
    rows = length // 2 + 1
    if length % 4 or length < _LEAST_FOLDED:
        cosines, sines = (make(name, m.astype(dtype)) for name, m in zip(_NAMES, matrices(length, rows), strict=True))
        return builder.emit(relax.op.matmul(x, cosines)), builder.emit(relax.op.matmul(x, sines))
    quarter = length // 4
    turns = np.outer(np.arange(quarter + 1), np.arange(rows)) % length / length
    # Sums of even k fold the way that those of n do, sums of odd k the other way. All of them first: together they are
    # as large as `x`, which nobody needs then.
    sums = [_folded(builder, x, quarter, sign, sign * turn, "folded") for sign in (1, -1) for turn in (1, -1)]
    found = []
    factors = (np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns))
    for place, (name, matrix) in enumerate(zip(_NAMES, factors, strict=True)):
        parts = [
            builder.emit(relax.op.matmul(item, make(f"{name}_{first}", matrix[:, first::2].astype(dtype))))
            for first, item in enumerate(sums[2 * place : 2 * place + 2])
        ]
        found.append(_alternating(builder, *parts))
    return found[0], found[1]


#: Below this length the matrices are so small that folding is not worth a pass over the data.
_LEAST_FOLDED = 128
_NAMES = ("cosines", "sines")


def _folded(builder: Builder, x: Expr, quarter: int, sign: int, turn: int, name: str) -> Expr:
    """y[n] + turn * y[N / 2 - n] for n = 0 to N / 4, of y[n] = x[n] + sign * x[N - n]; no term twice."""
    from tvm import te, tirx

    *outer, length = (int(dim) for dim in x.ty.shape)
    half = length // 2

    def define(source: Any) -> Any:  # noqa: ANN401 - TE tensors
        def element(*index: Any) -> Any:  # noqa: ANN401
            *row, n = index
            # x[N] is x[0], and stands there but once; so does x[N / 2], and y[N / 4].
            first, last = n.equal(0), n.equal(quarter)
            near = source(*row, n) + tirx.Select(
                first, tirx.const(0, x_dtype), _signed(source(*row, (length - n) % length), sign)
            )
            far = source(*row, half - n) + tirx.Select(
                first, tirx.const(0, x_dtype), _signed(source(*row, half + n), sign)
            )
            return near + tirx.Select(last, tirx.const(0, x_dtype), _signed(far, turn))

        x_dtype = str(source.dtype)
        return te.compute((*outer, quarter + 1), element, name="folded")

    return builder.emit(builder.call_te(define, x, primfunc_name_hint=name))


def _signed(value: Any, sign: int) -> Any:  # noqa: ANN401
    return value if sign > 0 else -value


def _alternating(builder: Builder, even: Expr, odd: Expr) -> Expr:
    """even[0], odd[0], even[1], ..., along the last axis."""
    from tvm import te, tirx

    *outer, count = (int(dim) for dim in even.ty.shape)
    last = int(odd.ty.shape[-1])

    def define(a: Any, b: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            *row, k = index
            return tirx.if_then_else((k % 2).equal(0), a(*row, k // 2), b(*row, tirx.min(k // 2, last - 1)))

        return te.compute((*outer, count + last), element, name="alternating")

    return builder.emit(builder.call_te(define, even, odd, primfunc_name_hint="alternating"))
