"""Give every intermediate tensor an offset in one arena, and every weight an offset in one blob."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ingot.frontend.interface import Imported
from ingot.passes.grain import grain
from ingot.passes.lower import Call, Copy, Lowered, Value
from ingot.passes.state import State
from ingot.program import BufferRef, CopyStep, Kernel, Param, Place, Program, Step

# One cache line, and the widest vector register.
ALIGNMENT = 64
# Kernels need only element alignment; small tensors are packed closer, so that tiny models stay tiny.
SMALL_BYTES = 4096
SMALL_ALIGNMENT = 16


@dataclass(frozen=True)
class Interval:
    """A temporary's life: it is written first in step `first` and read last in step `last` (both included)."""

    id: int
    bytes: int
    first: int
    last: int


def lifetimes(lowered: Lowered) -> list[Interval]:
    """Return the life of every temporary, in order of first use."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for step, call in enumerate(lowered.calls):
        values = call.args if isinstance(call, Call) else (call.source,)
        for value in values:
            if value.kind == "temp":
                first.setdefault(value.id, step)
                last[value.id] = step
                sizes[value.id] = value.bytes
    return [Interval(i, _aligned(sizes[i]), first[i], last[i]) for i in first]


def lower_bound(intervals: Iterable[Interval]) -> int:
    """Return the largest sum of bytes live in one step: no plan can be smaller."""
    events: dict[int, int] = {}
    for item in intervals:
        events[item.first] = events.get(item.first, 0) + item.bytes
        events[item.last + 1] = events.get(item.last + 1, 0) - item.bytes
    peak = live = 0
    for step in sorted(events):
        live += events[step]
        peak = max(peak, live)
    return peak


def assign_offsets(intervals: list[Interval]) -> tuple[dict[int, int], int]:
    """Return an offset for each interval and the arena's size.

    Greedy by size (Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020): larger
    tensors first, each into the tightest gap among those that live at the same time. Several orders are tried and
    the smallest arena is kept; the search ends early at the lower bound.
    """
    bound = lower_bound(intervals)
    orders = (
        lambda t: (-t.bytes, t.first, t.id),
        lambda t: (-t.bytes * (t.last - t.first + 1), t.first, t.id),
        lambda t: (t.first, -t.bytes, t.id),
        lambda t: (-(t.last - t.first), -t.bytes, t.id),
    )
    best: dict[int, int] = {}
    best_size = -1
    for order in orders:
        offsets, size = _place(sorted(intervals, key=order))
        if best_size < 0 or size < best_size:
            best, best_size = offsets, size
        if best_size == bound:
            break
    return best, max(best_size, 0)


def _place(ordered: list[Interval]) -> tuple[dict[int, int], int]:
    placed: list[tuple[int, int, Interval]] = []  # (offset, end, interval), sorted by offset
    offsets: dict[int, int] = {}
    size = 0
    for item in ordered:
        gap_best: tuple[int, int] | None = None
        cursor = 0
        for offset, end, other in placed:
            if other.last < item.first or other.first > item.last:
                continue
            start = _rounded(cursor, item.bytes)
            if offset - start >= item.bytes and (gap_best is None or offset - start < gap_best[0]):
                gap_best = (offset - start, start)
            cursor = max(cursor, end)
        where = gap_best[1] if gap_best is not None else _rounded(cursor, item.bytes)
        offsets[item.id] = where
        size = max(size, where + item.bytes)
        placed.append((where, where + item.bytes, item))
        placed.sort(key=lambda entry: entry[0])
    return offsets, size


def _aligned(size: int) -> int:
    """Return the size rounded up to its alignment."""
    return _rounded(size, size)


def _rounded(offset: int, size: int) -> int:
    """Return the first offset from `offset` on where a tensor of `size` bytes may begin."""
    unit = ALIGNMENT if size >= SMALL_BYTES else SMALL_ALIGNMENT
    return -(-offset // unit) * unit


def pack_weights(values: Iterable[Value]) -> tuple[bytes, dict[int, int]]:
    """Return one blob with every distinct weight once, aligned by its size, and the offset of each value."""
    blob: list[bytes] = []
    offsets: dict[int, int] = {}
    seen: dict[bytes, int] = {}
    size = 0
    for value in values:
        if value.data is None:
            continue
        data = np.ascontiguousarray(value.data).tobytes()
        if data not in seen:
            start = _rounded(size, len(data))
            end = start + _aligned(len(data))
            blob.append(bytes(start - size) + data + bytes(end - start - len(data)))
            seen[data], size = start, end
        offsets[value.id] = seen[data]
    return b"".join(blob), offsets


@dataclass(frozen=True)
class Interface:
    """Where the model's inputs and outputs lie, by kind and number: at the caller, or in a half of the state.

    half: its bytes. initial: what the first run finds there (empty if that is zeros). counters: offsets of the
    counters, by their numbers among the outputs.
    """

    places: dict[tuple[str, int], BufferRef]
    half: int
    initial: bytes
    counters: dict[int, int]


def place_interface(imported: Imported) -> Interface:
    """Return where inputs and outputs lie: state is written to one half and read from it in the next run."""
    places: dict[tuple[str, int], BufferRef] = {}
    image, counters = b"", dict[int, int]()
    for item in imported.states:
        places["input", item.input] = BufferRef("state", 0, len(image))
        places["output", item.output] = BufferRef("state", 1, len(image))
        data = item.initial.tobytes()
        image += data + bytes(-len(data) % ALIGNMENT)
    for counter in sorted({item.counter for item in imported.counts}):
        counters[counter] = len(image)
        places["output", counter] = BufferRef("state", 1, len(image))
        image += bytes(ALIGNMENT)
    kinds: tuple[tuple[Place, int], ...] = (("input", len(imported.inputs)), ("output", len(imported.outputs)))
    for kind, count in kinds:
        mine = [index for index in range(count) if (kind, index) not in places]
        places |= {(kind, index): BufferRef(kind, number) for number, index in enumerate(mine)}
    return Interface(places, len(image), image if any(image) else b"", counters)


def _of_integers(state: State) -> int:
    """Return how many of the model's multiply-adds are of integers: the share that the kernels execute so."""
    whole, real = state.lowered.multiply_adds
    share: float = whole / max(whole + real, state.macs, 1)
    return round(state.macs * share)


