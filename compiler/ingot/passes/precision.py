"""Choose the layers that multiply in half precision, and give them half-precision weights and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax, te

from ingot.passes.picks import Chooser, conv2d_text, matmul_text
from ingot.passes.rewriter import Rewriter, dtype_of, op_name, rewrite, shape_of
from ingot.passes.state import LayerPrecision, State
from ingot.passes.template_call import call_function, call_template
from ingot.schedules import conv2d, conv2d_half, winograd
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload
from ingot.schedules.half import Half, half_of
from ingot.target import Target

#: The name of the kernel that rounds a tensor; `half_storage` looks for it.
NARROW = "narrow"
#: FuseOps' pattern kind of an operator each of whose results depends on the one element at its place.
_ELEMENTWISE = 0


def half_layers(state: State) -> State:
    """Give the layers that gain by it half-precision weights and data; the sums stay float32.

    Case 1: conv2d (one group) and matmul with constant weights, where the target multiplies in the format and the cost
            formula says it is faster than the best float32 template: `schedules.conv2d_half`. The data are rounded
            first, in the kernel that makes them.
    Case 2: a product of one row with a constant matrix that does not fit the second-level cache: the weights are stored
            in half precision and widened as they are loaded, because memory bounds such a layer. Its data stay float32.
    All other layers stay float32, and so does everything if the precision is fp32. Weights with a value that the
    format would make infinite stay float32 too.
    """
    half = half_of(state.precision)
    if half is None:
        return state
    choice = _Choice(half, state.target, Chooser(state))
    rewritten = rewrite(state, choice.visit)
    return rewritten.having(layers=tuple(choice.layers), macs=choice.macs)


@dataclass
class _Choice:
    """The visitor: decides layer by layer and keeps the list of what it decided."""

    half: Half
    target: Target
    choose: Chooser
    layers: list[LayerPrecision] = field(default_factory=list)
    macs: int = 0
    narrowed: dict[Any, Any] = field(default_factory=dict)

    def visit(self, rewriter: Rewriter, call: Any, args: list[Any]) -> Any:  # noqa: ANN401
        """Replace one call, or return None."""
        name = op_name(call)
        if name not in ("relax.nn.conv2d", "relax.matmul"):
            return None
        weight = rewriter.weight(args[1])
        if weight is None or any(dtype_of(x) != "float32" for x in (call, *args)):
            return None
        if name == "relax.nn.conv2d":
            return self._conv2d(rewriter, call, args, weight)
        return self._matmul(rewriter, call, args, weight)

    def _conv2d(self, rewriter: Rewriter, call: Any, args: list[Any], weight: np.ndarray) -> Any:  # noqa: ANN401
        """Case 1, convolution."""
        attrs, label = call.attrs, _label(args[1])
        if int(attrs.groups) != 1:
            return self._stays(label, "a grouped or depthwise convolution multiplies in float32")
        batch, height, width, channels = shape_of(args[0])
        out_channels, kh, kw, _ = shape_of(args[1])
        geometry: dict[str, Any] = {
            name: tuple(int(v) for v in getattr(attrs, name)) for name in ("strides", "padding", "dilation")
        }
        workload = Conv2DWorkload(
            batch, height, width, channels, out_channels, kernel=(kh, kw), dtype="float32", **geometry
        )
        choice = self._choose(rewriter, call, args[0], workload, weight)
        if isinstance(choice, str):
            return self._stays(label, choice)
        packed = rewriter.add_weight(f"{label}_packed", conv2d_half.pack_chosen(weight, choice, self.half))
        function = conv2d_half.primitive(workload, choice, self.half, self.target)
        return self._multiplies(rewriter, label, "conv2d_half", function, (args[0], packed), call, workload.macs)

    def _matmul(self, rewriter: Rewriter, call: Any, args: list[Any], weight: np.ndarray) -> Any:  # noqa: ANN401
        """Case 1, matrix product, and case 2."""
        label, lead = _label(args[1]), shape_of(args[0])[:-1]
        if weight.ndim != 2 or not lead:
            return None
        k, n = weight.shape
        product = MatmulWorkload(lead, k, n, "float32")
        workload = product.as_conv()
        ohwi = weight.T.reshape(n, 1, 1, k)
        choice = self._choose(rewriter, call, args[0], product, weight)
        if not isinstance(choice, str):
            packed = rewriter.add_weight(f"{label}_packed", conv2d_half.pack_chosen(ohwi, choice, self.half))
            function = conv2d_half.primitive(product, choice, self.half, self.target)
            return self._multiplies(rewriter, label, "matmul_half", function, (args[0], packed), call, workload.macs)
        far = weight.size * 4 > self.target.cache.l2_kib * 1024
        if product.positions > 1 or not far or not self.half.holds(weight) or _is_stored(rewriter, args[0]):
            return self._stays(label, choice)
        config = conv2d.default_config(workload, self.target)
        rounded = self.half.round(conv2d.pack_weight(ohwi, config.block))
        packed = rewriter.add_weight(f"{label}_packed", rounded)
        tensors = conv2d_half.compute_row(product, config, self.half)
        self.layers.append(LayerPrecision(label, "stored", choice))
        self.macs += workload.macs
        return call_template(rewriter, "matmul_stored", tensors, [args[0], packed], call.ty)

    def _choose(
        self,
        rewriter: Rewriter,
        call: Any,  # noqa: ANN401
        data: Any,  # noqa: ANN401
        layer: Conv2DWorkload | MatmulWorkload,
        weight: np.ndarray,
    ) -> conv2d_half.Chosen | str:
        """Return how a layer should multiply in half precision, or why it should not."""
        target = self.target
        if not conv2d_half.multiplies(target, self.half):
            return f"{target.name} has no {self.half.name} multiplication with float32 sums"
        if _is_stored(rewriter, data):
            return "its data are quantised"
        if not self.half.holds(weight):
            return f"a weight is larger than {self.half.name} holds"
        workload = layer.as_conv() if isinstance(layer, MatmulWorkload) else layer
        direct = conv2d.default_config(workload, target)
        others = [conv2d.cost(workload, direct, target)]
        if winograd.supports(workload, target):
            others += [winograd.cost(workload, c, target) for c in winograd.configs(workload, target, 1 << 40)]
        choice = conv2d_half.choose(layer, target, self.half)
        if choice is None or choice.cost >= min(others):
            return "float32 is estimated faster"
        return self._searched(call, choice, layer)

    def _searched(
        self,
        call: Any,  # noqa: ANN401
        choice: conv2d_half.Chosen,
        layer: Conv2DWorkload | MatmulWorkload,
    ) -> conv2d_half.Chosen:
        """Return what is picked in place of the choice."""
        found: dict[Any, conv2d_half.Chosen] = {choice.config: choice}

        def space() -> list[Any]:
            found.update({v.config: v for v in conv2d_half.variants(layer, self.target, self.half, choice)})
            return list(found)

        name = self.half.name
        text = matmul_text(layer, name) if isinstance(layer, MatmulWorkload) else conv2d_text(layer, name)
        config = self.choose(call, text, space, choice.config)
        if config not in found:  # picked without a look at the space
            space()
        return found[config]

    def _stays(self, label: str, why: str) -> None:
        self.layers.append(LayerPrecision(label, "fp32", why))

    def _multiplies(
        self,
        rewriter: Rewriter,
        label: str,
        name: str,
        function: Any,  # noqa: ANN401
        args: Sequence[Any],
        call: Any,  # noqa: ANN401
        macs: int,
    ) -> Any:  # noqa: ANN401
        """Return the call of a template whose first argument is rounded first."""
        data, packed = args
        if data not in self.narrowed:
            stored = te.placeholder(shape_of(data), "float32", name="data")
            rounded = te.compute(shape_of(data), lambda *i: self.half.narrow(stored(*i)), name=NARROW)
            ty = relax.TensorType(shape_of(data), self.half.dtype)
            narrow = call_template(rewriter, NARROW, [stored, rounded], [data], ty, pattern=_ELEMENTWISE)
            self.narrowed[data] = rewriter.emit(narrow)
        self.layers.append(LayerPrecision(label, self.half.name, ""))
        self.macs += macs
        return call_function(rewriter, name, function, [self.narrowed[data], packed], call.ty)


def _label(weight: Any) -> str:  # noqa: ANN401
    return str(getattr(weight, "name", "weight"))


def _is_stored(rewriter: Rewriter, data: Any) -> bool:  # noqa: ANN401
    """Say whether a tensor is the result of a dequantize: a template that reads 8-bit data is the better one."""
    return op_name(rewriter.value_of(data)) == "relax.dequantize"
