"""Attention as one kernel: odd sizes, masks, transposes read and written in place, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.schedules.attention import AttentionWorkload, default_config
from ingot.schedules.rows import RowsConfig
from ingot.target import load_target
from passes.build import finish, normal, ops, relax_state, run_steps
from passes.execute import execute

op = relax.op
TARGETS = ("native", "x86-64-v3", "x86-64-v2")
#: batch, heads, m, n, k, d
SIZES = (
    (1, 2, 16, 16, 8, 8),
    (1, 3, 17, 33, 7, 8),
    (2, 2, 5, 197, 64, 64),
    (1, 1, 4, 65, 1, 12),
    (1, 2, 13, 31, 16, 40),
)


def const(value):
    return relax.const(value, "float32")


def reference(q, k, v, scale=1.0, mask=0.0):
    """q, k, v: [batch, length, heads, channels]."""
    scores = np.einsum("bmhk,bnhk->bhmn", q.astype(np.float64), k) * scale + mask
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhmn,bnhd->bmhd", powers / powers.sum(-1, keepdims=True), v)


def heads_first(e, x):
    return e(op.permute_dims(x, [0, 2, 1, 3]))


def attend(e, q, k, v, change=lambda e, s: s):
    scores = e(op.matmul(heads_first(e, q), e(op.permute_dims(k, [0, 2, 3, 1]))))
    return e(op.matmul(e(op.nn.softmax(change(e, scores), -1)), heads_first(e, v)))


def tensors(batch, heads, m, n, k, d):
    return [normal((batch, m, heads, k), 1), normal((batch, n, heads, k), 2), normal((batch, n, heads, d), 3)]


def compiled(feeds, body, weights=None, target="native"):
    inputs = {f"x{i}": x.shape for i, x in enumerate(feeds)}
    return finish(relax_state(inputs, weights or {}, body, target))


def labels(state):
    return [step.label for step in state.program.steps]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_with_a_scale_and_the_result_transposed(tmp_path, sizes, target):
    feeds = tensors(*sizes)
    scale = np.float32(0.37)

    def body(e, q, k, v):
        return [heads_first(e, attend(e, q, k, v, lambda e, s: e(op.multiply(s, const(float(scale))))))]

    state = compiled(feeds, body, target=target)
    assert len(state.program.steps) == 2, "the keys are packed, then one kernel does all"
    (got,) = execute(state, feeds, tmp_path, 3)
    np.testing.assert_allclose(got, reference(*feeds, scale=scale), rtol=1e-5, atol=2e-6)


def test_a_mask_may_be_of_lower_rank_or_have_one_row(tmp_path):
    feeds = tensors(1, 2, 9, 20, 8, 16)
    masks = {"a": normal((9, 20), 5), "b": normal((1, 2, 1, 20), 6)}

    def chain(a, b):
        return lambda e, s: e(op.add(b, e(op.add(e(op.divide(s, const(2.0))), a))))

    state = compiled(feeds, lambda e, q, k, v, a, b: [attend(e, q, k, v, chain(a, b))], masks)
    (got,) = execute(state, feeds, tmp_path, 2)
    want = reference(*feeds, scale=0.5, mask=masks["a"] + masks["b"]).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_a_mask_of_minus_infinity_hides_a_key(tmp_path):
    feeds = tensors(1, 1, 16, 16, 8, 8)
    mask = np.triu(np.full((16, 16), -np.inf, np.float32), 1)
    state = compiled(feeds, lambda e, q, k, v, m: [attend(e, q, k, v, lambda e, s: e(op.add(s, m)))], {"m": mask})
    (got,) = execute(state, feeds, tmp_path)
    np.testing.assert_allclose(got, reference(*feeds, mask=mask).transpose(0, 2, 1, 3), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(got[0, 0, 0], feeds[2][0, 0, 0], rtol=1e-6)


def test_repeated_heads_are_read_where_they_lie(tmp_path):
    q, k, v = normal((1, 12, 4, 8), 1), normal((1, 16, 2, 8), 2), normal((1, 16, 2, 8), 3)
    repeat = relax.const(np.array([0, 0, 1, 1]), "int64")

    def body(e, q, k, v):
        keys = e(op.permute_dims(e(op.take(heads_first(e, k), repeat, axis=1)), [0, 1, 3, 2]))
        values = e(op.take(heads_first(e, v), repeat, axis=1))
        return [e(op.matmul(e(op.nn.softmax(e(op.matmul(heads_first(e, q), keys)), 3)), values))]

    state = compiled([q, k, v], body)
    assert len(state.program.steps) == 2
    (got,) = execute(state, [q, k, v], tmp_path)
    want = reference(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2)).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_scores_that_are_also_an_output_are_still_computed(tmp_path):
    feeds = tensors(1, 2, 8, 16, 8, 8)

    def body(e, q, k, v):
        weights = e(op.nn.softmax(e(op.matmul(heads_first(e, q), e(op.permute_dims(k, [0, 2, 3, 1])))), -1))
        return [e(op.matmul(weights, heads_first(e, v))), weights]

    mixed, weights = execute(compiled(feeds, body), feeds, tmp_path)
    np.testing.assert_allclose(mixed, reference(*feeds).transpose(0, 2, 1, 3), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_another_axis_of_softmax_is_left_alone():
    def body(e, q, k, v):
        scores = e(op.matmul(heads_first(e, q), e(op.permute_dims(k, [0, 2, 3, 1]))))
        return [e(op.matmul(e(op.nn.softmax(scores, 2)), heads_first(e, v)))]

    inputs = {f"x{i}": x.shape for i, x in enumerate(tensors(1, 2, 16, 16, 8, 8))}
    assert "nn.softmax" in ops(run_steps(relax_state(inputs, {}, body), "select_attention"))


@pytest.mark.parametrize("m", [1, 3])
def test_few_rows_are_left_alone(m):
    feeds = tensors(1, 2, m, 16, 8, 8)
    inputs = {f"x{i}": x.shape for i, x in enumerate(feeds)}
    state = run_steps(relax_state(inputs, {}, lambda e, q, k, v: [attend(e, q, k, v)]), "select_attention")
    assert "nn.softmax" in ops(state)


def test_the_scores_of_a_tile_fit_the_stack():
    for name in (*TARGETS, "raspberry-pi-4"):
        target = load_target(name)
        for n in (16, 100, 512, 1024, 1400, 5000):
            work = AttentionWorkload((8,), 64, 64, n, 64, (0, 1, 2))
            config = default_config(work, RowsConfig(4, 1), target)
            assert config is None or config.rows * n * 8 <= 48 * 1024
        assert config is None
