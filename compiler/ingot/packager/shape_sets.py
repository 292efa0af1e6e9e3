"""The shapes that the inputs and outputs of one library may have: of its buckets, or for each size of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported, TensorSpec
    from ingot.program import Pad, Program


def with_shapes(specs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]]) -> list[TensorSpec]:
    """The tensors of the largest bucket in the shapes of another one."""
    return [replace(spec, shape=shape) for spec, shape in zip(specs, shapes, strict=True)]


def scaled(spec: TensorSpec, count: int, of: int) -> TensorSpec:
    """A tensor for `count` items of a batch in place of `of` items."""
    return replace(spec, shape=(spec.shape[0] // of * count, *spec.shape[1:]))


def of_items(program: Program, imported: Imported, count: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs of a model with a range of batches, for `count` items."""
    batch = program.batch
    if batch is None:
        return list(imported.user_inputs), list(imported.user_outputs)
    inputs = zip(imported.user_inputs, batch.shared, strict=True)
    return (
        [spec if same else scaled(spec, count, batch.largest) for spec, same in inputs],
        [scaled(spec, count, batch.largest) for spec in imported.user_outputs],
    )


def of_size(pad: Pad, imported: Imported, size: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs of a model whose inputs are padded, for inputs of one size."""
    specs = [*imported.user_inputs, *imported.user_outputs]
    found = [
        spec if axis is None else replace(spec, shape=(*spec.shape[:axis], size, *spec.shape[axis + 1 :]))
        for spec, axis in zip(specs, pad.axes, strict=True)
    ]
    count = len(imported.user_inputs)
    return found[:count], found[count:]


def other_shapes(program: Program, imported: Imported) -> list[tuple[list[TensorSpec], list[TensorSpec]]]:
    """All inputs and outputs that a run may have, but for the largest ones."""
    if program.batch is not None:
        sizes = range(program.batch.smallest, program.batch.largest)
        return [of_items(program, imported, count) for count in sizes]
    inputs, outputs = imported.user_inputs, imported.user_outputs
    if program.pad is not None:
        return [of_size(program.pad, imported, size) for size in range(1, program.pad.sizes[-1])]
    return [(with_shapes(inputs, b.inputs), with_shapes(outputs, b.outputs)) for b in program.buckets]
