"""Layers of whole numbers as integer kernels: part of `select_templates`."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from ingot.frontend import fixed_point
from ingot.passes.rewriter import Rewriter, dtype_of, op_name, shape_of
from ingot.passes.state import State
from ingot.passes.sum_readers import SumReaders, sum_readers
from ingot.passes.template_call import call_template
from ingot.schedules import conv2d, conv2d_int8, depthwise, depthwise_int8
from ingot.schedules.microkernels import dot_of
from ingot.schedules.padding import Dequantize

_LINEAR = ("relax.nn.conv2d", "relax.matmul")


def window_of(call: Any, args: list[Any]) -> dict[str, Any]:  # noqa: ANN401
    """Return what all workloads of a conv2d have in common."""
    attrs, (batch, height, width, _) = call.attrs, shape_of(args[0])
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "kernel": shape_of(args[1])[1:3],
        "strides": tuple(int(v) for v in attrs.strides),
        "padding": tuple(int(v) for v in attrs.padding),
        "dilation": tuple(int(v) for v in attrs.dilation),
        "dtype": dtype_of(call),
    }


def stored_of(rewriter: Rewriter, data: Any) -> tuple[Any, Dequantize | None]:  # noqa: ANN401
    """Return the tensor to read and, if it is the operand of a per-tensor dequantize, how to convert it."""
    value = rewriter.value_of(data)
    if op_name(value) != "relax.dequantize" or dtype_of(value) != "float32":
        return data, None
    scale, zero_point = rewriter.weight(value.args[1]), rewriter.weight(value.args[2])
    stored = dtype_of(value.args[0])
    if scale is None or zero_point is None or stored not in ("int8", "uint8"):
        return data, None
    if scale.size != 1 or zero_point.size != 1:
        return data, None
    return value.args[0], Dequantize(stored, float(scale.reshape(-1)[0]), int(zero_point.reshape(-1)[0]))


class IntegerLayers:
    """Makes integer kernels of the convolutions and matrix products of one program that read whole numbers.

    A layer takes its bias with it, and the cast to int32 or the requantisation that follows, where `sum_readers` finds
    one: those calls are then `absorbed`.
    """

    def __init__(self, state: State) -> None:
        self.target = state.target
        self.readers = sum_readers(state)
        self.absorbed: set[Any] = set()

    def select(self, rewriter: Rewriter, call: Any, args: list[Any]) -> tuple[Any, int] | None:  # noqa: ANN401
        """Return the kernel's call and its multiply-accumulates, or None for what is no such layer.

        The result is what the last absorbed call gave, else float32.
        """
        if op_name(call) not in _LINEAR:
            return None
        weight = rewriter.weight(args[1])
        data, convert = stored_of(rewriter, args[0])
        if weight is None or convert is None or convert.scale != 1.0:
            return None
        matrix = op_name(call) == "relax.matmul"
        if not matrix and int(call.attrs.groups) != 1:
            return self._depthwise(rewriter, call, args, weight, convert)
        if matrix and weight.ndim != 2:
            return None
        ohwi = weight.T.reshape(weight.shape[1], 1, 1, weight.shape[0]) if matrix else weight
        dot = dot_of(self.target, ohwi)
        if dot is None or ohwi[0].size > conv2d_int8.MAX_TERMS:
            return None
        readers, out_dtype = self._absorb(call)
        if matrix:
            product = conv2d.MatmulWorkload(shape_of(args[0])[:-1], weight.shape[0], weight.shape[1], dtype_of(call))
            config = conv2d_int8.matmul_config(product, self.target, dot)
            tensors, macs = conv2d_int8.compute_matmul(product, config, convert, dot, out_dtype), product.macs
        else:
            window = window_of(call, args)
            workload = conv2d.Conv2DWorkload(in_channels=weight.shape[3], out_channels=weight.shape[0], **window)
            config = conv2d_int8.default_config(workload, self.target, dot)
            tensors, macs = conv2d_int8.compute(workload, config, convert, dot, out_dtype), workload.macs
        packed = rewriter.add_weight(f"{base_name(args)}_packed", conv2d_int8.pack_weight(ohwi, config.block, dot))
        constant = conv2d_int8.correction(ohwi, convert, dot, readers.bias)
        constants = [packed, rewriter.add_weight(f"{base_name(args)}_correction", constant)]
        name = "matmul_int8" if matrix else "conv2d_int8"
        return _finished(rewriter, name, call, tensors, [data, *constants], readers), macs

    def _absorb(self, call: Any) -> tuple[SumReaders, str]:  # noqa: ANN401
        """Return what a layer absorbs, and the dtype of its sums."""
        readers = self.readers.get(call)
        if readers is None:
            return SumReaders((), None), "float32"
        self.absorbed.update(readers.absorbed)
        return readers, "int32"

    def _depthwise(
        self,
        rewriter: Rewriter,
        call: Any,  # noqa: ANN401
        args: list[Any],
        weight: np.ndarray,
        convert: Dequantize,
    ) -> tuple[Any, int] | None:
        """Return the kernel's call and its multiply-accumulates for groups = channels = outputs."""
        channels = shape_of(args[0])[3]
        whole = depthwise_int8.is_whole(weight)
        if not (int(call.attrs.groups) == channels == weight.shape[0] and weight.shape[3] == 1 and whole):
            return None
        workload = depthwise.DepthwiseWorkload(channels=channels, **window_of(call, args))
        config = depthwise_int8.default_config(workload, weight, self.target)
        readers, out_dtype = self._absorb(call)
        packed = depthwise_int8.pack_weight(weight, config, self.target)
        constants = [
            rewriter.add_weight(f"{base_name(args)}_packed", packed),
            rewriter.add_weight(
                f"{base_name(args)}_correction", depthwise_int8.correction(weight, convert, readers.bias)
            ),
        ]
        tensors = depthwise_int8.compute(workload, config, convert, self.target, out_dtype)
        data, _ = stored_of(rewriter, args[0])
        return _finished(rewriter, "depthwise_int8", call, tensors, [data, *constants], readers), workload.macs


def _finished(
    rewriter: Rewriter,
    name: str,
    call: Any,  # noqa: ANN401
    tensors: list[Any],
    args: list[Any],
    readers: SumReaders,
) -> Any:  # noqa: ANN401
    """Return the template's call, requantised where the model quantises the sums."""
    result = call_template(rewriter, name, tensors, args, relax.TensorType(shape_of(call), str(tensors[-1].dtype)))
    end = readers.quantized
    if end is None:
        return result
    m, t, s = (
        rewriter.constant(number, f"requantize_{part}")
        for number, part in zip(fixed_point.constants(end.ratio, end.zero_point), "mts", strict=True)
    )
    return fixed_point.requantize(rewriter.emit(result), (m, t, s), end.limits, end.dtype, away=False)


def base_name(args: list[Any]) -> str:
    """Return what the packed forms of a layer's weights are called after."""
    return str(getattr(args[1], "name", "weight"))
