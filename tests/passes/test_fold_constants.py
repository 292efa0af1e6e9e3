"""Folding of constants: what becomes a weight, what is left to run time, and the values."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.passes.fold_constants import FLOOR_BYTES, GROWTH
from passes.build import close, normal, numbers, ops, relax_state, run_steps

op = relax.op


def folded(inputs, weights, body):
    return run_steps(relax_state(inputs, weights, body), "fold_constants")


def test_case_1_an_operator_on_weights_becomes_a_weight(tmp_path):
    w = normal((70, 3), 1)
    state = folded({"x": (70,)}, {"w": w}, lambda e, x, w: [e(op.add(x, e(op.permute_dims(w, [1, 0]))))])
    assert ops(state) == ["add"]
    assert [v.shape for v in state.weights.values()] == [(3, 70)]
    assert "w" not in {n for n, v in state.weights.items() if v.shape == w.shape}
    np.testing.assert_array_equal(next(iter(state.weights.values())), w.T)
    x = normal((70,))
    close(numbers(state, [x], tmp_path)[0], x + w.T)


def test_case_1_a_chain_of_operators_folds_at_once(tmp_path):
    w = normal((70, 3), 1)

    def body(e, x, w):
        y = e(op.multiply(e(op.exp(e(op.negative(w)))), relax.const(2.0)))
        return [e(op.add(x, e(op.reshape(y, (3, 70)))))]

    state = folded({"x": (70,)}, {"w": w}, body)
    assert ops(state) == ["add"]
    x = normal((70,))
    close(numbers(state, [x], tmp_path)[0], x + (np.exp(-w) * 2).reshape(3, 70))


def test_case_1_small_results_are_constants_not_weights(tmp_path):
    w = normal((64,), 1)
    state = folded({"x": (64,)}, {"w": w}, lambda e, x, w: [e(op.add(x, e(op.negative(w))))])
    assert ops(state) == ["add"]
    assert not state.weights
    x = normal((64,))
    close(numbers(state, [x], tmp_path)[0], x - w)


def test_case_1_both_forms_of_a_weight_may_live(tmp_path):
    w = normal((9, 9), 1)
    state = folded({"x": (9, 9)}, {"w": w}, lambda e, x, w: [e(op.add(x, w)), e(op.add(x, e(op.permute_dims(w))))])
    assert ops(state) == ["add", "add"]
    assert len(state.weights) == 2
    x = normal((9, 9))
    first, second = numbers(state, [x], tmp_path)
    close(first, x + w)
    close(second, x + w.T)


def test_case_1_equal_results_are_stored_once():
    w = normal((9, 9), 1)

    def body(e, x, w):
        return [e(op.add(x, e(op.permute_dims(w)))), e(op.subtract(x, e(op.permute_dims(w))))]

    assert len(folded({"x": (9, 9)}, {"w": w}, body).weights) == 1


def test_case_1_a_scalar_keeps_its_rank(tmp_path):
    state = folded({"x": (3,)}, {"w": np.array(4.0, np.float32)}, lambda e, x, w: [e(op.multiply(x, e(op.sqrt(w))))])
    assert ops(state) == ["multiply"]
    x = normal((3,))
    close(numbers(state, [x], tmp_path)[0], x * 2)


def test_an_operator_on_an_input_stays(tmp_path):
    state = folded({"x": (4, 3)}, {}, lambda e, x: [e(op.permute_dims(x))])
    assert ops(state) == ["permute_dims"]
    x = normal((4, 3))
    close(numbers(state, [x], tmp_path)[0], np.ascontiguousarray(x.T))


def test_case_2_the_shape_of_a_tensor_is_a_constant(tmp_path):
    state = folded({"x": (4, 3)}, {}, lambda e, x: [e(op.shape_to_tensor(e(op.shape_of(x)))), e(op.negative(x))])
    assert ops(state) == ["negative"]
    shape, negative = numbers(state, [normal((4, 3))], tmp_path)
    close(shape, np.array([4, 3], np.int64))
    close(negative, -normal((4, 3)))


def test_a_large_broadcast_is_left_to_run_time(tmp_path):
    side = 1 + int(np.sqrt(FLOOR_BYTES // 8))
    state = folded(
        {"x": (side, side)}, {}, lambda e, x: [e(op.add(x, e(op.broadcast_to(relax.const(2.0), (side, side)))))]
    )
    assert ops(state) == ["broadcast_to", "add"]
    x = normal((side, side))
    close(numbers(state, [x], tmp_path)[0], x + 2)


@pytest.mark.parametrize(("times", "left"), [(GROWTH, 0), (GROWTH + 1, 1)])
def test_growth_is_allowed_to_its_limit(times, left):
    n = FLOOR_BYTES // 8
    w = np.arange(n, dtype=np.float32)

    def body(e, x, w):
        return [e(op.add(x, e(op.broadcast_to(w, (times, n)))))]

    assert ops(folded({"x": (1, 1)}, {"w": w}, body)).count("broadcast_to") == left


def test_a_join_of_weights_stays_at_run_time_and_is_right(tmp_path):
    a, b = normal((40, 3), 1), normal((50, 3), 2)

    def body(e, x, a, b):
        return [e(op.add(x, e(op.concat([a, b], 0))))]

    state = folded({"x": (90, 3)}, {"a": a, "b": b}, body)
    assert ops(state) == ["concat", "add"]
    x = normal((90, 3))
    close(numbers(state, [x], tmp_path)[0], x + np.concatenate([a, b]))


def test_an_output_that_is_all_weights_is_copied_out(tmp_path):
    w = normal((9, 9), 1)
    state = folded({"x": (1,)}, {"w": w}, lambda e, x, w: [e(op.permute_dims(w))])
    assert ops(state) == []
    close(numbers(state, [normal((1,))], tmp_path)[0], np.ascontiguousarray(w.T))


def test_unused_weights_are_dropped():
    state = folded({"x": (3,)}, {"w": normal((99,)), "v": normal((3,))}, lambda e, x, w, v: [e(op.add(x, v))])
    assert list(state.weights) == ["v"]
