"""`ingot bench`: how fast a compiled model is, alone or next to another engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ingot.cli.options import MAX_THREADS, PATH, bind_option, parse_binds, seed_option
from ingot.errors import InputError

if TYPE_CHECKING:
    from ingot.cli.peers import Peer

#: What --against takes, by the name it is called on the command line.
RIVALS = ("onnxruntime", "litert", "ingot")


@click.command("bench", short_help="Measure a compiled model's speed and memory.")
@click.argument("library", metavar="MODEL.so", type=PATH)
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), default=1, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=3.0,
    show_default=True,
    help="How long each engine is measured.",
)
@click.option(
    "--against",
    type=(click.Choice(RIVALS), PATH),
    multiple=True,
    metavar="ENGINE MODEL",
    help="Measure onnxruntime, litert, or ingot with another library in turn with this one. Repeatable.",
)
@seed_option
@bind_option
def command(
    library: Path, threads: int, seconds: float, against: Sequence[tuple[str, Path]], seed: int, binds: Sequence[str]
) -> None:
    """Measure MODEL.so on random inputs.

    Each engine has a process of its own; they take turns, and those whose turn it is not are stopped. RAM is what the
    process grew by: the engine's code, weights as far as they were used, and working memory.
    Values that were bound when MODEL.so was compiled are given to the other engines; large ones have to be given again.

    \b
      ingot bench model.so --threads 2
      ingot bench model.so --against onnxruntime model.onnx
    """
    import ingot
    from ingot.cli.console import clean, console, precision_name
    from ingot.cli.fixed_inputs import bound_inputs, first_states
    from ingot.cli.peers import interleave, peers, random_feeds
    from ingot.packager.selftest import source_inputs

    for _, path in against:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise InputError("cannot open the model to compare with", where=str(path), found=found)
    with ingot.load(str(library), threads=1) as model:  # its own errors, before any other process
        feeds = random_feeds(model.inputs, seed)
        inputs = ", ".join(clean(repr(spec)) for spec in model.inputs)
        meta = model.metadata
        precision = clean(precision_name(meta))
    contestants = [("ingot", library), *against]
    theirs = feeds
    if any(engine != "ingot" for engine, _ in against):
        theirs = source_inputs(feeds, [*bound_inputs(meta, parse_binds(binds)), *first_states(library, meta)])
    given = [feeds if engine == "ingot" else theirs for engine, _ in contestants]
    plural = "" if threads == 1 else "s"
    what = f"{precision}, {threads} thread{plural}, random inputs (seed {seed})"
    console().print(f"{clean(library)}, {what}: {inputs}", soft_wrap=True)
    with peers(contestants, threads, given) as running:
        outputs = [_outputs(peer, meta) for peer in running] if against else []
        interleave(running, seconds)
        _show(running)
        for peer, wanted in zip(running[1:], outputs[1:], strict=False):
            _compare(running[0], peer, outputs[0], wanted)


def _outputs(peer: Peer, meta: dict[str, Any]) -> list[np.ndarray]:
    """The outputs of one run, without those that a library keeps as state."""
    peer.turn(True)
    outputs = peer.outputs()
    peer.turn(False)
    if peer.engine == "ingot":
        return outputs
    kept = {entry["output_position"] for entry in meta["states"] if entry["in_source"]}
    return [array for place, array in enumerate(outputs) if place not in kept]


def _label(peer: Peer, others: Sequence[Peer]) -> str:
    from ingot.cli.console import clean

    alone = sum(other.engine == peer.engine for other in others) == 1
    return peer.engine if alone else f"{peer.engine} {clean(peer.model.name)}"


def _show(running: Sequence[Peer]) -> None:
    from ingot.cli.console import console, milliseconds, show, size, table

    rows = []
    for peer in running:
        median, p90, p99 = np.percentile(peer.seconds, (50, 90, 99))
        times = [milliseconds(s) for s in (median, p90, p99, min(peer.seconds))]
        rows.append([_label(peer, running), *times, str(len(peer.seconds)), milliseconds(peer.load_s), size(peer.rss)])
    columns = ("engine", "median ms", "p90", "p99", "min", "runs", "load ms", "RAM")
    show(console(), table(columns, rows, right=columns[1:]))


def _compare(ours: Peer, other: Peer, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    from ingot.cli.console import clean, console
    from ingot.cli.peers import distance

    ratio = float(np.median(other.seconds) / np.median(ours.seconds))
    name = other.engine if other.engine != "ingot" else clean(other.model.name)
    speed = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times slower than"
    out = console()
    out.print(f"ratio of medians: {ratio:.2f}, this library is {speed} {name}", soft_wrap=True)
    if len(found) != len(wanted):
        out.print(f"outputs: {len(found)} here, {len(wanted)} there; is it another model?", style="yellow")
        return
    worst = max((distance(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    # Quantised models may differ by a step; more than that is another model.
    style = "" if worst <= 0.05 else "yellow"
    out.print(f"outputs: max|error| / max|{name}| = {worst:.2g}", style=style, soft_wrap=True)
