"""Static shapes for a model's inputs: what the model fixes, what the user gives, and what defaults to 1."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ingot.errors import ShapeError

Dim = int | str | None  # fixed, named (equal names are equal sizes), or unknown
Size = int | Sequence[int]  # of a dimension; several stand for buckets, a range for all sizes of a batch
_MAX_DIM = 2**31 - 1
#: Sets of input shapes in one library.
MAX_BUCKETS = 16
#: The largest batch of a range: each of its sizes has a row in the library's tables.
MAX_BATCH = 128


@dataclass(frozen=True)
class DeclaredInput:
    """An input as the model declares it."""

    name: str
    dims: tuple[Dim, ...]

    def text(self) -> str:
        """The shape for messages: `[N, 3, ?, 224]`."""
        return "[" + ", ".join("?" if dim is None else str(dim) for dim in self.dims) + "]"


def resolve_shapes(
    declared: Sequence[DeclaredInput],
    given: Mapping[str, Sequence[int]] | None,
    may_be_empty: Collection[str] = (),
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], dict[str, int]]:
    """Static shapes by input name, the notices about defaults, and the sizes of named dimensions.

    Inputs in `may_be_empty` may have dimensions of 0. A first dimension that nobody fixes becomes 1, with a notice.
    Raises ShapeError for a name that is no input, a wrong rank, a size the model contradicts, and for every other
    dimension that stays unknown.
    """
    by_name = {item.name: item for item in declared}
    chosen: dict[str, list[Dim]] = {item.name: list(item.dims) for item in declared}
    sizes: dict[str, int] = {}
    for name, wanted in (given or {}).items():
        if name not in by_name:
            raise unknown_input(name, declared, "a shape")
        chosen[name] = list(_match(by_name[name], wanted, sizes, 0 if name in may_be_empty else 1))
    notices = []
    for item in declared:
        dims = chosen[item.name]
        if dims and not isinstance(dims[0], int) and not (isinstance(dims[0], str) and dims[0] in sizes):
            label = f" {dims[0]!r}" if dims[0] else ""
            if isinstance(dims[0], str):
                sizes[dims[0]] = 1
            dims[0] = 1
            notices.append(f"batch dimension{label} of input {item.name!r} set to 1; use {_example(item)} for another")
    resolved: dict[str, tuple[int, ...]] = {}
    unknown = []
    for item in declared:
        dims = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in chosen[item.name]]
        if all(isinstance(dim, int) for dim in dims):
            resolved[item.name] = tuple(dim for dim in dims if isinstance(dim, int))
        else:
            unknown.append(item)
    if unknown:
        raise ShapeError(
            "the model leaves dimensions open that must be fixed",
            where="; ".join(f"input {item.name!r}" for item in unknown),
            found="; ".join(item.text() for item in unknown),
            allowed="one positive number for each dimension",
            hint="give " + " ".join(_example(item) for item in unknown) + " with sizes of your choice",
        )
    return resolved, tuple(notices), sizes


def expand_buckets(given: Mapping[str, Sequence[Size]] | None) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of each bucket: a dimension may be a list of sizes, the first for the first bucket, and so on.

    Raises ShapeError for a list of no sizes, and for lists of different lengths.
    """
    lists = [
        (name, axis, list(size))
        for name, shape in (given or {}).items()
        if isinstance(shape, Sequence) and not isinstance(shape, (str, bytes))
        for axis, size in enumerate(shape)
        if isinstance(size, (list, tuple))
    ]
    counts = {len(sizes) for _, _, sizes in lists}
    if not lists:
        return [dict(given or {})]  # type: ignore[arg-type] # no dimension is a list
    if len(counts) > 1 or not 1 <= min(counts) <= MAX_BUCKETS:
        raise ShapeError(
            "the lists of sizes have different lengths, or too many or no sizes",
            where="; ".join(f"dimension {axis} of {name!r}" for name, axis, _ in lists),
            found=", ".join(str(len(sizes)) for _, _, sizes in lists),
            allowed=f"1 to {MAX_BUCKETS}, the same number for all",
        )

    def chosen(shape: Sequence[Size], number: int) -> tuple[int, ...]:
        return tuple(size[number] if isinstance(size, (list, tuple)) else size for size in shape)  # type: ignore[misc]

    return [{name: chosen(shape, number) for name, shape in (given or {}).items()} for number in range(counts.pop())]


