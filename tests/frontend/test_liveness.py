"""The lower bound for memory, on graphs small enough to count by hand."""

from __future__ import annotations

import itertools

import pytest

from ingot.frontend.liveness import Step, peak_bytes

SIZES = {"a": 10, "b": 20, "c": 40, "d": 80}


def test_a_chain_holds_two_neighbours_at_once() -> None:
    steps = [Step(("x",), ("a",)), Step(("a",), ("b",)), Step(("b",), ("c",)), Step(("c",), ("y",))]
    assert peak_bytes(steps, {**SIZES, "x": 1000, "y": 1000}, {"x", "y"}) == 60


def test_a_long_residual_stays_alive() -> None:
    steps = [Step(("x",), ("a",)), Step(("a",), ("b",)), Step(("b",), ("c",)), Step(("a", "c"), ("d",))]
    assert peak_bytes(steps, SIZES, {"x"}) == 10 + 40 + 80
    assert peak_bytes(steps, SIZES, {"x", "d"}) == 10 + 20 + 40


def test_a_view_shares_its_sources_bytes() -> None:
    steps = [Step(("x",), ("a",)), Step(("a",), ("v",), view=True), Step(("v",), ("b",))]
    assert peak_bytes(steps, {**SIZES, "v": 10}, {"x"}) == 30


def test_a_view_of_an_input_or_into_an_output_is_free() -> None:
    steps = [Step(("x",), ("v",), view=True), Step(("v",), ("a",)), Step(("a",), ("y",), view=True)]
    assert peak_bytes(steps, {"x": 5, "v": 5, "a": 10, "y": 10}, {"x", "y"}) == 0


def test_an_unread_result_lives_in_its_own_step_only() -> None:
    steps = [Step(("x",), ("a", "d")), Step(("a",), ("b",))]
    assert peak_bytes(steps, SIZES, {"x"}) == 90


def test_nothing_is_live_in_an_empty_graph() -> None:
    assert peak_bytes([], {}, ()) == 0


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_counting_by_hand(seed: int) -> None:
    import random

    generator = random.Random(seed)
    names = ["x"]
    steps = []
    for index in range(12):
        reads = tuple(generator.sample(names, min(len(names), generator.randint(1, 3))))
        steps.append(Step(reads, (f"t{index}",)))
        names.append(f"t{index}")
    sizes = {f"t{index}": generator.randint(1, 99) for index in range(12)}
    most = 0
    for now, _ in enumerate(steps):
        live = set()
        for name in sizes:
            touching = [place for place, step in enumerate(steps) if name in itertools.chain(step.reads, step.writes)]
            if touching[0] <= now <= touching[-1]:
                live.add(name)
        most = max(most, sum(sizes[name] for name in live))
    assert peak_bytes(steps, sizes, {"x"}) == most
