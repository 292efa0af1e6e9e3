"""What of a model cannot be compiled: every node with its reason, and the part that is left without them.

Importers say themselves which node they refuse. What only later steps find (a shape that stays unknown, loops that
cannot be scheduled, an output that cannot be planned) belongs to the first node whose presence makes them fail, which
is searched by bisection over the nodes in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ingot.errors import CompilerError, IngotError, OptionError, ShapeError, TargetError
from ingot.frontend import import_model, survey_model
from ingot.frontend.survey import Failure, NothingLeftError

if TYPE_CHECKING:
    import os

    from ingot.frontend.interface import Imported

#: Takes a model as far as it has to come; raises where it cannot.
Build = Callable[["Imported"], object]
#: What the user got wrong, or the machine: no node is to blame.
_NOT_OF_A_NODE = (OptionError, ShapeError, TargetError, MemoryError)


@dataclass(frozen=True)
class Diagnosis:
    """All nodes that cannot be compiled, in order, and the models of the largest part without them, one a bucket.

    `models` is empty if nothing is left. `nodes` counts all nodes, `behind` those that only need what failed ones make.
    """

    failures: tuple[Failure, ...]
    models: tuple[Imported, ...]
    nodes: int

    @property
    def behind(self) -> int:
        """Nodes that could be compiled, but for what they read."""
        cut = self.models[0].cut if self.models else None
        return (cut.left_out if cut is not None else self.nodes if self.failures else 0) - len(self.failures)


def diagnose(
    path: str | os.PathLike[str],
    shapes: Sequence[Mapping[str, Sequence[int]]],
    bind: Mapping[str, Any] | None,
    state: Mapping[str, Any] | None,
    build: Build,
) -> Diagnosis:
    """Find every node of a model that cannot be compiled; `shapes` has those of the inputs for each bucket.

    Raises what `import_model` raises for a file, an option or a shape that is wrong as a whole.
    """
    labels: dict[int, str] = {}
    failures: dict[int, Failure] = {}
    for shape in shapes:
        survey = survey_model(path, shape, bind)
        labels.update(survey.labels)
        failures = {**survey.failures, **failures}

    def attempt(without: Collection[int]) -> list[Imported]:
        models = [import_model(path, shape, bind, state, without) for shape in shapes]
        for model in models:
            build(model)
        return models

    while True:
        try:
            models = attempt(failures)
        except _NOT_OF_A_NODE:
            raise
        except NothingLeftError:
            return Diagnosis(_ordered(failures), (), len(labels))
        except Exception as error:
            left = [number for number in sorted(labels) if number not in failures]
            number = _first_bad(left, failures, attempt)
            if number is None:  # it fails without any node: no node is to blame
                raise
            failures[number] = Failure(number, labels[number], _as_ingot_error(error))
        else:
            ordered = _ordered(failures)
            stated = tuple((failure.label, failure.reason) for failure in ordered)
            cut = [replace(m, cut=replace(m.cut, failed=stated)) if m.cut is not None else m for m in models]
            return Diagnosis(ordered, tuple(cut), len(labels))


def _ordered(failures: Mapping[int, Failure]) -> tuple[Failure, ...]:
    return tuple(failures[number] for number in sorted(failures))


def _first_bad(
    left: Sequence[int], failures: Mapping[int, Failure], attempt: Callable[[Collection[int]], object]
) -> int | None:
    """The node with which a build that fails on all nodes fails first; None if it fails without any node."""

    def fails(count: int) -> bool:
        try:
            attempt({*failures, *left[count:]})
        except _NOT_OF_A_NODE:
            raise
        except NothingLeftError:
            return False
        except Exception:
            return True
        return False

    good, bad = 0, len(left)
    if not left or fails(0):
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return left[bad - 1]


def _as_ingot_error(error: Exception) -> IngotError:
    """An error of the compiler's own, or of a library, as one that says what to do."""
    if isinstance(error, IngotError):
        return error
    text = " ".join(str(error).split())[-200:]
    what = "the compiler fails on this node"
    return CompilerError(what, found=f"{type(error).__name__}: {text}")
