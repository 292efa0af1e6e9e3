"""Post-training quantisation from end to end: samples in, a model with 8-bit layers and a report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ingot.errors import OptionError
from ingot.frontend.interface import Imported
from ingot.passes.fold_batch_norm import fold_batch_norm
from ingot.passes.fold_constants import fold_constants
from ingot.passes.rewriter import bindings_of, dtype_of, op_name
from ingot.passes.simplify import simplify
from ingot.passes.state import State
from ingot.quantize.affine import Affine, Array, from_range
from ingot.quantize.calibrators import CALIBRATORS, Observed, range_of
from ingot.quantize.graph import Expr, Graph, place
from ingot.quantize.insert import insert
from ingot.quantize.observe import Build, Observer, Samples, Tick
from ingot.quantize.report import LayerReport, Report
from ingot.quantize.search import accuracy, fewest, layer_noise, relative_error
from ingot.quantize.speed import Estimate, estimate
from ingot.quantize.weights import QuantizedWeights, quantize_layer
from ingot.schedules.conv2d_int8 import preferred_activation
from ingot.target import Target

#: The calibrator that tries those of TRIED and keeps the one whose model has the least output error on the samples.
AUTO = "auto"
TRIED = ("mse", "minmax")
#: Samples on which whole models are compared, at most.
_COMPARED = 100


@dataclass(frozen=True)
class Options:
    """How to quantise.

    calibrator: a name of `calibrators.CALIBRATORS`, or "auto".
    max_drop:   with labels, the accuracy on the samples that may be lost (0.01 is one point); without, the error of the
                outputs over their size. None: every layer that is faster is quantised.
    labels:     the right class of each sample.
    """

    calibrator: str = AUTO
    max_drop: float | None = None
    labels: Array | None = None


def check(options: Options) -> None:
    """Raise OptionError for an unknown calibrator or a limit that is none."""
    if options.calibrator not in (AUTO, *CALIBRATORS):
        allowed = ", ".join((AUTO, *CALIBRATORS))
        raise OptionError("unknown calibrator", where="--calibrator", found=options.calibrator[:80], allowed=allowed)
    if options.max_drop is not None and not 0 <= options.max_drop <= 1:
        found, allowed = str(options.max_drop), "0 to 1, or 0% to 100%"
        raise OptionError("the limit is not a share", where="--max-drop", found=found, allowed=allowed)


def prepare(imported: Imported, target: Target) -> State:
    """Return the model as its layers will be: constants folded, scales and shifts of norms in the weights."""
    state = State(imported.module, dict(imported.weights), imported, target)
    for step in (simplify, fold_constants, fold_batch_norm):
        state = step(state)
    return state


@dataclass(frozen=True)
class _Candidate:
    """One way to quantise all layers: the stored form of each tensor, the weights, the noise of each layer."""

    calibrator: str
    affine: Mapping[Expr, Affine]
    weights: Mapping[str, QuantizedWeights]
    noise: Mapping[str, float]


def quantize(
    imported: Imported, target: Target, samples: Samples, options: Options, *, build: Build, tick: Tick
) -> tuple[Imported, Report]:
    """Return the model with the layers that are faster so on 8-bit tensors, and what was decided.

    Case 1: a layer whose integer kernel is not estimated faster on the target stays in float (`speed`).
    Case 2: with a limit, so do the noisiest layers, as few as keep the whole model within it (`search`).
    Raises OptionError for options that cannot be, and for a model that is quantised already.
    """
    check(options)
    graph = Graph(_unquantized(prepare(imported, target)))
    estimates = {layer.name: estimate(layer, target) for layer in graph.layers.values()}
    slow = frozenset(name for name, one in estimates.items() if one is not None and not one.pays)
    placement = place(graph, slow)
    observer = Observer(graph.state, placement, samples, build, tick)
    seen = observer.histograms(observer.extremes())
    compared = _Compared(observer.reference[:_COMPARED], samples, options, build, tick)
    candidates = {}
    for calibrator in TRIED if options.calibrator == AUTO else (options.calibrator,):
        candidates[calibrator] = _candidate(graph, observer, seen, calibrator, preferred_activation(target))

    def model(candidate: _Candidate, in_float: frozenset[str]) -> Imported:
        return insert(graph, place(graph, slow | in_float), candidate.affine, candidate.weights)

    errors = {name: compared.error(model(one, frozenset())) for name, one in candidates.items()}
    best = candidates[min(errors, key=errors.__getitem__)]
    harmful: frozenset[str] = frozenset()
    if options.max_drop is not None:
        limit = options.max_drop
        order = sorted(best.weights, key=lambda name: -best.noise[name])
        harmful = fewest(order, lambda names: compared.drop(model(best, names)) <= limit)
    done = model(best, harmful)
    left = [name for name in graph.layers if name in best.weights and name not in harmful]
    drop = compared.drop(done) if options.max_drop is not None else None
    report = Report(
        layers=tuple(_layer_reports(graph, best, estimates, slow, harmful)),
        calibrator=best.calibrator,
        samples=len(samples),
        output_sqnr_db=_decibels(compared.error(done) ** 2),
        limit=options.max_drop,
        drop=drop,
        metric=compared.metric,
        measured=compared.built,
    )
    return replace(done, notices=(*done.notices, *_notices(graph, slow, harmful, left))), report


def _candidate(
    graph: Graph, observer: Observer, seen: Mapping[int, Observed], calibrator: str, dtype: str
) -> _Candidate:
    """Quantise every layer that reads a stored tensor, with one calibrator's ranges."""
    placement = observer.placement
    groups = {group: from_range(*range_of(one, calibrator), dtype) for group, one in seen.items()}
    affine = {var: groups[placement.group[var]] for var in placement.stored}
    layers = [layer for layer in graph.layers.values() if layer.var in placement.integer]
    moments = observer.moments(layers, affine)
    weights = {layer.name: quantize_layer(layer, moments[layer.name]) for layer in layers}
    noise = {
        layer.name: layer_noise(layer, moments[layer.name], affine[layer.data], weights[layer.name]) for layer in layers
    }
    return _Candidate(calibrator, affine, weights, noise)


