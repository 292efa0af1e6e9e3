"""`ingot compile`: a model file in, a library (or another form of it) out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ingot.cli.options import (
    MAX_THREADS,
    PATH,
    bind_option,
    parse_binds,
    parse_pads,
    parse_shapes,
    parse_states,
    shape_option,
    state_option,
)
from ingot.cli.quantise import check_explain, quantise_options, read_share
from ingot.cli.quantise import show as show_quantisation
from ingot.errors import IngotError, OptionError

if TYPE_CHECKING:
    from ingot.driver import Progress
    from ingot.packager.artifact import Artifact

#: What --emit takes, and the ending of the file it makes unless -o says otherwise.
ENDINGS = {"so": ".so", "a": ".a", "c-header": ".h", "c": ".c", "llvm": ".ll", "relax": ".relax.py"}
_TEXTS = ("c-header", "c", "llvm", "relax")
_NATIVE = "native"

_STAGES = {
    "import": "reading the model",
    "simplify": "simplifying",
    "fold_constants": "folding constants",
    "fold_batch_norm": "folding batch norms",
    "nhwc_layout": "choosing layouts",
    "clean_layout": "simplifying again",
    "fold_layout": "folding weights",
    "half_layers": "choosing layers for half precision",
    "select_templates": "packing weights",
    "fuse": "fusing operators",
    "lower": "writing kernels",
    "plan_memory": "planning memory",
    "generate_code": "generating machine code",
    "selftest": "computing the selftest",
    "measure_error": "measuring the error",
    "link": "linking",
    "done": "done",
}


@click.command("compile", short_help="Compile a model to one self-contained library.")
@click.argument("model", type=PATH)
@click.option(
    "--target", metavar="NAME", help="The board, from `ingot targets`, or a .toml file. Default: this machine."
)
@click.option("-o", "--output", type=PATH, help="The file to write. Default: the model's name, here. - prints text.")
@shape_option
@bind_option
@state_option
@click.option(
    "--precision", default="fp32", show_default=True, help="Arithmetic of float layers: fp32, bf16, fp16, int8."
)
@quantise_options
@click.option("--emit", type=click.Choice(tuple(ENDINGS)), default="so", show_default=True, help="What to write.")
@click.option("--log", type=PATH, metavar="DIR", help="A folder of tuning logs to use, see `ingot tune`.")
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    default=1,
    show_default=True,
    help="Threads the model will run on: chooses among measured configs.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="Compile the largest part of a model that cannot be compiled whole; ends with 1 if something is missing.",
)
@click.option(
    "--pad",
    "pads",
    multiple=True,
    metavar="NAME=VALUE",
    help="Fill an input up to the size of a bucket with this number, where that changes nothing. Repeatable.",
)
@click.option("--no-selftest", is_flag=True, help="Store no expected outputs in the library.")
@click.option("--print-ir-after", "print_after", multiple=True, metavar="STEP", help="Print the program after a step.")
@click.option("--stop-after", metavar="STEP", help="Write the program after a step, and stop there.")
def command(
    model: Path,
    target: str | None,
    output: Path | None,
    shapes: Sequence[str],
    binds: Sequence[str],
    states: Sequence[str],
    precision: str,
    weights: str | None,
    calibrate: Path | None,
    calibrator: str,
    max_drop: str | None,
    explain: str | None,
    emit: str,
    log: Path | None,
    threads: int,
    keep_going: bool,
    pads: Sequence[str],
    no_selftest: bool,
    print_after: Sequence[str],
    stop_after: str | None,
) -> int:
    """Compile MODEL (ONNX or TFLite) to one self-contained shared library for a board.

    \b
      ingot compile model.onnx --target raspberry-pi-4 -o model.so
      ingot compile model.onnx --shape x=1,3,224,224 --bind threshold=0.5
      ingot compile model.tflite --emit a -o libmodel.a      (writes libmodel.h too)
    """
    interface: dict[str, Any] = {
        "shape": parse_shapes(shapes),
        "bind": parse_binds(binds),
        "state": parse_states(states),
    }
    precise: dict[str, Any] = {"precision": precision, "weights": weights, "max_drop": read_share(max_drop)}
    precise.update(calibrate=calibrate, calibrator=calibrator)
    if stop_after is not None:
        _check_steps([stop_after])
        if keep_going:
            raise OptionError("--stop-after and --keep-going do not go together", hint="leave one of them out")
        _write_program(model, target or _NATIVE, {**interface, **precise}, stop_after, output, also=print_after)
        return 0
    paths = _output_paths(model, output, emit)
    _check_steps(print_after)
    check_explain(explain, precision, weights, (model, *paths))

    import ingot

    with _progress(enabled=not print_after) as progress:
        artifact = ingot.compile(
            model,
            target=target or _NATIVE,
            **interface,
            **precise,
            selftest=not no_selftest,
            log=log,
            threads=threads,
            keep_going=keep_going,
            pad=parse_pads(pads),
            progress=progress,
            print_ir_after=print_after,
            show_ir=lambda step, text: click.echo(f"# after {step}\n{text}\n"),
        )
    _save(artifact, emit, paths)
    if paths:
        _summarise(artifact, model, paths, emit, explain, named=target is not None)
    return 0 if artifact.metadata["cut"] is None else 1


def _output_paths(model: Path, output: Path | None, emit: str) -> list[Path]:
    """The files to write, checked before the long work; none for standard output."""
    from ingot.cli.files import check_output
    from ingot.frontend.source import c_name

    if str(output) == "-":
        if emit not in _TEXTS:
            allowed = ", ".join(_TEXTS)
            raise OptionError("this form is not text", where="--emit with -o -", found=emit, allowed=allowed)
        return []
    path = output or Path(c_name(model) + ENDINGS[emit])
    paths = [path] if emit != "a" else [path, path.with_suffix(".h")]
    if len(set(paths)) != len(paths):
        raise OptionError("the library would have the header's name", where="-o", found=str(path), hint="end it in .a")
    for item in paths:
        check_output(item, inputs=(model,))
    return paths


def _check_steps(names: Sequence[str]) -> None:
    """Refuse a step that does not exist before anything is read."""
    if not names:
        return
    import difflib

    from ingot.passes.pipeline import STEPS

    for name in names:
        if name not in STEPS:
            near = difflib.get_close_matches(name, STEPS, n=1)
            hint = f"did you mean {near[0]}?" if near else None
            allowed = ", ".join(STEPS)
            raise OptionError("there is no such compiler step", found=repr(name[:80]), allowed=allowed, hint=hint)


def _write_program(
    model: Path, target: str, options: dict[str, Any], step: str, output: Path | None, *, also: Sequence[str]
) -> None:
    if also:
        raise OptionError("--stop-after and --print-ir-after do not go together", hint="leave one of them out")
    from ingot.cli.files import check_output
    from ingot.driver import relax_after

    to_file = output is not None and str(output) != "-"
    if output is not None and to_file:
        check_output(output, inputs=(model,))
    text = relax_after(model, step, target=target, **options) + "\n"
    if output is not None and to_file:
        from ingot.packager.artifact import write_file

        write_file(output, text.encode("utf-8"))
    else:
        click.echo(text, nl=False)


@contextlib.contextmanager
def _progress(*, enabled: bool) -> Iterator[Progress | None]:
    """A bar with the stage's name on standard error; nothing unless a person is watching both streams."""
    if not (enabled and sys.stdout.isatty() and sys.stderr.isatty()):
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ingot.cli.console import console

    columns = (BarColumn(bar_width=30), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=_STAGES.get(stage, stage.replace("_", " ")), completed=done, total=total
        )


