"""Programs of one model for several input shapes, joined into one: a weight that several read is stored once.

Also those of a batch of any size within a range, which a run is put together from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ingot.errors import ShapeError
from ingot.packager.metadata import aligned
from ingot.packager.shape_sets import scaled
from ingot.program import Batch, Bucket, BufferRef, CopyStep, Program, Step

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported, TensorSpec


def shapes_of(imported: Imported) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """The shapes of the caller's inputs and outputs."""
    return tuple(spec.shape for spec in imported.user_inputs), tuple(spec.shape for spec in imported.user_outputs)


def join(programs: Sequence[Program], models: Sequence[Imported]) -> Program:
    """The program of the last model, which is the largest, with those of the others as its buckets.

    All of them share one arena and one blob of weights. Raises ShapeError if two have the same input shapes, or if
    anything but shapes differs: the number of outputs, dtypes, or the state.
    """
    if len(programs) == 1:
        return programs[0]
    main = models[-1]
    for number, other in enumerate(models):
        if any(shapes_of(other)[0] == shapes_of(earlier)[0] for earlier in models[:number]):
            raise ShapeError("two buckets have the same input shapes", found=str(list(map(list, shapes_of(other)[0]))))
        if _fixed(other) != _fixed(main):
            what = "two buckets differ in more than the shapes of inputs and outputs"
            hint = "a state has one shape for all of them"
            raise ShapeError(what, found=_names(other), allowed=_names(main), hint=hint)
    blob, places = b"", dict[bytes, int]()

    def place(data: bytes) -> int:
        nonlocal blob
        if data not in places:
            places[data] = len(blob)
            blob += data + bytes(aligned(len(data)) - len(data))
        return places[data]

    def moved(program: Program) -> tuple[Step | CopyStep, ...]:
        def ref(item: BufferRef) -> BufferRef:
            if item.place != "weight":
                return item
            return replace(item, offset=place(program.weights[item.offset : item.offset + item.bytes]))

        return tuple(
            replace(step, args=tuple(map(ref, step.args)))
            if isinstance(step, Step)
            else replace(step, source=ref(step.source))
            for step in program.steps
        )

    steps = [moved(program) for program in programs]
    last = programs[-1]
    initial = last.initial_state
    if initial is not None:
        initial = place(last.weights[initial : initial + last.state_bytes])
    return replace(
        last,
        steps=steps[-1],
        objects=tuple(code for program in programs for code in program.objects),
        weights=blob,
        arena_bytes=max(program.arena_bytes for program in programs),
        initial_state=initial,
        llvm_ir="\n".join(program.llvm_ir for program in programs),
        relax="\n".join(program.relax for program in programs),
        buckets=tuple(Bucket(mine, *shapes_of(model)) for mine, model in zip(steps[:-1], models[:-1], strict=True)),
    )


def spread(
    program: Program, imported: Imported, sizes: range, counts: Sequence[int], shared: Sequence[bool]
) -> tuple[Program, Imported]:
    """The program for a batch of any of these sizes, and the model as it looks for the largest one.

    program, imported: joined from those for `counts` items, of which the last is the largest. shared: which inputs have
    no entry for each item.
    """
    batch = Batch(sizes[0], sizes[-1], tuple(counts), tuple(shared))
    largest, own = sizes[-1], counts[-1]
    inputs = [spec if same else scaled(spec, largest, own) for spec, same in zip(imported.inputs, shared, strict=True)]
    outputs = [scaled(spec, largest, own) for spec in imported.outputs]
    return replace(program, batch=batch), replace(imported, inputs=tuple(inputs), outputs=tuple(outputs))


def _fixed(imported: Imported) -> tuple[object, ...]:
    """What all buckets of a model have in common."""

    def kinds(specs: Sequence[TensorSpec]) -> list[tuple[object, ...]]:
        return [(spec.name, spec.dtype, len(spec.shape), spec.quantization) for spec in specs]

    states = [(state.input, state.output, state.initial.shape) for state in imported.states]
    return kinds(imported.inputs), kinds(imported.outputs), states, imported.counts


def _names(imported: Imported) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in (*imported.inputs, *imported.outputs))
