"""A whole run on a small model, measured here: records, resuming, compiling with the log, and never slower."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ingot
from autotune.small import small_model, small_state
from ingot.autotune.board_local import LocalBoard
from ingot.autotune.build import Built, Group, Job, build, link_batch
from ingot.autotune.log import Record, append, log_path, read
from ingot.autotune.lookup import REJECTED, Lookup, load, rank
from ingot.autotune.measure import Plan, measure
from ingot.autotune.pool import LocalPool
from ingot.autotune.search import Allocator
from ingot.autotune.space import encode
from ingot.autotune.task import tasks_of
from ingot.autotune.tuner import Settings, Tuner
from ingot.autotune.whole import Comparison, WholeModel, settle
from ingot.errors import LogError
from ingot.passes.picks import Choice
from ingot.target import native_target

TARGET = native_target()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model and a log of a few trials."""
    place = tmp_path_factory.mktemp("tuned")
    state = small_state(place)
    tuner = Tuner(tasks_of(state), TARGET, LocalBoard(TARGET), place / "logs", Settings(trials=12))
    with LocalPool(2) as pool:
        tuner.run(pool)
    assert tuner.status.trials == 12
    assert tuner.status.failures == 0
    return place


def test_every_trial_is_a_record(folder: Path) -> None:
    records, counts = read(log_path(folder / "logs", TARGET.log_name))
    assert counts.skipped == 0
    tasks = {t.key: t for t in tasks_of(small_state(folder))}
    assert {r.task for r in records} == set(tasks)
    assert all(r.ok and r.threads == 1 and r.target == TARGET.log_name for r in records)
    for key, task in tasks.items():  # each default is measured too: it is what the others are compared with
        assert any(dict(r.config) == encode(task.default) for r in records if r.task == key)


def test_a_second_run_goes_on(folder: Path) -> None:
    tuner = Tuner(tasks_of(small_state(folder)), TARGET, LocalBoard(TARGET), folder / "logs", Settings(trials=9))
    assert tuner.status.resumed >= 12 + len(tuner.tasks)
    assert all(progress.ns for progress in tuner.progress.values())
    proposed = tuner._compose(Allocator())
    for key, configs in proposed:
        assert not set(configs) & set(tuner.progress[key].search.ratios)


def test_the_whole_model_is_compared(folder: Path) -> None:
    state = small_state(folder)
    tasks = tasks_of(state)
    other = {t.key: next(c for c in t.space if c != t.default) for t in tasks}
    found = WholeModel(state, LocalBoard(TARGET)).compare(other)
    assert found is not None
    assert found.before > 0 < found.after
    assert 0 < found.error < 1e-4  # the same numbers, summed in another order


def test_every_kind_of_config_computes_the_same(folder: Path) -> None:
    """Both orders, groups of blocks, short and long steps, Winograd: measured against the default's output."""
    task = tasks_of(small_state(folder))[0]
    by_shape = {tuple(sorted(encode(c).items() - encode(task.default).items()))[:2]: c for c in task.space}
    configs = [task.default, *random.Random(0).sample(list(by_shape.values()), 10)]
    configs += [c for c in task.space if getattr(c, "group", 1) > 1][:4]
    jobs = [Job(i, task.key, task.work, encode(c), TARGET) for i, c in enumerate(configs)]
    built = [b for b in map(build, jobs) if isinstance(b, Built)]
    assert len(built) == len(configs)
    executable = folder / "candidates"
    link_batch([Group(task.work.inputs, task.work.outputs, tuple(built))], TARGET, executable)
    plan = Plan([[b.id for b in built]], rounds=1, microseconds=1)
    found = measure(LocalBoard(TARGET), executable, plan)
    assert {m.status for m in found.values()} == {"ok"}
    assert max(m.error for m in found.values()) < 1e-5


def test_compile_uses_the_log_and_stays_reproducible(folder: Path) -> None:
    tasks = tasks_of(small_state(folder))
    logs = folder / "chosen"
    other = {t.key: next(c for c in t.space if type(c) is type(t.default) and c != t.default) for t in tasks}
    for task in tasks:
        rows = [(task.default, 100.0), (other[task.key], 50.0)]
        append(log_path(logs, TARGET.log_name), [record(task.key, encode(c), ns) for c, ns in rows])
    model = folder / "small.onnx"
    model.write_bytes(small_model())
    plain = ingot.compile(model, selftest=False)
    first, second = (ingot.compile(model, log=logs, selftest=False) for _ in range(2))
    assert first.emit("so") == second.emit("so")
    assert first.emit("llvm") != plain.emit("llvm")


