"""Weights in few bits, everything else in float32: a float model in, the same with stored weights and a report out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm import relax

from ingot.errors import OptionError
from ingot.frontend.interface import Imported
from ingot.passes.rewriter import Rewriter, rebuild, shape_of
from ingot.passes.state import State
from ingot.passes.stored_weights import stored_call
from ingot.quantize.codes import encode
from ingot.quantize.graph import Expr, Graph, Layer, Placement
from ingot.quantize.observe import Build, Observer, Samples, Tick, run_on
from ingot.quantize.patches import Moments, as_rows, from_rows
from ingot.quantize.report import LayerReport, Report
from ingot.quantize.search import decibels, relative_error, relative_power
from ingot.quantize.tables import SMALLEST, looked_up, table_in, tables_of
from ingot.schedules.stored import FORMATS, StoredWeight, WeightFormat

Array = np.ndarray[Any, Any]

#: Samples on which the whole model is compared with the float one, at most.
_COMPARED = 100


def format_named(name: str) -> WeightFormat:
    """Return a format by its name. Raises OptionError for one that does not exist."""
    if name not in FORMATS:
        raise OptionError("unknown weight format", where="--weights", found=name[:80], allowed=", ".join(FORMATS))
    return FORMATS[name]


@dataclass(frozen=True)
class _Stored:
    """What became of one weight: its codes, the shift of the layer's bias (zeros for a table), its noise."""

    weight: StoredWeight
    shift: Array = field(repr=False)
    noise: float


def store_weights(
    state: State, form: WeightFormat, samples: Samples | None, *, build: Build, tick: Tick
) -> tuple[Imported, Report]:
    """Return the model with the weights of its layers in `form`, and what that did to each.

    state: of `prepare.prepare`.

    Case 1: a convolution of one group or a matrix product with constant weights. With samples, rounding follows their
            second moments, and the bias keeps each channel's mean.
    Case 2: a table whose rows are looked up.
    Case 3: depthwise and grouped convolutions, weights of fewer than SMALLEST elements or with a value that is not
            finite, and what is no layer stay float32.
    """
    graph = Graph(state)
    layers = {layer.var: layer for layer in graph.layers.values() if _why_not(layer) is None}
    tables = tables_of(graph)
    moments: Mapping[str, Moments] = {}
    observer = None
    if samples is not None and layers:
        watched = tuple(dict.fromkeys(layer.data for layer in layers.values()))
        placement = Placement(watched, {var: number for number, var in enumerate(watched)}, frozenset())
        observer = Observer(graph.state, placement, samples, build, tick)
        moments = observer.moments(list(layers.values()), None)
    done: dict[Expr, _Stored] = {}
    for number, (var, layer) in enumerate(layers.items()):
        tick("rounding weights", number, len(layers) + len(tables))
        done[var] = _layer(layer, form, moments.get(layer.name))
    for number, (var, value) in enumerate(tables.items(), len(layers)):
        tick("rounding weights", number, len(layers) + len(tables))
        weight, noise = table_in(value, form)
        done[var] = _Stored(weight, np.zeros(0, np.float32), noise)
    model = _insert(graph, done)
    error = None
    if observer is not None and samples is not None:
        reference = observer.reference[:_COMPARED]
        error = relative_error(reference, run_on(model, samples, len(reference), build, tick))
    report = Report(
        layers=tuple(_reports(graph, done, form)),
        calibrator="second moments" if observer is not None else "",
        samples=len(samples) if samples is not None else 0,
        output_sqnr_db=None if error is None else decibels(error**2),
        format=form.name,
    )
    notices = [] if done else [f"no weights can be stored as {form.name}: the model stays as it is"]
    return replace(model, notices=(*model.notices, *notices)), report


def _why_not(layer: Layer) -> str | None:
    """Say why a layer's weights stay float32, or return None."""
    if layer.kind == "depthwise":
        return "a depthwise layer has few weights"
    if layer.weight.size < SMALLEST:
        return "few weights"
    return None if np.isfinite(layer.weight).all() else "a weight is not finite"


def _layer(layer: Layer, form: WeightFormat, moments: Moments | None) -> _Stored:
    """Case 1."""
    rows = as_rows(layer)
    matrix = layer.kind == "matmul"
    inner = rows.shape[1] if matrix else layer.weight.shape[layer.layout.index("I")]
    codes, scales, table, real, shift = encode(rows, inner, form, moments)
    if matrix:
        placed = scales[:, 0].T
    else:
        order = [layer.layout.index(axis) for axis in "OHWI"]
        kernel = [layer.weight.shape[axis] for axis in order[1:3]] if scales.shape[1] > 1 else [1, 1]
        placed = scales.reshape(len(rows), *kernel, -1).transpose(np.argsort(order))
    covariance = moments.covariance() if moments is not None else None
    noise = relative_power(rows, rows - real, covariance)
    return _Stored(StoredWeight(form, from_rows(layer, codes), placed, table), shift, noise)


def _insert(graph: Graph, done: Mapping[Expr, _Stored]) -> Imported:
    """Return the model with the weights in codes, and the shifts added to the layers' results."""

    def visit(rewriter: Rewriter, call: Expr, args: list[Expr]) -> Expr | None:
        var = graph.variable[call]
        stored = done.get(var)
        if stored is None:
            return None
        if var not in graph.layer_of:
            return looked_up(rewriter, call, args, stored.weight)
        name = str(getattr(args[1], "name", "weight"))
        result = rebuild(call, [args[0], rewriter.emit(stored_call(rewriter, stored.weight, name))])
        if not stored.shift.any():
            return result
        shape = [1] * len(shape_of(call))
        shape[graph.layer_of[var].channel_axis] = stored.shift.size
        shift = rewriter.constant(stored.shift.reshape(shape), f"{name}_shift")
        return relax.op.add(rewriter.emit(result), shift)

    state = Rewriter(graph.state, visit).run()
    return replace(graph.state.imported, module=state.module, weights=dict(state.weights))


def _reports(graph: Graph, done: Mapping[Expr, _Stored], form: WeightFormat) -> list[LayerReport]:
    reports = []
    for var, _, name in graph.walk():
        layer, stored = graph.layer_of.get(var), done.get(var)
        if layer is None and stored is None:
            continue
        reports.append(
            LayerReport(
                name=str(var.name) if layer is None else layer.name,
                kind=name.removeprefix("relax.") if layer is None else layer.kind,
                macs=0 if layer is None else layer.macs,
                decision="float32" if stored is None else form.name,
                reason=(layer and _why_not(layer)) or ""
                if stored is None
                else f"{stored.weight.share:.1%} of its size",
                sqnr_db=None if stored is None else decibels(stored.noise),
            )
        )
    return reports