def _save(artifact: Artifact, emit: str, paths: Sequence[Path]) -> None:
    """Write all files or none."""
    if not paths:
        text = artifact.emit(emit)
        click.echo(text, nl=False)
        return
    kinds = [emit, *(["c-header"] if len(paths) > 1 else [])]
    written: list[Path] = []
    try:
        for kind, path in zip(kinds, paths, strict=True):
            new = not path.exists()
            artifact.save(path, kind)
            written += [path] if new else []
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _integers(meta: dict[str, Any]) -> list[tuple[str, str]]:
    """What share of the work is done on integers, if any is."""
    if not meta["integer_macs"]:
        return []
    return [("integers", f"{100 * meta['integer_macs'] / meta['macs']:.3g} % of the multiply-adds")]


def _summarise(
    artifact: Artifact, model: Path, paths: Sequence[Path], emit: str, explain: str | None, *, named: bool
) -> None:
    from ingot.cli.console import clean, console, facts, number, precision_words, size

    out, meta = console(), artifact.metadata
    board: dict[str, Any] = meta["target"]
    for path in paths:
        out.print(f"wrote {clean(path)}  {size(path.stat().st_size)}", style="bold")
    libc = f"{'glibc' if board['libc'] == 'gnu' else board['libc']} {board['libc_version']}"
    rows = [
        ("target", f"{board['name']}: {board['arch']}, {board['cpu']}, {libc} or later"),
        ("weights", f"{size(meta['weights_bytes'])}, mapped from the file, shared by all that use it"),
        ("RAM", f"{size(meta['memory_bytes'])} for each instance, of which {size(meta['arena_bytes'])} arena"),
        ("work", f"{meta['kernels']} kernels in {meta['steps']} steps, {number(meta['macs'])} multiply-adds"),
        ("precision", precision_words(meta)),
        *_integers(meta),
        ("selftest", "stored" if meta["selftest"] else "none"),
    ]
    facts(out, rows)
    if artifact.quantization is not None:
        show_quantisation(artifact.quantization, explain)
    notices = [*_cut(meta), *artifact.notices]
    if not named:
        notices.insert(0, "compiled for this machine; --target NAME compiles for a board, `ingot targets` lists them")
    for notice in notices:
        out.print(f"note: {clean(notice)}", style="yellow")
    if emit == "so":
        out.print(f"next: {_next_step(paths[0], model, meta)}", soft_wrap=True)


def _cut(meta: dict[str, Any]) -> list[str]:
    """Say where the model was cut, if it is not whole."""
    cut = meta["cut"]
    if cut is None:
        return []
    said = [f"only a part of the model is here: {cut['nodes'] - cut['left_out']} of its {cut['nodes']} nodes"]
    said += [f"cut at {entry['node']}: {entry['reason']}" for entry in cut["failed"]]
    opened = ", ".join(cut["opened"]) or "none: all of them need what is left out"
    return [*said, f"outputs that are inside the whole model: {opened}"]


def _next_step(path: Path, model: Path, meta: dict[str, Any]) -> str:
    """The command that is most useful now: run it here, or check it for the board."""
    import shlex

    from ingot.runtime.loader import check

    where = shlex.quote(str(path))
    try:
        here = all(ok for _, ok, _ in check(path))
    except IngotError:
        here = False
    if here:
        return f"ingot bench {where}"
    if meta["target"]["libc"] == "gnu":
        return f"ingot verify {where} {shlex.quote(str(model))} --on qemu"
    return f"ingot check {where} --target {meta['target']['name']}"
