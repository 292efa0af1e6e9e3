"""Which configs to measure next, and on which task.

A strategy proposes configs of one task's space; `model` ranks them with gradient-boosted trees that learn from every
measurement of every task, `random` and `grid` are there to compare with. `Allocator` decides which task gets the next
batch: the one from which the whole model still gains most.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ingot.autotune.features import formula, vector
from ingot.autotune.space import Encoded, Space, encode

if TYPE_CHECKING:
    from ingot.target import Target

STRATEGIES = ("model", "random", "grid")
#: Share of each batch that is drawn at random, whatever the model says.
EPSILON: Final = 0.15
#: Spaces up to this size are ranked whole; larger ones by an evolving population.
RANKED_WHOLE: Final = 3000
_POPULATION, _GENERATIONS = 128, 4
#: A measurement teaches this many trees of this depth.
_TREES, _DEPTH = 60, 6
_LEAST_SAMPLES = 16
#: Samples the trees learn from at most: the latest.
_MOST_SAMPLES = 6000


@dataclass
class Sample:
    """One measured config of a task: `ratio` is its time by the task's default's."""

    task: str
    config: Encoded
    ratio: float


class Ranker:
    """Gradient-boosted trees that rank the configs of one task, taught by those of all."""

    def __init__(self, target: Target, seed: int = 0) -> None:
        self.target = target
        self.seed = seed
        self.samples: list[tuple[str, np.ndarray, float]] = []
        self._trees: Any = None
        self._taught = 0

    def learn(self, samples: Sequence[Sample]) -> None:
        """Take samples; the trees are grown when they are next asked."""
        for sample in samples:
            row = vector(sample.task, sample.config, self.target)
            if row is not None:
                self.samples.append((sample.task, row, sample.ratio))

    @property
    def ready(self) -> bool:
        """Whether there is enough to learn from."""
        return len(self.samples) >= _LEAST_SAMPLES

    def scores(self, task: str, configs: Sequence[Any]) -> np.ndarray:
        """Return a score for each config, higher for faster."""
        rows = [vector(task, encode(config), self.target) for config in configs]
        width = self.samples[0][1].size
        matrix = np.stack([row if row is not None else np.zeros(width, np.float32) for row in rows])
        import xgboost

        return np.asarray(self._grown().predict(xgboost.DMatrix(matrix)))

    def _grown(self) -> Any:  # noqa: ANN401 - an xgboost.Booster
        if self._trees is not None and self._taught == len(self.samples):
            return self._trees
        import xgboost

        latest = sorted(self.samples[-_MOST_SAMPLES:], key=lambda s: s[0])
        tasks = sorted({task for task, _, _ in latest})
        number = {task: i for i, task in enumerate(tasks)}
        best = {task: min(r for t, _, r in latest if t == task) for task in tasks}
        data = xgboost.DMatrix(
            np.stack([row for _, row, _ in latest]),
            # Relevance: a config's speed by that of the best known one of its task.
            label=np.asarray([best[t] / r for t, _, r in latest], np.float32),
            qid=np.asarray([number[t] for t, _, _ in latest], np.uint32),
        )
        parameters = {
            "objective": "rank:pairwise",
            "max_depth": _DEPTH,
            "eta": 0.2,
            "subsample": 0.9,
            "min_child_weight": 0.1,
            "nthread": 1,
            "seed": self.seed,
            "verbosity": 0,
        }
        self._trees = xgboost.train(parameters, data, num_boost_round=_TREES)
        self._taught = len(self.samples)
        return self._trees


@dataclass
class Search:
    """The search of one task's space."""

    task: str
    space: Space
    default: Any
    target: Target = field(repr=False)
    strategy: str = "model"
    ranker: Ranker | None = field(default=None, repr=False)
    seed: int = 0
    ratios: dict[Any, float] = field(default_factory=dict)
    failed: set[Any] = field(default_factory=set)
    warm: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Seed the search by its task, so that the order of tasks does not matter."""
        self._random = random.Random(f"{self.seed} {self.task}")  # noqa: S311 - no secret
        self._order: list[Any] = list(self.space.configs)
        if self.strategy == "random":
            self._random.shuffle(self._order)

    # -- what is known ---------------------------------------------------------------------------------------------

    @property
    def trials(self) -> int:
        """How many configs were tried."""
        return len(self.ratios) + len(self.failed)

    @property
    def best(self) -> tuple[Any, float]:
        """The fastest config and its ratio; the default before anything was measured."""
        if not self.ratios:
            return self.default, 1.0
        return min(self.ratios.items(), key=lambda item: item[1])

    @property
    def exhausted(self) -> bool:
        """Whether every config was tried."""
        return all(c in self.ratios or c in self.failed for c in self.space.configs)

    def observe(self, config: Any, ratio: float | None) -> None:  # noqa: ANN401
        """Take a measurement; None for a config that failed."""
        if ratio is None:
            self.failed.add(config)
            self.ratios.pop(config, None)
        else:
            self.ratios[config] = ratio
            if self.ranker is not None:
                self.ranker.learn([Sample(self.task, encode(config), ratio)])

    # -- what to try -----------------------------------------------------------------------------------------------

    def propose(self, count: int) -> list[Any]:
        """Return up to `count` configs that were not tried yet, the most promising first."""
        fresh = [c for c in self._order if c not in self.ratios and c not in self.failed]
        if self.strategy != "model":
            return fresh[:count]
        warm = [c for c in self.warm if c in self.space and c not in self.ratios and c not in self.failed]
        chosen = list(dict.fromkeys(warm))[: max(1, count // 2)]
        ranked = self._ranked(fresh)
        explored = round(EPSILON * count) if len(fresh) > count else 0
        for config in ranked:
            if len(chosen) >= count - explored:
                break
            if config not in chosen:
                chosen.append(config)
        rest = [c for c in fresh if c not in chosen]
        self._random.shuffle(rest)
        return chosen + rest[: count - len(chosen)]

    def _ranked(self, fresh: list[Any]) -> list[Any]:
        """Return candidates, the most promising first: by the trees once they know something, else by the formula."""
        if not fresh:
            return []
        if self.ranker is None or not self.ranker.ready:
            costs = [formula(self.task, c, self.target) for c in fresh]
            if all(cost is None for cost in costs):
                near = self.space.neighbours(self.default)
                return [*(c for c in near if c in fresh), *fresh]
            keyed = sorted(range(len(fresh)), key=lambda i: (costs[i] is None, costs[i] or 0.0, i))
            return [fresh[i] for i in keyed]
        pool = fresh if len(fresh) <= RANKED_WHOLE else self._evolve(set(fresh))
        scores = self.ranker.scores(self.task, pool)
        return [pool[i] for i in sorted(range(len(pool)), key=lambda i: (-scores[i], i))]

    def _evolve(self, fresh: set[Any]) -> list[Any]:
        """Return configs that a population reaches by mutation and crossover, selected by the trees."""
        known = sorted(self.ratios, key=lambda c: self.ratios[c])[: _POPULATION // 4]
        population = known + self._random.sample(self.space.configs, min(_POPULATION - len(known), len(self.space)))
        found: dict[Any, None] = {}
        for _ in range(_GENERATIONS):
            scores = self.ranker.scores(self.task, population) if self.ranker is not None else np.zeros(len(population))
            order = sorted(range(len(population)), key=lambda i: (-scores[i], i))
            parents = [population[i] for i in order[: _POPULATION // 2]]
            children = []
            for _ in range(_POPULATION):
                a, b = self._random.choice(parents), self._random.choice(parents)
                children.append(self.space.cross(a, b, self._random) if a != b else self.space.mutate(a, self._random))
            found |= dict.fromkeys(c for c in (*parents, *children) if c in fresh)
            population = list(dict.fromkeys(parents + children))
        return list(found) or sorted(fresh, key=self.space.index)


# ----------------------------------------------------------------------------------------------------- many searches


@dataclass
class Progress:
    """What the allocator knows of one task. seconds: of one inference, with the default."""

    search: Search
    runs: int
    ns: float = 0.0
    gains: list[float] = field(default_factory=list)

    @property
    def now(self) -> float:
        """Nanoseconds of one inference spent in this task, with the best config so far."""
        return self.ns * self.runs * min(1.0, self.search.best[1])

    @property
    def before(self) -> float:
        """Nanoseconds of one inference spent in this task with the default."""
        return self.ns * self.runs


#: What a task that was not searched yet is expected to gain, and how fast that hope fades with each batch.
_HOPE, _FADE = 0.12, 0.45


class Allocator:
    """Gives the next batch to the task from which the whole model is expected to gain most."""

    def __init__(self, noise: float = 0.002) -> None:
        self.noise = noise

    def expected(self, progress: Progress) -> float:
        """Return the nanoseconds of an inference that another batch is expected to save."""
        if progress.search.exhausted:
            return 0.0
        hope = _HOPE * _FADE ** len(progress.gains)
        # The last batches' own gains, the latest counting most.
        seen = max((gain * _FADE ** (age + 1) for age, gain in enumerate(reversed(progress.gains))), default=0.0)
        return progress.now * max(hope, seen)

    def next(self, tasks: Mapping[str, Progress]) -> str | None:
        """Return the key of the task to search next, or None if no gain above the noise is expected anywhere.

        Tasks that were never measured come first: what they cost is not known.
        """
        for key, progress in tasks.items():
            if progress.ns == 0.0 and not progress.search.exhausted:
                return key
        total = sum(p.now for p in tasks.values()) or 1.0
        gains = {key: self.expected(p) for key, p in tasks.items()}
        best = max(gains, key=lambda k: gains[k], default=None)
        return best if best is not None and gains[best] > self.noise * total else None
