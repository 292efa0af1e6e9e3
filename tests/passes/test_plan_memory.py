"""The memory plan: no overlap, close to the lower bound, and the same every time."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from ingot.passes.lower import Call, Copy, Lowered, RawKernel, Value
from ingot.passes.plan_memory import (
    ALIGNMENT,
    SMALL_ALIGNMENT,
    SMALL_BYTES,
    Interval,
    assign_offsets,
    lifetimes,
    lower_bound,
    pack_weights,
)
from passes.build import close, finish, normal, relax_state
from passes.execute import execute

op = relax.op
EXAMPLES = int(os.environ.get("INGOT_EXAMPLES", "200"))
KERNEL = RawKernel("k", None, (), (), 1)


def overlaps(intervals, offsets):
    """Pairs that live together and share a byte."""
    return [
        (a.id, b.id)
        for i, a in enumerate(intervals)
        for b in intervals[i + 1 :]
        if a.first <= b.last
        and b.first <= a.last
        and offsets[a.id] < offsets[b.id] + b.bytes
        and offsets[b.id] < offsets[a.id] + a.bytes
    ]


def naive_bound(intervals):
    """The lower bound, counted step by step."""
    steps = range(max((t.last for t in intervals), default=-1) + 1)
    return max((sum(t.bytes for t in intervals if t.first <= s <= t.last) for s in steps), default=0)


@st.composite
def lives(draw):
    """Random intervals; ids are not in order of first use."""
    steps = draw(st.integers(1, 40))
    count = draw(st.integers(0, 40))
    ids = draw(st.permutations(range(count)))
    made = []
    for i in ids:
        first = draw(st.integers(0, steps - 1))
        made.append(Interval(i, 16 * draw(st.integers(1, 500)), first, draw(st.integers(first, steps - 1))))
    return made


@settings(max_examples=EXAMPLES, deadline=None)
@given(lives())
def test_any_plan_is_sound(intervals):
    offsets, size = assign_offsets(intervals)
    assert set(offsets) == {t.id for t in intervals}
    assert all(o >= 0 for o in offsets.values())
    assert not overlaps(intervals, offsets)
    assert size == max((offsets[t.id] + t.bytes for t in intervals), default=0)
    assert size >= lower_bound(intervals)
    assert lower_bound(intervals) == naive_bound(intervals)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lives(), st.randoms(use_true_random=False))
def test_the_plan_depends_on_the_lives_alone(intervals, rng):
    shuffled = list(intervals)
    rng.shuffle(shuffled)
    assert assign_offsets(intervals) == assign_offsets(shuffled)


def network(rng):
    """Lives as networks have them: a chain, with residual connections and branches that join."""
    made = []
    size = rng.choice([64, 128, 256]) * 1024
    for step in range(rng.randint(5, 60)):
        kind = rng.random()
        if kind < 0.2:
            size = max(4096, size // 2)
        last = step + 1 if kind < 0.7 else step + rng.randint(2, 4)
        made.append(Interval(step, size * (6 if kind > 0.9 else 1), step, last))
    return made


@pytest.mark.parametrize("seed", range(50))
def test_networks_fit_within_a_tenth_of_the_lower_bound(seed):
    intervals = network(random.Random(seed))
    offsets, size = assign_offsets(intervals)
    assert not overlaps(intervals, offsets)
    assert size <= 1.10 * lower_bound(intervals)


def test_a_chain_of_equal_tensors_takes_two():
    chain = [Interval(i, 4096, i, i + 1) for i in range(100)]
    assert assign_offsets(chain)[1] == 2 * 4096


def test_no_temporaries_take_no_arena():
    assert assign_offsets([]) == ({}, 0)


def test_tensors_that_meet_in_one_step_share_nothing():
    # A value that dies in step 1 is read there while the next is written: both live in step 1.
    pair = [Interval(1, 64, 0, 1), Interval(2, 64, 1, 2)]
    offsets, size = assign_offsets(pair)
    assert size == 128
    assert not overlaps(pair, offsets)


def test_tensors_that_never_meet_share_all():
    assert assign_offsets([Interval(1, 64, 0, 1), Interval(2, 64, 2, 3)])[1] == 64


# -- lives from calls ----------------------------------------------------------------------------------------------


def temp(i, size=64):
    return Value(i, "temp", size, "float32")


def test_a_life_spans_first_write_to_last_read():
    a, b, out = temp(1), temp(2, 5000), Value(3, "output", 64, "float32")
    calls = (Call(KERNEL, (a,), (a,), ""), Call(KERNEL, (a, b), (b,), ""), Call(KERNEL, (b,), (), ""), Copy(a, out, ""))
    assert lifetimes(Lowered(calls, ())) == [Interval(1, 64, 0, 3), Interval(2, 5056, 1, 2)]


@pytest.mark.parametrize(
    ("size", "aligned"),
    [
        (0, 0),
        (1, SMALL_ALIGNMENT),
        (16, 16),
        (17, 32),
        (SMALL_BYTES - 1, SMALL_BYTES),
        (SMALL_BYTES, SMALL_BYTES),
        (SMALL_BYTES + 1, SMALL_BYTES + ALIGNMENT),
    ],
)
def test_sizes_are_rounded_up_to_their_alignment(size, aligned):
    a = temp(1, size)
    assert lifetimes(Lowered((Call(KERNEL, (a,), (a,), ""),), ()))[0].bytes == aligned


# -- weights -------------------------------------------------------------------------------------------------------


def weight(i, data):
    return Value(i, "weight", data.nbytes, str(data.dtype), data=data)


def test_weights_are_packed_aligned_and_equal_ones_once():
    a, b, c = normal((5,), 1), normal((2000,), 2), normal((5,), 1)
    blob, offsets = pack_weights([weight(1, a), weight(2, b), weight(3, c)])
    assert offsets[1] == offsets[3]
    assert len(blob) < 20 + 8000 + 2 * ALIGNMENT
    for i, data in ((1, a), (2, b), (3, c)):
        assert offsets[i] % SMALL_ALIGNMENT == 0
        assert blob[offsets[i] : offsets[i] + data.nbytes] == data.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10_000), max_size=20))
def test_weights_never_overlap(sizes):
    rng = np.random.default_rng(len(sizes))
    values = [weight(i, rng.integers(0, 255, size, dtype=np.uint8)) for i, size in enumerate(sizes)]
    blob, offsets = pack_weights(values)
    for value in values:
        assert value.data is not None
        assert blob[offsets[value.id] : offsets[value.id] + value.bytes] == value.data.tobytes()


@pytest.mark.parametrize("size", [SMALL_BYTES, SMALL_BYTES + 4, 70_000])
def test_a_large_weight_starts_on_a_cache_line_wherever_it_stands(size):
    small, large = weight(1, np.arange(5, dtype=np.float32)), weight(2, np.arange(size, dtype=np.uint8) % 251)
    assert pack_weights([small, large])[1][2] % ALIGNMENT == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_large_temporary_starts_on_a_cache_line(seed):
    rng = random.Random(seed)
    mixed = []
    for i in range(30):
        first = rng.randint(0, 20)
        size = rng.choice([16, 48, 112, 4096, 8192, 4160])
        mixed.append(Interval(i, size, first, first + rng.randint(1, 4)))
    offsets, _ = assign_offsets(mixed)
    assert all(offsets[t.id] % ALIGNMENT == 0 for t in mixed if t.bytes >= SMALL_BYTES)


# -- whole programs ------------------------------------------------------------------------------------------------


def deep(e, x, *weights):
    first = x
    for i, w in enumerate(weights):
        x = e(op.tanh(e(op.matmul(x, w))))
        if i == 3:
            first = x
    return [e(op.add(x, first))]


def test_a_program_reuses_the_arena_and_stays_right(tmp_path):
    weights = {f"w{i}": normal((40, 40), i) / 8 for i in range(10)}
    state = finish(relax_state({"x": (30, 40)}, weights, deep))
    program = state.program
    assert program is not None
    # Kept from layer 3, read, and written: three at a time.
    assert program.arena_bytes <= 3 * 4800 * 1.1
    x = normal((30, 40))
    want, first = x, x
    for i in range(10):
        want = np.tanh(want @ weights[f"w{i}"])
        if i == 3:
            first = want
    close(execute(state, [x], tmp_path)[0], want + first, 1e-4)


def test_every_reference_lies_inside_its_buffer():
    weights = {f"w{i}": normal((40, 40), i) for i in range(4)}
    program = finish(relax_state({"x": (30, 40)}, weights, deep)).program
    assert program is not None
    room = {"arena": program.arena_bytes, "weight": len(program.weights), "input": 4800, "output": 4800}
    for step in program.steps:
        for ref in step.args:
            assert ref.offset >= 0
            assert ref.offset + ref.bytes <= room[ref.place]


def test_two_plans_of_one_program_are_equal():
    weights = {f"w{i}": normal((40, 40), i) for i in range(4)}
    one = finish(relax_state({"x": (30, 40)}, weights, deep)).program
    two = finish(relax_state({"x": (30, 40)}, weights, deep)).program
    assert one == two
