"""How much of the arena is free at each operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from ingot.passes.live import spare_bytes
from ingot.passes.rewriter import bindings_of
from passes.build import relax_state

op = relax.op


def spare(body, peak, inputs=1):
    state = relax_state({f"x{i}": (4, 6) for i in range(inputs)}, {"w": np.ones((4, 6), np.float32)}, body)
    state = state.having(imported=replace(state.imported, source_peak_bytes=peak))
    found = spare_bytes(state)
    return [found[b.value] for b in bindings_of(state.module["main"]) if isinstance(b.value, relax.Call)]


SIZE = 4 * 6 * 4


def test_a_tensor_counts_from_its_making_to_its_last_reader():
    def body(e, x, w):
        a = e(op.add(x, w))
        b = e(op.exp(a))
        c = e(op.tanh(b))
        return [e(op.add(c, a))]

    # live: a; a and b; a, b and c; a and c (the output lies in the caller's memory, as inputs and weights do)
    assert spare(body, 10 * SIZE) == [9 * SIZE, 8 * SIZE, 7 * SIZE, 8 * SIZE]


def test_it_is_never_negative():
    assert spare(lambda e, x, w: [e(op.exp(e(op.add(x, w))))], SIZE // 2) == [0, 0]


def test_a_reshape_is_the_memory_it_views():
    def body(e, x, w):
        a = e(op.add(x, w))
        b = e(op.reshape(a, (24,)))
        c = e(op.exp(b))
        return [e(op.tanh(c))]

    assert spare(body, 10 * SIZE) == [9 * SIZE, 9 * SIZE, 8 * SIZE, 9 * SIZE]


def test_an_output_through_a_reshape_lies_in_the_callers_memory():
    def body(e, x, w):
        return [e(op.reshape(e(op.add(x, w)), (24,)))]

    assert spare(body, 10 * SIZE) == [10 * SIZE, 10 * SIZE]
