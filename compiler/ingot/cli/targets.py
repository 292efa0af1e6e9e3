"""`ingot targets`: the boards that ingot compiles for, or all about one of them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ingot.target import Target


@click.command("targets", short_help="List the boards, or explain one.")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the boards, servers and CPU levels that --target takes, or explain the one called NAME.

    NAME can be `native`, for this machine, or the path of a .toml file of your own.
    """
    if name is None:
        _list()
    else:
        from ingot.target import load_target

        _explain(load_target(name))


def _ram(target: Target) -> str:
    if target.ram_mib is None:
        return "-"
    return f"{target.ram_mib} MiB" if target.ram_mib % 1024 else f"{target.ram_mib // 1024} GiB"


def _libc(target: Target) -> str:
    return f"{'glibc' if target.libc == 'gnu' else target.libc} {target.libc_version}"


def _cores(target: Target) -> str:
    return " + ".join(f"{cluster.count} {cluster.name}" for cluster in target.cores)


def _list() -> None:
    from ingot.cli.console import console, show, table
    from ingot.target import list_targets

    targets = list_targets()
    rows = [[t.name, t.arch, _cores(t), _ram(t), _libc(t), t.description] for t in targets]
    out = console()
    columns = ["name", "arch", "cores", "RAM", "libc", "what it is"]
    if out.width < 120:
        # Names must stay whole: they are what one copies from here.
        columns, rows = ["name", "arch", "what it is"], [[row[0], row[1], row[5]] for row in rows]
    show(out, table(columns, rows, right=("RAM",)))
    out.print(f"{len(rows)} targets, and native: this machine. Explain one: ingot targets NAME")


def _explain(target: Target) -> None:
    from ingot.cli.console import console, facts

    out = console()
    out.print(f"{target.name}: {target.description}", style="bold", soft_wrap=True)
    levels = (("L1", target.cache.l1d_kib), ("L2", target.cache.l2_kib), ("L3", target.cache.l3_kib))
    vectors = f"{target.vector_bits} bits, {target.vector_registers} registers"
    rows = [("cores", " + ".join(_cluster(target)))]
    rows += [
        ("caches", ", ".join(f"{level} {kib} KiB" if kib else f"no {level}" for level, kib in levels)),
        ("RAM", _ram(target) if target.ram_mib else "differs from machine to machine"),
        ("GPU", target.gpu or "none"),
        ("libc", f"{_libc(target)} or later"),
        ("features", " ".join(target.features) or "none beyond the architecture's"),
        ("vectors", vectors if target.has_vectors else "none"),
        ("pages", f"up to {target.page_bytes >> 10} KiB"),
    ]
    facts(out, rows)
    out.print("what the tools get", style="bold")
    zig = f"-target {target.zig_triple} -mcpu={target.baseline()}, for the runtime and the generated C"
    facts(out, [*_llvm(target), ("zig", zig), ("emulator", _emulator(target))])
    out.print("sources", style="bold")
    for source in target.sources:
        out.print(f"  {source}", soft_wrap=True)
    out.print(f"compile for it: ingot compile MODEL --target {target.name}", soft_wrap=True)


def _cluster(target: Target) -> list[str]:
    return [f"{c.count} {c.name} ({c.cpu}{f', {c.freq_mhz} MHz' if c.freq_mhz else ''})" for c in target.cores]


def _llvm(target: Target) -> list[tuple[str, str]]:
    switches = target.mattr()
    on = " ".join(s for s in switches if s.startswith("+"))
    off = " ".join(s for s in switches if s.startswith("-"))
    return [("LLVM", f"-mtriple={target.triple} -mcpu={target.cpu}"), ("LLVM on", on or "nothing"), ("LLVM off", off)]


def _emulator(target: Target) -> str:
    from ingot.emulator import emulator_for
    from ingot.errors import ToolchainError

    try:
        qemu = emulator_for(target)
    except ToolchainError as error:
        hint = f"; {error.hint}" if error.hint else ""
        return f"{error.what}{hint}"
    place = shutil.which(qemu.binary)
    return f"{' '.join(qemu.command())} (installed: {place})"
