"""Candidates to machine code in parallel, and a batch of them to one executable.

A candidate is compiled by the passes and the code generator that compile models, from its task's own little program;
only that kernel, without LLVM text, library or header. A batch links the objects of many with `runner.c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.autotune.pool import Pool, map_unordered
from ingot.autotune.space import Encoded, decode
from ingot.autotune.task import Work, lowered_with
from ingot.autotune.weights import STORED_BYTES, factorise
from ingot.errors import CompilerError, IngotError

if TYPE_CHECKING:
    from ingot.frontend.interface import TensorSpec
    from ingot.passes.state import State
    from ingot.target import Target

_ALIGNMENT = 16
#: The dimensions of what is no product.
_STORED = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Job:
    """What a builder needs to compile one candidate; plain data, so that it can be sent to another process."""

    id: int
    key: str
    work: Work = field(repr=False)
    config: Encoded
    target: Target = field(repr=False)


@dataclass(frozen=True)
class Fill:
    """How the runner makes one weight: the fields of `struct fill`, with the factors (or bytes) themselves."""

    offset: int
    size: int
    dims: tuple[int, int, int, int, int, int]
    dtype: str
    a: bytes = field(repr=False)
    b: bytes = field(repr=False)


@dataclass(frozen=True)
class Built:
    """A compiled candidate."""

    id: int
    source: str = field(repr=False)
    code: bytes = field(repr=False)
    arena_bytes: int
    weights_bytes: int
    fills: tuple[Fill, ...] = field(repr=False)


@dataclass(frozen=True)
class NotBuilt:
    """A candidate that could not be compiled, and why."""

    id: int
    why: str


def build(job: Job) -> Built | NotBuilt:
    """Compile one candidate. What goes wrong is a result: a config that a template cannot do must not end a run."""
    decoded = decode(job.config)
    if decoded is None:
        return NotBuilt(job.id, f"no such config: {dict(job.config)}")
    try:
        return built_from(job.id, lowered_with((job.key, job.work), decoded[0], job.target, name=f"c{job.id}"))
    except IngotError as error:
        return NotBuilt(job.id, str(error).replace("\n", " "))
    except Exception as error:
        # TVM's schedule primitives raise errors of their own where a config does not fit a loop nest.
        return NotBuilt(job.id, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def built_from(id: int, state: State) -> Built:
    """Return the candidate `id` from its planned program, whose kernels have names of their own ("c" and the id)."""
    from ingot.packager.codegen import generate_code
    from ingot.packager.entry import forward_source, prototype, step_source
    from ingot.program import Step

    program = state.program
    if program is None:
        raise CompilerError("the pipeline ended without a program")
    code = generate_code({k.symbol: k.function for k in state.lowered.kernels}, state.target)
    fills, size = _fills(state.lowered)
    steps = [step_source(f"c{id}_{i}", step) for i, step in enumerate(program.steps) if isinstance(step, Step)]
    source = "".join(prototype(kernel) for kernel in program.kernels)
    source += "\n".join([*steps, forward_source(program, f"c{id}_forward", f"c{id}_")])
    return Built(id, source, code, program.arena_bytes, size, fills)


def _fills(lowered: Any) -> tuple[tuple[Fill, ...], int]:  # noqa: ANN401 - passes.lower.Lowered
    """Return how to make each weight, at the offsets that `plan_memory` gave it, and the size of all."""
    from ingot.passes.lower import Call
    from ingot.passes.plan_memory import pack_weights

    used: dict[int, Any] = {}
    for call in lowered.calls:
        for value in call.args if isinstance(call, Call) else (call.source,):
            if value.kind == "weight":
                used.setdefault(value.id, value)
    blob, offsets = pack_weights(used.values())
    fills = {}
    for value in used.values():
        data = np.ascontiguousarray(value.data)
        stored = data.tobytes()
        factors = factorise(data) if len(stored) > 1024 else None
        if factors is not None:
            a, b = factors.a.tobytes(), factors.b.tobytes()
            fills[offsets[value.id]] = Fill(offsets[value.id], len(stored), factors.dims, factors.dtype, a, b)
        elif len(stored) <= STORED_BYTES:
            fills[offsets[value.id]] = Fill(offsets[value.id], len(stored), _STORED, value.dtype, stored, b"")
        else:
            raise CompilerError("a packed weight cannot be made up", found=f"{value.dtype} {list(data.shape)}")
    return tuple(fills[offset] for offset in sorted(fills)), len(blob)


def build_all(pool: Pool, jobs: Sequence[Job]) -> dict[int, Built | NotBuilt]:
    """Compile candidates in parallel; return what became of each, by its id."""
    results: dict[int, Built | NotBuilt] = {}
    for place, result in map_unordered(pool, build, jobs):
        id = jobs[place].id
        results[id] = NotBuilt(id, str(result).replace("\n", " ")) if isinstance(result, Exception) else result
    return results


# ---------------------------------------------------------------------------------------------------- one executable


@dataclass(frozen=True)
class Group:
    """One task's candidates in a batch, the reference first, and the tensors they work on."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    built: tuple[Built, ...]


