"""The search, on known cost functions: it finds what is best with few trials, and spends them where it pays."""

from __future__ import annotations

import random
import statistics

import pytest

from ingot.autotune.features import formula, numbers_of, vector, workload_of
from ingot.autotune.search import Allocator, Progress, Ranker, Search
from ingot.autotune.space import Space, encode
from ingot.schedules import conv2d, winograd
from ingot.schedules.conv2d import TileConfig
from ingot.schedules.winograd import WinogradConfig
from ingot.target import load_target

TARGET = load_target("x86-64-v3")
KEY = "conv2d float32 n1 h28 w28 i128 o128 k3x3 s1x1 p1.1.1.1 d1x1 | add.v relu"


def space_of(key: str = KEY) -> list[object]:
    workload = workload_of(key)
    assert workload is not None
    return [*conv2d.configs(workload, TARGET), *winograd.configs(workload, TARGET, 1 << 30)]


def cost(config: object) -> float:
    """Not the formula's own optimum: Winograd F(4x4) with whole tiles, six rows, in few parts."""
    if isinstance(config, TileConfig):
        return 1.0 + abs(config.pixels - 6) * 0.05 + abs(config.block - 16) * 0.01
    assert isinstance(config, WinogradConfig)
    return 0.6 + (config.size == 2) * 0.2 + abs(config.tiles - 6) * 0.03 + abs(config.block - 16) * 0.01


def search(strategy: str, seed: int = 0) -> Search:
    configs = space_of()
    ranker = Ranker(TARGET, seed) if strategy == "model" else None
    return Search(KEY, Space(configs), configs[0], TARGET, strategy, ranker, seed)


def run(strategy: str, trials: int, seed: int = 0) -> float:
    tried = search(strategy, seed)
    while tried.trials < trials:
        for config in tried.propose(min(8, trials - tried.trials)):
            tried.observe(config, cost(config) / cost(tried.default))
    return tried.best[1] * cost(tried.default)


def test_the_model_finds_the_best_with_few_trials() -> None:
    best = min(map(cost, space_of()))
    model = statistics.mean(run("model", 40, seed) for seed in range(2))
    chance = statistics.mean(run("random", 40, seed) for seed in range(8))
    assert model <= 1.03 * best
    assert model < chance


def test_every_strategy_tries_each_config_once() -> None:
    for strategy in ("model", "random", "grid"):
        tried = search(strategy)
        seen: list[object] = []
        while configs := tried.propose(40):
            seen += configs
            for config in configs:
                tried.observe(config, 1.0)
        assert len(seen) == len(set(seen)) == len(tried.space)
        assert tried.exhausted


def test_a_seed_fixes_the_search() -> None:
    def proposals(seed: int) -> list[object]:
        tried = search("model", seed)
        found: list[object] = []
        for _ in range(4):
            batch = tried.propose(8)
            found += batch
            for config in batch:
                tried.observe(config, cost(config))
        return found

    assert proposals(1) == proposals(1)
    assert proposals(1) != proposals(2)


def test_failures_are_not_tried_again_and_are_never_best() -> None:
    tried = search("model")
    first = tried.propose(4)
    for config in first:
        tried.observe(config, None)
    assert tried.best == (tried.default, 1.0)
    assert not set(first) & set(tried.propose(len(tried.space)))


def test_moves_stay_in_the_space() -> None:
    space, generator = Space(space_of()), random.Random(0)
    for _ in range(200):
        a, b = generator.choice(space.configs), generator.choice(space.configs)
        assert space.mutate(a, generator) in space
        assert space.cross(a, b, generator) in space
        assert all(type(n) is type(a) for n in space.neighbours(a))


def test_time_goes_where_it_pays() -> None:
    tasks = {name: Progress(search("random"), runs=1) for name in ("large", "small", "new")}
    tasks["large"].ns, tasks["small"].ns = 1e6, 1e3
    allocator = Allocator()
    assert allocator.next(tasks) == "new"  # nothing is known of it
    tasks["new"].ns = 1e5
    assert allocator.next(tasks) == "large"
    tasks["large"].gains = [0.0] * 8  # no hope left
    tasks["new"].gains = [0.3]
    assert allocator.next(tasks) == "new"
    for progress in tasks.values():
        progress.gains = [0.0] * 12
    assert allocator.next(tasks) is None


def test_features_tell_configs_apart() -> None:
    rows = [vector(KEY, encode(config), TARGET) for config in space_of()]
    assert len({row.tobytes() for row in rows if row is not None}) > 0.95 * len(rows)
    assert formula(KEY, space_of()[0], TARGET) is not None


@pytest.mark.parametrize(
    "key",
    [
        "",
        "conv2d",
        "conv2d float32",
        "conv2d float32 n1",
        "conv2d float32 n1 h0 w0 i1 o1 k1x1 s0x0 p0.0.0.0 d1x1",
        "conv2d float32 n1 h9 w9 i1 o1 k1 s1x1 p0.0.0.0 d1x1",
        "conv2d float32 n99999999 h9 w9 i1 o1 k1x1 s1x1 p0.0.0.0 d1x1",
        "matmul float32 m k3 n4",
        "\x00 \x00 \x00",
    ],
)
def test_a_key_from_elsewhere_is_no_error(key: str) -> None:
    numbers_of(key)
    assert vector(key, {"template": "tile", "pixels": 1, "block": 8, "unroll": 1}, TARGET) is None
