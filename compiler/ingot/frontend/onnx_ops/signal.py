"""Fourier transforms of a known length: products with constant matrices of cosines and sines."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.frontend.fourier import matrices, real_transform
from ingot.frontend.onnx_ops.context import Context, converts, normal_axis
from ingot.frontend.tvm_types import Expr


def _matrices(ctx: Context, length: int, rows: int, inverse: bool, dtype: str) -> tuple[Expr, Expr]:
    """Cosines and sines [length, rows] as weights."""
    cosines, sines = matrices(length, rows, inverse=inverse)
    kind = np.dtype(dtype)
    return ctx.array("cosines", cosines.astype(kind)), ctx.array("sines", sines.astype(kind))


@converts("DFT")
def _dft(ctx: Context) -> Expr:
    from tvm import relax

    shape, rank = ctx.shape(), len(ctx.shape())
    inverse, onesided = bool(ctx.attr("inverse", 0)), bool(ctx.attr("onesided", 0))
    axis = ctx.attr("axis", 1) if ctx.opset < 20 else -2
    if ctx.has(2):
        axis = int(ctx.need(2, "axis").reshape(()))
    axis = normal_axis(axis, rank)
    length = int(ctx.need(1, "length").reshape(())) if ctx.has(1) else 0
    whole_back = inverse and onesided
    length = length or (2 * (shape[axis] - 1) if whole_back else shape[axis])
    parts = shape[-1]
    order = [i for i in range(rank - 1) if i != axis] + [axis]
    back = [order.index(i) for i in range(rank - 1)]

    def part(index: int) -> Expr:
        cut = relax.op.strided_slice(ctx.inputs[0], [rank - 1], [index], [index + 1], [1])
        flat = ctx.emit(relax.op.permute_dims(ctx.emit(relax.op.reshape(cut, shape[:-1])), order))
        have = shape[axis]
        if whole_back:
            flat = _mirrored(ctx, flat, have, length, negative=index == 1)
        elif have > length:
            flat = relax.op.strided_slice(flat, [rank - 2], [0], [length], [1])
        elif have < length:
            flat = relax.op.nn.pad(flat, [*[0] * (2 * (rank - 2)), 0, length - have])
        return ctx.emit(flat)

    rows = ctx.out_shape()[axis]
    real = part(0)
    if parts == 1 and not inverse and rows == length // 2 + 1:
        first, second = real_transform(ctx.bb, ctx.array, real, ctx.dtype())
    else:
        cosines, sines = _matrices(ctx, length, rows, inverse, ctx.dtype())
        first, second = relax.op.matmul(real, cosines), relax.op.matmul(real, sines)
    if parts == 2:
        imaginary = part(1)
        first = relax.op.subtract(first, relax.op.matmul(imaginary, sines))
        second = relax.op.add(second, relax.op.matmul(imaginary, cosines))
    results = [first, second][: ctx.out_shape()[-1]]
    return relax.op.stack([ctx.emit(relax.op.permute_dims(ctx.emit(item), back)) for item in results], axis=rank - 1)


def _mirrored(ctx: Context, x: Expr, have: int, length: int, *, negative: bool) -> Expr:
    """The whole spectrum of a real signal from its first half, along the last axis."""
    from tvm import relax

    places = np.arange(length)
    mirrored = places >= have
    source = np.where(mirrored, length - places, places)
    beyond = (source >= have) | (source < 0)
    sign = np.where(mirrored & negative, -1.0, 1.0) * ~beyond
    whole = ctx.emit(
        relax.op.take(x, ctx.array("mirror", np.where(beyond, 0, source)), len(ctx.shape()) - 2, mode="clip")
    )
    return relax.op.multiply(whole, ctx.array(f"signs{int(negative)}", sign.astype(np.dtype(ctx.dtype()))))


@converts("STFT")
def _stft(ctx: Context) -> Expr:
    """Frames of the signal times the window, each transformed: [batch, frames, bins, 2]."""
    from tvm import relax, te

    shape = ctx.shape()
    step = int(ctx.need(1, "frame step").reshape(()))
    length = ctx.shape(2)[0] if ctx.has(2) else int(ctx.need(3, "frame length").reshape(()))
    if ctx.has(3) and int(ctx.need(3, "frame length").reshape(())) != length:
        raise ctx.unsupported(f"a window of {length}", "a window as long as a frame")
    batch, frames, bins, _ = ctx.out_shape()

    def cut(x: Any, *window: Any) -> Any:  # noqa: ANN401
        def at(n: Any, frame: Any, i: Any, part: Any) -> Any:  # noqa: ANN401
            value = x[(n, frame * step + i, part) if len(shape) == 3 else (n, frame * step + i)]
            return value * window[0][i] if window else value

        return te.compute((batch, frames, length, shape[2] if len(shape) == 3 else 1), at, name="frames")

    arguments = [ctx.inputs[0], *([ctx.inputs[2]] if ctx.has(2) else [])]
    whole = ctx.emit(ctx.bb.call_te(cut, *arguments, primfunc_name_hint="frames"))

    def part(index: int) -> Expr:
        piece = relax.op.strided_slice(whole, [3], [index], [index + 1], [1])
        return ctx.emit(relax.op.reshape(piece, (batch, frames, length)))

    if bins == length // 2 + 1 and (len(shape) < 3 or shape[2] == 1):
        return relax.op.stack([*real_transform(ctx.bb, ctx.array, part(0), ctx.dtype())], axis=3)
    cosines, sines = _matrices(ctx, length, bins, False, ctx.dtype())
    first, second = relax.op.matmul(part(0), cosines), relax.op.matmul(part(0), sines)
    if len(shape) == 3 and shape[2] == 2:
        first = relax.op.subtract(first, relax.op.matmul(part(1), sines))
        second = relax.op.add(second, relax.op.matmul(part(1), cosines))
    return relax.op.stack([ctx.emit(first), ctx.emit(second)], axis=3)


@converts("MelWeightMatrix")
def _mel(ctx: Context) -> Expr:
    """Only reached where an input is no constant: the matrix's shape depends on them."""
    raise ctx.unsupported("bins or rates that are computed at run time", "constants")