def link_batch(groups: Sequence[Group], target: Target, output: Path) -> None:
    """Write the executable of a batch. Raises ToolchainError or OutputError."""
    from ingot.packager.link import link_program

    header, blob = batch_source(groups, target)
    runner = Path(__file__).with_name("runner.c").read_bytes()
    objects = [built.code for group in groups for built in group.built]
    link_program(
        "runner.c", {"runner.c": runner, "batch.h": header.encode(), "batch.bin": blob}, objects, target, output
    )


def batch_source(groups: Sequence[Group], target: Target) -> tuple[str, bytes]:
    """Return batch.h and batch.bin."""
    from ingot.packager.entry import c_string

    blob, places = bytearray(), {}

    def place(data: bytes) -> int:
        if data not in places:
            blob.extend(bytes(-len(blob) % _ALIGNMENT))
            places[data] = len(blob)
            blob.extend(data)
        return places[data]

    parts, candidates, tasks = [], [], []
    for index, group in enumerate(groups):
        for kind, specs in (("inputs", group.inputs), ("outputs", group.outputs)):
            tensors = ", ".join(_tensor(spec) for spec in specs)
            parts.append(f"static const tensor {kind}_{index}[] = {{{tensors}}};\n")
        tasks.append(f"    {{inputs_{index}, outputs_{index}, {len(group.inputs)}, {len(group.outputs)}}},\n")
        for built in group.built:
            rows = [
                f"    {{{fill.offset}, {fill.size}, {{{', '.join(map(str, fill.dims))}}}, {_dtype(fill.dtype)},"
                f" {place(fill.a)}, {place(fill.b)}}},\n"
                for fill in built.fills
            ]
            parts.append(f"{built.source}static const fill fills_{built.id}[] = {{\n{''.join(rows)}    {{0}}}};\n")
            candidates.append(
                f"    {{{built.id}, {index}, c{built.id}_forward, {built.arena_bytes}, {built.weights_bytes},"
                f" fills_{built.id}, {len(built.fills)}}},\n"
            )
    # What the fastest core's caches hold, twice.
    sweep = 2 * 1024 * max(target.cache.l2_kib, target.cache.l1d_kib)
    text = f"""\
#define SWEEP_BYTES {sweep}
static const ingot_model_info rt_info = {{
    .target = {c_string(target.name)},
    .features = {c_string(" ".join(target.features))},
}};
extern const uint8_t batch_data[];
__asm__(".section .rodata\\n.balign 64\\nbatch_data:\\n.incbin \\"batch.bin\\"\\n.byte 0\\n.previous");
{"".join(parts)}static const task tasks[] = {{
{"".join(tasks)}}};
static const candidate candidates[] = {{
{"".join(candidates)}}};
"""
    return text, bytes(blob)


def _tensor(spec: TensorSpec) -> str:
    count = 1
    for dim in spec.shape:
        count *= dim
    return f"{{{count}, {_dtype(spec.dtype)}}}"


def _dtype(name: str) -> str:
    from ingot.packager.metadata import DTYPES

    return DTYPES[name][0]
