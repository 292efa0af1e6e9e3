"""The lowered program: everything the packager needs, and nothing of TVM.

The passes end here. A `Program` is plain data: which kernels exist, in which order they are called, on which
buffers, and where those buffers lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Place = Literal["input", "output", "weight", "arena", "state"]


@dataclass(frozen=True)
class BufferRef:
    """Where an argument of a kernel lies.

    `index` is the position among the caller's inputs or outputs for those places, and for "state" which half: 0 what
    the run before has left, 1 what this one leaves; else 0. `offset` is in bytes: into the weights blob, the arena, the
    half, or the input or output tensor.
    """

    place: Place
    index: int = 0
    offset: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Param:
    """One pointer parameter of a kernel: its element dtype (numpy name) and whether the kernel only reads it."""

    dtype: str
    readonly: bool


@dataclass(frozen=True)
class Kernel:
    """A function in the kernels' object: `void symbol(T0 *, ..., int32_t begin, int32_t end)`.

    `extent` is the number of independent parallel iterations; 1 means the kernel runs on one thread. `grain` is the
    fewest iterations worth giving to a thread. Of a recurrent kernel the extent is `rounds` equal parts, each of which
    runs when the one before it is done.
    """

    symbol: str
    params: tuple[Param, ...]
    extent: int
    grain: int = 1
    rounds: int = 1


@dataclass(frozen=True)
class Step:
    """One kernel call of the schedule. `label` names the source operators, for people who read entry.c."""

    kernel: Kernel
    args: tuple[BufferRef, ...]
    label: str


@dataclass(frozen=True)
class CopyStep:
    """A plain memory copy, for an output that is an input, a weight or another output unchanged."""

    source: BufferRef
    destination: BufferRef
    bytes: int
    label: str


@dataclass(frozen=True)
class Bucket:
    """The steps for other shapes of the caller's inputs, and the shapes of inputs and outputs then."""

    steps: tuple[Step | CopyStep, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """Programs for parts of a batch of independent items: a run of any size takes them one after the other.

    smallest, largest: the sizes a run may have. counts: how many items the buckets take, in order, and last the
    program's own steps; one of them is 1. shared: which of the caller's inputs are the same for all items.
    """

    smallest: int
    largest: int
    counts: tuple[int, ...]
    shared: tuple[bool, ...]


@dataclass(frozen=True)
class Pad:
    """Inputs that may be smaller than a bucket: they are filled up in the arena, and outputs are cut back.

    sizes: of the buckets, in order, and last of the program's own steps. values: for each of the caller's inputs what
    it is filled with, None for one that is the same in all buckets. axes: of inputs, then outputs, the one axis along
    which their size differs, None for those that are the same. places: where in the arena they are, by the same order.
    """

    sizes: tuple[int, ...]
    values: tuple[float | None, ...]
    axes: tuple[int | None, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A whole lowered model. `objects` holds relocatable ELF objects with all kernels; `llvm_ir` their LLVM text.

    `integer_macs` of the `macs` multiply-adds are on integers. `state_bytes` is the size of each of the two halves of
    an instance's state; `initial_state` the offset in the weights of what the first run finds, None for zeros.
    `counters` gives the offset in a half of each counter, by its number among the model's outputs. `buckets` are
    programs for smaller inputs, on the same weights and arena; with a `batch` for fewer of its items. With `pad`,
    sizes between those of the buckets are filled up.
    """

    steps: tuple[Step | CopyStep, ...]
    objects: tuple[bytes, ...]
    weights: bytes
    arena_bytes: int
    macs: int
    integer_macs: int = 0
    state_bytes: int = 0
    initial_state: int | None = None
    counters: Mapping[int, int] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    batch: Batch | None = None
    pad: Pad | None = None
    llvm_ir: str = field(repr=False, default="")
    relax: str = field(repr=False, default="")

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The distinct kernels, in order of first use."""
        seen: dict[str, Kernel] = {}
        for step in (*self.steps, *(step for bucket in self.buckets for step in bucket.steps)):
            if isinstance(step, Step):
                seen.setdefault(step.kernel.symbol, step.kernel)
        return tuple(seen.values())
