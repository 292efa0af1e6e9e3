"""TFLite's SVDF on integers: 8-bit activations, a 16-bit memory and 16-bit weights over time, as its kernel rounds."""

from __future__ import annotations

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_rounding import multiplier_of, real_scale, scaled, zero_of
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter, Wrapper

_INT16, _INT8, _INT32 = 7, 9, 2
_INT16_LIMITS, _INT8_LIMITS = (-(1 << 15), (1 << 15) - 1), (-(1 << 7), (1 << 7) - 1)


def remembered(converter: TfliteConverter, state: Wrapper, fresh: Expr, shape: tuple[int, int, int]) -> Expr:
    """The memory [batch, filters, memory] after `fresh` [batch, filters] took the place of the oldest products."""
    from tvm import relax

    op, bb, (batch, filters, memory) = relax.op, converter.bb, shape
    found: Expr = bb.emit(op.reshape(fresh, (batch, filters, 1)))
    if memory > 1:
        held = bb.emit(op.reshape(converter.get_tensor_expr(state), shape))
        found = bb.emit(op.concat([op.strided_slice(held, [2], [1], [memory], [1]), found], axis=2))
    converter.next_states[int(state.tensor_idx)] = bb.emit(op.reshape(found, (batch, filters * memory)))
    return found


def integer_svdf(converter: TfliteConverter, operator: Operator) -> Expr:
    """Return the outputs [batch, units] (int8) of an SVDF whose input [batch, n] is int8.

    Products over the features are scaled to the memory's 16 bits; those over time are summed in int32 with the bias
    and scaled to the output. A relu is where the output's range ends, as in LiteRT's kernel.

    Raises UnsupportedError for types that LiteRT's integer kernel does not have.
    """
    from tvm import relax

    op, bb, make = relax.op, converter.bb, converter.exp_tab.new_const
    tensors = converter.get_input_tensors(operator)
    x, features, times, bias, state = tensors
    (output,) = converter.get_output_tensors(operator)
    kinds = ((x, _INT8), (features, _INT8), (times, _INT16), (bias, _INT32), (state, _INT16), (output, _INT8))
    for place, (tensor, kind) in enumerate(kinds):
        one = tensor.tensor_idx >= 0 and tensor.qnn_params is not None and tensor.qnn_params["scale"].value.numpy()
        if tensor is bias and tensor.tensor_idx < 0:
            continue
        if tensor.tensor.Type() != kind or (tensor is not bias and np.size(one) != 1):
            raise UnsupportedError(
                "an integer SVDF's tensor is of another type",
                where=f"input {place}" if tensor is not output else "output",
                found=converter.get_tensor_type_str(tensor.tensor.Type()),
                allowed=f"{converter.get_tensor_type_str(kind)} with one scale",
            )
    options = converter.options(operator, "SVDFOptions")
    rank, activation = options.Rank(), options.FusedActivationFunction()
    if activation not in (0, 1):
        raise UnsupportedError(
            "an integer SVDF has this activation", found=str(activation), allowed="none (0), relu (1)"
        )
    weights, over_time = (np.asarray(converter.constant(item, "weights")) for item in (features, times))
    batch, (filters, memory) = converter.shape_of(x)[0], over_time.shape
    if rank < 1 or filters % rank or weights.shape != (filters, converter.shape_of(x)[1]):
        raise UnsupportedError("SVDF's weights do not fit its rank", found=str(rank), allowed="a divisor of filters")

    def ratio(up: tuple[Wrapper, Wrapper], down: Wrapper) -> tuple[np.ndarray, np.ndarray]:
        product = np.float32(real_scale(up[0])) * np.float32(real_scale(up[1])) / np.float32(real_scale(down))
        return multiplier_of(np.atleast_1d(np.float64(product)))

    one, none = relax.const(1.0, "float32"), relax.const(0, "int32")
    value = op.dequantize(converter.get_tensor_expr(x), one, relax.const(zero_of(x), "int32"), axis=0)
    stored = make(np.ascontiguousarray(weights.T), dtype="int8", source_name=b"svdf")
    sums = op.matmul(value, op.dequantize(stored, one, none, axis=1))
    fresh = bb.emit(scaled(converter, sums, ratio((x, features), state), 0, _INT16_LIMITS, "int16"))
    held = op.astype(remembered(converter, state, fresh, (batch, filters, memory)), "int32")
    products = op.multiply(held, make(over_time.astype(np.int32), dtype="int32", source_name=b"svdf"))
    # Filters of one unit stand next to each other.
    total = bb.emit(op.sum(op.reshape(bb.emit(products), (batch, filters // rank, rank * memory)), 2))
    if bias.tensor_idx >= 0:
        total = op.add(total, make(np.asarray(converter.constant(bias, "bias")), dtype="int32", source_name=b"svdf"))
    return scaled(converter, total, ratio((state, times), output), zero_of(output), _INT8_LIMITS, "int8")
