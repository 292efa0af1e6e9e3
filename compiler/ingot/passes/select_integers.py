"""Layers of whole numbers as integer kernels: part of `select_templates`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.picks import Chooser, integer_text
from ingot.passes.rewriter import Rewriter, bindings_of, dtype_of, op_name, shape_of, uses_of
from ingot.passes.state import State
from ingot.passes.template_call import call_function, call_template
from ingot.schedules import conv2d, conv2d_int8, depthwise, depthwise_int8, winograd_int8
from ingot.schedules.groups import join_weight
from ingot.schedules.microkernels import weight_kind
from ingot.schedules.padding import Dequantize

_LINEAR = ("relax.nn.conv2d", "relax.matmul")


@dataclass(frozen=True)
class WholeSum:
    """A layer whose only reader adds `bias` (or nothing) and casts to int32; `absorbed` are those readers' calls."""

    bias: Any
    absorbed: tuple[Any, ...]


def whole_sums(state: State) -> dict[Any, WholeSum]:
    """Return the layers of `main` followed by astype(int32), or by add(constant) and astype(int32), by their calls."""
    function = state.module["main"]
    constants = {str(param.name) for param in list(function.params)[state.n_inputs :]}
    uses = uses_of(function)
    reader: dict[Any, Any] = {}  # variable with one reader -> that reader's binding
    for binding in bindings_of(function):
        for arg in binding.value.args if isinstance(binding.value, relax.Call) else ():
            if isinstance(arg, relax.Var) and uses.get(arg) == 1:
                reader[arg] = binding
    found: dict[Any, WholeSum] = {}
    for binding in bindings_of(function):
        after = reader.get(binding.var)
        if op_name(binding.value) not in _LINEAR or after is None:
            continue
        bias, absorbed = None, []
        if op_name(after.value) == "relax.add":
            left, right = after.value.args
            bias = right if left.same_as(binding.var) else left
            if isinstance(bias, relax.Var) and str(bias.name) not in constants:
                continue
            absorbed.append(after.value)
            after = reader.get(after.var)
        if after is not None and op_name(after.value) == "relax.astype" and dtype_of(after.var) == "int32":
            found[binding.value] = WholeSum(bias, (*absorbed, after.value))
    return found


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


