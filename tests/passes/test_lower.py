"""Lowering: calls in order over values, views for free, outputs written in place, equal kernels once."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.errors import CompilerError
from ingot.passes.lower import Call, Copy
from ingot.passes.rewriter import rewrite
from passes.build import close, normal, numbers, relax_state, run_steps

op = relax.op
TO_LOWER = ("simplify", "fold_constants", "fold_batch_norm", "nhwc_layout", "clean_layout", "fold_layout")
TO_LOWER += ("select_templates", "fuse", "lower")


def lowered(inputs, weights, body):
    return run_steps(relax_state(inputs, weights, body), *TO_LOWER)


def shape(state):
    """The steps as text: the kinds of each call's values, written ones after the arrow."""
    lines = []
    for call in state.lowered.calls:
        if isinstance(call, Copy):
            lines.append(f"copy {call.source.kind}->{call.destination.kind}{call.destination.index}")
        else:
            reads = [v.kind for v in call.args if v not in call.writes]
            writes = [f"{v.kind}{v.index}" if v.kind == "output" else v.kind for v in call.writes]
            lines.append(f"{' '.join(reads)}->{' '.join(writes)}")
    return lines


def run(state, feeds, folder):
    return numbers(state, feeds, folder, "plan_memory")


def test_one_operator_writes_straight_into_the_output(tmp_path):
    state = lowered({"x": (5, 7)}, {}, lambda e, x: [e(op.exp(x))])
    assert shape(state) == ["input->output0"]
    x = normal((5, 7))
    close(run(state, [x], tmp_path)[0], np.exp(x))


def test_a_reshape_before_the_output_costs_nothing(tmp_path):
    state = lowered({"x": (5, 7)}, {}, lambda e, x: [e(op.reshape(e(op.reshape(e(op.exp(x)), (35,))), (7, 5)))])
    assert shape(state) == ["input->output0"]
    x = normal((5, 7))
    close(run(state, [x], tmp_path)[0], np.exp(x).reshape(7, 5))


def test_a_reshape_between_kernels_is_the_same_value(tmp_path):
    def body(e, x, w):
        return [e(op.matmul(e(op.reshape(e(op.exp(x)), (5, 7))), w))]

    state = lowered({"x": (7, 5)}, {"w": normal((7, 3), 1)}, body)
    first, second = state.lowered.calls
    assert first.writes[0].kind == "temp"
    assert first.writes[0] in second.args
    x = normal((7, 5))
    close(run(state, [x], tmp_path)[0], np.exp(x).reshape(5, 7) @ normal((7, 3), 1))


def test_an_input_returned_unchanged_is_copied(tmp_path):
    state = lowered({"x": (5, 7)}, {}, lambda e, x: [x])
    assert shape(state) == ["copy input->output0"]
    x = normal((5, 7))
    close(run(state, [x], tmp_path)[0], x)


def test_an_input_returned_reshaped_is_copied(tmp_path):
    state = lowered({"x": (5, 7)}, {}, lambda e, x: [e(op.reshape(x, (35,)))])
    assert shape(state) == ["copy input->output0"]
    x = normal((5, 7))
    close(run(state, [x], tmp_path)[0], x.reshape(35))


def test_a_weight_returned_is_copied(tmp_path):
    w = normal((99,), 1)
    state = lowered({"x": (1,)}, {"w": w}, lambda e, x, w: [w, e(op.exp(x))])
    assert shape(state) == ["input->output1", "copy weight->output0"]
    close(run(state, [normal((1,))], tmp_path)[0], w)


def test_a_constant_returned_is_copied(tmp_path):
    state = lowered({"x": (1,)}, {}, lambda e, x: [relax.const(np.arange(5), "int64")])
    assert shape(state) == ["copy weight->output0"]
    close(run(state, [normal((1,))], tmp_path)[0], np.arange(5))


def test_one_value_as_two_outputs_is_computed_once(tmp_path):
    def body(e, x):
        y = e(op.exp(x))
        return [y, e(op.reshape(y, (35,))), y]

    state = lowered({"x": (5, 7)}, {}, body)
    assert shape(state) == ["input->output0", "copy output->output1", "copy output->output2"]
    x = normal((5, 7))
    for got, want in zip(run(state, [x], tmp_path), [np.exp(x), np.exp(x).reshape(35), np.exp(x)], strict=True):
        close(got, want)


def test_an_output_is_read_by_a_later_step(tmp_path):
    def body(e, x, w):
        y = e(op.matmul(x, w))
        return [y, e(op.matmul(y, w))]

    w = normal((7, 7), 1)
    state = lowered({"x": (5, 7)}, {"w": w}, body)
    assert shape(state) == ["input weight->output0", "output weight->output1"]
    x = normal((5, 7))
    first, second = run(state, [x], tmp_path)
    close(first, x @ w)
    close(second, x @ w @ w)


