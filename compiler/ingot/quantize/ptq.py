"""Post-training quantisation from end to end: samples in, a model with 8-bit layers and a report out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ingot.errors import OptionError
from ingot.frontend.interface import Imported
from ingot.passes.fold_batch_norm import fold_batch_norm
from ingot.passes.fold_constants import fold_constants
from ingot.passes.rewriter import bindings_of, dtype_of, op_name
from ingot.passes.simplify import simplify
from ingot.passes.state import State
from ingot.quantize.affine import Affine, from_range
from ingot.quantize.calibrators import CALIBRATORS, Observed, range_of
from ingot.quantize.graph import Graph, place
from ingot.quantize.insert import insert
from ingot.quantize.observe import Build, Observer, Samples, Tick
from ingot.quantize.weights import quantize_layer
from ingot.schedules.conv2d_int8 import preferred_activation
from ingot.target import Target


@dataclass(frozen=True)
class Options:
    """How to quantise: a calibrator's name, and whether rounding and biases follow the samples."""

    calibrator: str = "mse"
    adjust: bool = True


def prepare(imported: Imported, target: Target) -> State:
    """Return the model as its layers will be: constants folded, scales and shifts of norms in the weights."""
    state = State(imported.module, dict(imported.weights), imported, target)
    for step in (simplify, fold_constants, fold_batch_norm):
        state = step(state)
    return state


def quantize(
    imported: Imported, target: Target, samples: Samples, options: Options, *, build: Build, tick: Tick
) -> Imported:
    """Return the model with every layer that has an integer kernel on 8-bit tensors."""
    graph = Graph(_unquantized(prepare(imported, target)))
    placement = place(graph)
    observer = Observer(graph.state, placement, samples, build, tick)
    seen = observer.histograms(observer.extremes())
    affine = scales(seen, options.calibrator, preferred_activation(target))
    layers = [layer for layer in graph.layers.values() if layer.data in placement.group]
    moments = observer.moments(layers, affine) if options.adjust else {}
    weights = {layer.name: quantize_layer(layer, moments.get(layer.name)) for layer in layers}
    return insert(graph, placement, affine, weights)


def scales(seen: Mapping[int, Observed], calibrator: str, dtype: str) -> dict[int, Affine]:
    """Return the stored form of each scale's tensors. Raises OptionError for an unknown calibrator."""
    if calibrator not in CALIBRATORS:
        raise OptionError("unknown calibrator", where="--calibrator", found=calibrator, allowed=", ".join(CALIBRATORS))
    return {group: from_range(*range_of(one, calibrator), dtype) for group, one in seen.items()}


def _unquantized(state: State) -> State:
    """Return the state. Raises OptionError if layers of the model are quantised already."""
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) in ("relax.quantize", "relax.dequantize"):
            raise OptionError(
                "the model is quantised already",
                where=f"tensor '{binding.var.name}'",
                found=f"{op_name(binding.value).removeprefix('relax.')} of {dtype_of(binding.var)}",
                allowed="a float32 model",
                hint="compile it without --precision int8: its integer layers stay integer",
            )
    return state
