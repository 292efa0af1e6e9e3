"""Resize one axis after the other: each is a product with a small constant matrix, or a read at constant indices.

This covers every form of Resize whose sizes are known: any rank, scales that give no whole sizes, antialiasing and
cropping. The matrices follow ONNX's reference: rows are output places, columns source places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ingot.frontend.onnx_ops.context import Context, normal_axis
from ingot.frontend.tvm_types import Expr

# Elements of one axis' matrix; larger resizes belong to images, which have a kernel of their own.
_MAX_MATRIX = 2**24


@dataclass(frozen=True)
class _Axis:
    """One axis: its sizes, the scale as the model gives it, and for cropping the part that is read."""

    size: int
    out: int
    scale: float
    begin: float = 0.0
    end: float = 1.0


def _coordinates(axis: _Axis, mode: str) -> np.ndarray:
    """The source coordinate of each output place."""
    place = np.arange(axis.out, dtype=np.float64)
    scaled = axis.scale * axis.size
    if mode == "align_corners":
        return place * (axis.size - 1) / (scaled - 1) if scaled > 1 else np.zeros_like(place)
    if mode == "asymmetric":
        return place / axis.scale
    if mode == "tf_half_pixel_for_nn":
        return (place + 0.5) / axis.scale
    if mode == "pytorch_half_pixel" and scaled <= 1:
        return np.full_like(place, -0.5)
    if mode == "half_pixel_symmetric":
        adjusted = axis.out / scaled
        centre = axis.size / 2
        return centre * (1 - adjusted) + (place + 0.5) / axis.scale - 0.5
    if mode == "tf_crop_and_resize":
        if axis.out == 1:
            return np.full_like(place, (axis.end - axis.begin) * (axis.size - 1) / 2)
        step = (axis.end - axis.begin) * (axis.size - 1) / (axis.out - 1)
        return axis.begin * (axis.size - 1) + place * step
    return np.asarray((place + 0.5) / axis.scale - 0.5)


def _kernel(distance: np.ndarray, method: str, a: float) -> np.ndarray:
    away = np.abs(distance)
    if method == "linear":
        return np.asarray(np.maximum(0.0, 1.0 - away))
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    return np.asarray(np.where(away <= 1, near, np.where(away < 2, far, 0.0)))


def _matrix(axis: _Axis, where: np.ndarray, method: str, a: float, exclude: bool, antialias: bool) -> np.ndarray:
    """Weights [out, size] of a linear or cubic resize."""
    shrink = min(axis.scale, 1.0) if antialias else 1.0
    reach = math.ceil((1 if method == "linear" else 2) / shrink) + 1
    low = np.floor(where).astype(np.int64)
    matrix = np.zeros((axis.out, axis.size))
    for offset in range(-reach, reach + 1):
        source = low + offset
        weight = _kernel((source - where) * shrink, method, a)
        inside = (source >= 0) & (source < axis.size)
        if exclude:
            weight = np.where(inside, weight, 0.0)
        np.add.at(matrix, (np.arange(axis.out), np.clip(source, 0, axis.size - 1)), weight)
    if exclude or antialias:
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return matrix


def _nearest(where: np.ndarray, rounding: str, size: int) -> np.ndarray:
    if rounding.startswith("round"):
        rounded = np.ceil(where - 0.5) if rounding == "round_prefer_floor" else np.floor(where + 0.5)
    else:
        rounded = np.ceil(where) if rounding == "ceil" else np.floor(where)
    return np.clip(rounded, 0, size - 1).astype(np.int64)


def _axes(ctx: Context, coordinates: str) -> list[_Axis]:
    """Every axis of the input, with scales as ONNX derives them."""
    source, target = ctx.shape(), ctx.out_shape()
    rank = len(source)
    chosen = [normal_axis(int(axis), rank) for axis in (ctx.attr("axes") or range(rank))]
    scales = [out / size for out, size in zip(target, source, strict=True)]
    old = ctx.node.op_type == "Upsample" or ctx.opset < 11
    given = ctx.value(1 if old else 2)
    listed = given.reshape(-1).tolist() if given is not None and given.size else ctx.attr("scales")
    policy = ctx.attr("keep_aspect_ratio_policy", "stretch")
    if listed:
        for axis, scale in zip(chosen, listed, strict=False):
            scales[axis] = float(scale)
    elif policy != "stretch" and ctx.has(3):
        sizes = ctx.need(3, "sizes").reshape(-1).tolist()
        ratios = [size / source[axis] for axis, size in zip(chosen, sizes, strict=True)]
        for axis in chosen:
            scales[axis] = min(ratios) if policy == "not_larger" else max(ratios)
    begins, ends = [0.0] * rank, [1.0] * rank
    if coordinates == "tf_crop_and_resize":
        roi = ctx.need(1, "roi").reshape(-1).astype(np.float64).tolist()
        for place, axis in enumerate(chosen):
            begins[axis], ends[axis] = roi[place], roi[place + len(chosen)]
    return [_Axis(*entry) for entry in zip(source, target, scales, begins, ends, strict=True)]


def resize_by_axes(ctx: Context, mode: str, coordinates: str, rounding: str) -> Expr:
    """Resize every axis that changes. `mode`: nearest, linear or cubic."""
    from tvm import relax

    if rounding not in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        raise ctx.unsupported(f"nearest_mode {rounding!r}", "round_prefer_floor, round_prefer_ceil, floor or ceil")
    x = ctx.inputs[0]
    floating = np.dtype(ctx.dtype()).kind == "f"
    if mode != "nearest" and not floating:
        x = relax.op.astype(x, "float32")
    dtype = ctx.dtype() if floating else "float32"
    crop = coordinates == "tf_crop_and_resize"
    outside: np.ndarray | None = None
    for number, axis in enumerate(_axes(ctx, coordinates)):
        if axis.size == axis.out and axis.scale == 1.0 and (axis.begin, axis.end) == (0.0, 1.0):
            continue
        where = _coordinates(axis, coordinates)
        if crop:
            beyond = (where < 0) | (where > axis.size - 1)
            shape = [axis.out if i == number else 1 for i in range(len(ctx.out_shape()))]
            outside = beyond.reshape(shape) if outside is None else outside | beyond.reshape(shape)
        if mode == "nearest":
            places = ctx.array(f"places{number}", _nearest(where, rounding, axis.size))
            x = ctx.emit(relax.op.take(x, places, number, mode="clip"))
            continue
        if axis.size * axis.out > _MAX_MATRIX:
            raise ctx.unsupported(f"{axis.size} to {axis.out}", f"at most {_MAX_MATRIX} weights")
        alpha, exclude = float(ctx.attr("cubic_coeff_a", -0.75)), bool(ctx.attr("exclude_outside", 0))
        weights = _matrix(axis, where, mode, alpha, exclude, bool(ctx.attr("antialias", 0)))
        matrix = ctx.array(f"weights{number}", np.ascontiguousarray(weights.T).astype(np.dtype(dtype)))
        rank = len(ctx.shape())
        order = [i for i in range(rank) if i != number] + [number]
        x = ctx.emit(relax.op.matmul(relax.op.permute_dims(x, order), matrix))
        x = ctx.emit(relax.op.permute_dims(x, [order.index(i) for i in range(rank)]))
    if mode != "nearest" and not floating:
        limits = np.iinfo(ctx.dtype())
        x = relax.op.astype(relax.op.clip(relax.op.round(x), float(limits.min), float(limits.max)), ctx.dtype())
    if outside is not None and np.any(outside):
        mask = ctx.array("outside", np.broadcast_to(outside, ctx.out_shape()))
        x = relax.op.where(mask, ctx.const(float(ctx.attr("extrapolation_value", 0.0))), ctx.emit(x))
    return x
