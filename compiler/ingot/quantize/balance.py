"""Moving scale between the layers on both sides of a tensor, so that one scale fits all of its channels.

A tensor X that only layers read can be divided, channel by channel, by s, if what makes X is divided and the readers'
weights are multiplied by s: the float model computes the same. What is stored in 8 bits then has channels of more
equal ranges, and the readers' weights less equal ones. That is cross-layer equalisation (Nagel et al. 2019,
arXiv:1906.04721, section 4.1) where a convolution makes X, and SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) where a
norm does. Between X and its maker may be functions f with f(x / s) = f(x) / s for s > 0, sums with constants, and clip.
Where another function of a layer's result comes first, such as SiLU, its values are multiplied by 1 / s: they are in
float registers there, on their way to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from ingot.passes.rewriter import Rewriter, op_name, outputs_of, rebuild, shape_of
from ingot.passes.state import State
from ingot.quantize.graph import Expr, Graph, Layer
from ingot.quantize.observe import ChannelStatistics
from ingot.quantize.patches import as_rows

Array = np.ndarray[Any, Any]

#: Operators that commute with dividing a channel by a positive number.
_HOMOGENEOUS = frozenset(
    f"relax.{name}" for name in ("nn.relu", "nn.leakyrelu", "nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d")
)
#: Shares of X's range that move into the weights, as exponents; SmoothQuant's alpha.
_ALPHAS = (0.25, 0.5, 0.75, 1.0)
#: Scales stay within this factor of 1.
_LARGEST = 1e3
#: A pair is worth another model on the samples if its estimated noise falls below this share.
_WORTH = 0.9


@dataclass(frozen=True)
class Pair:
    """A tensor and the layers around it.

    data: X, of whose dimension `axis` the channels are. readers: the layers that read it, all of its readers. path: the
    variables from X back to what absorbs the division, each read by the one before it alone. multiplied: whether
    nothing absorbs it, so that the last of the path is multiplied by its own.
    """

    data: Expr
    axis: int
    readers: tuple[Layer, ...]
    path: tuple[Expr, ...]
    multiplied: bool = False


def pairs_of(graph: Graph) -> list[Pair]:
    """Return the tensors that can be balanced."""
    outputs = set(outputs_of(graph.main))
    found = []
    for data in dict.fromkeys(layer.data for layer in graph.layers.values()):
        readers = [graph.layer_of.get(reader) for reader in graph.readers.get(data, [])]
        layers = [layer for layer in readers if layer is not None]
        axes = {layer.data_axis for layer in layers}
        if len(layers) < len(readers) or len(axes) != 1 or data in outputs:
            continue
        (axis,) = axes
        path, multiplied = _path(graph, data, axis, outputs)
        if path:
            found.append(Pair(data, axis, tuple(layers), path, multiplied))
    return found


def _path(graph: Graph, data: Expr, axis: int, outputs: set[Expr]) -> tuple[tuple[Expr, ...], bool]:
    """Return the variables from a tensor back to what absorbs a division of its channels; () if nothing does.

    And whether the last of them is multiplied instead: a function of a layer's result that does not commute.
    """
    path, var = [data], data
    while True:
        call: Expr = graph.value.get(var)
        name = op_name(call)
        if var is not data and (len(graph.readers.get(var, [])) != 1 or var in outputs):
            return (), False
        if var in graph.layer_of:
            return (tuple(path) if graph.layer_of[var].channel_axis == axis else ()), False
        if name == "relax.nn.layer_norm":
            constants = all(graph.constant(arg) is not None for arg in call.args[1:])
            only_last = [int(a) % len(shape_of(var)) for a in call.attrs.axes] == [axis] == [len(shape_of(var)) - 1]
            return (tuple(path) if constants and only_last else ()), False
        if name in ("relax.add", "relax.multiply"):
            if not _by_vector(graph, call, axis):
                return _multiplied(graph, path)
            if name == "relax.multiply":
                return tuple(path), False
        elif name not in _HOMOGENEOUS and name != "relax.clip":
            return _multiplied(graph, path)
        reads = graph.reads(call)
        if len(reads) != 1 or len(shape_of(reads[0])) != len(shape_of(var)):
            return (), False
        var = reads[0]
        path.append(var)


def _multiplied(graph: Graph, path: list[Expr]) -> tuple[tuple[Expr, ...], bool]:
    """Return a path whose last variable is multiplied, if that happens in the registers of a layer."""
    return (tuple(path), True) if graph.root.get(path[-1]) in graph.layer_of else ((), False)


def _by_vector(graph: Graph, call: Expr, axis: int) -> bool:
    """Say whether one operand is a constant that varies along the dimension of the channels at most."""
    constants = [value for arg in call.args if (value := graph.constant(arg)) is not None]
    rank = len(shape_of(call))
    if len(constants) != 1 or constants[0].ndim > rank:
        return False
    full = (1,) * (rank - constants[0].ndim) + constants[0].shape
    return all(extent == 1 for i, extent in enumerate(full) if i != axis)


def scales_of(pair: Pair, seen: ChannelStatistics) -> Array | None:
    """Return what each channel of a tensor should be divided by, or None where that would not lower the noise.

    s_j = x_j^alpha / w_j^(1 - alpha), with x_j the largest value of channel j and w_j the largest weight it meets;
    alpha is the one of least noise as `noise_of` estimates it. A depthwise layer's weights have a scale for each
    channel anyway: there the whole range moves. Channels that are always 0 stay.
    """
    largest = np.maximum(np.abs(seen.above.first), np.abs(seen.below.first))
    live = largest > 0
    if live.sum() < 2:
        return None
    met = np.maximum.reduce([_largest_met(layer) for layer in pair.readers])
    met = np.where(met > 0, met, met[live].mean() or 1.0)
    best, chosen = noise_of(pair, seen, np.ones_like(largest)) * _WORTH, None
    for alpha in _ALPHAS:
        raw = np.where(live, largest**alpha / met ** (1 - alpha), 1.0)
        scales = np.clip(raw / np.exp(np.log(raw[live]).mean()), 1 / _LARGEST, _LARGEST)
        scales = np.where(live, scales, 1.0)
        noise = noise_of(pair, seen, scales)
        if noise < best:
            best, chosen = noise, scales
    return chosen


def _largest_met(layer: Layer) -> Array:
    """Return the largest weight that meets each input channel."""
    rows = np.abs(as_rows(layer))
    if layer.kind == "depthwise":
        return np.asarray(rows.max(1))
    return np.asarray(rows.reshape(len(rows), -1, _inputs(layer)).max((0, 1)))


def _inputs(layer: Layer) -> int:
    return int(layer.weight.shape[layer.layout.index("I")])


def noise_of(pair: Pair, seen: ChannelStatistics, scales: Array) -> float:
    """Return the estimated noise power of the readers' results, when X / s and the weights times s are stored.

    A step t rounds with noise t^2 / 12. X has one step, the weights of an output channel have another one.
    """
    high, below = (max(0.0, float((end.first / scales).max())) for end in (seen.above, seen.below))
    step = ((high + below) / 255) ** 2 / 12
    power = seen.squares / max(1, seen.count) / scales**2
    total = 0.0
    for layer in pair.readers:
        rows = as_rows(layer).astype(np.float64)
        if layer.kind == "depthwise":
            wide, met = rows * scales[:, None], power[:, None]
        else:
            window = rows.shape[1] // _inputs(layer)
            wide, met = rows * np.tile(scales, window), np.tile(power, window)[None]
        rounding = (np.abs(wide).max(1) / 127) ** 2 / 12
        total += step * float((wide**2).sum()) + float((rounding[:, None] * met * np.ones_like(wide)).sum())
    return total


def balanced(graph: Graph, scales: Sequence[tuple[Pair, Array]]) -> State:
    """Return the program with each pair's tensor divided by its scales; it computes the same."""
    divided: dict[Expr, tuple[Array, int]] = {}  # variable on a path -> scales, the dimension of channels
    multiplied: set[Expr] = set()
    weights: dict[Expr, list[Array]] = {}  # layer's variable -> factors of its weights, in their layout
    for pair, vector in scales:
        divided.update(dict.fromkeys(pair.path, (vector, pair.axis)))
        if pair.multiplied:
            multiplied.add(pair.path[-1])
        for layer in pair.readers:
            letter = "O" if layer.kind == "depthwise" else "I"
            weights.setdefault(layer.var, []).append(_along(vector, layer.layout, letter))
        maker = graph.layer_of.get(pair.path[-1])
        if maker is not None:
            weights.setdefault(maker.var, []).append(1 / _along(vector, maker.layout, "O"))

    def visit(rewriter: Rewriter, call: Expr, args: list[Expr]) -> Expr | None:
        var = graph.variable[call]
        if var in weights:
            value = rewriter.weight(args[1])
            if value is not None:
                factor = np.ones((1,) * value.ndim)
                for other in weights[var]:
                    factor = factor * other
                name = f"{getattr(args[1], 'name', 'weight')}_balanced"
                return rebuild(call, [args[0], rewriter.add_weight(name, (value * factor).astype(np.float32))])
        if var not in divided:
            return None
        if var in multiplied:
            vector, axis = divided[var]
            factor = rewriter.constant((1 / _at(vector, axis, len(shape_of(call)))).astype(np.float32), "balanced")
            return relax.op.multiply(rewriter.emit(rebuild(call, args)), factor)
        return _divided(rewriter, call, args, *divided[var])

    return Rewriter(graph.state, visit).run()


