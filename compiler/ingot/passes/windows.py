"""What the templates for pools and for layers that stay in NCHW need to know of a call, and the calls of them."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.ir import GenericConst

from ingot.passes.rewriter import Rewriter, dtype_of, op_name, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import call_function, call_template
from ingot.schedules import planes, planes_product, pooling, resize
from ingot.schedules.planes import PlaneWorkload
from ingot.schedules.planes_product import ProductWorkload
from ingot.schedules.pooling import PoolWorkload
from ingot.target import Target

POOLS = {"relax.nn.max_pool2d": "max", "relax.nn.avg_pool2d": "mean"}


def pool_of(call: Any) -> PoolWorkload | None:  # noqa: ANN401
    """Return what a call of a 2-D pool of float32 computes, NCHW or NHWC; None for another call."""
    if op_name(call) not in POOLS or dtype_of(call) != "float32" or dtype_of(call.args[0]) != "float32":
        return None
    attrs = call.attrs
    layout = str(attrs.layout)
    if layout not in ("NCHW", "NHWC") or str(attrs.out_layout) not in ("", layout):
        return None
    size, out = (dict(zip(layout, shape_of(item), strict=True)) for item in (call.args[0], call))
    return PoolWorkload(
        kind=POOLS[op_name(call)],
        batch=size["N"],
        height=size["H"],
        width=size["W"],
        channels=size["C"],
        out_height=out["H"],
        out_width=out["W"],
        kernel=_pair(attrs.pool_size),
        strides=_pair(attrs.strides),
        padding=(*_pair(attrs.padding[:2]), *_pair(attrs.padding[2:])),
        dilation=_pair(attrs.dilation),
        include_padding=bool(attrs.count_include_pad),
    )


def plane_of(state: State, call: Any) -> PlaneWorkload | ProductWorkload | None:  # noqa: ANN401
    """Return what a layer in NCHW computes for which there is a template: a pool, a depthwise or a 1x1 convolution.

    None for all else, and under half precision, whose layers are NHWC.
    """
    if state.precision != "fp32":
        return None
    if op_name(call) == "relax.nn.conv2d" and str(call.attrs.data_layout) == "NCHW":
        return _plane_of_conv2d(state, call)
    pool = pool_of(call)
    if pool is None or str(call.attrs.layout) != "NCHW":
        return None
    image = (pool.batch, pool.channels, pool.height, pool.width, pool.out_height, pool.out_width)
    found = PlaneWorkload(pool.kind, *image, pool.kernel, pool.strides, pool.padding[:2], pool.dilation)
    return found if planes.supports(found) else None


def moved_from_nhwc(value: Any) -> bool:  # noqa: ANN401
    """Say whether an expression is the transpose of an NHWC value to NCHW."""
    return op_name(value) == "relax.permute_dims" and list(value.attrs.axes or ()) == [0, 3, 1, 2]


def _plane_of_conv2d(state: State, call: Any) -> PlaneWorkload | ProductWorkload | None:  # noqa: ANN401
    attrs, (data, weight) = call.attrs, call.args
    constants = list(state.module["main"].params)[state.n_inputs :]
    constant = isinstance(weight, GenericConst) or any(weight.same_as(param) for param in constants)
    if not constant or str(attrs.kernel_layout) != "OIHW":
        return None
    if any(dtype_of(item) != "float32" for item in (call, data, weight)):
        return None
    (batch, channels, height, width), (_, out_channels, out_height, out_width) = shape_of(data), shape_of(call)
    kernel, strides, groups = _pair(shape_of(weight)[2:]), _pair(attrs.strides), int(attrs.groups)
    if groups == 1 and kernel == (1, 1) and not any(int(v) for v in attrs.padding):
        sizes = (batch, channels, out_channels, height, width, out_height, out_width)
        product = ProductWorkload(*sizes, strides)
        return product if planes_product.default_config(product, state.target) is not None else None
    if not groups == channels == out_channels:
        return None
    image, padding = (batch, channels, height, width, out_height, out_width), _pair(attrs.padding[:2])
    plane = PlaneWorkload("depthwise", *image, kernel, strides, padding, _pair(attrs.dilation))
    return plane if planes.supports(plane) else None


def _pair(values: Any) -> tuple[int, int]:  # noqa: ANN401 - a sequence of numbers
    first, second = (int(v) for v in values)
    return first, second


def resize_of(call: Any) -> resize.ResizeWorkload | None:  # noqa: ANN401
    """Return what a call of resize2d computes, NCHW or NHWC; None for another call, or one that has no template."""
    if op_name(call) != "relax.image.resize2d" or dtype_of(call.args[0]) != dtype_of(call):
        return None
    attrs = call.attrs
    layout, coordinates = str(attrs.layout), str(attrs.coordinate_transformation_mode)
    if layout not in ("NCHW", "NHWC"):
        return None
    size, out = (dict(zip(layout, shape_of(item), strict=True)) for item in (call.args[0], call))
    workload = resize.ResizeWorkload(
        batch=size["N"],
        height=size["H"],
        width=size["W"],
        channels=size["C"],
        out_height=out["H"],
        out_width=out["W"],
        method=str(attrs.method),
        coordinates=coordinates,
        # No name means TVM's default.
        rounding=str(attrs.rounding_method) or ("round" if coordinates == "align_corners" else "floor"),
        dtype=dtype_of(call),
        layout=layout,
    )
    return workload if workload.supported else None


def may_stay(state: State, call: Any) -> bool:  # noqa: ANN401
    """Say whether a layer in NCHW has a template there."""
    if plane_of(state, call) is not None:
        return True
    return state.precision == "fp32" and resize_of(call) is not None and str(call.attrs.layout) == "NCHW"


def call_plane(
    rewriter: Rewriter,
    call: Any,  # noqa: ANN401
    args: list[Any],
    workload: PlaneWorkload | ProductWorkload,
    target: Target,
) -> Any:  # noqa: ANN401
    """Return the call of the template on a layer in NCHW."""
    operands, weight = [args[0]], rewriter.weight(args[1]) if len(args) > 1 else None
    base = str(getattr(args[-1], "name", "weight"))
    if isinstance(workload, ProductWorkload):
        tile = planes_product.default_config(workload, target)
        if weight is None or tile is None:
            return None
        packed = planes_product.pack_weight(weight[:, :, 0, 0], tile.rows)
        function = planes_product.primitive(workload, tile)
        return call_function(
            rewriter, "product_planes", function, [*operands, rewriter.add_weight(f"{base}_planes", packed)], call.ty
        )
    config, scale = planes.default_config(workload, target), 1.0
    if weight is not None:
        operands.append(rewriter.add_weight(f"{base}_planes", planes.pack_weight(weight)))
    elif (pool := pool_of(call)) is not None and pool.kind == "mean":
        scales, scale = _scales(rewriter, pool)
        operands += scales
    function = planes.primitive(workload, config, scale, table=workload.kind == "mean" and len(operands) > 1)
    return call_function(rewriter, f"{workload.kind}_planes", function, operands, call.ty)


def call_pool(rewriter: Rewriter, args: list[Any], workload: PoolWorkload, target: Target) -> Any:  # noqa: ANN401
    """Return the call of the template on a pool in NHWC; all but the last of several stages are bound."""
    result = args[0]
    for w in workload.stages():
        scales, scale = _scales(rewriter, w) if w.kind == "mean" else ([], 1.0)
        tensors = pooling.compute(w, pooling.default_config(w, target), scale, table=bool(scales))
        ty = relax.TensorType((w.batch, w.out_height, w.out_width, w.channels), "float32")
        operand = rewriter.emit(result)
        result = call_template(rewriter, f"{w.kind}_pool2d", tensors, [operand, *scales], ty)
    return result


def _scales(rewriter: Rewriter, workload: PoolWorkload) -> tuple[list[Any], float]:
    """Return what the sums of a mean are multiplied by: a table as a weight, or one number."""
    table = pooling.inverse_counts(workload)
    if table.size > 1:
        return [rewriter.add_weight("inverse_counts", table)], 1.0
    return [], float(table[0, 0])