def batch_range(given: Mapping[str, Sequence[Size]] | None) -> range | None:
    """The range of batch sizes among the shapes, if one is given.

    Raises ShapeError for one that is not along the first dimension, that is empty or too large, for several that
    differ, and for one next to lists of sizes.
    """
    every = [
        (name, axis, size)
        for name, shape in (given or {}).items()
        if isinstance(shape, Sequence) and not isinstance(shape, (str, bytes))
        for axis, size in enumerate(shape)
        if isinstance(size, (range, list, tuple))
    ]
    ranges = [(name, axis, size) for name, axis, size in every if isinstance(size, range)]
    if not ranges:
        return None
    found = ranges[0][2]
    where = "; ".join(f"dimension {axis} of {name!r}" for name, axis, _ in every)
    if any(axis for _, axis, _ in ranges):
        raise ShapeError("a range is not along the batch", where=where, allowed="the first dimension")
    if len({(size.start, size.stop, size.step) for _, _, size in ranges}) > 1 or len(every) > len(ranges):
        raise ShapeError("ranges that differ, or a range and lists of sizes", where=where, allowed="one range")
    if found.step != 1 or not 1 <= found.start < found.stop <= MAX_BATCH + 1:
        text = f"{found.start} to {found.stop - 1}"
        raise ShapeError("not a range of batch sizes", where=where, found=text, allowed=f"1 to {MAX_BATCH}")
    return found


def of_batch(given: Mapping[str, Sequence[Size]], count: int) -> dict[str, tuple[int, ...]]:
    """The shapes for a batch of `count` items, where a range is given."""
    return {
        name: tuple(count if isinstance(size, range) else size for size in shape)  # type: ignore[misc]
        for name, shape in given.items()
    }


def unknown_input(name: str, declared: Sequence[DeclaredInput], what: str) -> ShapeError:
    """The error for `what` ("a shape", "a value") given for an input that the model does not have."""
    names = [item.name for item in declared]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else ""
    return ShapeError(
        f"{what} is given for an input the model does not have",
        where=f"{what.split()[-1]} of {name!r}",
        found=repr(name),
        allowed=", ".join(f"{item.name!r} {item.text()}" for item in declared) or "no inputs",
        hint=hint,
    )


def _match(item: DeclaredInput, wanted: Sequence[int], sizes: dict[str, int], least: int) -> list[int]:
    where = f"shape of input {item.name!r}"
    if isinstance(wanted, (str, bytes)) or not isinstance(wanted, Sequence):
        raise ShapeError("a shape is not a list of numbers", where=where, found=repr(wanted), allowed=item.text())
    if len(wanted) != len(item.dims):
        raise ShapeError(
            "a shape has the wrong number of dimensions",
            where=where,
            found=f"{len(wanted)}: {list(wanted)}",
            allowed=f"{len(item.dims)}: {item.text()}",
        )
    result = []
    for axis, (size, dim) in enumerate(zip(wanted, item.dims, strict=True)):
        try:
            value = operator.index(size)
        except TypeError:
            value = -1
        if isinstance(size, bool) or not least <= value <= _MAX_DIM:
            allowed = f"{least} to {_MAX_DIM}"
            raise ShapeError("a dimension is not a positive number", where=where, found=repr(size), allowed=allowed)
        fixed = sizes.get(dim) if isinstance(dim, str) else dim
        if fixed is not None and fixed != value:
            named = f" (dimension {dim!r}, given elsewhere)" if isinstance(dim, str) else ""
            raise ShapeError(
                "a dimension contradicts the model",
                where=f"{where}, dimension {axis}",
                found=str(value),
                allowed=f"{fixed}{named}; the model declares {item.text()}",
            )
        if isinstance(dim, str):
            sizes[dim] = value
        result.append(value)
    return result


def _example(item: DeclaredInput) -> str:
    dims = [
        "1" if axis == 0 and not isinstance(dim, int) else "?" if not isinstance(dim, int) else str(dim)
        for axis, dim in enumerate(item.dims)
    ]
    return f"--shape {item.name}={','.join(dims)}"
