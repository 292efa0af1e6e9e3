"""What flows through the pipeline: one immutable `State`, replaced by every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ingot.frontend.interface import Imported
    from ingot.program import Program
    from ingot.target import Target


@dataclass(frozen=True)
class LayerPrecision:
    """How one layer with weights is computed: `label` names its weight, `why` says why it is not in half precision.

    arithmetic: "bf16" or "fp16" (products of half-precision values, float32 sums), "stored" (float32 products of
    half-precision weights) or "fp32".
    """

    label: str
    arithmetic: str
    why: str


@dataclass(frozen=True)
class State:
    """The program between two passes.

    module:     one Relax function `main` (and, after `select_templates`, the PrimFuncs it calls).
    weights:    value of each parameter of `main` after the model's inputs, by the parameter's name.
    imported:   what the frontend read; its own module is the one before any pass.
    lowered:    set by `lower`: the steps over virtual buffers, see `ingot.passes.lower`.
    program:    set by `plan_memory`: the finished description for the packager.
    picks:      chooses the templates' configs, see `ingot.passes.picks`; None for the cost formula.
    precision:  what the user asked for; `layers` and `half_tensors` (how many tensors between kernels are stored in
                half precision) say what became of it, if it is half.
    """

    module: Any
    weights: Mapping[str, np.ndarray]
    imported: Imported
    target: Target
    macs: int = 0
    lowered: Any = None
    program: Program | None = None
    notices: tuple[str, ...] = field(default=())
    picks: Callable[[Any], Any] | None = field(default=None, compare=False, repr=False)
    precision: str = "fp32"
    layers: tuple[LayerPrecision, ...] = ()
    half_tensors: int = 0

    def having(self, **changes: Any) -> State:  # noqa: ANN401 - any field of State
        """Return a copy with the given fields replaced."""
        return replace(self, **changes)

    @property
    def n_inputs(self) -> int:
        """Return how many of `main`'s parameters are the user's inputs."""
        return len(self.imported.inputs)


@dataclass(frozen=True)
class Pass:
    """A named step of the pipeline.

    requires/ensures name entries of `ingot.passes.invariants.INVARIANTS`: what must hold before, and what holds after
    it (and stays true unless a later pass lists it under `breaks`).
    """

    name: str
    run: Callable[[State], State]
    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Return the first line of the pass's own documentation."""
        return (self.run.__doc__ or "").strip().splitlines()[0]
