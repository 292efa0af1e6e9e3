"""Recognise: each numbered case, and what only looks like it."""

from __future__ import annotations

import pytest
from tvm import relax

from passes.build import calls, close, normal, numbers, ops, relax_state, run_steps

op = relax.op
N = 24


def const(value):
    return relax.const(value, "float32")


def spread(e, d, form="sqrt", epsilon=1e-5, axis=-1):
    square = {
        "power": lambda: op.power(d, const(2.0)),
        "square": lambda: op.square(d),
    }.get(form, lambda: op.multiply(d, d))()
    shifted = e(op.add(e(op.mean(e(square), [axis], keepdims=True)), const(epsilon)))
    return e(op.rsqrt(shifted)) if form == "rsqrt" else e(op.sqrt(shifted))


def normalised(e, d, form="sqrt"):
    s = spread(e, d, form)
    if form == "rsqrt":
        return e(op.multiply(d, s))
    if form == "inverse":
        return e(op.multiply(e(op.divide(const(1.0), s)), d))
    return e(op.divide(d, s))


def centred(e, x):
    return e(op.subtract(x, e(op.mean(x, [2], keepdims=True))))


def found(body, weights=None, shape=(2, 3, N)):
    state = relax_state({"x": shape}, weights or {}, body)
    return state, run_steps(state, "recognise")


def both(state, recognised, folder, shape=(2, 3, N)):
    x = normal(shape, 5) * 2 + 1
    close(numbers(recognised, [x], folder)[0], numbers(state, [x], folder, start="select_templates")[0])


@pytest.mark.parametrize("form", ["sqrt", "rsqrt", "inverse", "power", "square"])
def test_case_1_layer_norm(tmp_path, form):
    state, new = found(lambda e, x: [normalised(e, centred(e, x), form)])
    assert ops(new) == ["nn.layer_norm"]
    both(state, new, tmp_path)


@pytest.mark.parametrize("form", ["sqrt", "rsqrt", "inverse"])
def test_case_2_rms_norm(tmp_path, form):
    state, new = found(lambda e, x: [normalised(e, x, form)])
    assert ops(new) == ["nn.rms_norm"]
    both(state, new, tmp_path)


def test_cases_3_and_4_scale_and_shift_join(tmp_path):
    weights = {"g": normal((N,), 1), "b": normal((1, 1, N), 2)}

    def body(e, x, g, b):
        return [e(op.add(b, e(op.multiply(g, normalised(e, centred(e, x))))))]

    state, new = found(body, weights)
    assert ops(new) == ["nn.layer_norm"]
    both(state, new, tmp_path)


def test_case_3_rms_norm_takes_its_scale_once(tmp_path):
    weights = {"g": normal((N,), 1), "h": normal((N,), 2)}

    def body(e, x, g, h):
        return [e(op.multiply(e(op.multiply(normalised(e, x), g)), h))]

    state, new = found(body, weights)
    assert ops(new) == ["nn.rms_norm", "multiply"]
    both(state, new, tmp_path)


@pytest.mark.parametrize("rows", [3, N])
def test_a_scale_per_row_stays_outside(tmp_path, rows):
    """Also where there are as many rows as columns."""
    shape = (2, rows, N)
    weights = {"g": normal((rows, 1), 1)}
    state, new = found(lambda e, x, g: [e(op.multiply(normalised(e, x), g))], weights, shape)
    assert ops(new) == ["nn.rms_norm", "multiply"]
    both(state, new, tmp_path, shape)


def test_a_norm_with_a_second_reader_is_kept_for_it(tmp_path):
    def body(e, x, g):
        norm = normalised(e, x)
        return [e(op.multiply(norm, g)), norm]

    _, new = found(body, {"g": normal((N,), 1)})
    assert ops(new) == ["nn.rms_norm", "nn.rms_norm"]
    x = normal((2, 3, N))
    scaled, plain = numbers(new, [x], tmp_path)
    close(scaled, plain * new.weights["g"])


def test_another_axis_is_no_norm():
    def body(e, x):
        return [e(op.divide(x, spread(e, x, axis=1)))]

    assert "divide" in ops(found(body)[1])


def test_the_square_of_something_else_is_no_norm():
    def body(e, x):
        return [e(op.divide(x, spread(e, centred(e, x))))]

    assert "divide" in ops(found(body)[1])


def test_the_mean_of_something_else_makes_an_rms_norm(tmp_path):
    def body(e, x):
        d = e(op.subtract(x, e(op.mean(e(op.abs(x)), [2], keepdims=True))))
        return [normalised(e, d)]

    state, new = found(body)
    assert ops(new)[-1] == "nn.rms_norm"
    assert len(calls(new, "nn.layer_norm")) == 0
    both(state, new, tmp_path)
