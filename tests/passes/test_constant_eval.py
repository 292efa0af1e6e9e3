"""Every numpy form of an operator against TVM's own code for it."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.passes.constant_eval import TABLE, _evaluate_with_tvm, evaluate
from passes.build import close, normal

op = relax.op
POSITIVE = np.abs(normal((3, 4), 1)) + np.float32(0.1)
MATRIX, OTHER = normal((3, 4), 2), normal((3, 4), 3)
ROW = normal((4,), 4)
SCALES, ZEROS = np.array([0.5, 0.03, 2.0], np.float32), np.array([0, -3, 7], np.int8)
INT8 = np.array([[-128, -1, 0, 127], [1, 2, 3, 4], [50, -50, 100, -100]], np.int8)

#: operator: calls of it as (make, values).
EXAMPLES = {
    "relax.reshape": [(lambda x: op.reshape(x, (2, 6)), [MATRIX])],
    "relax.squeeze": [(lambda x: op.squeeze(x, [0]), [MATRIX[None]])],
    "relax.expand_dims": [(lambda x: op.expand_dims(x, [1]), [MATRIX])],
    "relax.flatten": [(lambda x: op.flatten(x), [MATRIX])],
    "relax.permute_dims": [
        (lambda x: op.permute_dims(x), [MATRIX]),
        (lambda x: op.permute_dims(x, [2, 0, 1]), [normal((2, 3, 4))]),
        (lambda x: op.permute_dims(x, [0, -1, 1]), [normal((2, 3, 4))]),
    ],
    "relax.broadcast_to": [(lambda x: op.broadcast_to(x, (5, 3, 4)), [MATRIX])],
    "relax.astype": [
        (lambda x: op.astype(x, "int32"), [MATRIX * 10]),
        (lambda x: op.astype(x, "float32"), [INT8]),
        (lambda x: op.astype(x, "float16"), [MATRIX]),
        (lambda x: op.astype(x, "bool"), [INT8]),
    ],
    "relax.add": [(op.add, [MATRIX, ROW]), (op.add, [INT8, INT8])],
    "relax.subtract": [(op.subtract, [ROW, MATRIX])],
    "relax.multiply": [(op.multiply, [MATRIX, ROW])],
    "relax.divide": [(op.divide, [MATRIX, ROW]), (op.divide, [INT8[1:2] * 9, INT8[1:2]])],
    "relax.maximum": [(op.maximum, [MATRIX, OTHER])],
    "relax.minimum": [(op.minimum, [MATRIX, OTHER])],
    "relax.less": [(op.less, [MATRIX, ROW])],
    "relax.greater": [(op.greater, [MATRIX, ROW])],
    "relax.equal": [(op.equal, [INT8, np.abs(INT8)])],
    "relax.where": [(op.where, [MATRIX > 0, MATRIX, OTHER])],
    "relax.negative": [(op.negative, [MATRIX])],
    "relax.abs": [(op.abs, [MATRIX])],
    "relax.sqrt": [(op.sqrt, [POSITIVE])],
    "relax.rsqrt": [(op.rsqrt, [POSITIVE])],
    "relax.exp": [(op.exp, [MATRIX])],
    "relax.quantize": [
        (lambda x, s, z: op.quantize(x, s, z, axis=0, out_dtype="int8"), [MATRIX * 100, SCALES, ZEROS]),
        (lambda x, s, z: op.quantize(x, s, z, axis=1, out_dtype="int8"), [MATRIX.T * 100, SCALES, ZEROS]),
    ],
    "relax.dequantize": [
        (lambda x, s, z: op.dequantize(x, s, z, axis=0), [INT8, SCALES, ZEROS]),
        (lambda x, s, z: op.dequantize(x, s, z, axis=-1), [np.ascontiguousarray(INT8.T), SCALES, ZEROS]),
    ],
}


def call_of(make, values):
    """The normalised call on variables of the values' types."""
    params = [relax.Var(f"v{i}", relax.TensorType(v.shape, str(v.dtype))) for i, v in enumerate(values)]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            call = builder.normalize(make(*params))
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    return call


def test_every_operator_of_the_table_has_an_example():
    assert set(EXAMPLES) == set(TABLE)


@pytest.mark.parametrize(("name", "i"), [(n, i) for n, examples in EXAMPLES.items() for i in range(len(examples))])
def test_numpy_form_equals_tvm(name, i):
    make, values = EXAMPLES[name][i]
    call = call_of(make, values)
    mine, theirs = evaluate(call, values), _evaluate_with_tvm(call, values)
    assert mine.flags.c_contiguous
    close(mine, theirs, 1e-6)


def test_integer_division_is_left_to_tvm():
    a, b = np.array([7, -7, 9], np.int32), np.array([2, 2, -2], np.int32)
    got = evaluate(call_of(op.divide, [a, b]), [a, b])
    np.testing.assert_array_equal(got, _evaluate_with_tvm(call_of(op.divide, [a, b]), [a, b]))
    assert got.dtype == np.int32


def test_an_operator_outside_the_table_is_computed_by_tvm():
    call = call_of(lambda x: op.tanh(x), [MATRIX])
    close(evaluate(call, [MATRIX]), np.tanh(MATRIX), 1e-6)


def test_a_scalar_stays_a_scalar():
    value = np.array(4.0, np.float32)
    assert evaluate(call_of(op.sqrt, [value]), [value]).shape == ()


@pytest.mark.parametrize("value", [0.5, 1.5, 2.5, -0.5, -1.5])
def test_quantize_rounds_halves_to_even(value):
    data = np.array([value], np.float32)
    scale, zero = np.array(1.0, np.float32), np.array(0, np.int8)
    call = call_of(lambda x, s, z: op.quantize(x, s, z, axis=0, out_dtype="int8"), [data, scale, zero])
    assert evaluate(call, [data, scale, zero])[0] == np.int8(round(value))


def test_quantize_clips_at_both_ends():
    data = np.array([-1e9, -129, 128, 1e9], np.float32)
    scale, zero = np.array(1.0, np.float32), np.array(0, np.int8)
    call = call_of(lambda x, s, z: op.quantize(x, s, z, axis=0, out_dtype="int8"), [data, scale, zero])
    np.testing.assert_array_equal(evaluate(call, [data, scale, zero]), [-128, -128, 127, 127])
