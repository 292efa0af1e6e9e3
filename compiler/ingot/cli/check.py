"""`ingot check`: will this library run there, or can this model be compiled?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ingot.cli.options import PATH, bind_option, parse_binds, parse_shapes, parse_states, shape_option, state_option
from ingot.errors import OptionError

if TYPE_CHECKING:
    from rich.text import Text

    from ingot.diagnosis import Diagnosis
    from ingot.target import Target

#: What is asked, the answer (None: nobody knows), and the numbers.
Row = tuple[str, bool | None, str]


@click.command("check", short_help="Tell whether a library runs on a board, or a model can be compiled.")
@click.argument("file", metavar="MODEL.so|MODEL", type=PATH)
@click.option("--target", metavar="NAME", help="The board it should run on. Default: this machine.")
@click.option(
    "--ram", type=click.FloatRange(0), metavar="MIB", help="RAM that is free for it. Default: the board's RAM."
)
@click.option("--flash", type=click.FloatRange(0), metavar="MIB", help="Storage that is free for it.")
@shape_option
@bind_option
@state_option
def command(
    file: Path,
    target: str | None,
    ram: float | None,
    flash: float | None,
    shapes: Sequence[str],
    binds: Sequence[str],
    states: Sequence[str],
) -> int:
    """Tell whether a compiled library will run on a board or this machine, or whether a model can be compiled.

    Ends with 1 if the library will not run, with 2 if the model cannot be compiled, and lists every node that cannot
    be, with the reason and what to do; `ingot compile --keep-going` compiles the rest.

    \b
      ingot check model.so --target raspberry-pi-4
      ingot check model.onnx
    """
    from ingot.cli.files import is_elf

    if is_elf(file):
        for option, values in (("--shape", shapes), ("--bind", binds), ("--state", states)):
            if values:
                raise OptionError("a library has its interface already", where=option, hint="leave it out")
        return _check_library(file, target, ram, flash)
    if ram is not None or flash is not None:
        hint = f"compile it first: ingot compile {file}" + (f" --target {target}" if target else "")
        raise OptionError("--ram and --flash are about libraries", where=str(file), hint=hint)
    interface = {"shape": parse_shapes(shapes), "bind": parse_binds(binds), "state": parse_states(states)}
    return _check_model(file, target or "native", interface)


def _check_model(path: Path, target: str, interface: dict[str, Any]) -> int:
    """Take the model to its memory plan, and tell of every node on which that fails."""
    from ingot.cli.console import clean, console
    from ingot.driver import diagnose_model

    found = diagnose_model(path, target=target, **interface)
    if found.failures:
        _tell_failures(path, found)
        return 2
    imported, out = found.models[-1], console()
    out.print(f"yes, {clean(path)} can be compiled", style="green", soft_wrap=True)
    for side, specs in (("input", imported.user_inputs), ("output", imported.user_outputs)):
        for spec in specs:
            out.print(f"  {side} {clean(spec.name)}: {spec.dtype}[{', '.join(map(str, spec.shape))}]", soft_wrap=True)
    for bound in imported.bound:
        out.print(f"  bound {clean(bound.spec.name)}: {bound.spec.dtype}{list(bound.spec.shape)}", soft_wrap=True)
    for kept in imported.states:
        pair = clean(f"{imported.inputs[kept.input].name} = {imported.outputs[kept.output].name}")
        out.print(f"  state {pair}: {imported.inputs[kept.input].dtype}{list(kept.initial.shape)}", soft_wrap=True)
    for notice in imported.notices:
        out.print(f"note: {clean(notice)}", style="yellow", soft_wrap=True)
    return 0


def _tell_failures(path: Path, found: Diagnosis) -> None:
    """List the nodes that cannot be compiled, then what is left without them."""
    from ingot.cli.console import clean, console

    out, count = console(), len(found.failures)
    nodes = "1 node cannot" if count == 1 else f"{count} nodes cannot"
    out.print(f"no, {clean(path)} cannot be compiled: {nodes} be", style="bold red", soft_wrap=True)
    for failure in found.failures:
        out.print(f"  {clean(failure.label)}: {clean(failure.reason)}", soft_wrap=True)
        out.print(f"    do: {clean(failure.hint)}", soft_wrap=True)
    if found.behind:
        out.print(f"  {found.behind} more of its {found.nodes} nodes need their results", soft_wrap=True)
    if not found.models:
        return
    rest = ", ".join(clean(spec.name) for spec in found.models[-1].user_outputs)
    out.print(f"  --keep-going compiles the rest, with the outputs {rest}", soft_wrap=True)


def _check_library(path: Path, target: str | None, ram: float | None, flash: float | None) -> int:
    from ingot.cli.console import clean, console, show, table, verdict
    from ingot.runtime.loader import check, read_metadata

    meta = read_metadata(str(path))
    if target is None:
        names = {"machine": "architecture", "CPU": "CPU features"}
        # The loader's own answers, but for sizes, which have rows of their own here.
        rows: list[Row] = [(names.get(what, what), ok, text) for what, ok, text in check(str(path))]
        rows = [row for row in rows if row[0] not in ("file", "memory")]
        rows.append(_ram(meta, _free_ram_mib() if ram is None else ram))
        place = "this machine"
    else:
        from ingot.target import load_target

        board = load_target(target)
        rows = _rows(path, meta, board)
        rows.append(_ram(meta, board.ram_mib if ram is None else ram))
        place = board.name
    rows.append(_flash(path, flash, here=target is None))
    out = console()
    cells: list[list[str | Text]] = [[what, verdict(ok), clean(detail)] for what, ok, detail in rows]
    show(out, table(("", "fits", ""), cells))
    ok = all(row[1] is not False for row in rows)
    made_for = meta["target"]["name"]
    sentence = f"{path}, compiled for {made_for}, {'runs' if ok else 'does not run'} on {place}"
    out.print(clean(sentence), style="green" if ok else "bold red", soft_wrap=True)
    return 0 if ok else 1


def _rows(path: Path, meta: dict[str, Any], board: Target) -> list[Row]:
    """What the library needs, next to what the board has."""
    made = meta["target"]
    same = made["arch"] == board.arch
    rows: list[Row] = [("architecture", same, f"{made['arch']} needed, {board.arch} there")]
    mine, theirs = made["triple"].rsplit("-", 1)[-1], board.triple.rsplit("-", 1)[-1]
    # What follows "gnu" or "musl" is the calling convention: eabihf.
    convention = mine.removeprefix(made["libc"]) == theirs.removeprefix(board.libc)
    rows.append(("ABI", same and convention, f"{made['triple']} needed, {board.triple} there; ABI {meta['abi']}"))
    missing = [feature for feature in made["features"] if feature not in board.features]
    needed = " ".join(made["features"]) or "none"
    if not same:
        rows.append(("CPU features", False, f"of another architecture: {needed}"))
    elif missing:
        rows.append(("CPU features", False, f"{' '.join(missing)} missing there"))
    else:
        rows.append(("CPU features", True, f"{needed} needed, all there"))
    rows.append(_libc(path, made, board))
    return rows


def _libc(path: Path, made: dict[str, Any], board: Target) -> Row:
    def name(libc: str) -> str:
        return "glibc" if libc == "gnu" else libc

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".") if part.isdecimal() and len(part) < 9)

    needed = f"{name(made['libc'])} {made['libc_version']} or later needed"
    there = f"{name(board.libc)} {board.libc_version} there"
    fits = made["libc"] == board.libc and version(made["libc_version"]) <= version(board.libc_version)
    return ("libc", fits, f"{needed}{_used(path)}, {there}")


def _used(path: Path) -> str:
    """The newest symbols of glibc that the file uses, in words; nothing for another libc."""
    from ingot.packager.elf import Elf

    versions = Elf(path.read_bytes(), str(path)).versions.values()
    found = [version[6:] for names in versions for version in names if version.startswith("GLIBC_")]
    numbers = [tuple(map(int, text.split("."))) for text in found if text.replace(".", "").isdecimal()]
    return f" (its symbols are of {'.'.join(map(str, max(numbers)))})" if numbers else ""


def _ram(meta: dict[str, Any], limit: float | None) -> Row:
    from ingot.cli.console import size

    need = meta["memory_bytes"] + meta["weights_bytes"]
    parts = f"{size(need)} needed ({size(meta['weights_bytes'])} weights, {size(meta['arena_bytes'])} arena)"
    if limit is None:
        return ("RAM", None, f"{parts}; how much there is differs, --ram MIB compares")
    return ("RAM", need <= limit * 2**20, f"{parts}, {size(limit * 2**20)} there")


def _free_ram_mib() -> float | None:
    """MiB that this machine can give to a new program, if it says."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:"))
    return None


def _flash(path: Path, limit: float | None, *, here: bool) -> Row:
    from ingot.cli.console import size

    need = path.stat().st_size
    if limit is None and here:
        return ("flash", True, f"{size(need)}, stored here already")
    if limit is None:
        return ("flash", None, f"{size(need)} needed; --flash MIB compares")
    return ("flash", need <= limit * 2**20, f"{size(need)} needed, {size(limit * 2**20)} there")
