"""Running the float model on samples and looking at what its tensors hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ingot.frontend.interface import Imported, TensorSpec
from ingot.passes.rewriter import Rewriter, shape_of
from ingot.passes.state import State
from ingot.quantize.affine import Affine
from ingot.quantize.calibrators import BINS, Observed, Range
from ingot.quantize.graph import Expr, Layer, Placement
from ingot.quantize.patches import Moments, take
from ingot.quantize.tails import Ends, joined

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
#: A compiled model on this machine: arrays by input name in, its outputs in order out.
Run = Callable[[Feeds], Sequence[Array]]
#: Compiles a model for this machine.
Build = Callable[[Imported], Run]
#: Called with what is being done, how many samples are done, and how many there are.
Tick = Callable[[str, int, int], None]

#: Values of a tensor that one sample adds to its histogram, at most.
_COUNTED = 1 << 16
#: Input patches of a layer that all samples together give, about.
_PATCHES = 1 << 13


class Samples(Protocol):
    """Calibration data: arrays by input name for each sample, as often as they are asked for."""

    def __len__(self) -> int:
        """Return how many samples there are."""

    def __iter__(self) -> Iterator[Feeds]:
        """Read them one at a time."""


class ChannelStatistics:
    """Both ends of each channel of a tensor, and its mean square, over samples."""

    def __init__(self, channels: int) -> None:
        self.above, self.below = Ends(channels), Ends(channels)
        self.squares = np.zeros(channels)
        self.count = 0

    def add(self, value: Array, axis: int | None) -> None:
        """Take in one sample's tensor whose dimension `axis` counts the channels; None if it has one channel."""
        rows = value.reshape(-1, 1) if axis is None else np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])
        self.above.add(rows.max(0))
        self.below.add(-rows.min(0))
        self.squares += np.einsum("nc,nc->c", rows, rows, dtype=np.float64)
        self.count += len(rows)


class EverySecond:
    """Every second one of the first `most` samples, from number `start` on."""

    def __init__(self, samples: Samples, start: int, most: int) -> None:
        self._samples, self._taken = samples, range(start, min(most, len(samples)), 2)

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self._taken)

    def __iter__(self) -> Iterator[Feeds]:
        """Read them one at a time."""
        taken = self._taken
        return islice(iter(self._samples), taken.start, taken.stop, taken.step)


def with_outputs(state: State, variables: Sequence[Expr]) -> Imported:
    """Return the model with the given variables as further outputs, after its own."""
    rewriter = Rewriter(state, lambda *_: None)
    rewriter.extra_outputs = list(variables)
    seen = rewriter.run()
    specs = tuple(TensorSpec(f"observed_{i}", "float32", shape_of(var)) for i, var in enumerate(variables))
    outputs = (*state.imported.outputs, *specs)
    return replace(state.imported, module=seen.module, weights=dict(seen.weights), outputs=outputs, states=())


def run_on(model: Imported, samples: Samples, count: int, build: Build, tick: Tick) -> list[list[Array]]:
    """Return the outputs of a model, compiled for this machine, for each of the first `count` samples."""
    run, found = build(model), []
    for number, feeds in enumerate(samples):
        if number == count:
            break
        tick("comparing models", number, count)
        found.append(list(run(feeds)))
    return found


class Observer:
    """The float model with its stored tensors as outputs, and three ways to look at them.

    A tensor's values count the same in every sample. `tick` hears of every sample.
    """

    def __init__(self, state: State, placement: Placement, samples: Samples, build: Build, tick: Tick) -> None:
        self.samples, self.tick, self.placement = samples, tick, placement
        inputs = list(state.module["main"].params[: state.n_inputs])
        self._inputs = {var: spec.name for var, spec in zip(inputs, state.imported.inputs, strict=True)}
        self._watched = [var for var in placement.stored if var not in self._inputs]
        self._first = len(state.imported.outputs)
        self._run = build(with_outputs(state, self._watched))
        #: The model's own outputs for each sample of the last pass.
        self.reference: list[list[Array]] = []

    def on(self, samples: Samples) -> Observer:
        """Return an observer of the same model, compiled already, on other samples."""
        other = copy(self)
        other.samples, other.reference = samples, []
        return other

    def _each(self, doing: str) -> Iterator[Callable[[Expr], Array]]:
        """Run every sample and give a function from stored variable to its value."""
        total = len(self.samples)
        self.reference = []
        for number, feeds in enumerate(self.samples):
            self.tick(doing, number, total)
            outputs = list(self._run(feeds))
            self.reference.append(outputs[: self._first])
            values = dict(zip(self._watched, outputs[self._first :], strict=True))
            values.update({var: feeds[name] for var, name in self._inputs.items() if var in self.placement.group})
            yield values.__getitem__
        self.tick(doing, total, total)

    def channels(self, axes: Mapping[Expr, int]) -> dict[Expr, ChannelStatistics]:
        """Return the ends and powers of each stored tensor's channels, given the dimension that counts them, if any."""
        found: dict[Expr, ChannelStatistics] = {}
        for value in self._each("ranges"):
            for var in self.placement.stored:
                array, axis = value(var), axes.get(var)
                if var not in found:
                    found[var] = ChannelStatistics(1 if axis is None else array.shape[axis])
                found[var].add(array, axis)
        return found

    def histograms(
        self, channels: Mapping[Expr, ChannelStatistics], bounds: Mapping[Expr, Range]
    ) -> dict[int, Observed]:
        """Return the histogram of each scale's tensors between their extremes, and the tails of their channels.

        bounds: what values of a tensor can be at all.
        """
        extremes, observed = {}, {}
        for group, members in self.placement.members.items():
            above, below = ([getattr(channels[var], end) for var in members] for end in ("above", "below"))
            low, high = -max(float(one.first.max()) for one in below), max(float(one.first.max()) for one in above)
            limits = [bounds.get(var, (-np.inf, np.inf)) for var in members]
            extremes[group] = (low, high)
            observed[group] = Observed(
                low,
                high,
                np.zeros(BINS),
                above=joined(above),
                below=joined(below),
                bounds=(min(one[0] for one in limits), max(one[1] for one in limits)),
            )
        for value in self._each("histograms"):
            for var in self.placement.stored:
                group = self.placement.group[var]
                low, high = extremes[group]
                array = value(var).reshape(-1)
                stride = max(1, array.size // _COUNTED)
                if high > low:
                    bins = (array[::stride] - np.float32(low)) * np.float32(BINS / (high - low))
                    where = np.clip(bins, 0, BINS - 1).astype(np.int64)
                    observed[group].counts[:] += stride * np.bincount(where, minlength=BINS)
        return observed

    def moments(self, layers: Sequence[Layer], affine: Mapping[Expr, Affine] | None) -> dict[str, Moments]:
        """Return the moments of each layer's input patches, at positions drawn with a fixed seed.

        affine: how the layers' inputs are stored; None where they stay float32.
        """
        found = {layer.name: Moments(layer) for layer in layers}
        random = np.random.default_rng(0)
        each = max(1, _PATCHES // max(1, len(self.samples)))
        for value in self._each("moments"):
            for layer in layers:
                patches = take(layer, value(layer.data), each, random)
                found[layer.name].add(patches, patches if affine is None else affine[layer.data].rounded(patches))
        return found
