"""Before and after, on the board: a whole model with its default configs next to the same model with others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.autotune.build import Built, Group, built_from, link_batch
from ingot.autotune.measure import Measured, Plan, measure
from ingot.autotune.task import planned, with_made_up_weights

if TYPE_CHECKING:
    from ingot.autotune.board import Board
    from ingot.passes.picks import Choice
    from ingot.passes.state import State

_PROCESSES, _ROUNDS, _MICROSECONDS = 6, 5, 20_000
#: Whole models round differently in many places at once.
_ERROR_LIMIT = 2e-2
#: A model on a slow or crowded board is no hang.
_LIMIT_S = 600.0
#: Models that are built and measured at most, to find out which configs do not pay.
_MOST_BUILDS = 7


@dataclass(frozen=True)
class Comparison:
    """Median nanoseconds of an inference before and after, the median ratio after / before, and its noise.

    processes: the ratio in each process that was measured.
    """

    before: float
    after: float
    ratio: float
    noise: float
    error: float
    processes: tuple[float, ...] = ()

    @property
    def faster(self) -> bool:
        """Say whether it was so in all processes but one: by chance that happens once in nine times with six."""
        return sum(ratio < 1 for ratio in self.processes) > max(0, len(self.processes) - 2)


class WholeModel:
    """Measures a prepared model (`task.prepared`) with different configs; weights are made up."""

    def __init__(self, state: State, board: Board, threads: int = 1) -> None:
        self.state, self.board, self.threads = state, board, threads
        self.builds = 0
        self._default: Built | None = None

    def _built(self, configs: Mapping[str, Any]) -> Built:
        self.builds += 1

        def pick(choice: Choice) -> Any:  # noqa: ANN401
            return configs.get(choice.task, choice.default)

        id = self.builds
        return built_from(id, planned(with_made_up_weights(self.state, f"c{id}").having(picks=pick)))

    def compare(self, configs: Mapping[str, Any]) -> Comparison | None:
        """Return how the model does with `configs` by task, or None if it fails with them."""
        if self._default is None:
            self._default = self._built({})
        other = self._built(configs)
        imported, target = self.state.imported, self.state.target
        group = Group(imported.inputs, imported.outputs, (self._default, other))
        processes = _PROCESSES if self.board.unit == "ns" else 1  # instructions repeat exactly
        ids = [[self._default.id, other.id]]
        plan = Plan(ids, self.threads, _ROUNDS, _MICROSECONDS, _ERROR_LIMIT, _LIMIT_S, processes)
        with tempfile.TemporaryDirectory(prefix="ingot-") as temporary:
            executable = Path(temporary) / "candidates"
            link_batch([group], target, executable)
            results = measure(self.board, executable, plan)
        before, after = results[self._default.id], results[other.id]
        return _comparison(before, after)


def _comparison(before: Measured, after: Measured) -> Comparison | None:
    if before.ns is None or after.ns is None or after.ratio is None:
        return None
    return Comparison(before.ns, after.ns, after.ratio, after.noise, after.error, after.processes)


def settle(
    compare: Callable[[Mapping[str, Any]], Comparison | None], configs: Mapping[str, Any], weights: Mapping[str, float]
) -> tuple[dict[str, Any], Comparison | None]:
    """Return the configs that make the model faster together, and the comparison with them.

    Case 1: all of them do. Case 2: they do not; halves are added to what is kept as long as they help, those with the
    largest expected gain (`weights`) first. A half that does not is split again, until builds run out; what was not
    shown to help is not kept.
    """
    if not configs:
        return {}, None
    order = sorted(configs, key=lambda key: (-weights.get(key, 0.0), key))
    result = compare(configs)
    if result is not None and result.faster:
        return dict(configs), result
    kept: dict[str, Any] = {}
    best: Comparison | None = None
    builds = 1
    waiting: list[Sequence[str]] = [order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]]
    while waiting and builds < _MOST_BUILDS:
        part = waiting.pop(0)
        if not part or len(part) == len(order):
            continue
        trial = {**kept, **{key: configs[key] for key in part}}
        result = compare(trial)
        builds += 1
        if result is not None and result.faster and (best is None or result.ratio < best.ratio):
            kept, best = trial, result
        elif len(part) > 1:
            middle = (len(part) + 1) // 2
            waiting += [part[:middle], part[middle:]]
    return kept, best
