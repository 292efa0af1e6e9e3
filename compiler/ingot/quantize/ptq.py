"""Post-training quantisation from end to end: samples in, a model with 8-bit layers and a report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from ingot.errors import OptionError
from ingot.frontend.interface import Imported
from ingot.passes.state import State
from ingot.quantize.affine import Affine, Array, from_range
from ingot.quantize.balance import balanced, choose, pairs_of
from ingot.quantize.calibrators import CALIBRATORS, range_of
from ingot.quantize.graph import Expr, Graph, bounds_of, place
from ingot.quantize.insert import insert
from ingot.quantize.observe import Build, EverySecond, Observer, Samples, Tick, run_on
from ingot.quantize.report import LayerReport, Report
from ingot.quantize.search import accuracy, decibels, fewest, layer_noise, relative_error
from ingot.quantize.sensitivity import Sensitivity, cost_most
from ingot.quantize.speed import estimate, slower
from ingot.quantize.tables import table_in, tables_of
from ingot.quantize.weights import QuantizedWeights, quantize_layer
from ingot.schedules.conv2d_int8 import preferred_activation
from ingot.schedules.stored import FORMATS, StoredWeight
from ingot.target import Target

#: Stands for the calibrator that is best on samples which calibration has not seen. It is not searched for: on the
#: samples themselves narrow ranges look better than they are.
AUTO, CHOSEN = "auto", "mse"
#: Samples on which whole models are compared, at most.
_COMPARED = 100
#: The share of the error that may be left if scale moves between layers: on samples that nothing was taken from, and,
#: where there are too few samples to hold any back, on the samples themselves, where it looks better than it is.
_MOVED, _MOVED_BY_FEW = 0.9, 0.5
_FEW = 4
#: An error of the outputs over their size that no layer need stay in float for (30 dB), and the share of a larger one
#: that must be left if some do.
_ENOUGH, _LEFT = 10**-1.5, 0.9
_HARMFUL = "among the noisiest layers: the limit needs it"


@dataclass(frozen=True)
class Options:
    """How to quantise.

    calibrator: a name of `calibrators.CALIBRATORS`, or "auto".
    max_drop:   with labels, the accuracy on the samples that may be lost (0.01 is one point); without, the error of the
                outputs over their size. None: every layer that is faster is quantised, but for a few small ones that
                cost the outputs most.
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


@dataclass(frozen=True)
class _Candidate:
    """One way to quantise all layers: the stored form of each tensor, the weights, the noise of each layer and table.

    error: of the whole model's outputs on the samples, over their size.
    """

    calibrator: str
    affine: Mapping[Expr, Affine]
    weights: Mapping[str, QuantizedWeights]
    noise: Mapping[str, float]
    error: float = 0.0


@dataclass(frozen=True)
class _Table:
    """A table whose rows are looked up, as it is stored, and its noise power over its power."""

    name: str
    weight: StoredWeight
    noise: float


class _Plan:
    """One form of the float model: its layers, those that are slower in 8 bits, and what its tensors hold."""

    def __init__(
        self, graph: Graph, target: Target, tables: Sequence[_Table], samples: Samples, build: Build, tick: Tick
    ) -> None:
        self.graph, self.target = graph, target
        self.tables = dict(zip(tables_of(graph), tables, strict=True))
        self.estimates = {layer.name: estimate(layer, target) for layer in self.graph.layers.values()}
        self.slow = slower(self.graph.layers.values(), self.estimates)
        self.placement = place(self.graph, self.slow)
        self._look(Observer(graph.state, self.placement, samples, build, tick))

    def _look(self, observer: Observer) -> None:
        self.observer = observer
        axes = {layer.data: layer.data_axis for layer in self.graph.layers.values()}
        self.channels = observer.channels(axes)
        self.seen = observer.histograms(self.channels, bounds_of(self.graph))

    def on(self, samples: Samples) -> _Plan:
        """Return the plan of the same model on other samples."""
        other = copy(self)
        other._look(self.observer.on(samples))
        return other

    def moved(self, build: Build, tick: Tick) -> tuple[_Plan, int]:
        """Return the plan of the model with scale moved around the tensors where that should pay, and their number.

        With none, it is this plan.
        """
        chosen = choose(self.channels, pairs_of(self.graph))
        if not chosen:
            return self, 0
        graph, tables = Graph(balanced(self.graph, chosen)), list(self.tables.values())
        return _Plan(graph, self.target, tables, self.observer.samples, build, tick), len(chosen)

    def model(self, candidate: _Candidate, in_float: frozenset[str] = frozenset()) -> Imported:
        """Return the quantised model with the named layers and tables left in float besides the slow ones."""
        tables = {var: table.weight for var, table in self.tables.items() if table.name not in in_float}
        return insert(self.graph, place(self.graph, self.slow | in_float), candidate.affine, candidate.weights, tables)

    def candidate(self, calibrator: str, compared: _Compared) -> _Candidate:
        """Quantise every layer that reads a stored tensor, with one calibrator's ranges."""
        placement, dtype = self.placement, preferred_activation(self.target)
        groups = {group: from_range(*range_of(one, calibrator), dtype) for group, one in self.seen.items()}
        affine = {var: groups[placement.group[var]] for var in placement.stored}
        layers = [layer for layer in self.graph.layers.values() if layer.var in placement.integer]
        moments = self.observer.moments(layers, affine)
        weights = {layer.name: quantize_layer(layer, moments[layer.name]) for layer in layers}
        noise = {
            layer.name: layer_noise(layer, moments[layer.name], affine[layer.data], weights[layer.name])
            for layer in layers
        }
        noise.update((table.name, table.noise) for table in self.tables.values())
        found = _Candidate(calibrator, affine, weights, noise)
        return replace(found, error=compared.error(self.model(found)))


