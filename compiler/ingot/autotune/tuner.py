"""A tuning run: tasks, searches, builders, a board and a log, until the time is up or nothing more is to be gained.

Everything measured is in the log, on the disk, before the next batch begins; a run that was killed goes on from there.
Times in the log are scaled by the task's default, which is measured in every batch next to the candidates: so a
machine that was busy for a minute does not make one config look slower than another.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.autotune.build import Built, Group, Job, NotBuilt, build_all, link_batch
from ingot.autotune.log import Record, append, log_path, read
from ingot.autotune.lookup import MARGIN, REJECTED, siblings
from ingot.autotune.measure import Measured, Plan, measure
from ingot.autotune.pool import in_parallel
from ingot.autotune.search import Allocator, Progress, Ranker, Sample, Search
from ingot.autotune.space import Space, decode, encode
from ingot.autotune.task import Task

if TYPE_CHECKING:
    from ingot.autotune.board import Board
    from ingot.autotune.pool import Pool
    from ingot.target import Target

#: Candidates of one executable, besides the references.
BATCH = 24
#: Candidates of one task in a batch: few when nothing is known of any task, more later.
FIRST, LATER = 3, 12
#: At the end the fastest configs of each task are measured again, longer and in several processes.
FINALISTS, FINAL_ROUNDS, FINAL_PROCESSES = 3, 5, 3


@dataclass(frozen=True)
class Settings:
    """How long to search and how. trials: configs to measure, in all tasks together."""

    threads: int = 1
    trials: int | None = None
    seconds: float | None = None
    strategy: str = "model"
    seed: int = 0


@dataclass
class Status:
    """What a person wants to see while it runs."""

    trials: int = 0
    failures: int = 0
    resumed: int = 0
    started: float = field(default_factory=time.monotonic)
    stage: str = "starting"


def _shares(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """Divide a batch among `count` boards; a task stays whole, as its candidates are compared with each other."""
    shares: list[list[Group]] = [[] for _ in range(count)]
    for group in sorted(groups, key=lambda g: -len(g.built)):
        min(shares, key=lambda share: sum(len(g.built) for g in share)).append(group)
    return [share for share in shares if share]


class Tuner:
    """Searches the configs of some tasks for one target, on one board, into one log."""

    def __init__(
        self,
        tasks: Sequence[Task],
        target: Target,
        board: Board,
        folder: Path,
        settings: Settings,
        *,
        warm_folders: Sequence[Path] = (),
        changed: Callable[[Tuner], None] = lambda _: None,
    ) -> None:
        self.tasks = {task.key: task for task in tasks}
        self.target, self.board, self.settings = target, board, settings
        self.path = log_path(folder, target.log_name, instructions=board.unit == "instructions")
        self.changed = changed
        self.status = Status()
        self.ranker = Ranker(target, settings.seed)
        self.progress: dict[str, Progress] = {}
        for task in tasks:
            search = Search(
                task.key,
                Space(task.space),
                task.default,
                target,
                settings.strategy,
                self.ranker if settings.strategy == "model" else None,
                settings.seed,
            )
            self.progress[task.key] = Progress(search, task.runs)
        self._ids = 0
        self._references: dict[str, Built] = {}  # each task's compiled default, which every batch holds
        self._resume()
        self._warm(warm_folders, folder)

    # -- what is known already -------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Take what the log has of these tasks on this target."""
        records = [r for r in read(self.path)[0] if r.target == self.target.log_name]
        mine = [r for r in records if r.threads == self.settings.threads and r.task in self.progress]
        times: dict[str, dict[Any, list[float]]] = {}
        for record in mine:
            decoded, progress = decode(record.config), self.progress[record.task]
            if decoded is None or decoded[0] not in progress.search.space:
                continue
            if record.ok and record.ns is not None:
                times.setdefault(record.task, {}).setdefault(decoded[0], []).append(record.ns)
            elif record.status != REJECTED:
                progress.search.observe(decoded[0], None)
        for key, configs in times.items():
            progress = self.progress[key]
            if progress.search.default not in configs:
                continue  # without its default nothing of a task can be compared
            progress.ns = statistics.median(configs[progress.search.default])
            for config, ns in configs.items():
                if config not in progress.search.failed:
                    progress.search.observe(config, statistics.median(ns) / progress.ns)
                    self.status.resumed += 1
            progress.gains.append(1 - min(1.0, progress.search.best[1]))

    def _warm(self, folders: Iterable[Path], own: Path) -> None:
        """Teach the ranking with the logs of this target and its siblings; begin with their best configs."""
        if self.settings.strategy != "model":
            return
        for folder in dict.fromkeys([own, *folders]):
            if not folder.is_dir():
                continue
            for name in (self.target.log_name, *siblings(self.target, folder)):
                path = log_path(folder, name)
                if path == self.path and name == self.target.log_name:
                    records = [r for r in read(path)[0] if r.task not in self.progress]
                else:
                    records = read(path)[0]
                self._learn(records)

    def _learn(self, records: Iterable[Record]) -> None:
        groups: dict[tuple[str, int], list[Record]] = {}
        for record in records:
            if record.ok and record.ns is not None:
                groups.setdefault((record.task, record.threads), []).append(record)
        for (key, _), group in groups.items():
            group.sort(key=lambda r: r.ns or 0.0)
            middle = group[len(group) // 2].ns or 1.0
            self.ranker.learn([Sample(key, r.config, (r.ns or 0.0) / middle) for r in group])
            if key in self.progress:
                found = [decode(r.config) for r in group[:FINALISTS]]
                self.progress[key].search.warm += [d[0] for d in found if d is not None]

    # -- the run ---------------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds until the time is up, None without a limit."""
        if self.settings.seconds is None:
            return None
        return self.settings.seconds - (time.monotonic() - self.status.started)

    def _over(self) -> bool:
        left = self.seconds_left()
        used_up = self.settings.trials is not None and self.status.trials >= self.settings.trials
        return used_up or (left is not None and left <= 0)

    def run(self, pool: Pool) -> None:
        """Search until the trials or the time are used up, or nothing above the noise is expected; then confirm.

        Raises BoardError where the board fails; what was measured until then is in the log.
        """
        allocator = Allocator()
        self.status.stage = "searching"
        self.changed(self)
        while not self._over():
            batch = self._compose(allocator)
            if not batch:
                break
            self._measure(pool, batch)
            self.changed(self)
        self.confirm(pool)

    def _compose(self, allocator: Allocator) -> list[tuple[str, list[Any]]]:
        """Return the next batch: configs of the tasks that are expected to gain most."""
        room = BATCH
        if self.settings.trials is not None:
            room = min(room, self.settings.trials - self.status.trials)
        waiting = dict(self.progress)
        batch: list[tuple[str, list[Any]]] = []
        while room > 0 and waiting:
            key = allocator.next(waiting)
            if key is None:
                break
            progress = waiting.pop(key)
            count = min(room, LATER if progress.ns else FIRST)
            configs = [c for c in progress.search.propose(count + 1) if c != progress.search.default][:count]
            if configs or not progress.ns:
                batch.append((key, configs))
                room -= max(1, len(configs))
        return batch

    def _measure(self, pool: Pool, batch: Sequence[tuple[str, list[Any]]], rounds: int | None = None) -> None:
        """Build, run and record one batch; each task's default is its reference."""
        jobs: list[Job] = []
        wanted: list[list[tuple[Any, int]]] = []
        for key, configs in batch:
            search = self.progress[key].search
            rows = []
            for config in (search.default, *configs):
                if config == search.default and key in self._references:
                    rows.append((config, self._references[key].id))
                    continue
                self._ids += 1
                rows.append((config, self._ids))
                jobs.append(Job(self._ids, key, self.tasks[key].work, encode(config), self.target))
            wanted.append(rows)
        made = build_all(pool, jobs)
        for key in self._references.keys() & dict(batch).keys():
            made[self._references[key].id] = self._references[key]
        for (key, _), rows in zip(batch, wanted, strict=True):
            compiled = made[rows[0][1]]
            if isinstance(compiled, Built):
                self._references[key] = compiled
        groups = []
        for (key, _), rows in zip(batch, wanted, strict=True):
            built = tuple(b for _, id in rows if isinstance(b := made[id], Built))
            if built and built[0].id == rows[0][1]:  # without its default there is nothing to compare with
                work = self.tasks[key].work
                groups.append(Group(work.inputs, work.outputs, built))
        results: dict[int, Measured] = {
            id: Measured("build", detail=b.why, board=self.board.name)
            for id, b in made.items()
            if isinstance(b, NotBuilt)
        }
        for part in in_parallel([partial(self._run, share, rounds) for share in _shares(groups, self.board.size)]):
            results |= part
        records: list[Record] = []
        for (key, _), rows in zip(batch, wanted, strict=True):
            records += self._take(key, rows, results, final=rounds is not None)
        append(self.path, records)

    def _run(self, groups: Sequence[Group], rounds: int | None) -> dict[int, Measured]:
        """Link these tasks' candidates into one executable and run it on a board."""
        plan = Plan([[b.id for b in g.built] for g in groups], self.settings.threads)
        if rounds is not None:
            processes = FINAL_PROCESSES if self.board.unit == "ns" else 1
            plan = Plan(plan.groups, plan.threads, rounds, 2 * plan.microseconds, processes=processes)
        with tempfile.TemporaryDirectory(prefix="ingot-") as temporary:
            executable = Path(temporary) / "candidates"
            link_batch(groups, self.target, executable)
            return measure(self.board, executable, plan)

    def _take(
        self, key: str, rows: Sequence[tuple[Any, int]], results: dict[int, Measured], *, final: bool
    ) -> list[Record]:
        """Tell the search what was measured of one task, and return its records."""
        progress = self.progress[key]
        reference = results.get(rows[0][1])
        if reference is None or reference.ns is None:
            for config, _ in rows:
                progress.search.observe(config, None)
            self.status.failures += len(rows)
            progress.gains.append(0.0)
            status = reference.status if reference is not None else "build"
            return [self._record(key, rows[0][0], Measured(status, board=self.board.name), None)]
        if not progress.ns:
            progress.ns = reference.ns
        before = min(1.0, progress.search.best[1])
        records = []
        for config, id in rows:
            found = results.get(id, Measured("build", board=self.board.name))
            ok = found.status == "ok" and found.ratio is not None
            if config != progress.search.default and not final:
                self.status.trials += 1
                self.status.failures += not ok
            progress.search.observe(config, found.ratio if ok else None)
            records.append(self._record(key, config, found, progress.ns))
        if not final:
            progress.gains.append(max(0.0, before - min(1.0, progress.search.best[1])))
        return records

    def _record(self, key: str, config: Any, found: Measured, base: float | None) -> Record:  # noqa: ANN401
        ns = round(found.ratio * base, 1) if found.ratio is not None and base is not None else None
        status = found.status if ns is not None or found.status != "ok" else "crash"
        return Record(
            self.target.log_name,
            key,
            self.settings.threads,
            encode(config),
            status,
            ns if status == "ok" else None,
            round(found.noise, 4),
            found.board,
        )

    def confirm(self, pool: Pool) -> None:
        """Measure the fastest configs of every task again, next to the default: the luckiest is not the fastest."""
        self.status.stage = "confirming"
        self.changed(self)
        batch: list[tuple[str, list[Any]]] = []
        for key, progress in self.progress.items():
            ranked = sorted(progress.search.ratios.items(), key=lambda item: item[1])
            top = [c for c, ratio in ranked[:FINALISTS] if ratio < 1 - MARGIN / 2 and c != progress.search.default]
            if top:
                batch.append((key, top))
        while batch:
            part, size = [], 0
            while batch and size < BATCH:
                size += len(batch[0][1])
                part.append(batch.pop(0))
            self._measure(pool, part, FINAL_ROUNDS)
            self.changed(self)
        self.status.stage = "done"

    # -- what came of it -------------------------------------------------------------------------------------------

    def reject(self, keys: Iterable[str]) -> None:
        """Record that the best configs of these tasks were fast alone and not in their model."""
        records = []
        for key in keys:
            config = self.picks().get(key)
            if config is not None:
                records.append(self._record(key, config, Measured(REJECTED, board=self.board.name), None))
        append(self.path, records)

    def picks(self) -> dict[str, Any]:
        """Return the configs that beat their default, as a compile with this log would choose them."""
        from ingot.autotune.lookup import Lookup, rank
        from ingot.passes.picks import Choice

        mine = rank(r for r in read(self.path)[0] if r.target == self.target.log_name)
        lookup = Lookup([mine], self.settings.threads)
        chosen = {}
        for key, task in self.tasks.items():
            chosen[key] = lookup(Choice(None, key, partial(tuple, task.space), task.default))
        return {key: config for key, config in chosen.items() if config != self.tasks[key].default}
