"""How much memory a graph needs at least: the largest sum of bytes of tensors that are live at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Operators whose output is their first input under another shape or name, in ONNX's and TFLite's spelling.
_VIEWS = frozenset(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "RESHAPE", "SQUEEZE", "EXPAND_DIMS")
)


def is_view(operator: str) -> bool:
    """Whether `operator` (ONNX or TFLite name) needs no memory of its own."""
    return operator in _VIEWS


@dataclass(frozen=True)
class Step:
    """One operator of the source graph: the tensors it reads and writes. A view writes no new bytes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    view: bool = False


def peak_bytes(steps: Sequence[Step], sizes: Mapping[str, int], excluded: Iterable[str]) -> int:
    """The largest number of bytes live during any step, in the given order.

    `sizes` has the bytes of every tensor. A tensor lives from the step that writes it to the last that reads it; a
    view shares its source's bytes. Tensors in `excluded` (inputs, outputs, weights) and all views of them count
    nothing.
    """
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.get(name, name) != name:
            name = root[name]
        return name

    free = set(excluded)
    for step in steps:
        if step.view and step.reads and step.writes:
            root[step.writes[0]] = find(step.reads[0])
    free_roots = {find(name) for name in free}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in (*step.reads, *step.writes):
            origin = find(name)
            if origin in sizes and origin not in free_roots:
                first.setdefault(origin, index)
                last[origin] = index
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    for name, index in first.items():
        begins[index] = begins.get(index, 0) + sizes[name]
        ends[last[name]] = ends.get(last[name], 0) + sizes[name]
    live = peak = 0
    for index in range(len(steps)):
        live += begins.get(index, 0)
        peak = max(peak, live)
        live -= ends.get(index, 0)
    return peak
