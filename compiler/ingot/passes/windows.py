"""What the templates for pools and for depthwise layers in NCHW need to know of a call, and the calls of them."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.ir import GenericConst

from ingot.passes.rewriter import Rewriter, dtype_of, op_name, shape_of
from ingot.passes.state import State
from ingot.passes.template_call import call_function, call_template
from ingot.schedules import planes, pooling
from ingot.schedules.planes import PlaneWorkload
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


def plane_of(state: State, call: Any) -> PlaneWorkload | None:  # noqa: ANN401
    """Return what a layer computes that `schedules.planes` covers: a pool or a depthwise convolution in NCHW.

    None for all else, and under half precision, whose layers are NHWC.
    """
    if state.precision != "fp32":
        return None
    if op_name(call) in POOLS and str(call.attrs.layout) == "NCHW":
        pool = pool_of(call)
        found = _plane_of_pool(pool) if pool is not None else None
    elif op_name(call) == "relax.nn.conv2d" and str(call.attrs.data_layout) == "NCHW":
        found = _plane_of_depthwise(state, call)
    else:
        return None
    return found if found is not None and planes.supports(found) else None


def moved_from_nhwc(value: Any) -> bool:  # noqa: ANN401
    """Say whether an expression is the transpose of an NHWC value to NCHW."""
    return op_name(value) == "relax.permute_dims" and list(value.attrs.axes or ()) == [0, 3, 1, 2]


def _plane_of_pool(w: PoolWorkload) -> PlaneWorkload:
    image = (w.batch, w.channels, w.height, w.width, w.out_height, w.out_width)
    return PlaneWorkload(w.kind, *image, w.kernel, w.strides, w.padding[:2], w.dilation)


def _plane_of_depthwise(state: State, call: Any) -> PlaneWorkload | None:  # noqa: ANN401
    attrs, (data, weight) = call.attrs, call.args
    constants = list(state.module["main"].params)[state.n_inputs :]
    constant = isinstance(weight, GenericConst) or any(weight.same_as(param) for param in constants)
    shape, out = shape_of(data), shape_of(call)
    if not constant or not int(attrs.groups) == shape[1] == out[1] or str(attrs.kernel_layout) != "OIHW":
        return None
    if any(dtype_of(item) != "float32" for item in (call, data, weight)):
        return None
    (batch, channels, height, width), kernel = shape, _pair(shape_of(weight)[2:])
    window = (_pair(attrs.strides), _pair(attrs.padding[:2]), _pair(attrs.dilation))
    return PlaneWorkload("depthwise", batch, channels, height, width, out[2], out[3], kernel, *window)


def _pair(values: Any) -> tuple[int, int]:  # noqa: ANN401 - a sequence of numbers
    first, second = (int(v) for v in values)
    return first, second


def call_plane(rewriter: Rewriter, call: Any, args: list[Any], workload: PlaneWorkload, target: Target) -> Any:  # noqa: ANN401
    """Return the call of the template on a layer in NCHW."""
    config, operands, scale = planes.default_config(workload, target), [args[0]], 1.0
    if workload.kind == "depthwise" and (weight := rewriter.weight(args[1])) is not None:
        base = str(getattr(args[1], "name", "weight"))
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
