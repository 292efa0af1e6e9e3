"""Resize and Upsample with sizes known at compile time."""

from __future__ import annotations

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.onnx_ops.resize_axes import resize_by_axes
from ingot.frontend.tvm_types import Expr

_COORDINATES = frozenset(
    (
        "half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric",
        "tf_half_pixel_for_nn",
    )
)  # fmt: skip


@converts("Resize", "Upsample")
def _resize(ctx: Context) -> Expr:
    from tvm import relax

    source, target = ctx.shape(), ctx.out_shape()
    if source == target and ctx.attr("coordinate_transformation_mode") != "tf_crop_and_resize":
        return ctx.inputs[0]
    mode = ctx.attr("mode", "nearest")
    old = ctx.node.op_type == "Upsample" or ctx.opset < 11
    coordinates = "asymmetric" if old else ctx.attr("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else ctx.attr("nearest_mode", "round_prefer_floor")
    scales = [out / size for out, size in zip(target, source, strict=True)]
    factors = [round(scale) for scale in scales]
    whole = all(factor >= 1 and factor * size == out for factor, size, out in zip(factors, source, target, strict=True))
    plain = (coordinates, rounding) in (
        ("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")
    )  # fmt: skip
    if mode == "nearest" and whole and plain and len(source) != 4:
        x = ctx.inputs[0]
        for axis, factor in enumerate(factors):
            if factor > 1:
                x = ctx.emit(relax.op.repeat(x, factor, axis))
        return x
    if mode not in ("nearest", "linear", "cubic") or coordinates not in _COORDINATES | {"tf_crop_and_resize"}:
        raise ctx.unsupported(f"mode {mode!r}, coordinates {coordinates!r}", "nearest, linear or cubic")
    image = len(source) in (3, 4) and source[:2] == target[:2] and coordinates in _COORDINATES
    special = ctx.attr("antialias", 0) or ctx.attr("keep_aspect_ratio_policy", "stretch") != "stretch"
    if not image or special or not _whole_sizes(ctx):
        return resize_by_axes(ctx, mode, coordinates, rounding)
    x = ctx.inputs[0]
    if len(source) == 3:
        x = relax.op.reshape(x, (source[0], source[1], 1, source[2]))
    if coordinates == "half_pixel_symmetric":
        coordinates = "half_pixel"  # the same where output sizes are whole, which _whole_sizes made sure of
    result = relax.op.image.resize2d(
        x,
        size=(1, target[2]) if len(source) == 3 else target[2:],
        layout="NCHW",
        method={"nearest": "nearest_neighbor"}.get(mode, mode),
        coordinate_transformation_mode=coordinates,
        rounding_method=rounding if mode == "nearest" else "",
        cubic_alpha=float(ctx.attr("cubic_coeff_a", -0.75)),
        cubic_exclude=int(ctx.attr("exclude_outside", 0)),
    )
    return relax.op.reshape(result, target) if len(source) == 3 else result


def _whole_sizes(ctx: Context) -> bool:
    """Whether the sizes reproduce the scales, as Relax, which computes scales from sizes, needs it."""
    index = 1 if ctx.node.op_type == "Upsample" or ctx.opset < 11 else 2
    given = ctx.value(index)
    scales = given.reshape(-1).tolist() if given is not None else ctx.attr("scales")
    if not scales:
        return True
    if ctx.attr("axes"):
        return False
    pairs = zip(scales, ctx.out_shape(), ctx.shape(), strict=True)
    return all(abs(scale * size - out) <= 1e-3 for scale, out, size in pairs)