def quantize(state: State, samples: Samples, options: Options, *, build: Build, tick: Tick) -> tuple[Imported, Report]:
    """Return the model with the layers that are faster so on 8-bit tensors, and what was decided.

    state: of `prepare.prepare`.

    Case 1: a layer whose integer kernel is not estimated faster on the target stays in float (`speed`).
    Case 2: scale moves between layers (`balance`) if that lowers the outputs' error on samples that were held back.
    Case 3: with a limit, the noisiest layers stay in float, as few as keep the whole model within it (`search`).
    Case 4: without, where the outputs' error is large, a few small layers that cause most of it do (`sensitivity`).
    Raises OptionError for options that cannot be.
    """
    check(options)
    graph = Graph(state)
    plan = _Plan(graph, state.target, _tables(graph), samples, build, tick)
    compared = _Compared(plan.observer.reference[:_COMPARED], samples, options, build, tick)
    best = plan.candidate(CHOSEN if options.calibrator == AUTO else options.calibrator, compared)
    plain, pairs = (plan, best), 0
    other, found = plan.moved(build, tick)
    if found:
        instead = other.candidate(best.calibrator, compared)
        if _pays(plan, best, instead, compared, build, tick):
            plan, best, pairs = other, instead, found
    small: frozenset[str] = frozenset()
    harmful: frozenset[str] = frozenset()
    if options.max_drop is None:
        small = _small_and_harmful(plan, best, compared, samples, build)
    else:
        limit = options.max_drop
        order = sorted(best.noise, key=lambda name: -best.noise[name])
        harmful = fewest(order, lambda names: compared.drop(plan.model(best, names)) <= limit)
        if len(harmful) == len(order):  # the float model as it was, to the last bit
            (plan, best), pairs = plain, 0
            harmful = frozenset(best.noise)
    done = plan.model(best, harmful | small)
    report = Report(
        layers=tuple(_layer_reports(plan, best, harmful, small)),
        calibrator=best.calibrator,
        samples=len(samples),
        output_sqnr_db=decibels(compared.error(done) ** 2),
        limit=options.max_drop,
        drop=compared.drop(done) if options.max_drop is not None else None,
        metric=compared.metric,
        measured=compared.built,
        balanced=pairs,
        gained_db=round(decibels(best.error**2) - decibels(plain[1].error ** 2), 2),
    )
    return replace(done, notices=(*done.notices, *_notices(report, len(plan.slow), len(harmful), len(small)))), report


def _pays(plan: _Plan, plain: _Candidate, moved: _Candidate, compared: _Compared, build: Build, tick: Tick) -> bool:
    """Say whether moving scale lowers the error of inputs that calibration has not seen.

    Scales that even out what channels reach in some samples leave no room for what one channel reaches in others, so
    the error of the samples themselves says little. Every second sample gives ranges, weights and scales, and the
    others judge; then the other way round.
    """
    count = len(compared.reference)
    if count < _FEW:
        return moved.error < _MOVED_BY_FEW * plain.error
    if moved.error >= _MOVED * plain.error:
        return False
    errors = np.zeros(2)
    for own in (0, 1):
        mine, others = (EverySecond(compared.samples, start, count) for start in (own, 1 - own))
        judge = _Compared(compared.reference[1 - own :: 2], others, Options(), build, tick)
        half = plan.on(mine)
        ways = half, half.moved(build, tick)[0]
        errors += [one.candidate(plain.calibrator, judge).error ** 2 for one in ways]
    return bool(errors[1] < _MOVED**2 * errors[0])