def _along(vector: Array, layout: str, letter: str) -> Array:
    """Return a vector in the shape in which it multiplies weights along one of their dimensions."""
    return _at(vector, layout.index(letter), len(layout))


def _at(vector: Array, axis: int, rank: int) -> Array:
    """Return a vector as an array of `rank` dimensions, along one of them."""
    shape = [1] * rank
    shape[axis] = vector.size
    return vector.reshape(shape)


def _divided(rewriter: Rewriter, call: Expr, args: list[Expr], vector: Array, axis: int) -> Expr | None:
    """Return one call of a path on an operand that is divided, or, at its end, with a result that is."""
    name = op_name(call)
    wide = _at(vector, axis, len(shape_of(call)))
    if name == "relax.clip":
        bounds = [np.float32(bound.value) / wide for bound in call.args[1:]]
        low, high = (rewriter.constant(bound.astype(np.float32), "bound") for bound in bounds)
        return relax.op.minimum(rewriter.emit(relax.op.maximum(args[0], low)), high)
    if name == "relax.nn.layer_norm":
        scaled = []
        for arg in args[1:]:
            value = rewriter.weight(arg)
            if value is None:
                return None
            scaled.append(rewriter.constant((value / vector).astype(np.float32), "norm"))
        return rebuild(call, [args[0], *scaled])
    if name in ("relax.add", "relax.multiply"):
        changed = []
        for arg in args:
            value = rewriter.weight(arg)
            changed.append(arg if value is None else rewriter.constant((value / wide).astype(np.float32), "balanced"))
        return rebuild(call, changed)
    return None


def choose(statistics: Mapping[Expr, ChannelStatistics], pairs: Sequence[Pair]) -> list[tuple[Pair, Array]]:
    """Return the pairs worth balancing, with their scales."""
    found = ((pair, scales_of(pair, statistics[pair.data])) for pair in pairs if pair.data in statistics)
    return [(pair, scales) for pair, scales in found if scales is not None]
