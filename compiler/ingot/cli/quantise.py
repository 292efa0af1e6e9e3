"""The options of `ingot compile --precision int8` and `--weights`, and what they tell about each layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ingot.cli.options import PATH
from ingot.errors import OptionError

if TYPE_CHECKING:
    from ingot.quantize.report import Report

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--weights",
        metavar="FORMAT",
        help="Store weights in few bits, multiply in float32: int8, int4, codebook4 to codebook8, pow2.",
    ),
    click.option(
        "--calibrate",
        type=PATH,
        metavar="FILE|FOLDER",
        help="Samples for --precision int8 or --weights: a .npz file, or a folder of arrays or images.",
    ),
    click.option(
        "--calibrator",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="How ranges follow from samples: auto, minmax, percentile, entropy or mse.",
    ),
    click.option("--max-drop", metavar="SHARE", help="Keep as few layers in float as lose no more than this, like 1%."),
    click.option(
        "--explain",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
        help="Say what quantisation decided for each layer: here, or in a .json or .html file.",
    ),
)


def quantise_options(command: _Command) -> _Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_share(text: str | None) -> float | None:
    """Read `1%` or `0.01`. Raises OptionError."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        allowed, hint = "0% to 100%", "for example: --max-drop 1%"
        raise OptionError(
            "--max-drop cannot be read", where="--max-drop", found=repr(text[:80]), allowed=allowed, hint=hint
        )
    return value


def check_explain(explain: str | None, precision: str, weights: str | None, inputs: tuple[Path, ...]) -> None:
    """Refuse what cannot be written, before the long work. Raises OptionError or OutputError."""
    from ingot.cli.files import check_output

    if explain is None:
        return
    if precision != "int8" and weights is None:
        found, allowed = f"--precision {precision}", "int8, or --weights"
        raise OptionError("--explain tells about quantisation", where="--explain", found=found, allowed=allowed)
    if explain == "-":
        return
    if Path(explain).suffix not in (".json", ".html"):
        raise OptionError("unknown form of explanation", where="--explain", found=explain[:200], allowed=".json, .html")
    check_output(Path(explain), inputs=inputs)


def show(report: Report, explain: str | None) -> None:
    """Print what was decided, in short or layer by layer, and write the file that was asked for."""
    from ingot.cli.console import console, facts
    from ingot.packager.artifact import write_file

    if explain == "-":
        click.echo(report.as_text(), nl=False)
        return
    facts(console(), report.facts())
    if explain is not None:
        text = report.as_json() if explain.endswith(".json") else report.as_html()
        write_file(Path(explain), text.encode("utf-8"))
