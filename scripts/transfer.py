"""How many trials a model needs with and without what the logs say of other models; writes a table to docs/tuning.md.

usage: transfer.py MODEL... --log DIR [--target NAME] [--seeds N] [--write]

DIR holds a log in which kernels of the models were measured, best all configs of their spaces. For each model, every
kernel is searched twice among its measured configs, from nothing and taught by the records of kernels that the model
does not have; the measurements are the log's, the same for both. After n trials of each kernel, the model's kernels
take so long as the best configs so far: the table says for which n that is within 2 % of the best of all, the mean of
the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_searches import replay
from tuned import put_table

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "compiler"))
PAGE = REPO / "docs" / "tuning.md"
BEGIN, END = "<!-- transfer: written by scripts/transfer.py -->", "<!-- end of transfer -->"
HEAD = (
    "| model | kernels | configs of each | the default's time by the best's | trials of each, from nothing "
    "| taught by other models |",
    "|---|---:|---:|---:|---:|---:|",
)
#: A kernel of which fewer configs were measured is left out.
LEAST = 12
NEAR = 1.02

if TYPE_CHECKING:
    from ingot.autotune.search import Sample
    from ingot.autotune.task import Task
    from ingot.target import Target

Tables = Mapping[str, Mapping[Any, float]]


def measured(folder: Path, target: Target) -> dict[str, dict[Any, float]]:
    """The configs of each task in a log, on one thread, with their nanoseconds."""
    from ingot.autotune.log import log_path, read
    from ingot.autotune.lookup import rank
    from ingot.autotune.space import decode

    tables: dict[str, dict[Any, float]] = {}
    for (key, threads), ranked in rank(read(log_path(folder, target.log_name))[0]).items():
        found = [(decode(encoded), ns) for encoded, ns in ranked.configs]
        if threads == 1 and len(found) >= LEAST:
            tables[key] = {config[0]: ns for config, ns in found if config is not None}
    return tables


def samples_of(tables: Tables) -> list[Sample]:
    """What a tuner learns from these tables."""
    from ingot.autotune.search import Sample
    from ingot.autotune.space import encode

    return [
        Sample(key, encode(config), ns / statistics.median(table.values()))
        for key, table in tables.items()
        for config, ns in table.items()
    ]


def needed(
    tasks: Sequence[Task], tables: Tables, known: Sequence[Sample], target: Target, seeds: int
) -> tuple[float, float]:
    """Return the trials of each kernel, mean of the seeds, and the defaults' time by that of the best configs."""
    best = sum(task.runs * min(tables[task.key].values()) for task in tasks)
    first = sum(task.runs * tables[task.key][task.default] for task in tasks)
    counts = []
    for seed in range(seeds):
        curves = []
        for task in tasks:
            start = tables[task.key][task.default]
            ratios = {config: ns / start for config, ns in tables[task.key].items() if config != task.default}
            curve = replay(task.key, task.default, ratios, target, "model", seed, known)
            curves.append([task.runs * start * ratio for ratio in (1.0, *curve)])
        most = max(len(curve) for curve in curves)
        totals = (sum(curve[min(n, len(curve) - 1)] for curve in curves) for n in range(most))
        counts.append(next(n for n, total in enumerate(totals) if total <= NEAR * best))
    return statistics.mean(counts), first / best


def row(model: Path, tables: Tables, target: Target, seeds: int) -> str:
    """Search one model's kernels both ways; return its line of the table."""
    from ingot.autotune.task import prepared, tasks_of
    from ingot.frontend import import_model
    from ingot.passes.state import State

    imported = import_model(model)
    found = tasks_of(prepared(State(imported.module, imported.weights, imported, target)))
    tasks = [task for task in found if task.default in tables.get(task.key, {})]
    if not tasks:
        raise SystemExit(f"the log holds no kernel of {model}")
    own = {task.key for task in found}
    known = samples_of({key: table for key, table in tables.items() if key not in own})
    cold, gain = needed(tasks, tables, [], target, seeds)
    taught, _ = needed(tasks, tables, known, target, seeds)
    sizes = [len(tables[task.key]) for task in tasks]
    cells = (model.stem, len(tasks), f"{min(sizes)} to {max(sizes)}", f"{gain:.2f}", f"{cold:.1f}", f"{taught:.1f}")
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--target", default="native")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    from ingot.target import load_target

    target = load_target(options.target)
    tables = measured(options.log, target)
    rows = [row(model, tables, target, options.seeds) for model in options.models]
    print(*HEAD, *rows, sep="\n")
    if options.write:
        how = f"one thread, `--target {options.target} --seeds {options.seeds}`"
        put_table(PAGE, (BEGIN, END), [*HEAD, *rows], how)
    return 0


if __name__ == "__main__":
    sys.exit(main())
