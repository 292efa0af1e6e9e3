"""`ingot tune`: search the best config of each kernel, measured on the board itself."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ingot.cli.options import MAX_THREADS, PATH, parse_shapes, shape_option
from ingot.errors import OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ingot.autotune.board import Board
    from ingot.autotune.pool import Pool
    from ingot.autotune.tuner import Tuner
    from ingot.autotune.whole import Comparison
    from ingot.target import Target

#: Without --minutes and --trials.
DEFAULT_MINUTES = 15.0
DEFAULT_LOG = Path("tuning_logs")
#: Rows of the live table: the tasks with the largest share.
_ROWS = 12


@click.command("tune", short_help="Search the best kernels for a model, on the board itself.")
@click.argument("model", type=PATH)
@click.option(
    "--target", metavar="NAME", help="The board, from `ingot targets`, or a .toml file. Default: this machine."
)
@click.option(
    "--board",
    "boards",
    multiple=True,
    metavar="BOARD",
    help="Where to measure: local, ssh://[user@]host[:port] or qemu:ARCH. Default: local. Repeatable: boards of one"
    " kind share the work.",
)
@click.option("--cluster", metavar="tcp://HOST:PORT", help="A Dask cluster that builds, and measures without --board.")
@click.option("--minutes", type=click.FloatRange(0, 10_000, min_open=True), help="Time for the search. Default: 15.")
@click.option("--trials", type=click.IntRange(1, 1_000_000), help="Configs to measure, in all kernels together.")
@click.option(
    "--log", type=PATH, default=DEFAULT_LOG, show_default=True, metavar="DIR", help="Where the measurements are kept."
)
@click.option("--precision", default="fp32", show_default=True, help="Arithmetic of float layers, as for compile.")
@click.option("--calibrate", type=PATH, metavar="FILE", help="Samples for --precision int8, as for compile.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), default=1, show_default=True)
@click.option("--builders", type=click.IntRange(1, 1024), help="Processes that compile. Default: one for each core.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Seed of the search.")
@shape_option
def command(
    model: Path,
    target: str | None,
    boards: Sequence[str],
    cluster: str | None,
    minutes: float | None,
    trials: int | None,
    log: Path,
    precision: str,
    calibrate: Path | None,
    threads: int,
    builders: int | None,
    seed: int,
    shapes: Sequence[str],
) -> None:
    """Search the best config of each kernel of MODEL by measuring on the board.

    Every measurement is kept in --log DIR as soon as it is made. Ctrl-C ends the search and keeps what was found; the
    same command goes on from there. `ingot compile --log DIR` uses the log, for this model and for others.

    \b
      ingot tune model.onnx --target raspberry-pi-4 --board ssh://pi@raspberrypi.local --minutes 30
      ingot compile model.onnx --target raspberry-pi-4 --log tuning_logs

    With --precision and --calibrate, what is tuned is the program that `ingot compile` makes with the same options.
    """
    if minutes is not None and trials is not None:
        raise OptionError("--minutes and --trials do not go together", hint="leave one of them out")
    if len(set(boards)) < len(boards):
        raise OptionError("a board is given twice", where="--board", found=", ".join(boards))
    if cluster is not None and builders is not None:
        raise OptionError("--cluster and --builders do not go together", hint="leave one of them out")
    if log.exists() and not log.is_dir():
        raise OptionError("the tuning logs need a folder", where="--log", found=f"{log}, a file", allowed="a folder")
    shape = parse_shapes(shapes, buckets=False)
    if minutes is None and trials is None:
        minutes = DEFAULT_MINUTES

    from ingot.autotune.log import shipped_folder
    from ingot.autotune.task import prepared, tasks_of
    from ingot.autotune.tuner import Settings, Tuner
    from ingot.cli.console import clean, console
    from ingot.driver import check_precision, program_before
    from ingot.target import load_target

    out = console()
    machine = load_target(target or "native")
    check_precision(precision, machine, None, calibrate, None)
    with _workers(cluster, builders, boards, machine) as (pool, board):
        out.print(f"board: {clean(board.name)}, {clean(board.probe())}", soft_wrap=True)
        state = prepared(program_before(model, machine, shape=shape, precision=precision, calibrate=calibrate))
        tasks = tasks_of(state)
        if not tasks:
            out.print(f"{clean(model)} has no kernel with a choice: there is nothing to tune")
            return
        settings = Settings(threads, trials, None if minutes is None else minutes * 60, seed=seed)
        with _Live() as live:
            tuner = Tuner(tasks, machine, board, log, settings, warm_folders=[shipped_folder()], changed=live.show)
            live.show(tuner)
            try:
                tuner.run(pool)
            except KeyboardInterrupt:
                live.close()
                _count(tuner)
                raise
        _count(tuner)
        _finish(tuner, state, log)


@contextlib.contextmanager
def _workers(
    cluster: str | None, builders: int | None, boards: Sequence[str], target: Target
) -> Iterator[tuple[Pool, Board]]:
    """Who builds and who measures: processes and boards of this machine's, or of a cluster."""
    from ingot.autotune.board import open_board
    from ingot.autotune.board_pool import BoardPool

    named = [open_board(text, target) for text in boards or ([] if cluster else ["local"])]
    if cluster is None:
        from ingot.autotune.pool import LocalPool

        with LocalPool(builders) as pool:
            yield pool, BoardPool(named)
        return
    from ingot.autotune.cluster import ClusterBoard, DaskPool

    with DaskPool(cluster) as shared:
        yield shared, BoardPool(named) if named else ClusterBoard(shared, target)


