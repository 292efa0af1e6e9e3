"""Simplify: each numbered case of the pass, its IR and its numbers."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.passes.rewriter import outputs_of, shape_of
from passes.build import calls, close, normal, numbers, ops, relax_state, run_steps

op = relax.op


def simplified(inputs, weights, body):
    return run_steps(relax_state(inputs, weights, body), "simplify")


def test_case_1_a_reshape_to_the_same_shape_goes(tmp_path):
    state = simplified({"x": (2, 3)}, {}, lambda e, x: [e(op.nn.relu(e(op.reshape(x, (2, 3)))))])
    assert ops(state) == ["nn.relu"]
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


def test_case_1_a_reshape_to_another_shape_stays(tmp_path):
    state = simplified({"x": (2, 3)}, {}, lambda e, x: [e(op.nn.relu(e(op.reshape(x, (3, 2)))))])
    assert ops(state) == ["reshape", "nn.relu"]
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0).reshape(3, 2))


def test_case_2_a_chain_of_reshapes_is_one(tmp_path):
    def body(e, x):
        return [e(op.nn.relu(e(op.reshape(e(op.reshape(e(op.reshape(x, (12,))), (3, 4))), (2, 6)))))]

    state = simplified({"x": (4, 3)}, {}, body)
    assert ops(state) == ["reshape", "nn.relu"]
    assert shape_of(calls(state, "reshape")[0]) == (2, 6)
    x = normal((4, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0).reshape(2, 6))


def test_case_2_a_chain_that_ends_where_it_began_is_nothing(tmp_path):
    state = simplified({"x": (4, 3)}, {}, lambda e, x: [e(op.nn.relu(e(op.reshape(e(op.reshape(x, (12,))), (4, 3)))))])
    assert ops(state) == ["nn.relu"]
    x = normal((4, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


def test_case_2_an_inner_reshape_with_a_reader_of_its_own_stays(tmp_path):
    def body(e, x):
        inner = e(op.reshape(x, (12,)))
        return [e(op.nn.relu(inner)), e(op.negative(e(op.reshape(inner, (3, 4)))))]

    state = simplified({"x": (4, 3)}, {}, body)
    assert sorted(ops(state)) == ["negative", "nn.relu", "reshape", "reshape"]
    assert all(call.args[0] in list(state.module["main"].params) for call in calls(state, "reshape"))
    x = normal((4, 3))
    flat, folded = numbers(state, [x], tmp_path)
    close(flat, np.maximum(x, 0).reshape(12))
    close(folded, -x.reshape(3, 4))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda x: op.squeeze(x, [0, 2]), (4, 3)),
        (lambda x: op.squeeze(x), (4, 3)),
        (lambda x: op.expand_dims(x, [0, -1]), (1, 1, 4, 1, 3, 1)),
        (lambda x: op.flatten(x), (12,)),
    ],
    ids=["squeeze", "squeeze-all", "expand_dims", "flatten"],
)
def test_case_3_squeeze_expand_dims_and_flatten_are_reshapes(tmp_path, make, shape):
    state = simplified({"x": (1, 4, 1, 3)}, {}, lambda e, x: [e(op.nn.relu(e(make(x))))])
    assert ops(state) == ["reshape", "nn.relu"]
    x = normal((1, 4, 1, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0).reshape(shape))


def test_case_4_a_transpose_that_moves_nothing_goes(tmp_path):
    state = simplified({"x": (2, 3, 4)}, {}, lambda e, x: [e(op.nn.relu(e(op.permute_dims(x, [0, -2, 2]))))])
    assert ops(state) == ["nn.relu"]
    x = normal((2, 3, 4))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


@pytest.mark.parametrize("first", [(1, 2, 0), (2, 0, 1), (0, 2, 1), None])
@pytest.mark.parametrize("second", [(1, 2, 0), (2, 1, 0), None])
def test_case_5_a_transpose_of_a_transpose_is_one(tmp_path, first, second):
    def body(e, x):
        inner = e(op.permute_dims(x, first and list(first)))
        return [e(op.nn.relu(e(op.permute_dims(inner, second and list(second)))))]

    state = simplified({"x": (2, 3, 5)}, {}, body)
    x = normal((2, 3, 5))
    want = np.maximum(x, 0).transpose(first).transpose(second)
    assert ops(state).count("permute_dims") == (0 if want.strides == x.strides else 1)
    close(numbers(state, [x], tmp_path)[0], np.ascontiguousarray(want))


def test_case_6_a_transpose_that_only_moves_ones_is_a_reshape(tmp_path):
    state = simplified({"x": (1, 5, 1, 7)}, {}, lambda e, x: [e(op.nn.relu(e(op.permute_dims(x, [1, 3, 0, 2]))))])
    assert ops(state) == ["reshape", "nn.relu"]
    x = normal((1, 5, 1, 7))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0).reshape(5, 7, 1, 1))


def test_case_6_joins_the_reshape_before_it(tmp_path):
    def body(e, x):
        return [e(op.nn.relu(e(op.permute_dims(e(op.reshape(x, (1, 5, 1, 7))), [1, 3, 0, 2]))))]

    state = simplified({"x": (35,)}, {}, body)
    assert ops(state) == ["reshape", "nn.relu"]
    x = normal((35,))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0).reshape(5, 7, 1, 1))


def test_case_6_a_transpose_that_moves_data_stays(tmp_path):
    state = simplified({"x": (1, 5, 1, 7)}, {}, lambda e, x: [e(op.nn.relu(e(op.permute_dims(x, [0, 3, 2, 1]))))])
    assert ops(state) == ["permute_dims", "nn.relu"]
    x = normal((1, 5, 1, 7))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0).transpose(0, 3, 2, 1))


def test_case_7_a_cast_to_the_same_dtype_goes(tmp_path):
    state = simplified({"x": (5,)}, {}, lambda e, x: [e(op.nn.relu(e(op.astype(x, "float32"))))])
    assert ops(state) == ["nn.relu"]
    x = normal((5,))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


def test_case_7_a_cast_to_another_dtype_stays(tmp_path):
    state = simplified({"x": (5,)}, {}, lambda e, x: [e(op.astype(x, "int32"))])
    assert ops(state) == ["astype"]
    x = normal((5,)) * 10
    close(numbers(state, [x], tmp_path)[0], x.astype(np.int32))


TINY = np.array([0, 0, 1e-3], np.float32)
ZERO, ONE = np.zeros((3,), np.float32), np.ones((3,), np.float32)


@pytest.mark.parametrize(
    ("make", "constant"),
    [
        (lambda x, c: op.add(x, c), ZERO),
        (lambda x, c: op.add(c, x), ZERO),
        (lambda x, c: op.subtract(x, c), ZERO),
        (lambda x, c: op.multiply(x, c), ONE),
        (lambda x, c: op.multiply(c, x), ONE),
        (lambda x, c: op.divide(x, c), ONE),
    ],
    ids=["x+0", "0+x", "x-0", "x*1", "1*x", "x/1"],
)
@pytest.mark.parametrize("kind", ["weight", "constant"])
def test_case_8_neutral_operands_go(tmp_path, make, constant, kind):
    if kind == "weight":
        state = simplified({"x": (2, 3)}, {"c": constant}, lambda e, x, c: [e(op.nn.relu(e(make(x, c))))])
    else:
        state = simplified({"x": (2, 3)}, {}, lambda e, x: [e(op.nn.relu(e(make(x, relax.const(constant)))))])
    assert ops(state) == ["nn.relu"]
    assert not state.weights
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


@pytest.mark.parametrize(
    ("make", "constant", "want"),
    [
        (lambda x, c: op.subtract(c, x), ZERO, lambda x: -x),
        (lambda x, c: op.divide(c, x), ONE, lambda x: 1 / x),
        (lambda x, c: op.add(x, c), TINY, lambda x: x + TINY),
        (lambda x, c: op.multiply(x, c), ZERO, lambda x: x * 0),
        (lambda x, c: op.add(x, c), np.zeros((4, 2, 3), np.float32), lambda x: np.stack([x] * 4)),
        (lambda x, c: op.multiply(c, x), np.ones((2, 1, 3), np.float32), lambda x: np.stack([x] * 2)),
    ],
    ids=["0-x", "1/x", "nearly-zero", "x*0", "hidden-broadcast-add", "hidden-broadcast-multiply"],
)
def test_case_8_what_only_looks_neutral_stays(tmp_path, make, constant, want):
    state = simplified({"x": (2, 3)}, {"c": constant}, lambda e, x, c: [e(make(x, c))])
    assert len(ops(state)) == 1
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.asarray(want(x), np.float32))


def test_case_9_dropout_is_its_input(tmp_path):
    def body(e, x):
        return [e(op.nn.relu(e(relax.TupleGetItem(e(op.nn.dropout(x, 0.5)), 0))))]

    state = simplified({"x": (2, 3)}, {}, body)
    assert ops(state) == ["nn.relu"]
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


def test_case_10_relu_of_relu_is_relu(tmp_path):
    state = simplified({"x": (2, 3)}, {}, lambda e, x: [e(op.nn.relu(e(op.nn.relu(e(op.nn.relu(x))))))])
    assert ops(state) == ["nn.relu"]
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.maximum(x, 0))


def test_case_10_relu_of_something_else_stays(tmp_path):
    state = simplified({"x": (2, 3)}, {}, lambda e, x: [e(op.nn.relu(e(op.negative(e(op.nn.relu(x))))))])
    assert ops(state) == ["nn.relu", "negative", "nn.relu"]
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], np.zeros((2, 3), np.float32))


def test_the_cases_work_together_down_to_the_bare_input(tmp_path):
    def body(e, x):
        x = e(op.permute_dims(e(op.permute_dims(x, [1, 0])), [1, 0]))
        return [e(op.add(e(op.reshape(e(op.astype(x, "float32")), (2, 3))), relax.const(0.0)))]

    state = simplified({"x": (2, 3)}, {}, body)
    assert ops(state) == []
    assert outputs_of(state.module["main"])[0].same_as(state.module["main"].params[0])
    x = normal((2, 3))
    close(numbers(state, [x], tmp_path)[0], x)


def test_running_it_twice_changes_nothing():
    import tvm_ffi

    def body(e, x):
        return [e(op.nn.relu(e(op.permute_dims(e(op.squeeze(e(op.add(x, relax.const(0.0))))), [1, 0]))))]

    once = simplified({"x": (1, 4, 1, 3)}, {}, body)
    assert tvm_ffi.structural_equal(once.module, run_steps(once, "simplify").module)
