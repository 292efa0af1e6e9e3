"""Whether a layer's integer kernel is faster than its float one: the cost formulas that choose the kernels say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.passes.rewriter import shape_of
from ingot.quantize.graph import Layer
from ingot.quantize.patches import as_rows
from ingot.quantize.weights import symmetric_scales
from ingot.schedules import conv2d, conv2d_int8, depthwise, depthwise_int8, winograd
from ingot.schedules.vector import registers
from ingot.target import Target

#: The arena that a float kernel may use for itself, in bytes, when its cost is estimated: Winograd's patches.
_WORKSPACE = 1 << 20
#: Instructions that store, load and convert a vector of float32 where 8-bit values would pass; the same where the layer
#: converts its result either way, and the layer before it no longer does.
_MOVE, _MOVE_IN = 3.0, 1.0


@dataclass(frozen=True)
class Estimate:
    """Estimated cycles of one core, in one unit, of a layer's best float kernel and its best integer kernel.

    moved: the cycles that a float layer among integer ones costs besides: its tensors are four times as large, and are
    converted.
    """

    float32: float
    int8: float
    moved: float

    @property
    def pays(self) -> bool:
        """Say whether the integer kernel is faster."""
        return self.int8 < self.float32 + self.moved


def slower(layers: Iterable[Layer], estimates: Mapping[str, Estimate | None]) -> frozenset[str]:
    """Return the layers that stay in float, given each one's costs.

    Those that read the same tensor are decided on together: a float layer that reads a tensor which is stored in 8 bits
    for another one converts it, and gives up Winograd's transformation.
    """
    together: dict[Any, list[Layer]] = {}
    for layer in layers:
        together.setdefault(layer.data, []).append(layer)
    found: set[str] = set()
    for group in together.values():
        known = [one for layer in group if (one := estimates[layer.name]) is not None]
        if known and sum(one.int8 for one in known) >= sum(one.float32 + one.moved for one in known):
            found.update(layer.name for layer in group)
    return frozenset(found)


def estimate(layer: Layer, target: Target) -> Estimate | None:
    """Return the costs of a layer's two kernels; None for depthwise layers of targets other than x86.

    Those read 8-bit data, a quarter of the bytes, and multiply in as many instructions either way: never slower. On x86
    products of 8-bit integers take more instructions to widen than float32 ones take in all.
    """
    if layer.kind == "depthwise":
        return _depthwise(layer, target) if target.arch == "x86_64" else None
    rows = as_rows(layer)
    elements = np.prod(shape_of(layer.data)) + np.prod(shape_of(layer.call))
    moved = float(elements) / registers(target).lanes * _MOVE
    whole = _whole(rows).reshape(len(rows), 1, 1, -1)
    kind = conv2d_int8.preferred_activation(target)
    if layer.kind == "matmul":
        product = conv2d.MatmulWorkload(shape_of(layer.data)[:-1], rows.shape[1], rows.shape[0], "float32")
        work = product.as_conv()
        plain = conv2d.cost(work, conv2d.default_config(work, target), target)
        return Estimate(plain, _integer_cost(product, target, kind, whole, plain), moved)
    work = conv2d.Conv2DWorkload(
        in_channels=shape_of(layer.data)[layer.data_axis],
        out_channels=layer.channels,
        **_window(layer),
    )
    plain = conv2d.cost(work, conv2d.default_config(work, target), target)
    if winograd.supports(work, target):
        fast = winograd.default_config(work, target, _WORKSPACE)
        plain = min(plain, winograd.cost(work, fast, target)) if fast is not None else plain
    return Estimate(plain, _integer_cost(work, target, kind, whole, plain), moved)


def _whole(rows: np.ndarray) -> np.ndarray:
    """Return the whole numbers that weights are stored as, about."""
    whole: np.ndarray = (rows / symmetric_scales(rows)[:, None]).round()
    return whole


def _depthwise(layer: Layer, target: Target) -> Estimate:
    """Return the costs of a depthwise layer, whose result is converted to 8 bits either way."""
    work = depthwise.DepthwiseWorkload(channels=layer.channels, **_window(layer))
    plain = depthwise.cost(work, depthwise.default_config(work, target), target)
    config = depthwise_int8.default_config(work, _whole(as_rows(layer)), target)
    moved = float(np.prod(shape_of(layer.data))) / registers(target).lanes * _MOVE_IN
    return Estimate(plain, depthwise_int8.cost(work, config, target), moved)


def _integer_cost(
    work: conv2d.Conv2DWorkload | conv2d.MatmulWorkload, target: Target, kind: str, whole: np.ndarray, plain: float
) -> float:
    """Return the cost of the integer kernel, or `plain` where the target has none."""
    choice = conv2d_int8.choose(work, target, kind, whole, _WORKSPACE)
    return plain if choice is None else choice.cost


def _window(layer: Layer) -> dict[str, Any]:
    """Return what the workloads of both kinds of convolutions have in common."""
    attrs: Any = layer.call.attrs
    shape, layout = shape_of(layer.data), str(attrs.data_layout)
    batch, height, width = (shape[layout.index(axis)] for axis in "NHW")
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "kernel": tuple(layer.weight.shape[layer.layout.index(axis)] for axis in "HW"),
        "strides": tuple(int(v) for v in attrs.strides),
        "padding": tuple(int(v) for v in attrs.padding),
        "dilation": tuple(int(v) for v in attrs.dilation),
        "dtype": "float32",
    }