def _count(tuner: Tuner) -> None:
    """Say how much was measured, and where it is kept."""
    from ingot.cli.console import clean, console

    status = tuner.status
    resumed = f" and {status.resumed} known before" if status.resumed else ""
    console().print(
        f"{status.trials} configs measured{resumed}, {status.failures} of them failed, in {clean(tuner.path)}",
        soft_wrap=True,
    )


def _finish(tuner: Tuner, state: Any, log: Path) -> None:  # noqa: ANN401 - passes.state.State
    """Compare the whole model before and after, and keep what makes it faster."""
    from ingot.autotune.whole import WholeModel, settle
    from ingot.cli.console import clean, console

    out = console()
    found = tuner.picks()
    if not found:
        out.print("no config is faster than what the compiler chooses by itself")
        return
    out.print(f"comparing the whole model with and without {len(found)} configs")
    whole = WholeModel(state, tuner.board, tuner.settings.threads)
    weights = {key: tuner.progress[key].before - tuner.progress[key].now for key in found}
    kept, comparison = settle(whole.compare, found, weights)
    tuner.reject(key for key in found if key not in kept)
    _tell(comparison, kept, found, tuner)
    out.print(f"next: ingot compile MODEL --log {clean(log)}", soft_wrap=True)


def _tell(comparison: Comparison | None, kept: dict[str, Any], found: dict[str, Any], tuner: Tuner) -> None:
    from ingot.cli.console import console, milliseconds

    out, unit = console(), "ms" if tuner.board.unit == "ns" else "million instructions"
    if comparison is None or not kept:
        out.print("the whole model is not faster with the configs found: none of them will be used")
        return
    before, after = milliseconds(comparison.before * 1e-9), milliseconds(comparison.after * 1e-9)
    out.print(
        f"whole model: {before} -> {after} {unit}, {1 / comparison.ratio:.2f} times as fast"
        f" (noise {comparison.noise:.1%}), with {len(kept)} of {len(found)} configs",
        soft_wrap=True,
    )


class _Live:
    """A table that follows the run on a terminal; a line for each batch elsewhere."""

    def __init__(self) -> None:
        self._live: Any = None
        self._said = ""

    def __enter__(self) -> _Live:
        if sys.stdout.isatty():
            from rich.live import Live

            from ingot.cli.console import console

            self._live = Live(console=console(), auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last table on the screen."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def show(self, tuner: Tuner) -> None:
        """Show where the run is."""
        if self._live is not None:
            self._live.update(_table(tuner), refresh=True)
            return
        line = _headline(tuner)
        if line != self._said:
            self._said = line
            click.echo(line)


def _headline(tuner: Tuner) -> str:
    from ingot.cli.console import milliseconds

    known = [p for p in tuner.progress.values() if p.ns]
    before, now = sum(p.before for p in known), sum(p.now for p in known)
    status, elapsed = tuner.status, time.monotonic() - tuner.status.started
    parts = [f"{status.stage}: {status.trials} trials in {elapsed:.0f} s"]
    left = tuner.seconds_left()
    if left is not None:
        parts.append(f"{max(0.0, left):.0f} s left")
    if tuner.settings.trials is not None:
        parts.append(f"{max(0, tuner.settings.trials - status.trials)} trials left")
    if known:
        unit = "ms" if tuner.board.unit == "ns" else "million instructions"
        estimate = f"{milliseconds(before * 1e-9)} -> {milliseconds(now * 1e-9)} {unit}"
        parts.append(f"{len(known)} of {len(tuner.progress)} kernels: {estimate} ({before / now:.2f} times as fast)")
    return ", ".join(parts)


def _table(tuner: Tuner) -> RenderableType:
    from rich.console import Group

    from ingot.cli.console import clean, table

    rows = []
    total = sum(p.now for p in tuner.progress.values()) or 1.0
    ordered = sorted(tuner.progress.items(), key=lambda item: -item[1].now)
    for key, progress in ordered[:_ROWS]:
        best = min(1.0, progress.search.best[1])
        rows.append(
            [
                clean(key),
                str(progress.runs),
                f"{progress.search.trials}/{len(progress.search.space)}",
                f"{progress.ns * best / 1e3:.1f}" if progress.ns else "-",
                f"{1 / best:.2f}" if progress.ns else "-",
                f"{progress.now / total:.0%}" if progress.ns else "-",
            ]
        )
    columns = ("kernel", "runs", "trials", "best us", "gain", "share")
    more = len(ordered) - _ROWS
    parts: list[Any] = [_headline(tuner), "", table(columns, rows, right=columns[1:])]
    return Group(*parts, *([f"and {more} more"] if more > 0 else []))
