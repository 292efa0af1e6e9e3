"""How things look in the terminal: sizes, tables, escaped names. Plain text when the output is not a terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Columns when the output is a file or a pipe: rows stay on one line, where grep finds them.
PIPED_WIDTH = 250


class _Console(Console):
    """A console that leaves a broken pipe to `ingot.cli.main`, like any other error."""

    def on_broken_pipe(self) -> None:
        """Raise what the write raised."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console for text that comes from models and files: no markup, no colours outside terminals."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
    return _Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def clean(text: object) -> str:
    """Text from a file with everything escaped that a terminal would take for a command."""
    string = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in string)


def size(count: float) -> str:
    """Bytes for people: `512 B`, `1.2 KiB`, `14.0 MiB`."""
    if count < 1024:
        return f"{count:g} B"
    units = ("KiB", "MiB", "GiB")
    power = min(len(units), max(1, (int(count).bit_length() - 1) // 10))
    return f"{count / 1024**power:.1f} {units[power - 1]}"


def number(count: float) -> str:
    """A count for people: `950`, `3.87 thousand`, `301 million`, `4.09 billion`."""
    for limit, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}" if count / limit < 999.5 else f"{count / limit:.0f}{unit}"
    return f"{count:g}"


def shape(dims: Iterable[Any]) -> str:
    """A shape as the command line writes it: `1,3,224,224`; `scalar` for rank 0."""
    return ",".join("?" if d is None else clean(d) for d in dims) or "scalar"


def milliseconds(seconds: float) -> str:
    """A time in ms with three significant digits: `0.0123`, `6.47`, `1280`."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def facts(out: Console, rows: Iterable[tuple[str, str]], *, indent: int = 2) -> None:
    """Print `name  value` lines, values aligned and wrapped in their column."""
    listed = list(rows)
    column = indent + max((len(name) for name, _ in listed), default=0) + 2
    for name, value in listed:
        lines = textwrap.wrap(value, max(20, out.width - column), break_on_hyphens=False) or [""]
        head = Text.assemble((f"{'':{indent}}{name:{column - indent}}", "bold"), lines[0])
        out.print(head, *(Text(" " * column + line) for line in lines[1:]), sep="\n", soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[str] = ()) -> Table:
    """A table with one line under its head; the columns named in `right` are numbers."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        numbers = column in right
        result.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return result


def show(out: Console, content: Table) -> None:
    """Print a table; in a pipe or file without the blanks that fill the last column."""
    if out.is_terminal:
        out.print(content)
        return
    with out.capture() as capture:
        out.print(content)
    for line in capture.get().splitlines():
        out.print(Text(line.rstrip()), soft_wrap=True)


def verdict(ok: bool | None) -> Text:
    """Yes, no, or nothing to say."""
    if ok is None:
        return Text("-")
    return Text("yes", style="green") if ok else Text("no", style="bold red")


def source_is_quantized(meta: dict[str, Any]) -> bool:
    """Whether the model was quantised before ingot read it: it multiplies integers, and nobody asked for that."""
    return bool(meta["precision"] == "fp32" and meta.get("integer_macs", 0))


def precision_name(meta: dict[str, Any]) -> str:
    """The precision of a library; of a model that came quantised, that of its integers and of the rest, if any."""
    name = str(meta["precision"])
    if not source_is_quantized(meta):
        return name
    return "int8 as in the model" if meta["integer_macs"] == meta["macs"] else f"int8 as in the model, rest {name}"


def precision_words(meta: dict[str, Any]) -> str:
    """The precision of a library and, for half formats and few bits, what they cover and the outputs' largest error.

    No loader reads the fields "half" and "few_bits", so none has checked them: one that is not as the compiler writes
    it is left out.
    """
    name = precision_name(meta)
    try:
        if "few_bits" in meta:
            few = meta["few_bits"]
            words = f": {int(few['stored'])} of {int(few['layers'])} layers store their weights so"
            return name + words + _error_words(few["errors"])
        return f"{name}{_half_words(meta['half'])}"
    except (KeyError, TypeError, ValueError, AttributeError):
        return name


def _half_words(half: dict[str, Any]) -> str:
    layers, multiplied, stored, tensors = (int(half[key]) for key in ("layers", "multiplied", "stored", "tensors"))
    words = f": {multiplied} of {layers} layers multiply in it"
    if stored:
        words += f", {stored} more store their weights in it"
    if tensors:
        words += f", {tensors} tensors are stored in it"
    return words + _error_words(half["errors"])


def _error_words(errors: list[dict[str, Any]]) -> str:
    finite = [e for e in errors if e["sqnr_db"] is not None]
    if not finite:
        return ""
    worst = min(finite, key=lambda e: float(e["sqnr_db"]))
    sqnr, error, reference = (float(worst[key]) for key in ("sqnr_db", "max_error", "max_reference"))
    return f"; random input against fp32: SQNR {sqnr:.1f} dB, max|error| {error:.2g} of {reference:.2g}"
