"""Turn the operators that have a template into PrimFuncs with packed constant weights."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, topi

from ingot.passes.live import spare_bytes
from ingot.passes.picks import Chooser, conv2d_text, depthwise_text, matmul_text
from ingot.passes.rewriter import Rewriter, dtype_of, op_name, rewrite, shape_of
from ingot.passes.select_integers import IntegerLayers, reads_padding_alone, stored_of, window_of
from ingot.passes.state import State
from ingot.passes.stored_weights import select_stored
from ingot.passes.template_call import call_function, call_template
from ingot.passes.windows import POOLS, call_plane, call_pool, plane_of, pool_of, resize_of
from ingot.schedules import conv2d, depthwise, resize, winograd, winograd_nests
from ingot.schedules.groups import join_weight
from ingot.target import Target


def select_templates(state: State) -> State:
    """Turn the operators that have a template into PrimFuncs with packed constant weights.

    Case 1: conv2d (NHWC, OHWI, constant weights): `schedules.conv2d`; of several groups also (`schedules.groups`).
            Of whole numbers: `schedules.conv2d_int8`, which also adds a bias and casts to int32 where that follows.
    Case 2: depthwise conv2d (groups = channels = outputs): `schedules.depthwise`.
    Case 3: matmul with a constant 2-D right-hand side: `schedules.conv2d` as a 1x1 convolution.
    In cases 1 to 3 a dequantize before it joins the kernel: what lies in memory stays 8 bits wide.
    Case 4: resize2d (nearest or linear): `schedules.resize`, its tables as weights.
    Case 5: max_pool2d and avg_pool2d: `schedules.pooling`; of a dequantize TVM's own pooling, reading 8-bit data.
    Case 6: conv2d of case 1 with 3x3 windows and stride 1, where that is estimated to be faster: `schedules.winograd`.
    Case 7: conv2d, matmul and take whose weights are stored in few bits: `passes.stored_weights`.
    Case 8: pools and convolutions that `nhwc_layout` left in NCHW: `schedules.planes`, `schedules.planes_product`.
    Case 9: conv2d of cases 1 and 2 with computed weights, float32 and not of several groups: packed at run time.
    All else keeps its operator, for `fuse` to legalise with TVM's own definitions.
    """
    target, spare, choose = state.target, spare_bytes(state), Chooser(state)
    integers = IntegerLayers(state, choose, spare)
    macs = 0

    def visit(rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        nonlocal macs
        name = op_name(call)
        if call in integers.absorbed:  # part of the layer before it
            return next(arg for arg in args if rewriter.weight(arg) is None)
        found = select_stored(rewriter, call, args, target) or integers.select(rewriter, call, args)
        if found is not None:
            result, count = found
        elif (plane := plane_of(state, call)) is not None:
            result, count = call_plane(rewriter, call, args, plane, target), plane.macs
        elif name == "relax.nn.conv2d":
            result, count = _conv2d(rewriter, call, args, target, spare.get(call, 0), choose)
        elif name == "relax.matmul":
            result, count = _matmul(rewriter, call, args, target, choose)
        elif name == "relax.image.resize2d":
            result, count = _resize2d(rewriter, call, args, target), 0
        elif name in POOLS:
            result, count = _pool2d(rewriter, call, args, target), 0
        else:
            return None
        macs += count
        return result

    return rewrite(state, visit).having(macs=state.macs + macs)


def _conv2d(
    rewriter: Rewriter,
    call: Any,  # noqa: ANN401
    args: list[Any],
    target: Target,
    workspace: int,
    choose: Chooser,
) -> tuple[Any, int]:
    """Cases 1, 2 and 6; `workspace` is the bytes of the arena the call may use for itself."""
    attrs, weight = call.attrs, rewriter.weight(args[1])
    out_channels, kh, kw, _ = shape_of(args[1])
    channels, groups = shape_of(args[0])[3], int(attrs.groups)
    common = window_of(call, args)
    positions = 1
    for dim in shape_of(call)[:3]:
        positions *= dim
    count = positions * out_channels * kh * kw * (channels // groups)
    if dtype_of(args[0]) != dtype_of(call) or dtype_of(args[1]) != dtype_of(call):
        return None, count
    if reads_padding_alone(common, shape_of(call)[1:3]):  # loops without any load: nothing for a template
        return None, count
    if weight is None:
        return _computed_weights(rewriter, call, args, target), count
    base = str(getattr(args[1], "name", "weight"))
    data, convert = stored_of(rewriter, args[0])
    stored = convert.dtype if convert is not None else common["dtype"]
    if groups > 1 and not groups == channels == out_channels:
        if convert is not None:
            return None, count
        workload = conv2d.Conv2DWorkload(
            in_channels=channels // groups, out_channels=out_channels, groups=groups, **common
        )
        together = conv2d.groups_to_join(workload, target)
        weight = join_weight(weight, groups, together)
        workload = conv2d.joined(workload, together)
        groups = workload.groups
        if groups > 1:
            config = conv2d.default_config(workload, target)
            packed = rewriter.add_weight(f"{base}_packed", conv2d.pack_weight(weight, config.block, groups))
            return call_template(rewriter, "conv2d", conv2d.compute(workload, config), [data, packed], call.ty), count
    if groups == 1:
        workload = conv2d.Conv2DWorkload(in_channels=channels, out_channels=out_channels, **common)
        fits = convert is None and winograd.supports(workload, target)
        fast = winograd.default_config(workload, target, workspace) if fits else None

        def space() -> list[Any]:
            tiles = conv2d.variants(workload, target)
            return [*tiles, *winograd.configs(workload, target, workspace)] if fits else list(tiles)

        default = fast or conv2d.default_config(workload, target)
        config = choose(call, conv2d_text(workload, stored), space, default)
        if isinstance(config, winograd.WinogradConfig):
            transformed = rewriter.add_weight(f"{base}_winograd", winograd.pack_weight(weight, config))
            function = winograd_nests.primitive(workload, config, target)
            return call_function(rewriter, "winograd_conv2d", function, [data, transformed], call.ty), count
        packed = rewriter.add_weight(f"{base}_packed", conv2d.pack_weight(weight, config.block))
        tensors = conv2d.compute(workload, config, convert)
        return call_template(rewriter, "conv2d", tensors, [data, packed], call.ty), count
    if groups == channels == out_channels:
        depth = depthwise.DepthwiseWorkload(channels=channels, **common)
        depth_config = choose(
            call,
            depthwise_text(depth, stored),
            lambda: depthwise.configs(depth, target),
            depthwise.default_config(depth, target),
        )
        packed = rewriter.add_weight(f"{base}_packed", depthwise.pack_weight(weight))
        tensors = depthwise.compute(depth, depth_config, convert)
        return call_template(rewriter, "depthwise_conv2d", tensors, [data, packed], call.ty), count
    return None, count


def _computed_weights(rewriter: Rewriter, call: Any, args: list[Any], target: Target) -> Any:  # noqa: ANN401
    """Case 9."""
    weight, common = args[1], window_of(call, args)
    (out, kh, kw, inner), channels = shape_of(weight), shape_of(args[0])[3]
    if dtype_of(call) != "float32":
        return None
    if call.attrs.groups == channels == out and inner == 1:
        depth = depthwise.DepthwiseWorkload(channels=channels, **common)
        packed = relax.op.permute_dims(rewriter.emit(relax.op.reshape(weight, (out, kh, kw))), [1, 2, 0])
        tensors = depthwise.compute(depth, depthwise.default_config(depth, target))
        return call_template(rewriter, "depthwise_conv2d", tensors, [args[0], rewriter.emit(packed)], call.ty)
    if call.attrs.groups != 1:
        return None
    workload = conv2d.Conv2DWorkload(in_channels=channels, out_channels=out, **common)
    config = conv2d.default_config(workload, target)
    if out % config.block:
        zeros = relax.op.zeros((config.block - out % config.block, kh, kw, inner), "float32")
        weight = rewriter.emit(relax.op.concat([weight, rewriter.emit(zeros)], axis=0))
    blocks = relax.op.reshape(weight, (-1, config.block, kh, kw, inner))
    packed = relax.op.permute_dims(rewriter.emit(blocks), [0, 2, 3, 4, 1])
    tensors = conv2d.compute(workload, config)
    return call_template(rewriter, "conv2d", tensors, [args[0], rewriter.emit(packed)], call.ty)


def _matmul(
    rewriter: Rewriter,
    call: Any,  # noqa: ANN401
    args: list[Any],
    target: Target,
    choose: Chooser,
) -> tuple[Any, int]:
    """Case 3."""
    weight = rewriter.weight(args[1])
    lead, k, n = shape_of(args[0])[:-1], shape_of(args[0])[-1], shape_of(args[1])[-1]
    out = shape_of(call)
    count = k
    for dim in out:
        count *= dim
    if weight is None or weight.ndim != 2 or not lead or dtype_of(args[0]) != dtype_of(call):
        return None, count
    workload = conv2d.MatmulWorkload(lead, k, n, dtype_of(call))
    data, convert = stored_of(rewriter, args[0])
    conv = workload.as_conv()
    config = choose(
        call,
        matmul_text(workload, convert.dtype if convert is not None else workload.dtype),
        lambda: conv2d.variants(conv, target),
        conv2d.default_config(conv, target),
    )
    ohwi = weight.T.reshape(n, 1, 1, k)
    base = str(getattr(args[1], "name", "weight"))
    packed = rewriter.add_weight(f"{base}_packed", conv2d.pack_weight(ohwi, config.block))
    tensors = conv2d.compute_matmul(workload, config, convert)
    return call_template(rewriter, "matmul", tensors, [data, packed], call.ty), count


def _resize2d(rewriter: Rewriter, call: Any, args: list[Any], target: Target) -> Any:  # noqa: ANN401
    """Case 4."""
    workload = resize_of(call)
    if workload is None:
        return None
    tables = [rewriter.constant(table, "resize_table") for table in resize.all_tables(workload)]
    tensors = resize.compute(workload, resize.default_config(workload, target))
    return call_template(rewriter, "resize2d", tensors, [args[0], *tables], call.ty)


def _pool2d(rewriter: Rewriter, call: Any, args: list[Any], target: Target) -> Any:  # noqa: ANN401
    """Case 5."""
    attrs = call.attrs
    data, convert = stored_of(rewriter, args[0])
    if str(attrs.layout) != "NHWC" or str(attrs.out_layout) != "NHWC":
        return None
    if convert is None:
        workload = pool_of(call)
        return None if workload is None else call_pool(rewriter, args, workload, target)
    stored = te.placeholder(shape_of(data), convert.dtype, name="data")
    real = te.compute(shape_of(data), lambda *i: convert(stored(*i)), name="dequantized")
    kind = "max" if POOLS[op_name(call)] == "max" else "avg"
    out = topi.nn.pool2d(
        real,
        kernel=[int(v) for v in attrs.pool_size],
        stride=[int(v) for v in attrs.strides],
        dilation=[int(v) for v in attrs.dilation],
        padding=[int(v) for v in attrs.padding],
        pool_type=kind,
        ceil_mode=bool(attrs.ceil_mode),
        layout="NHWC",
        count_include_pad=bool(attrs.count_include_pad),
    )
    return call_template(rewriter, f"{kind}_pool2d", [stored, out], [data], call.ty)