def reads_padding_alone(window: dict[str, Any], out: tuple[int, ...]) -> bool:
    """Say whether no window of a conv2d (see `window_of`) with this output's height and width holds an input."""
    for axis, size in enumerate((window["height"], window["width"])):
        places = (
            y * window["strides"][axis] + k * window["dilation"][axis] - window["padding"][axis]
            for y in range(out[axis])
            for k in range(window["kernel"][axis])
        )
        if not any(0 <= place < size for place in places):
            return True
    return False


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

    A layer whose sums the model wants as int32 takes its bias and the cast with it: those calls are then `absorbed`.
    workspace: the bytes of the arena that a call may use for itself.
    """

    def __init__(self, state: State, choose: Chooser, workspace: Mapping[Any, int]) -> None:
        self.target, self.choose, self.workspace = state.target, choose, workspace
        self.sums = whole_sums(state)
        self.absorbed: set[Any] = set()

    def select(self, rewriter: Rewriter, call: Any, args: list[Any]) -> tuple[Any, int] | None:  # noqa: ANN401
        """Return the kernel's call and its multiply-accumulates, or None for what is no such layer.

        The result is int32 if the model casts it to that, else float32.
        """
        if op_name(call) not in _LINEAR:
            return None
        weight = rewriter.weight(args[1])
        data, convert = stored_of(rewriter, args[0])
        if weight is None or convert is None or convert.scale != 1.0:
            return None
        matrix = op_name(call) == "relax.matmul"
        n_groups = 1 if matrix else int(call.attrs.groups)
        if n_groups == shape_of(args[0])[-1] == shape_of(call)[-1] > 1:
            return self._depthwise(rewriter, call, args, weight, convert)
        if matrix and weight.ndim != 2:
            return None
        ohwi = weight.T.reshape(weight.shape[1], 1, 1, weight.shape[0]) if matrix else weight
        workload: conv2d.MatmulWorkload | conv2d.Conv2DWorkload
        if matrix:
            workload = conv2d.MatmulWorkload(shape_of(args[0])[:-1], weight.shape[0], weight.shape[1], dtype_of(call))
        else:
            workload = conv2d.Conv2DWorkload(
                in_channels=weight.shape[3], out_channels=weight.shape[0], groups=n_groups, **window_of(call, args)
            )
            if n_groups > 1:
                together = conv2d_int8.groups_to_join(workload, self.target, ohwi)
                ohwi, workload = join_weight(ohwi, n_groups, together), conv2d.joined(workload, together)
                n_groups = workload.groups
        choice = conv2d_int8.choose(workload, self.target, convert.dtype, ohwi, self.workspace.get(call, 0))
        if choice is None or ohwi[0].size > conv2d_int8.MAX_TERMS:
            return None
        if n_groups == 1:
            choice = self._searched(call, choice, workload, convert.dtype, ohwi)
        macs = workload.macs // ohwi.shape[3] * weight.shape[0 if matrix else 3]
        bias, out_dtype = self._chain(rewriter, call)
        function = conv2d_int8.primitive(workload, choice, convert, out_dtype, self.target)
        packed = rewriter.add_weight(f"{base_name(args)}_packed", conv2d_int8.pack_chosen(ohwi, choice, n_groups))
        constant = conv2d_int8.correction(ohwi, convert, choice, bias, n_groups)
        constants = [packed, rewriter.add_weight(f"{base_name(args)}_correction", constant)]
        ty = relax.TensorType(shape_of(call), out_dtype)
        name = "matmul_int8" if matrix else "conv2d_int8"
        if isinstance(choice, winograd_int8.Choice):
            name = "winograd_int8"
        return call_function(rewriter, name, function, [data, *constants], ty), macs

    def _searched(
        self,
        call: Any,  # noqa: ANN401
        choice: conv2d_int8.Chosen,
        workload: conv2d.MatmulWorkload | conv2d.Conv2DWorkload,
        stored: str,
        weight: np.ndarray,
    ) -> conv2d_int8.Chosen:
        """Return what is picked in place of the choice."""
        found: dict[Any, conv2d_int8.Chosen] = {choice.config: choice}

        def space() -> list[Any]:
            spare = self.workspace.get(call, 0)
            others = conv2d_int8.variants(workload, self.target, weight, choice, spare, stored)
            found.update({other.config: other for other in others})
            return list(found)

        config = self.choose(call, integer_text(workload, stored, weight_kind(weight)), space, choice.config)
        if config not in found:  # picked without a look at the space
            space()
        return found[config]

    def _chain(self, rewriter: Rewriter, call: Any) -> tuple[np.ndarray | None, str]:  # noqa: ANN401
        """Return the bias and the dtype that a layer takes from its readers, and absorb those."""
        chain = self.sums.get(call)
        if chain is None:
            return None, "float32"
        self.absorbed.update(chain.absorbed)
        return None if chain.bias is None else rewriter.weight(rewriter.new(chain.bias)), "int32"

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
        if not (weight.shape[3] == 1 and depthwise_int8.is_whole(weight)):
            return None
        workload = depthwise.DepthwiseWorkload(channels=channels, **window_of(call, args))
        config = self.choose(
            call,
            integer_text(workload, convert.dtype, weight_kind(weight)),
            lambda: depthwise_int8.configs(workload, weight, self.target),
            depthwise_int8.default_config(workload, weight, self.target),
        )
        bias, out_dtype = self._chain(rewriter, call)
        packed = depthwise_int8.pack_weight(weight, config, self.target)
        constants = [
            rewriter.add_weight(f"{base_name(args)}_packed", packed),
            rewriter.add_weight(f"{base_name(args)}_correction", depthwise_int8.correction(weight, convert, bias)),
        ]
        tensors = depthwise_int8.compute(workload, config, convert, self.target, out_dtype)
        ty = relax.TensorType(shape_of(call), out_dtype)
        data, _ = stored_of(rewriter, args[0])
        return call_template(rewriter, "depthwise_int8", tensors, [data, *constants], ty), workload.macs


def base_name(args: list[Any]) -> str:
    """Return what the packed forms of a layer's weights are called after."""
    return str(getattr(args[1], "name", "weight"))