def test_an_operator_with_several_results(tmp_path):
    def body(e, x):
        parts = e(op.split(x, [2, 5], 1))
        return [e(relax.TupleGetItem(parts, i)) for i in (2, 0, 1)]

    state = lowered({"x": (3, 9)}, {}, body)
    x = normal((3, 9))
    for got, want in zip(run(state, [x], tmp_path), [x[:, 5:], x[:, :2], x[:, 2:5]], strict=True):
        close(got, np.ascontiguousarray(want))


def test_an_unused_result_of_several_is_no_output(tmp_path):
    state = lowered({"x": (4, 6)}, {}, lambda e, x: [e(op.negative(e(relax.TupleGetItem(e(op.split(x, 2, 1)), 1))))])
    x = normal((4, 6))
    close(run(state, [x], tmp_path)[0], -x[:, 3:])


def test_equal_kernels_on_other_buffers_are_made_once(tmp_path):
    def body(e, x, w, v):
        return [e(op.nn.relu(e(op.matmul(e(op.nn.relu(e(op.matmul(x, w)))), v))))]

    w, v = normal((16, 16), 1), normal((16, 16), 2)
    state = lowered({"x": (5, 16)}, {"w": w, "v": v}, body)
    assert len(state.lowered.calls) == 2
    assert len(state.lowered.kernels) == 1
    x = normal((5, 16))
    close(run(state, [x], tmp_path)[0], np.maximum(np.maximum(x @ w, 0) @ v, 0))


def test_equal_constants_are_one_value():
    table = np.arange(9, dtype=np.float32)

    def body(e, x):
        return [
            e(op.matmul(e(op.add(x, relax.const(table))), relax.const(np.eye(9)[:, :1].astype(np.float32)))),
            e(op.power(e(op.matmul(x, relax.const(np.ones((9, 9), np.float32)))), relax.const(table))),
        ]

    weights = [v for call in lowered({"x": (5, 9)}, {}, body).lowered.calls for v in call.args if v.kind == "weight"]
    tables = {v.id for v in weights if v.data is not None and v.data.tobytes() == table.tobytes()}
    assert len(tables) == 1


@pytest.mark.parametrize("axes", [None, [0], [1], [0, 1]])
def test_a_reduction_has_a_kernel_for_each_nest(tmp_path, axes):
    state = lowered({"x": (5, 33)}, {}, lambda e, x: [e(op.variance(x, axes))])
    x = normal((5, 33))
    want = np.var(x, axis=None if axes is None else tuple(axes))
    close(run(state, [x], tmp_path)[0], np.asarray(want), 1e-5)


def test_symbols_carry_the_models_prefix_and_kernels_are_distinct():
    def body(e, x, w):
        return [e(op.nn.softmax(e(op.matmul(x, w)), -1)), e(op.exp(x))]

    symbols = [k.symbol for k in lowered({"x": (5, 16)}, {"w": normal((16, 16), 1)}, body).lowered.kernels]
    assert all(s.startswith("ingot_tiny_") for s in symbols)
    assert len(set(symbols)) == len(symbols)


def test_kernels_say_what_they_only_read():
    state = lowered({"x": (5, 7)}, {}, lambda e, x: [e(op.exp(x))])
    (call,) = state.lowered.calls
    assert isinstance(call, Call)
    assert call.kernel.readonly == (True, False)
    assert call.kernel.dtypes == ("float32", "float32")
    assert [v.bytes for v in call.args] == [140, 140]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float32", "bool"])
def test_values_have_the_bytes_of_their_dtype(tmp_path, dtype):
    state = lowered({"x": ((3, 5), dtype)}, {}, lambda e, x: [e(op.permute_dims(x))])
    (call,) = state.lowered.calls
    assert [v.bytes for v in call.args] == [15 * np.dtype(dtype).itemsize] * 2
    x = (normal((3, 5)) * 50).astype(dtype)
    close(run(state, [x], tmp_path)[0], np.ascontiguousarray(x.T))


def test_an_operator_that_nobody_lowered_is_named():
    state = relax_state({"x": (5, 7)}, {}, lambda e, x: [e(op.exp(x))])
    with pytest.raises(CompilerError, match=r"relax\.exp"):
        run_steps(state, "lower")


def test_lowering_twice_gives_equal_kernels():
    import tvm_ffi

    state = run_steps(rewrite(relax_state({"x": (5, 7)}, {}, lambda e, x: [e(op.exp(x))]), {}), *TO_LOWER[:-1])
    one, two = run_steps(state, "lower").lowered, run_steps(state, "lower").lowered
    assert [k.symbol for k in one.kernels] == [k.symbol for k in two.kernels]
    assert all(tvm_ffi.structural_equal(a.function, b.function) for a, b in zip(one.kernels, two.kernels, strict=True))