def _tables(graph: Graph) -> list[_Table]:
    """Return the tables of a program with a scale for each row; their names are none of layers."""
    found: list[_Table] = []
    for var, value in tables_of(graph).items():
        name = str(var.name)
        while name in graph.layers or any(name == other.name for other in found):
            name += "_"
        found.append(_Table(name, *table_in(value, FORMATS["int8"])))
    return found


def _small_and_harmful(
    plan: _Plan, best: _Candidate, compared: _Compared, samples: Samples, build: Build
) -> frozenset[str]:
    """Return the layers of case 4: none, if the outputs do not gain by it."""
    if best.error <= _ENOUGH:
        return frozenset()
    seen = Sensitivity(plan.graph, plan.placement, best.affine, samples, build)
    # There weights and means are what they were in float, so that errors differ from the model's by a factor.
    enough = _ENOUGH * seen.error(plan.placement.stored) / best.error
    names = cost_most(plan.graph, plan.slow, seen.error, enough)
    gains = bool(names) and compared.error(plan.model(best, names)) < _LEFT * best.error
    return names if gains else frozenset()


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
        """Compile a model for this machine and run the samples; neither of the last two models is run again."""
        key = str(model.module.script(show_meta=True)).encode()
        if key not in self._outputs:
            self._outputs = dict(list(self._outputs.items())[-1:])
            self._outputs[key] = run_on(model, self.samples, len(self.reference), self._build, self._tick)
            self.built += 1
        return self._outputs[key]

    def error(self, model: Imported) -> float:
        """Return the error of the outputs over their size."""
        return relative_error(self.reference, self.outputs(model))

    def drop(self, model: Imported) -> float:
        """Return what --max-drop limits."""
        if self.labels is None:
            return self.error(model)
        return max(0.0, accuracy(self.reference, self.labels) - accuracy(self.outputs(model), self.labels))


def _layer_reports(plan: _Plan, best: _Candidate, harmful: frozenset[str], small: frozenset[str]) -> list[LayerReport]:
    reports = []
    for layer in plan.graph.layers.values():
        cost = plan.estimates[layer.name]
        decision, reason = "int8", "faster" if cost is not None else "reads a quarter of the bytes"
        if layer.name in plan.slow:
            decision, reason = "float32", "int8 is not estimated faster on this target"
            if cost is None or cost.pays:
                reason += ", with the layers that read the same"
        elif layer.name in harmful:
            decision, reason = "float32", _HARMFUL
        elif layer.name in small:
            decision, reason = "float32", "small, and costs the outputs most"
        numbers = best.affine.get(layer.data)
        reports.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                macs=layer.macs,
                decision=decision,
                reason=reason,
                sqnr_db=decibels(best.noise[layer.name]) if layer.name in best.noise else None,
                speed=round(cost.int8 / cost.float32, 3) if cost is not None else None,
                range=numbers.span if numbers is not None else None,
            )
        )
    for table in plan.tables.values():
        held = table.name not in harmful
        reports.append(
            LayerReport(
                name=table.name,
                kind="take",
                macs=0,
                decision="int8" if held else "float32",
                reason=f"{table.weight.share:.1%} of its size" if held else _HARMFUL,
                sqnr_db=decibels(table.noise),
            )
        )
    return reports


def _notices(report: Report, slow: int, harmful: int, small: int) -> list[str]:
    """Return what the user should know about layers that stay in float, given how many do for which reason."""
    if not report.layers:
        return ["the model has no layer that can be quantised: it stays as it is"]
    found, of_all = [], f"of {len(report.layers)} layers stay in float"
    if slow:
        found.append(f"{slow} {of_all}: int8 is not estimated faster there")
    if harmful:
        found.append(f"{harmful} {of_all} to hold the limit")
    if small:
        found.append(f"{small} {of_all}: small, and they cost the outputs most")
    if all(layer.decision == "float32" for layer in report.layers):
        found.append("no layer is quantised")
    return found
