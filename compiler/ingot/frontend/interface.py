"""What every importer hands to the passes: one frozen description of a model, the same for ONNX and TFLite."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import tvm

# Tensors up to this many elements stay `relax.Constant`; larger ones are parameters of `main` ("weights").
CONSTANT_ELEMENTS = 64


@dataclass(frozen=True)
class Quantization:
    """Affine quantisation of one tensor: real = scale * (stored - zero_point).

    `scales` and `zero_points` have one entry (per tensor) or one entry per index along `axis` (per channel).
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """One input or output as the user knows it: the model's own name, dtype, layout and (static) shape.

    `dtype` is a numpy dtype name such as "float32", "int8" or "bool", or "bfloat16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Bound:
    """An input of the source that the user made a constant: `position` counts among all of the source's inputs."""

    spec: TensorSpec
    position: int
    value: np.ndarray


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a run leaves to the next one: `Imported.outputs[output]` becomes `inputs[input]` then.

    `initial` is what the first run finds. `in_source` says whether the source has them as an input and an output too,
    or keeps the tensor itself.
    """

    input: int
    output: int
    initial: np.ndarray
    in_source: bool = True


@dataclass(frozen=True)
class Counted:
    """An output whose size along `axis` depends on data: `outputs[output]` has the size in `outputs[counter]`.

    The counter is an int64[1] that the caller does not get. The output's own shape is the largest one; zeros lie behind
    its last entry.
    """

    output: int
    axis: int
    counter: int


@dataclass(frozen=True)
class Cut:
    """Where a model ends of which only a part is compiled.

    `left_out` of its `nodes` nodes are not there. `outputs` names all outputs of the part, `opened` those that the
    whole model has not. `failed` has the nodes that cannot be compiled, each with the reason; the others that are left
    out need their results.
    """

    nodes: int
    left_out: int
    outputs: tuple[str, ...]
    opened: tuple[str, ...]
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Imported:
    """A model in the compiler's normal form (see `ingot.frontend.normal_form`).

    `weights` holds one array for each parameter of `module["main"]` after the inputs, in that order, by the
    parameter's name. `name` is a C identifier made from the file's stem. `source_peak_bytes` is the largest number
    of bytes live at once on the source graph, in its own order, without weights, inputs and outputs: a lower bound
    for any arena. `notices` are sentences the user should read. `bound` are inputs of the source that are constants
    here. `states` are pairs of an input and an output that a compiled model keeps for itself. `counts` are outputs
    whose size depends on data. `cut` says what is left out.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str
    source_format: str
    source_sha256: str
    source_peak_bytes: int
    notices: tuple[str, ...]
    bound: tuple[Bound, ...] = ()
    states: tuple[StateTensor, ...] = ()
    counts: tuple[Counted, ...] = ()
    cut: Cut | None = None

    @property
    def user_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a caller gives, in order: those that are no state."""
        kept = {state.input for state in self.states}
        return tuple(spec for i, spec in enumerate(self.inputs) if i not in kept)

    def source_position(self, index: int) -> int:
        """The place of `inputs[index]` among the source's inputs, of which some may be bound."""
        taken = {bound.position for bound in self.bound}
        free = (place for place in range(len(self.inputs) + len(taken)) if place not in taken)
        return next(itertools.islice(free, index, None))

    @property
    def user_outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that a caller gets, in order: those that are neither state nor counters."""
        return tuple(self.outputs[i] for i in self.user_output_places)

    @property
    def user_output_places(self) -> tuple[int, ...]:
        """The places of `user_outputs` in `outputs`."""
        kept = {state.output for state in self.states} | {count.counter for count in self.counts}
        return tuple(i for i in range(len(self.outputs)) if i not in kept)
