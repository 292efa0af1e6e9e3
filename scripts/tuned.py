"""Tunes models on this machine and says how much faster each became; the records can become a shipped log.

usage: tuned.py MODEL... --log DIR [--minutes N] [--threads N] [--target NAME] [--out docs/tuning.md]

Each model is searched from what DIR knows already, then run whole with and without the configs found, both in one
process and in turn, in the thread's own time if there is one thread. "95 % after" is the time at which the sum over
the kernels had made 95 % of its final gain. With --out the rows go into the table of that file.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "compiler"))
BEGIN, END = "<!-- tuned: written by scripts/tuned.py -->", "<!-- end of tuned -->"
HEAD = (
    "| model | threads | kernels | trials | minutes | 95 % after | before, ms | after, ms | times as fast | noise |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


@dataclass(frozen=True)
class Row:
    """What tuning did for one model; times in ms, durations in minutes."""

    model: str
    threads: int
    kernels: int
    trials: int
    minutes: float
    near: float
    before: float
    after: float
    noise: float

    @property
    def gain(self) -> float:
        return self.before / self.after

    def __str__(self) -> str:
        cells = (
            self.model,
            str(self.threads),
            str(self.kernels),
            str(self.trials),
            f"{self.minutes:.1f}",
            f"{self.near:.1f}",
            f"{self.before:.2f}",
            f"{self.after:.2f}",
            f"{self.gain:.2f}",
            f"{self.noise:.1%}",
        )
        return f"| {' | '.join(cells)} |"


def tune(path: Path, name: str, arguments: argparse.Namespace) -> Row:
    """Search one model's configs for the given time, keep what helps the whole model, and return what came of it."""
    from ingot.autotune.board_local import LocalBoard
    from ingot.autotune.log import shipped_folder
    from ingot.autotune.pool import LocalPool
    from ingot.autotune.task import prepared, tasks_of
    from ingot.autotune.tuner import Settings, Tuner
    from ingot.autotune.whole import WholeModel, settle
    from ingot.frontend import import_model
    from ingot.passes.state import State
    from ingot.target import load_target

    target = load_target(name)
    imported = import_model(path)
    state = prepared(State(imported.module, imported.weights, imported, target))
    curve: list[tuple[float, float]] = []

    def note(tuner: Tuner) -> None:
        known = [p for p in tuner.progress.values() if p.ns]
        if len(known) == len(tuner.progress):
            curve.append((time.monotonic() - tuner.status.started, sum(p.before - p.now for p in known)))

    settings = Settings(arguments.threads, seconds=arguments.minutes * 60)
    warm = [] if arguments.cold else [shipped_folder()]
    board = LocalBoard(target)
    tuner = Tuner(tasks_of(state), target, board, arguments.log, settings, warm_folders=warm, changed=note)
    with LocalPool(arguments.builders) as pool:
        tuner.run(pool)
    minutes = (time.monotonic() - tuner.status.started) / 60
    found = tuner.picks()
    whole = WholeModel(state, board, arguments.threads)
    kept, comparison = settle(
        whole.compare, found, {k: tuner.progress[k].before - tuner.progress[k].now for k in found}
    )
    tuner.reject(key for key in found if key not in kept)
    if comparison is None or not kept:
        same = whole.compare({})
        before = after = same.before * 1e-6 if same is not None else float("nan")
        noise = same.noise if same is not None else float("nan")
    else:
        before, after, noise = comparison.before * 1e-6, comparison.before * comparison.ratio * 1e-6, comparison.noise
    near = next((seconds for seconds, gain in curve if gain >= 0.95 * curve[-1][1]), 0.0) / 60
    return Row(
        path.stem, arguments.threads, len(tuner.progress), tuner.status.trials, minutes, near, before, after, noise
    )


def processor() -> str:
    """The name of this machine's CPU and how many of its cores are ours."""
    words = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(words)} cores of {words[0]}" if words else "an unnamed CPU"


def put_table(page: Path, marks: tuple[str, str], lines: list[str], how: str) -> None:
    """Put a table between two marks of a page, with the day, this machine and how it was made."""
    before, rest = page.read_text("utf-8").split(marks[0], 1)
    note = f"{datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}, {processor()}, {how}."
    after = rest.split(marks[1], 1)[1]
    page.write_text("\n".join([f"{before}{marks[0]}", *lines, "", note, f"{marks[1]}{after}"]), "utf-8")


def publish(path: Path, row: Row, target: str) -> None:
    """Put the row into the table of `path`, in place of an earlier one of the same model and threads."""
    table = path.read_text("utf-8").split(BEGIN, 1)[1].split(END, 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and line != HEAD[0]]
    rows = [line for line in rows if not line.startswith(f"| {row.model} | {row.threads} |")] + [str(row)]
    gains = [float(line.split("|")[9]) for line in rows]
    how = f"`--target {target}`; geometric mean {geometric_mean(gains):.2f}"
    put_table(path, (BEGIN, END), [*HEAD, *rows], how)


def main() -> None:
    """Tune each model in turn; a row is printed, and published, as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--builders", type=int)
    parser.add_argument("--target", default="native")
    parser.add_argument("--cold", action="store_true", help="do not begin from the shipped logs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(*HEAD, sep="\n", flush=True)
    for path in arguments.models:
        row = tune(path, arguments.target, arguments)
        print(row, flush=True)
        if arguments.out is not None:
            publish(arguments.out, row, arguments.target)


if __name__ == "__main__":
    main()