class _Compared:
    """Quantised models on the samples, next to the float one."""

    def __init__(
        self, reference: Sequence[Sequence[Array]], samples: Samples, options: Options, build: Build, tick: Tick
    ) -> None:
        self.reference, self.samples, self._build, self._tick = reference, samples, build, tick
        self.labels = options.labels[: len(reference)] if options.labels is not None else None
        self.metric = "of the outputs' size" if self.labels is None else "of the accuracy on the samples"
        self.built = 0
        self._outputs: dict[bytes, list[list[Array]]] = {}

    def outputs(self, model: Imported) -> list[list[Array]]:
        """Compile a model for this machine and run the samples; the same model is run once."""
        key = str(model.module.script(show_meta=True)).encode()
        if key not in self._outputs:
            run, found = self._build(model), []
            for number, feeds in enumerate(self.samples):
                if number == len(self.reference):
                    break
                self._tick("comparing models", number, len(self.reference))
                found.append(list(run(feeds)))
            self.built += 1
            self._outputs = {key: found}
        return self._outputs[key]

    def error(self, model: Imported) -> float:
        """Return the error of the outputs over their size."""
        return relative_error(self.reference, self.outputs(model))

    def drop(self, model: Imported) -> float:
        """Return what --max-drop limits."""
        if self.labels is None:
            return self.error(model)
        return max(0.0, accuracy(self.reference, self.labels) - accuracy(self.outputs(model), self.labels))


def _layer_reports(
    graph: Graph,
    best: _Candidate,
    estimates: Mapping[str, Estimate | None],
    slow: frozenset[str],
    harmful: frozenset[str],
) -> list[LayerReport]:
    reports = []
    for layer in graph.layers.values():
        cost = estimates[layer.name]
        decision, reason = "int8", "faster" if cost is not None else "reads a quarter of the bytes"
        if layer.name in slow:
            decision, reason = "float32", "int8 is not estimated faster on this target"
        elif layer.name in harmful:
            decision, reason = "float32", "among the noisiest layers: the limit needs it"
        numbers = best.affine.get(layer.data)
        reports.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                macs=layer.macs,
                decision=decision,
                reason=reason,
                sqnr_db=_decibels(best.noise[layer.name]) if layer.name in best.noise else None,
                speed=round(cost.int8 / cost.float32, 3) if cost is not None else None,
                range=numbers.span if numbers is not None else None,
            )
        )
    return reports


def _decibels(noise: float) -> float:
    """Return noise power over signal power as decibels of signal to noise."""
    return round(float(-10 * np.log10(max(noise, 1e-20))), 2)


def _notices(graph: Graph, slow: frozenset[str], harmful: frozenset[str], left: list[str]) -> list[str]:
    """Return what the user should know about layers that stay in float."""
    found = []
    if not graph.layers:
        return ["the model has no layer that can be quantised: it stays as it is"]
    if slow:
        found.append(f"{len(slow)} of {len(graph.layers)} layers stay in float: int8 is not estimated faster there")
    if harmful:
        found.append(f"{len(harmful)} of {len(graph.layers)} layers stay in float to hold the limit")
    if not left:
        found.append("no layer is quantised")
    return found


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
