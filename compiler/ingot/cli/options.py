"""Options that several verbs share, and the reading of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ingot.errors import OptionError

#: A path as given: the verbs themselves say what is wrong with one, in the words of the error family.
PATH = click.Path(path_type=Path)
MAX_THREADS = 64

shape_option = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=D,D,...",
    help="Shape of an input whose dimensions the model leaves open, like x=1,3,224,224. Repeatable.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Seed of the random inputs."
)


def parse_shapes(values: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read `--shape` values to shapes by input name. Raises OptionError for one that cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for value in values:
        name, equals, text = value.rpartition("=")
        words = [word.strip() for word in text.split(",")]
        # Longer numbers are no dimensions, and Python refuses to read numbers of thousands of digits.
        if not equals or not name or not all(w.isascii() and w.isdecimal() and len(w) < 19 for w in words):
            raise OptionError(
                "a --shape cannot be read",
                where="--shape",
                found=repr(value[:80]),
                allowed="NAME=D,D,... with whole numbers",
                hint="for example: --shape x=1,3,224,224",
            )
        if name in shapes:
            raise OptionError("a --shape is given twice for one input", where="--shape", found=repr(name[:80]))
        shapes[name] = tuple(int(word) for word in words)
    return shapes
