"""Loops in pieces: what vectors a row of any length comes to, and the planes and rows that are computed by them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax, te

from ingot.passes.lower import split_nests
from ingot.schedules import pieces
from ingot.schedules.apply import schedule_function
from ingot.target import load_target
from passes.build import finish, normal, relax_state
from passes.execute import execute
from schedules.common import TARGETS, property_settings

op = relax.op
#: Image, and which of its axes the constant operand has: a channel's value, an image's, a pixel's,
#: a column's, one for all.
PLANES = (
    ((1, 80, 13, 14), (1,)),
    ((1, 20, 7, 7), (1,)),
    ((1, 3, 20, 26), (1,)),
    ((2, 17, 5, 9), (0, 1)),
    ((3, 8, 5, 7), (2, 3)),
    ((4, 5, 6, 24), (3,)),
    ((1, 16, 1, 33), (1,)),
    ((5, 7, 3, 3), (0, 3)),
    ((1, 4, 20, 26), ()),
    ((2, 8, 12, 16), ()),
)


@property_settings
@given(st.integers(1, 300), st.sampled_from([4, 8, 16]), st.sampled_from([1, 2, 4]), st.booleans())
def test_every_element_is_in_one_vector_or_in_the_last_two(length, lanes, registers, overlap):
    group = lanes * registers
    counts = np.zeros(length, int)
    counts[: length // group * group] += 1
    for begin, width in pieces.spans(length, lanes, registers, overlap=overlap):
        assert width <= group and width & (width - 1) == 0 and begin + width <= length
        counts[begin : begin + width] += 1
    assert (counts >= 1).all()
    assert (counts[: max(0, length - lanes) if overlap else length] == 1).all()
    assert counts.max() <= 2


@pytest.mark.parametrize(("shape", "axes"), PLANES, ids=str)
def test_functions_of_planes_of_any_size(tmp_path, shape, axes):
    x, bias = normal(shape), normal([d if i in axes else 1 for i, d in enumerate(shape)], 1)

    def body(e, x, b):
        return [e(op.sigmoid(e(op.add(e(op.exp(x)), b))))]

    state = finish(relax_state({"x": x.shape}, {"b": bias}, body))
    assert len(state.program.steps) == 1
    (got,) = execute(state, [x], tmp_path, 3)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-(np.exp(x) + bias))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 20, 26), (16, 33), (2, 8, 12, 16)], ids=str)
def test_a_scalar_meets_every_element(tmp_path, shape):
    x, scale = normal(shape), np.float32(3)
    inputs = {"x": shape, "s": ((), "float32")}
    state = finish(relax_state(inputs, {}, lambda e, x, s: [e(op.multiply(e(op.exp(x)), s))]))
    (got,) = execute(state, [x, np.array(scale)], tmp_path, 3)
    np.testing.assert_allclose(got, np.exp(x) * 3, rtol=1e-5)


@pytest.mark.parametrize("shape", [(80, 13, 14), (40, 5, 5), (6, 20, 26)], ids=str)
def test_planes_take_whole_vectors_and_no_division(shape):
    x, b = te.placeholder(shape, "float32", name="x"), te.placeholder((shape[0],), "float32", name="b")
    y = te.compute(shape, lambda c, i, j: te.exp(x(c, i, j)) * b[c], name="y")
    function = te.create_prim_func([x, b, y], index_dtype_override="int64").with_attr("global_symbol", "main")
    text = str(split_nests(schedule_function(function, load_target("x86-64-v3")))[0].statement)
    stores = [line for line in text.splitlines() if " = " in line and "exp(" in line]
    assert stores and not any("//" in line or "%" in line.split("exp(")[1] for line in stores)
    assert f"vectorized(T.int64({32 if shape[1] * shape[2] >= 32 else 16}))" in text


@pytest.mark.parametrize("sizes", [(48, 12, 10, 4), (1, 2, 26, 13), (3, 16, 5, 5), (8, 8, 1, 9)], ids=str)
def test_images_join_along_their_channels_plane_by_plane(tmp_path, sizes):
    first, second, height, width = sizes
    feeds = [normal((2, c, height, width), c) for c in (first, second)]
    inputs = {f"x{i}": x.shape for i, x in enumerate(feeds)}
    (got,) = execute(finish(relax_state(inputs, {}, lambda e, *xs: [e(op.concat(xs, 1))])), feeds, tmp_path, 3)
    np.testing.assert_array_equal(got, np.concatenate(feeds, 1))


@pytest.mark.parametrize("target", TARGETS)
def test_large_planes_are_copied_bit_by_bit(tmp_path, target):
    feeds = [normal((1, c, 33, 37), c) for c in (5, 13)]
    feeds[0].reshape(-1)[:6] = np.array([0x7F800001, 0x7FC12345, 0xFFFFFFFF, 1, 0x80000001, 0x80000000], "u4").view(
        "f4"
    )
    inputs = {f"x{i}": x.shape for i, x in enumerate(feeds)}
    state = finish(relax_state(inputs, {}, lambda e, *xs: [e(op.concat(xs, 1))], target))
    (got,) = execute(state, feeds, tmp_path, 3)
    np.testing.assert_array_equal(got.view("u4"), np.concatenate(feeds, 1).view("u4"))


@pytest.mark.parametrize(("board", "kept"), [("x86-64-v3", True), ("raspberry-pi-4", False)])
def test_large_planes_are_copied_by_vectors_on_x86(board, kept):
    x, y = (te.placeholder((c, 40, 40), "float32", name=f"x{c}") for c in (20, 30))
    z = te.compute((50, 40, 40), lambda c, i, j: te.if_then_else(c < 20, x(c, i, j), y(c - 20, i, j)), name="z")
    function = te.create_prim_func([x, y, z], index_dtype_override="int64").with_attr("global_symbol", "main")
    text = str(split_nests(schedule_function(function, load_target(board)))[0].statement)
    assert ("ingot_kept" in text) == kept == ("vectorized" in text)


def test_a_joined_plane_that_is_chosen_by_its_place_is_left_alone(tmp_path):
    x, y = normal((1, 20, 5, 6)), normal((1, 20, 7, 6), 1)
    inputs = {"x": x.shape, "y": y.shape}
    (got,) = execute(finish(relax_state(inputs, {}, lambda e, *xs: [e(op.concat(xs, 2))])), [x, y], tmp_path, 3)
    np.testing.assert_array_equal(got, np.concatenate([x, y], 2))
