"""The source model's inputs that nobody gives a library: bound when it was compiled, or kept as state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ingot.errors import LoadError, OptionError

Array = np.ndarray[Any, Any]


def bound_inputs(meta: dict[str, Any], given: dict[str, Any]) -> list[tuple[int, str, Array]]:
    """The inputs that were bound at compile time: place, name, value. Raises OptionError where a value is not known."""
    from ingot.packager.metadata import bound_array

    names = [entry["name"] for entry in meta["bound"]]
    for name in given:
        if name not in names:
            allowed = ", ".join(map(repr, names)) or "none: the library has no bound inputs"
            raise OptionError("--bind names an input that is not bound", "--bind", repr(name[:80]), allowed)
    found = []
    for entry in meta["bound"]:
        name = entry["name"]
        value = given.get(name)
        if value is not None and not isinstance(value, np.ndarray):
            value = np.asarray(value).astype(_bits(entry["dtype"]))
        array = bound_array(entry, value)
        if array is None:
            what = "a bound input has another value in the library" if name in given else "a bound value is not known"
            hint = f"give the value it was compiled with: --bind {name}=FILE.npy"
            raise OptionError(what, where=f"input {name!r}", allowed=f"SHA-256 {entry['sha256']}", hint=hint)
        found.append((entry["position"], name, array))
    return found


def first_states(library: Path, meta: dict[str, Any]) -> list[tuple[int, str, Array]]:
    """The first values of the state: place among the source's inputs, name, value. Raises LoadError for a lie."""
    import math

    from ingot.packager.elf import Elf

    entries = meta["states"]
    if sum(math.prod(entry["shape"]) for entry in entries) > meta["state_bytes"]:
        raise LoadError("the library's states are larger than its memory for them", where=str(library))
    elf = Elf(library.read_bytes(), str(library)) if any(entry["initial"] is not None for entry in entries) else None
    section = elf.section(".ingot.weights") if elf is not None else None
    found = []
    for entry in entries:
        if not entry["in_source"]:
            continue
        dtype, shape, start = _bits(entry["dtype"]), entry["shape"], entry["initial"]
        value = np.zeros(shape, dtype)
        if start is not None:
            data = bytes(elf.contents(section)[start : start + value.nbytes]) if elf and section else b""
            if len(data) != value.nbytes:
                raise LoadError("a first state lies outside the library's weights", where=str(library))
            value = np.frombuffer(data, dtype).reshape(shape)
        found.append((entry["input_position"], entry["input"], value))
    return found


def _bits(dtype: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
