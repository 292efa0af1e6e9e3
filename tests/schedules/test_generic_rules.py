"""Rule-based schedules: axes joined to one, concatenations whose parts meet inside a vector, finished reductions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view as sliding
from tvm import relax, te, tirx

from ingot.passes.lower import split_nests
from ingot.schedules.apply import schedule_function
from ingot.target import load_target
from passes.build import close, finish, normal, relax_state
from passes.execute import execute

op = relax.op


def run(feeds, body, folder, kernels):
    state = finish(relax_state({f"x{i}": x.shape for i, x in enumerate(feeds)}, {}, body))
    assert len(state.program.steps) == kernels
    return execute(state, feeds, folder, 3)


@pytest.mark.parametrize(
    "parts", [(4, 1, 80), (1, 1), (3, 3, 3, 3), (16, 16), (64, 32), (100, 60), (8, 24), (1, 16)], ids=str
)
def test_parts_of_any_width_join_along_the_last_axis(tmp_path, parts):
    feeds = [normal((1, 5, 3, width), i) for i, width in enumerate(parts)]
    (got,) = run(feeds, lambda e, *xs: [e(op.concat(xs, 3))], tmp_path, 1)
    np.testing.assert_array_equal(got, np.concatenate(feeds, 3))


def test_one_dimension_joins(tmp_path):
    feeds = [normal((3,), 1), normal((5,), 2)]
    (got,) = run(feeds, lambda e, *xs: [e(op.concat(xs, 0))], tmp_path, 1)
    np.testing.assert_array_equal(got, np.concatenate(feeds))


def test_pixels_fold_into_channels(tmp_path):
    x = normal((1, 8, 6, 3))

    def body(e, x):
        parts = [e(op.strided_slice(x, [1, 2], [i, j], [8, 6], [2, 2])) for j in (0, 1) for i in (0, 1)]
        return [e(op.concat(parts, 3))]

    (got,) = run([x], body, tmp_path, 1)
    np.testing.assert_array_equal(got, np.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], 3))


@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64])
def test_the_division_of_a_mean_over_rows_joins_its_sum(tmp_path, channels):
    x = normal((2, 7, 5, channels))
    (got,) = run([x], lambda e, x: [e(op.mean(x, [1, 2], keepdims=True))], tmp_path, 1)
    close(got, x.mean((1, 2), keepdims=True))


@pytest.mark.parametrize("padding", [0, 1])
def test_average_pooling_and_its_activation_are_one_kernel(tmp_path, padding):
    x = normal((1, 8, 8, 24))

    def body(e, x):
        pooled = e(op.nn.avg_pool2d(x, (3, 3), (2, 2), (padding,) * 4, layout="NHWC", count_include_pad=True))
        return [e(op.nn.relu(pooled))]

    (got,) = run([x], body, tmp_path, 1)
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = (8 + 2 * padding - 3) // 2 + 1
    want = sum(padded[:, i : i + 2 * size - 1 : 2, j : j + 2 * size - 1 : 2] for i in range(3) for j in range(3)) / 9
    close(got, np.maximum(want, 0).astype(np.float32))


def test_a_sum_with_two_readers_keeps_its_result(tmp_path):
    x = normal((1, 6, 6, 16))

    def body(e, x):
        total = e(op.sum(x, [1, 2]))
        return [e(op.nn.relu(total)), e(op.negative(total))]

    state = finish(relax_state({"x": x.shape}, {}, body))
    positive, negative = execute(state, [x], tmp_path)
    close(positive, np.maximum(x.sum((1, 2)), 0))
    close(negative, -x.sum((1, 2)))


@pytest.mark.parametrize(
    "shape", [(1, 80, 65, 14), (1, 7, 5, 6), (3, 64, 3), (2, 9, 33), (5, 5), (1, 16, 4, 40)], ids=str
)
def test_functions_of_functions_over_rows_of_any_length(tmp_path, shape):
    x, y = normal(shape), normal(shape, 1)

    def body(e, x, y):
        return [e(op.sigmoid(e(op.add(e(op.tanh(e(op.exp(x)))), y))))]

    (got,) = run([x, y], body, tmp_path, 1)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(np.tanh(np.exp(x)) + y))), rtol=1e-5, atol=1e-6)


def test_rows_that_end_inside_a_vector_take_no_division():
    function = schedule_function(_doubled((128, 52, 26)), load_target("x86-64-v3"))
    text = str(split_nests(function)[0].statement)
    stored = next(line for line in text.splitlines() if " = " in line and "2.0" in line)
    assert "//" not in stored and "%" not in stored


def test_an_element_made_of_another_place_of_a_tensor_of_its_shape(tmp_path):
    x = normal((7, 7))
    (got,) = run([x], lambda e, x: [e(op.tanh(e(op.add(x, e(op.permute_dims(x))))))], tmp_path, 1)
    np.testing.assert_allclose(got, np.tanh(x + x.T), rtol=1e-5, atol=1e-6)


def test_what_stores_a_written_nest_keeps_its_axes(tmp_path):
    x = normal((1, 5, 9, 10))
    (got,) = run([x], lambda e, x: [e(op.nn.relu(e(op.nn.max_pool2d(x, (3, 3), (1, 1), (1,) * 4))))], tmp_path, 1)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    np.testing.assert_array_equal(got, np.maximum(sliding(padded, (3, 3), (2, 3)).max((-1, -2)), 0))


def _doubled(shape):
    x = te.placeholder(shape, "float32", name="x")
    y = te.compute(shape, lambda *i: x(*i) * tirx.const(2.0, "float32"), name="y")
    return te.create_prim_func([x, y], index_dtype_override="int64").with_attr("global_symbol", "main")
