"""Which config a compile uses: the user's log, then the shipped one, then those of sibling targets, then the formula.

A record is a suggestion: its config must be one of the space of the kernel at hand, as this compiler sees it, or the
next best is taken. So a log from another version, or from somebody else, can make a model slower, but not wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingot.autotune.log import Counts, Record, log_path, read, shipped_folder
from ingot.autotune.space import Encoded, decode, encode

if TYPE_CHECKING:
    from ingot.passes.picks import Choice
    from ingot.target import Target

#: The state of a config that was fast alone and not in its model: it is not used.
REJECTED = "rejected"
#: A config is used if it is faster than the default by more than this share: less is noise.
MARGIN = 0.02


@dataclass(frozen=True)
class Ranked:
    """The measured configs of one task, the fastest first, with the median of their times in ns."""

    configs: tuple[tuple[Encoded, float], ...]

    def time_of(self, config: Any) -> float | None:  # noqa: ANN401
        """Return the time of a config, or None if it was not measured."""
        wanted = encode(config)
        return next((ns for encoded, ns in self.configs if dict(encoded) == wanted), None)


def rank(records: Iterable[Record]) -> dict[tuple[str, int], Ranked]:
    """Return the usable configs of every (task, threads). The order of the records does not matter.

    A config that was rejected, or that ever crashed or gave a wrong answer, is not among them. Of two times the longer
    one counts: the search measured many configs once, and the fastest of them were lucky too.
    """
    times: dict[tuple[str, int], dict[str, tuple[Encoded, list[float]]]] = {}
    bad: set[tuple[str, int, str]] = set()
    for record in records:
        key = (record.task, record.threads)
        if record.ok and record.ns is not None:
            times.setdefault(key, {}).setdefault(record.config_key, (record.config, []))[1].append(record.ns)
        else:
            bad.add((*key, record.config_key))
    result = {}
    for key, configs in times.items():
        rows = [
            (statistics.median_high(ns), text, config)
            for text, (config, ns) in configs.items()
            if (*key, text) not in bad
        ]
        result[key] = Ranked(tuple((config, ns) for ns, _, config in sorted(rows, key=lambda row: row[:2])))
    return result


@dataclass
class Lookup:
    """A `passes.picks.Picks` that asks logs. used, missed: how many kernels had a record and how many had none."""

    sources: Sequence[Mapping[tuple[str, int], Ranked]]
    threads: int = 1
    used: int = 0
    missed: int = 0
    skipped_fields: int = 0
    counts: Counts = field(default_factory=Counts)

    def __call__(self, choice: Choice) -> Any:  # noqa: ANN401 - a config
        """Return the config for one kernel."""
        space: frozenset[Any] | None = None
        for source in self.sources:
            ranked = self._ranked(source, choice.task)
            if ranked is None:
                continue
            space = space if space is not None else frozenset(choice.space())
            found = self._first(ranked, space, choice.default)
            if found is not None:
                self.used += 1
                return found
        self.missed += 1
        return choice.default

    def _ranked(self, source: Mapping[tuple[str, int], Ranked], task: str) -> Ranked | None:
        """Return what a log has for the task: on as many threads, else on the nearest number of them."""
        threads = sorted((n for t, n in source if t == task), key=lambda n: (abs(n - self.threads), n))
        return source[task, threads[0]] if threads else None

    def _first(self, ranked: Ranked, space: frozenset[Any], default: Any) -> Any:  # noqa: ANN401
        """Return the fastest config that is valid here; the default where that is as fast; None if none is valid."""
        usual = ranked.time_of(default)
        for encoded, ns in ranked.configs:
            decoded = decode(encoded)
            if decoded is None or decoded[0] not in space:
                continue
            self.skipped_fields += decoded[1]
            return default if usual is not None and ns > usual * (1 - MARGIN) else decoded[0]
        return None


def siblings(target: Target, folder: Path) -> list[str]:
    """Return the names of other targets with a log in `folder` and the same instruction set and vectors, sorted."""
    from ingot.errors import TargetError
    from ingot.target import load_target

    found = []
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem == target.log_name or "+" in path.stem:
            continue
        try:
            other = load_target(path.stem)
        except TargetError:
            continue
        same = (other.arch, other.vector_bits, other.vector_registers)
        if same == (target.arch, target.vector_bits, target.vector_registers):
            found.append((abs(other.cache.l2_kib - target.cache.l2_kib), other.name))
    return [name for _, name in sorted(found)]


def load(target: Target, log: Path | None = None, threads: int = 1, *, shipped: bool = True) -> Lookup:
    """Return the lookup for a target. Raises LogError where `log` is no folder that can be read."""
    from ingot.errors import LogError

    folders = [log] if log is not None else []
    if log is not None and not log.is_dir():
        found = "a file" if log.exists() else "no such folder"
        raise LogError("cannot read the tuning logs", where=f"--log {log}", found=found, allowed="a folder")
    if shipped:
        folders.append(shipped_folder())
    counts, sources = Counts(), []
    own = [(folder, [target.log_name]) for folder in folders]
    others = [(folder, siblings(target, folder)) for folder in folders if folder.is_dir()]
    for folder, names in (*own, *others):
        for name in names:
            records, count = read(log_path(folder, name))
            counts += count
            if records:
                sources.append(rank(r for r in records if r.target == name))
    return Lookup(sources, threads, counts=counts)
