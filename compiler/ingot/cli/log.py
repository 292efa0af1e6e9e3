"""`ingot log`: what tuning measured. Lists, merges, prunes and verifies logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ingot.cli.options import PATH
from ingot.errors import LogError, OptionError

if TYPE_CHECKING:
    from ingot.autotune.log import Counts, Record

_folder = click.option("--log", "folder", type=PATH, metavar="DIR", help="Folder of your own logs.")
_own_folder = click.option("--log", "folder", type=PATH, metavar="DIR", required=True, help="Folder of your own logs.")


@click.group("log", short_help="List, merge, prune and verify tuning logs.")
def command() -> None:
    """What `ingot tune` measured: one file per target, one line per candidate.

    \b
      ingot log list --log logs
      ingot log merge colleague/*.jsonl --log logs
    """


# ------------------------------------------------------------------------------------------------------ list


@command.command("list", short_help="Show the logs, or the best of one target.")
@click.argument("target", required=False)
@_folder
def list_logs(target: str | None, folder: Path | None) -> None:
    """Show which logs there are, or, for TARGET, the best config of each workload."""
    from ingot.autotune.log import log_path, shipped_folder

    folders = [("shipped", shipped_folder())] + ([("yours", folder)] if folder else [])
    target = _log_name(target) if target else None
    if target is None:
        _list_files([(whose, path) for whose, place in folders for path in _logs_in(place)])
        return
    paths = [log_path(place, target, instructions=counted) for _, place in folders for counted in (False, True)]
    _list_best([path for path in paths if path.exists()], target)


def _log_name(target: str) -> str:
    from ingot.target import NATIVE, native_target

    return native_target().log_name if target == NATIVE else target


def _logs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise OptionError("not a folder", where="--log", found=str(folder), allowed="a folder of tuning logs")
    return sorted(folder.glob("*.jsonl"))


def _list_files(files: Sequence[tuple[str, Path]]) -> None:
    from ingot.autotune.log import read
    from ingot.cli.console import clean, console, show, table

    rows = []
    for whose, path in files:
        records, counts = read(path)
        tasks = len({(r.task, r.threads) for r in records})
        failed = sum(not r.ok for r in records)
        numbers = (tasks, counts.records, failed, counts.skipped)
        rows.append([clean(path.stem), whose, *map(str, numbers)])
    out = console()
    if rows:
        columns = ("target", "whose", "workloads", "records", "failures", "lines skipped")
        show(out, table(columns, rows, right=columns[2:]))
    shipped = sum(whose == "shipped" for whose, _ in files)
    out.print(f"{shipped} shipped, {len(files) - shipped} yours")


def _list_best(paths: Sequence[Path], target: str) -> None:
    from ingot.autotune.log import best, read
    from ingot.cli.console import clean, console, show, table

    out = console()
    rows = []
    for path in paths:
        records, counts = read(path)
        _tell_skipped(path, counts)
        trials = Counter((r.task, r.threads) for r in records)
        for key, winner in sorted(best(records).items()):
            config = " ".join(f"{name}={value}" for name, value in sorted(winner.config.items()))
            cells = (winner.task, winner.threads, trials[key], _duration(winner), config, winner.board)
            rows.append([clean(cell) for cell in cells])
    if rows:
        columns = ("workload", "threads", "trials", "best", "config", "measured on")
        show(out, table(columns, rows, right=("threads", "trials", "best")))
    else:
        out.print(f"nothing was measured for {clean(target)}")


def _duration(record: Record) -> str:
    from ingot.cli.console import number

    value = record.ns or 0.0
    if record.board.startswith("qemu:"):
        return f"{number(value)} instructions"
    return f"{value / 1e6:.3f} ms" if value >= 1e5 else f"{value / 1e3:.2f} us"


def _tell_skipped(path: Path, counts: Counts) -> None:
    """On standard error, if a file holds anything but records."""
    from ingot.cli.console import clean, console

    if counts.skipped or counts.unread_bytes:
        console(stderr=True).print(f"{clean(path)}: {_describe(counts)}", soft_wrap=True)


def _describe(counts: Counts) -> str:
    kinds = [("damaged", counts.damaged), ("foreign", counts.foreign), ("oversized", counts.oversized)]
    skipped = [f"{count} {kind}" for kind, count in kinds if count]
    parts = [f"{counts.records} records"] + ([f"skipped: {', '.join(skipped)}"] if skipped else [])
    return "; ".join(parts + ([f"{counts.unread_bytes} bytes not read"] if counts.unread_bytes else []))


# ------------------------------------------------------------------------------------------------------ merge


@command.command("merge", short_help="Add the records of other logs to yours.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=PATH)
@_own_folder
def merge(files: Sequence[Path], folder: Path) -> None:
    """Add the records of each FILE to the log of their target in DIR, but for those that are there already."""
    from ingot.cli.console import clean, console

    out = console()
    for file in files:
        records, counts = _read_existing(file)
        added = _add(records, folder)
        _tell_skipped(file, counts)
        out.print(f"{clean(file)}: {added} of {counts.records} records added", soft_wrap=True)


def _read_existing(file: Path) -> tuple[list[Record], Counts]:
    from ingot.autotune.log import read

    if not file.exists():
        raise LogError("there is no such tuning log", where=str(file))
    return read(file)


def _add(records: Iterable[Record], folder: Path) -> int:
    from ingot.autotune.log import append, encode, log_path, read

    groups: dict[Path, list[Record]] = {}
    for record in records:
        counted = record.board.startswith("qemu:")
        groups.setdefault(log_path(folder, record.target, instructions=counted), []).append(record)
    added = 0
    for path, group in sorted(groups.items()):
        there = set(map(encode, read(path)[0]))
        fresh = [record for record in group if encode(record) not in there]
        append(path, fresh)
        added += len(fresh)
    return added


# ------------------------------------------------------------------------------------------------------ prune, verify


@command.command("prune", short_help="Keep the best records of a log only.")
@click.argument("target")
@_own_folder
@click.option(
    "--keep", type=click.IntRange(1, 1_000_000), default=16, show_default=True, help="Configs kept per workload."
)
def prune(target: str, folder: Path, keep: int) -> None:
    """Rewrite TARGET's log in DIR with the fastest configs of each workload, and those that failed."""
    from ingot.autotune.log import log_path, rewrite
    from ingot.cli.console import clean, console

    name = _log_name(target)
    paths = [log_path(folder, name), log_path(folder, name, instructions=True)]
    for path in [path for path in paths if path.exists()] or paths[:1]:
        before, after, counts = rewrite(path, keep)
        dropped = f", {counts.skipped} lines that were no records removed" if counts.skipped else ""
        console().print(f"{clean(path)}: {after} of {before} records kept{dropped}", soft_wrap=True)


@command.command("verify", short_help="Tell whether every line of a log is a record.")
@click.argument("files", metavar="[FILE...]", nargs=-1, type=PATH)
@_folder
def verify(files: Sequence[Path], folder: Path | None) -> int:
    """Check each FILE, each log in DIR, or the shipped logs. Ends with 1 if any line is damaged or foreign."""
    from ingot.autotune.log import shipped_folder
    from ingot.cli.console import clean, console

    out = console()
    bad = 0
    paths = [*files, *(_logs_in(folder) if folder else [])]
    for path in paths or ([] if folder else _logs_in(shipped_folder())):
        records, counts = _read_existing(path)
        expected = path.stem.partition("+")[0]
        strangers = sum(r.target != expected for r in records) if path.parent == folder else 0
        text = _describe(counts) + (f"; {strangers} of another target" if strangers else "")
        bad += counts.skipped + counts.unread_bytes + strangers
        out.print(f"{clean(path)}: {text}", soft_wrap=True)
    out.print("not every line is a record" if bad else "all lines are records")
    return 1 if bad else 0
