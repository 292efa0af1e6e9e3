"""Options that several verbs share, and the reading of their values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    help="Shape of an input whose dimensions the model leaves open: x=1,3,224,224; 'ids=1x{16,64}' for buckets;"
    " x=1..32x3x224x224 for any batch from 1 to 32.",
)
bind_option = click.option(
    "--bind",
    "binds",
    multiple=True,
    metavar="NAME=VALUE",
    help="Make an input a constant: a number, a list like 1,3,224, or a .npy file. Repeatable.",
)
state_option = click.option(
    "--state",
    "states",
    multiple=True,
    metavar="IN=OUT[:FILE.npy]",
    help="Keep a pair of input and output in the model, from one run to the next; the file is its first value.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Seed of the random inputs."
)


#: A dimension, a range of them, or sizes of it for several buckets. Longer numbers are no dimensions, and Python
#: refuses to read numbers of thousands of digits.
_SIZE = re.compile(r"\s*(?:(\d{1,18})(?:\.\.(\d{1,18}))?|\{\s*(\d{1,18}(?:\s*,\s*\d{1,18})*)\s*\})\s*", re.ASCII)


def parse_shapes(values: Sequence[str], *, buckets: bool = True) -> dict[str, tuple[Any, ...]]:
    """Read `--shape` values to shapes by input name; a dimension is a number or, with `buckets`, a list or range.

    Raises OptionError for one that cannot be read.
    """
    shapes: dict[str, tuple[Any, ...]] = {}
    for value in values:
        name, equals, text = value.rpartition("=")
        sizes = _read_sizes(text) if equals and name else None
        if sizes is None or (not buckets and not all(isinstance(size, int) for size in sizes)):
            example = "NAME=D,D,... or NAME=DxD... with whole numbers"
            raise OptionError(
                "a --shape cannot be read",
                where="--shape",
                found=repr(value[:80]),
                allowed=example + ("; {D,D} for several sizes of a dimension, D..D for a batch" if buckets else ""),
                hint="for example: --shape x=1,3,224,224",
            )
        if name in shapes:
            raise OptionError("a --shape is given twice for one input", where="--shape", found=repr(name[:80]))
        shapes[name] = tuple(sizes)
    return shapes


def _read_sizes(text: str) -> list[int | list[int] | range] | None:
    """The dimensions in a text like 1..4x3,{16,32}; None if it holds something else."""
    sizes: list[int | list[int] | range] = []
    at = 0
    while True:
        found = _SIZE.match(text, at)
        if found is None:
            return None
        number, last, several = found.groups()
        if last:
            sizes.append(range(int(number), int(last) + 1))
        else:
            sizes.append(int(number) if number else [int(word) for word in several.split(",")])
        at = found.end()
        if at == len(text):
            return sizes
        if text[at] not in ",x":
            return None
        at += 1


def parse_binds(values: Sequence[str]) -> dict[str, Any]:
    """Read `--bind` values to numbers, lists or arrays by input name. Raises OptionError, or InputError for a file."""
    from ingot.arrays import load_any

    binds: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.rpartition("=")
        found = _numbers(text.strip()) if equals and name else None
        if found is None and equals and name and text.endswith(".npy"):
            found = load_any(Path(text))
        if found is None:
            raise OptionError(
                "a --bind cannot be read",
                where="--bind",
                found=repr(value[:80]),
                allowed="NAME=NUMBER, NAME=[N,N,...] or NAME=FILE.npy",
                hint="for example: --bind axes=0,1 or --bind table=table.npy",
            )
        if name in binds:
            raise OptionError("a --bind is given twice for one input", where="--bind", found=repr(name[:80]))
        binds[name] = found
    return binds


def parse_pads(values: Sequence[str]) -> dict[str, float]:
    """Read `--pad` values to numbers by input name. Raises OptionError for one that cannot be read."""
    pads: dict[str, float] = {}
    for value in values:
        name, equals, text = value.rpartition("=")
        found = _numbers(text.strip()) if equals and name and name not in pads else None
        if not isinstance(found, (int, float)):
            example = "for example: --pad ids=0 --pad mask=0"
            raise OptionError(
                "a --pad cannot be read, or is given twice", "--pad", repr(value[:80]), "NAME=NUMBER", example
            )
        pads[name] = found
    return pads


def parse_states(values: Sequence[str]) -> dict[str, Any]:
    """Read `--state` values: an output, or (output, first value), by input. Raises OptionError or InputError."""
    from ingot.arrays import load_any

    states: dict[str, Any] = {}
    for value in values:
        name, _, rest = value.partition("=")
        # Names may hold colons themselves: only a file behind one is a first value.
        output, colon, file = rest.rpartition(":")
        has_file = bool(colon) and file.endswith(".npy")
        output = output if has_file else rest
        if not name or not output:
            raise OptionError(
                "a --state cannot be read",
                where="--state",
                found=repr(value[:80]),
                allowed="INPUT=OUTPUT or INPUT=OUTPUT:FILE.npy",
                hint="for example: --state h=h_out",
            )
        if name in states:
            raise OptionError("a --state is given twice for one input", where="--state", found=repr(name[:80]))
        states[name] = (output, load_any(Path(file))) if has_file else output
    return states


def _numbers(text: str) -> Any:  # noqa: ANN401 - a number or nested lists of them
    """The number or list that a text holds; None if it holds neither."""
    try:
        value = json.loads(text if text[:1] == "[" or "," not in text else f"[{text}]")
    except (ValueError, RecursionError):
        return None
    kinds = (bool, int, float)
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif not isinstance(item, kinds):
            return None
    return value
