"""What of a model cannot be imported, all of it at once.

Nodes are numbered as in the main graph of an ONNX model whose functions are written out, and as the operators of a
TFLite model. A node fails for a reason of its own; the nodes that need its results are only counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ingot.errors import CompilerError, IngotError, UnsupportedError

#: What to do about an operator that is not supported.
REPLACE_HINT = "replace it before exporting the model, or teach it with ingot.register_op"


@dataclass(frozen=True)
class Failure:
    """A node that cannot be compiled: its number, how messages call it, and why."""

    number: int
    label: str
    error: IngotError

    @property
    def reason(self) -> str:
        """Why, in one line, without the node's own name."""
        error = self.error
        inside = error.where if error.where and error.where != self.label else None
        parts = [error.what, inside and f"in {inside}", error.found and f"found {error.found}"]
        return ", ".join(part for part in parts if part) + (f"; allowed: {error.allowed}" if error.allowed else "")

    @property
    def hint(self) -> str:
        """What to do about it."""
        if self.error.hint:
            return self.error.hint
        if isinstance(self.error, CompilerError):
            return "this is a bug in ingot: please report it with the model"
        return REPLACE_HINT


@dataclass
class Survey:
    """Collects what fails, where an import would end at the first failure.

    labels: all nodes by number. lost: tensors (names or places) of failed nodes, and of nodes that need them.
    """

    labels: dict[int, str] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    lost: set[object] = field(default_factory=set)

    def fail(self, number: int, error: IngotError, results: Iterable[object]) -> None:
        """Remember why a node fails, and that nobody makes its results."""
        self.failures.setdefault(number, Failure(number, self.labels[number], error))
        self.lost.update(results)

    def skips(self, number: int, reads: Iterable[object], results: Iterable[object]) -> bool:
        """Whether a node has failed before, or needs what is lost; then its results are lost too."""
        skipped = number in self.failures or not self.lost.isdisjoint(reads)
        if skipped:
            self.lost.update(results)
        return skipped


@contextlib.contextmanager
def surveyed(survey: Survey | None, number: int, results: Iterable[object]) -> Iterator[None]:
    """Let an error of a node go into the survey; without one it is raised as it is."""
    try:
        yield
    except IngotError as error:
        if survey is None:
            raise
        survey.fail(number, error, results)


Key = TypeVar("Key", bound=Hashable)


class NothingLeftError(UnsupportedError):
    """Without the nodes that are left out, a model computes nothing."""


@dataclass(frozen=True)
class Links(Generic[Key]):
    """One node of a graph: the tensors it reads and writes."""

    reads: frozenset[Key]
    writes: tuple[Key, ...]


@dataclass(frozen=True)
class Part(Generic[Key]):
    """A graph without some nodes: the numbers of those that are left, its inputs and its outputs.

    `opened` are the outputs that the whole graph has not: tensors that left-out nodes would have read.
    """

    kept: tuple[int, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    opened: tuple[Key, ...]


def part_without(
    nodes: Sequence[Links[Key]], without: Collection[int], inputs: Sequence[Key], outputs: Sequence[Key]
) -> Part[Key]:
    """The largest part of a graph without these nodes and all that need their results.

    nodes: in order, each after those it reads from. inputs: what a caller gives; one that is only read by nodes that
    are left out vanishes. Raises NothingLeftError if nothing is left that depends on an input.
    """
    lost: set[Key] = set()
    varying: set[Key] = set(inputs)
    kept = []
    for number, node in enumerate(nodes):
        if number in without or not lost.isdisjoint(node.reads):
            lost.update(node.writes)
            continue
        kept.append(number)
        if not varying.isdisjoint(node.reads):
            varying.update(node.writes)
    left = set(kept)
    needed = {name for number, node in enumerate(nodes) if number not in left for name in node.reads} & varying
    own: list[Key] = [name for name in outputs if name not in lost]
    made: list[Key] = [name for number in kept for name in nodes[number].writes]
    opened: list[Key] = [name for name in dict.fromkeys(made) if name in needed and name not in own]
    if not own and not opened:
        raise NothingLeftError("nothing of the model can be compiled", found=f"{len(kept)} of {len(nodes)} nodes")
    read = {name for number in kept for name in nodes[number].reads}
    unread = {name for node in nodes for name in node.reads} - read - set(own)
    given = tuple(name for name in inputs if name not in unread)
    return Part(tuple(kept), given, (*own, *opened), tuple(opened))
