"""Measures each kernel of some models alone, on one thread, and writes two tables to docs/kernels.md.

usage: kernels.py [MODEL ...] [--configs 8] [--seed 0] [--no-write]

The first says how much of the core's peak each kernel reaches with the config that the cost formula chooses. The peak
is measured in the same run: independent fused multiply-adds on registers. The second compares that config with others
of the space, drawn at random from the seed, each timed next to it.
"""

from __future__ import annotations

import argparse
import datetime
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ingot
from bench import default_models, machine
from ingot.autotune.board_local import LocalBoard
from ingot.autotune.features import workload_of
from ingot.autotune.pool import LocalPool
from ingot.autotune.task import Task, prepared, tasks_of
from ingot.autotune.tuner import Settings, Tuner
from ingot.frontend import import_model
from ingot.passes.state import State
from ingot.target import Target, load_target

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "kernels.md"
#: Kernels measured in one executable, and times the peak is measured.
BATCH, PEAKS = 4, 15
#: A config counts as near the best if it takes at most so much longer.
NEAR = 1.2
LARGE = 10e6  # operations
PEAK = """
#include <stdio.h>
#include <time.h>
typedef float vector __attribute__((vector_size(BYTES)));
int main(void) {
    enum { CHAINS = 12, STEPS = 400000 };
    vector sums[CHAINS] = {{0}}, a = {0}, b = {0};
    struct timespec t[2];
    for (unsigned i = 0; i < BYTES / 4; i++) a[i] = 0.5f, b[i] = 0.25f;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t[0]);
    for (int step = 0; step < STEPS; step++) {
        __asm__ volatile("" : "+m"(step));
        for (int i = 0; i < CHAINS; i++) sums[i] = sums[i] * a + b;
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t[1]);
    for (int i = 1; i < CHAINS; i++) sums[0] += sums[i];
    const double seconds = (double)(t[1].tv_sec - t[0].tv_sec) + 1e-9 * (double)(t[1].tv_nsec - t[0].tv_nsec);
    const double done = 2.0 * STEPS * CHAINS * (BYTES / 4);
    printf("%g %g\\n", done / seconds / 1e9, (double)sums[0][0]);
    return 0;
}
"""


@dataclass(frozen=True)
class Row:
    """One kernel: operations of one call, calls in one inference, seconds, and the best ratio to it of any config."""

    model: str
    key: str
    operations: float
    runs: int
    seconds: float
    best: float


def core_peak(target: Target, folder: Path) -> float:
    """The most operations a second, in 1e9, that one core does: the best of several runs."""
    source, program = folder / "peak.c", folder / "peak"
    source.write_text(PEAK, "utf-8")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", f"-DBYTES={target.vector_bits // 8}"]
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, str(source), "-o", str(program)], check=True)
    runs = [subprocess.run([str(program)], check=True, capture_output=True, text=True) for _ in range(PEAKS)]
    return max(float(run.stdout.split()[0]) for run in runs)


def tasks_in(model: Path, target: Target) -> list[Task]:
    """The kernels of a model whose work can be counted."""
    imported = import_model(model)
    tasks = tasks_of(prepared(State(imported.module, imported.weights, imported, target)))
    return [task for task in tasks if workload_of(task.key) is not None]


def measure(
    tasks: dict[str, Task], target: Target, count: int, seed: int, folder: Path
) -> dict[str, tuple[float, float]]:
    """Seconds of each kernel's default config, and the least ratio to it of `count` others."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    tuner = Tuner(list(tasks.values()), target, LocalBoard(target), folder, Settings(strategy="random"))
    batches: list[tuple[str, list[object]]] = []
    for key, task in tasks.items():
        others = [config for config in task.space if config != task.default]
        batches.append((key, draw.sample(others, min(count, len(others)))))
    with LocalPool() as pool:
        for first in range(0, len(batches), BATCH):
            tuner._measure(pool, batches[first : first + BATCH])
            print(f"{min(first + BATCH, len(batches))} of {len(batches)} kernels", file=sys.stderr, flush=True)
    found = {}
    for key, progress in tuner.progress.items():
        ratios = [ratio for ratio in progress.search.ratios.values() if ratio is not None]
        if progress.ns:
            found[key] = (progress.ns * 1e-9, min([1.0, *ratios]))
    return found


def operations_of(task: Task) -> float:
    """Multiplications and additions of one call, those of the definition: Winograd needs fewer."""
    work = workload_of(task.key)
    if work is None:
        return 0.0
    return 2.0 * work.macs / (work.in_channels if task.key.startswith("depthwise") else 1)


def markdown(rows: list[Row], peak: float, command: str, count: int) -> str:
    """The page."""
    lines = [
        "# Kernels",
        "",
        "Written by `scripts/kernels`: each kernel of a model alone, on one thread, warm, with the config that the",
        "cost formula chooses. Operations are those of the definition, so a Winograd kernel may exceed the peak.",
        "",
        f"- {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {machine()}, ingot {ingot.__version__}",
        f"- command: `{command}`",
        f"- the core's peak, measured: {peak:.0f} GFLOP/s",
        "",
        "| model | kernels | time in them, ms | GFLOP/s | of the peak | of at least 10 MFLOP, median of the peak "
        f"| default within 20 % of the best of {count + 1} | by time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        seconds = sum(row.seconds * row.runs for row in mine)
        rate = sum(row.operations * row.runs for row in mine) / seconds / 1e9
        large = [row.operations / row.seconds / 1e9 / peak for row in mine if row.operations >= LARGE]
        near = [row for row in mine if row.best * NEAR >= 1]
        part = sum(row.seconds * row.runs for row in near) / seconds
        share = f"{statistics.median(large):.0%}" if large else "-"
        lines.append(
            f"| {model} | {len(mine)} | {seconds * 1e3:.2f} | {rate:.1f} | {rate / peak:.0%} | {share} "
            f"| {len(near)} of {len(mine)} | {part:.0%} |"
        )
    lines += [
        "",
        "| model | kernel | calls | MFLOP | GFLOP/s | of the peak | default / best |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rate = row.operations / row.seconds / 1e9
        key = row.key.replace("|", "then")
        lines.append(
            f"| {row.model} | {key} | {row.runs} | {row.operations / 1e6:.1f} | {rate:.1f} | {rate / peak:.0%} "
            f"| {1 / row.best:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/kernels", description="each kernel of a model alone")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="ONNX or TFLite files")
    parser.add_argument("--configs", type=int, default=8, help="others of each kernel's space (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the configs that are drawn (default: 0)")
    parser.add_argument("--no-write", action="store_true", help=f"print, and leave {PAGE.relative_to(REPO)} as it is")
    args = parser.parse_args()
    target = load_target("native")
    try:
        tasks = {
            (model.stem, task.key): task
            for model in args.models or default_models()
            for task in tasks_in(model, target)
        }
        distinct = {task.key: task for task in tasks.values()}
        with tempfile.TemporaryDirectory(prefix="ingot-kernels-") as folder:
            peak = core_peak(target, Path(folder))
            times = measure(distinct, target, args.configs, args.seed, Path(folder))
    except ingot.IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = [
        Row(model, key, operations_of(task), task.runs, *times[key])
        for (model, key), task in tasks.items()
        if key in times
    ]
    text = markdown(rows, peak, shlex.join(["scripts/kernels", *sys.argv[1:]]), args.configs)
    if args.no_write:
        print(text)
    else:
        PAGE.write_text(text, "utf-8")
        print(f"written: {PAGE.relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