def record(
    task: str, config: Mapping[str, int | str], ns: float | None, status: str = "ok", threads: int = 1
) -> Record:
    return Record(TARGET.log_name, task, threads, config, status, ns)


def choice(folder: Path) -> Choice:
    task = tasks_of(small_state(folder))[0]
    return Choice(None, task.key, lambda: task.space, task.default)


def test_what_is_picked(folder: Path) -> None:
    c = choice(folder)
    fast, slow = [x for x in c.space() if x != c.default][:2]
    key = c.task

    def pick(*records: Record, threads: int = 1) -> Any:
        return Lookup([rank(records)], threads)(c)

    assert pick() == c.default
    assert pick(record(key, encode(fast), 50), record(key, encode(slow), 80)) == fast
    # Several times of one config count with their median, of two the longer one.
    assert pick(record(key, encode(fast), 50), *(record(key, encode(slow), ns) for ns in (10, 90))) == fast
    lucky = [record(key, encode(slow), ns) for ns in (10, 90, 90)]
    assert pick(record(key, encode(fast), 50), *lucky) == fast
    # A config that was rejected, crashed or was wrong once is not used.
    for status in (REJECTED, "crash", "wrong_answer"):
        assert pick(record(key, encode(fast), 50), record(key, encode(fast), None, status)) == c.default
    # Within the noise the default stays.
    assert pick(record(key, encode(fast), 99), record(key, encode(c.default), 100)) == c.default
    # What is not of the space here is no config: the next one is taken.
    alien = {**encode(fast), "block": 4096}
    assert pick(record(key, alien, 1), record(key, encode(fast), 50)) == fast
    assert pick(record(key, {"template": "tile", "pixels": 1 << 40, "block": 8, "unroll": 1}, 1)) == c.default
    # Fields of another version are skipped.
    assert pick(record(key, {**encode(fast), "tomorrow": 1}, 50)) == fast
    # Records of as many threads come first.
    both = (record(key, encode(fast), 50), record(key, encode(slow), 50, threads=2))
    assert pick(*both) == fast
    assert pick(*both, threads=2) == slow


def test_the_users_log_comes_before_others(folder: Path) -> None:
    c = choice(folder)
    fast, slow = [x for x in c.space() if x != c.default][:2]
    user, shipped = (rank([record(c.task, encode(x), ns)]) for x, ns in ((slow, 80), (fast, 50)))
    assert Lookup([user, shipped])(c) == slow


def test_a_log_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no such folder"):
        load(TARGET, tmp_path / "none")


def comparison(ratio: float) -> Comparison:
    return Comparison(1.0, ratio, ratio, 0.0, 0.0, (ratio,) * 6)


def test_settle_keeps_all_that_helps() -> None:
    kept, found = settle(lambda _: comparison(0.8), {"a": 1, "b": 2}, {})
    assert kept == {"a": 1, "b": 2}
    assert found is not None


def test_settle_drops_what_makes_the_model_slower() -> None:
    costs = {"a": -0.1, "b": 0.5, "c": -0.1, "d": -0.05}

    def compare(configs: Mapping[str, Any]) -> Comparison:
        return comparison(1 + sum(costs[key] for key in configs))

    kept, found = settle(compare, dict.fromkeys(costs, 0), {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0})
    assert set(kept) == {"a", "c", "d"}
    assert found is not None
    assert found.ratio < 1


@pytest.mark.parametrize(
    ("ratios", "faster"),
    [
        ((0.9,) * 6, True),
        ((*(0.9,) * 5, 1.1), True),
        ((*(0.5,) * 4, 1.1, 1.1), False),
        ((0.9,), True),
        ((1.1,), False),
        ((), False),
    ],
)
def test_what_counts_as_faster(ratios: tuple[float, ...], faster: bool) -> None:
    assert Comparison(1.0, 0.9, 0.9, 0.0, 0.0, ratios).faster is faster


@pytest.mark.parametrize("result", [None, comparison(1.5)])
def test_settle_keeps_nothing_that_never_helps(result: Comparison | None) -> None:
    assert settle(lambda _: result, {"a": 1, "b": 2, "c": 3}, {}) == ({}, None)
