"""Softmax, layer norm and RMS norm by rows: one kernel each, no arena, right at every length around a vector."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.passes.grain import cycles
from ingot.schedules.rows import MAX_STACK_ROW, default_config
from ingot.target import load_target
from passes.build import finish, normal, relax_state
from passes.execute import execute

op = relax.op
LENGTHS = (2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 197)
TARGETS = ("native", "x86-64-v3", "x86-64-v2")


def softmax(x):
    wide = x.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def layer_norm(x, gamma, beta, epsilon=1e-5):
    wide = x.astype(np.float64)
    return (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + epsilon) * gamma + beta


def rms_norm(x, weight, epsilon=1e-5):
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * weight


def shapes():
    return {f"x{n}": (2, 5, n) for n in LENGTHS}


def run(inputs, weights, body, feeds, folder, target="native"):
    state = finish(relax_state(inputs, weights, body, target))
    assert len(state.program.steps) == len(state.imported.outputs), "one kernel each"
    assert state.program.arena_bytes == 0
    return execute(state, feeds, folder, 3)


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_at_every_length(tmp_path, target):
    feeds = [normal(shape, i) * 4 for i, shape in enumerate(shapes().values())]
    got = run(shapes(), {}, lambda e, *xs: [e(op.nn.softmax(x, -1)) for x in xs], feeds, tmp_path, target)
    for x, y in zip(feeds, got, strict=True):
        np.testing.assert_allclose(y, softmax(x), rtol=2e-6, atol=1e-9)


def test_softmax_of_large_and_infinite_values(tmp_path):
    x = np.array([[1e30, -1e30] + [0.0] * 31, [-np.inf, 3.0] + [-np.inf] * 31, [-500.0] * 33], np.float32)
    (y,) = run({"x": (3, 33)}, {}, lambda e, x: [e(op.nn.softmax(x, 1))], [x], tmp_path)
    np.testing.assert_array_equal(y[0], [1.0] + [0.0] * 32)
    np.testing.assert_array_equal(y[1], [0.0, 1.0] + [0.0] * 31)
    np.testing.assert_allclose(y[2], 1 / 33, rtol=1e-6)


def test_softmax_of_one_row_and_of_a_row_too_long_for_the_stack(tmp_path):
    lengths = (1000, MAX_STACK_ROW, MAX_STACK_ROW + 1)
    feeds = [normal((n,), n) for n in lengths]
    inputs = {f"x{n}": (n,) for n in lengths}
    got = run(inputs, {}, lambda e, *xs: [e(op.nn.softmax(x, 0)) for x in xs], feeds, tmp_path)
    for x, y in zip(feeds, got, strict=True):
        np.testing.assert_allclose(y, softmax(x), rtol=4e-6, atol=1e-10)


def test_log_softmax(tmp_path):
    feeds = [normal(shape, i) * 4 for i, shape in enumerate(shapes().values())]
    got = run(shapes(), {}, lambda e, *xs: [e(op.nn.log_softmax(x, 2)) for x in xs], feeds, tmp_path)
    for x, y in zip(feeds, got, strict=True):
        np.testing.assert_allclose(y, np.log(softmax(x)), rtol=2e-6, atol=2e-6)


def test_what_follows_a_softmax_joins_its_kernel(tmp_path):
    x, y = normal((3, 33)), normal((3, 33), 1)

    def body(e, x, y):
        return [e(op.multiply(e(op.add(e(op.nn.softmax(x, 1)), y)), relax.const(2.0, "float32")))]

    (got,) = run({"x": (3, 33), "y": (3, 33)}, {}, body, [x, y], tmp_path)
    np.testing.assert_allclose(got, (softmax(x) + y) * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_norms_at_every_length(tmp_path, target):
    feeds = [normal(shape, i) * 3 + 1 for i, shape in enumerate(shapes().values())]
    weights = {f"{k}{n}": normal((n,), n + i) for i, k in enumerate("gb") for n in LENGTHS}

    def body(e, *args):
        xs, gs, bs = (args[i * len(LENGTHS) : (i + 1) * len(LENGTHS)] for i in range(3))
        layers = [e(op.nn.layer_norm(x, g, b, [-1])) for x, g, b in zip(xs, gs, bs, strict=True)]
        return layers + [e(op.nn.rms_norm(x, g)) for x, g in zip(xs, gs, strict=True)]

    got = run(shapes(), weights, body, feeds, tmp_path, target)
    for i, (n, x) in enumerate(zip(LENGTHS, feeds, strict=True)):
        gamma, beta = weights[f"g{n}"], weights[f"b{n}"]
        np.testing.assert_allclose(got[i], layer_norm(x, gamma, beta), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[i + len(LENGTHS)], rms_norm(x, gamma), rtol=1e-5, atol=1e-5)


def test_layer_norm_does_not_cancel_where_the_mean_is_large(tmp_path):
    x, weights = normal((4, 96)) + np.float32(1000), {"g": np.ones(96, np.float32), "b": np.zeros(96, np.float32)}
    (got,) = run({"x": (4, 96)}, weights, lambda e, x, g, b: [e(op.nn.layer_norm(x, g, b, [1]))], [x], tmp_path)
    np.testing.assert_allclose(got, layer_norm(x, 1, 0), rtol=0, atol=2e-4)


def test_layer_norm_without_scale_and_shift_reads_none(tmp_path):
    weights = {"g": np.ones(37, np.float32), "b": np.zeros(37, np.float32)}
    make = relax_state({"x": (5, 37)}, weights, lambda e, x, g, b: [e(op.nn.layer_norm(x, g, b, [1]))])
    state, x = finish(make), normal((5, 37), 3)
    assert not state.program.weights
    np.testing.assert_allclose(execute(state, [x], tmp_path, 3)[0], layer_norm(x, 1, 0), rtol=1e-5, atol=1e-5)


def test_layer_norm_over_several_axes_counts_them_as_one(tmp_path):
    x, g, b = normal((3, 4, 5)), normal((4, 5), 1), normal((4, 5), 2)
    weights = {"g": g, "b": b}
    (got,) = run({"x": (3, 4, 5)}, weights, lambda e, x, g, b: [e(op.nn.layer_norm(x, g, b, [1, 2]))], [x], tmp_path)
    want = layer_norm(x.reshape(3, 20), g.reshape(20), b.reshape(20)).reshape(3, 4, 5)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_config_never_exceeds_the_row():
    target = load_target("native")
    for length in (1, 2, 3, 4, 5, 8, 15, 16, 17, 64, 1000):
        config = default_config(length, "float32", target)
        assert config.lanes * config.vectors <= max(length, 1)


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "min"])
def test_reductions_at_every_length(tmp_path, kind):
    feeds = [normal(shape, i) for i, shape in enumerate(shapes().values())]
    reduce = getattr(op, kind)

    def body(e, *xs):
        return [e(reduce(x, [-1], keepdims=i % 2 == 0)) for i, x in enumerate(xs)]

    for i, (x, y) in enumerate(zip(feeds, run(shapes(), {}, body, feeds, tmp_path), strict=True)):
        want = getattr(np, kind)(x.astype(np.float64), axis=-1, keepdims=i % 2 == 0)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_reductions_over_several_axes_and_over_all(tmp_path):
    x = normal((3, 4, 70))

    def body(e, x):
        return [e(op.mean(x, [1, 2], keepdims=True)), e(op.max(x, [2, 1])), e(op.sum(x)), e(op.min(x, keepdims=True))]

    mean, high, total, low = run({"x": x.shape}, {}, body, [x], tmp_path)
    np.testing.assert_allclose(mean, x.mean((1, 2), keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(high, x.max((1, 2)))
    np.testing.assert_allclose(total, x.astype(np.float64).sum(), rtol=1e-4)
    assert total.shape == ()
    np.testing.assert_array_equal(low, x.min(keepdims=True))


def test_what_surrounds_a_reduction_joins_its_kernel(tmp_path):
    x = normal((6, 40))

    def body(e, x):
        return [e(op.sqrt(e(op.add(e(op.mean(e(op.multiply(x, x)), [1])), relax.const(1.0, "float32")))))]

    state = finish(relax_state({"x": x.shape}, {}, body))
    assert len(state.program.steps) == 1
    (got,) = execute(state, [x], tmp_path)
    np.testing.assert_allclose(got, np.sqrt((x.astype(np.float64) ** 2).mean(1) + 1), rtol=1e-5)


def test_a_value_that_is_spread_along_its_row_is_computed_once(tmp_path):
    x = normal((6, 4, 40))

    def body(e, x):
        high = e(op.max(x, [2], keepdims=True))
        return [
            e(op.nn.relu(e(op.subtract(x, high)))),
            e(op.multiply(x, e(op.sum(e(op.abs(x)), [1, 2], keepdims=True)))),
        ]

    state = finish(relax_state({"x": x.shape}, {}, body))
    work = sum(cycles(kernel.function, state.target) for kernel in state.lowered.kernels)
    assert work < 20 * x.size
    peak, total = execute(state, [x], tmp_path, 2)
    np.testing.assert_array_equal(peak, np.maximum(x - x.max(2, keepdims=True), 0))
    np.testing.assert_allclose(total, x * np.abs(x).sum((1, 2), keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_few_rows_times_contiguous_columns_are_dot_products(tmp_path, m):
    feeds = [x for i, k in enumerate(LENGTHS) for x in (normal((2, m, k), i), normal((2, 9, k), i + 40))]
    inputs = {f"x{i}": x.shape for i, x in enumerate(feeds)}

    def body(e, *xs):
        return [e(op.matmul(a, e(op.permute_dims(b, [0, 2, 1])))) for a, b in zip(xs[::2], xs[1::2], strict=True)]

    got = run(inputs, {}, body, feeds, tmp_path)
    for y, a, b in zip(got, feeds[::2], feeds[1::2], strict=True):
        np.testing.assert_allclose(y, a @ b.transpose(0, 2, 1), rtol=1e-5, atol=1e-5)