def plan_memory(state: State) -> State:
    """Give every intermediate tensor an offset in one arena, and every weight an offset in one blob.

    The program that results still lacks its machine code: the packager generates it from `lowered.kernels`.
    """
    lowered: Lowered = state.lowered
    offsets, arena = assign_offsets(lifetimes(lowered))
    used: dict[int, Value] = {}
    for call in lowered.calls:
        for value in call.args if isinstance(call, Call) else (call.source,):
            if value.kind == "weight":
                used.setdefault(value.id, value)
    weights, weight_offsets = pack_weights(used.values())
    interface = place_interface(state.imported)
    initial_state = None
    if interface.initial:
        initial_state = _rounded(len(weights), SMALL_BYTES)
        weights += bytes(initial_state - len(weights)) + interface.initial

    def ref(value: Value) -> BufferRef:
        if value.kind in ("input", "output"):
            return replace(interface.places[value.kind, value.index], bytes=value.bytes)
        if value.kind == "weight":
            return BufferRef("weight", offset=weight_offsets[value.id], bytes=value.bytes)
        return BufferRef("arena", offset=offsets[value.id], bytes=value.bytes)

    kernels = {
        raw.symbol: Kernel(
            raw.symbol,
            tuple(Param(dtype, readonly) for dtype, readonly in zip(raw.dtypes, raw.readonly, strict=True)),
            raw.extent,
            grain(raw.function, raw.extent, state.target),
            raw.rounds,
        )
        for raw in lowered.kernels
    }
    steps: list[Step | CopyStep] = []
    for call in lowered.calls:
        if isinstance(call, Copy):
            steps.append(CopyStep(ref(call.source), ref(call.destination), call.destination.bytes, call.label))
        else:
            steps.append(Step(kernels[call.kernel.symbol], tuple(ref(v) for v in call.args), call.label))
    program = Program(
        steps=tuple(steps),
        objects=(),
        weights=weights,
        arena_bytes=arena,
        macs=state.macs,
        integer_macs=_of_integers(state),
        state_bytes=interface.half,
        initial_state=initial_state,
        counters=interface.counters,
        relax=str(state.module.script(show_meta=False)),
    )
    return state.having(program=program)
