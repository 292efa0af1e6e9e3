"""TFLite operators on single elements, where TVM's conversion is missing, wrong or not what LiteRT computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter


def _dtypes(converter: TfliteConverter, operator: Operator) -> tuple[str, str]:
    """The dtypes of an operator's first input and first output."""
    ends = (converter.get_input_tensors(operator)[0], converter.get_output_tensors(operator)[0])
    return tuple(str(converter.get_tensor_type_str(item.tensor.Type())) for item in ends)  # type: ignore[return-value]


@handles("CAST")
def _cast(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, target = _dtypes(converter, operator)
    value = converter.get_tensor_expr(converter.get_input_tensors(operator)[0])
    if source == target:
        return value
    if source == "complex64":  # its real part
        axis = len(value.ty.shape) - 1
        value = relax.op.squeeze(relax.op.strided_slice(value, [axis], [0], [1], [1]), axis)
        return relax.op.astype(value, target)
    if target == "bool":
        return relax.op.not_equal(value, relax.const(0, source))
    return relax.op.astype(value, target)


@handles("BITCAST")
def _bitcast(converter: TfliteConverter, operator: Operator) -> Expr:
    """To elements of another size, the last axis holds the parts of one, the lowest bits first."""
    from tvm import relax, te, tirx

    source, target = (np.dtype(name) for name in _dtypes(converter, operator))
    tensor = converter.get_input_tensors(operator)[0]
    shape, value = converter.shape_of(tensor), converter.get_tensor_expr(tensor)
    if "bool" in (source.name, target.name):
        raise UnsupportedError("BITCAST of bool is not supported", found=f"{source} to {target}", allowed="numbers")
    whole, part = (source, target) if source.itemsize > target.itemsize else (target, source)
    ratio, bits = whole.itemsize // part.itemsize, part.itemsize * 8
    if ratio == 1:
        result = shape
    elif target is part:
        result = (*shape, ratio)
    elif shape and shape[-1] == ratio:
        result = shape[:-1]
    else:
        raise UnsupportedError("these elements make no whole ones", found=str(list(shape)), allowed=f"[..., {ratio}]")
    wide, narrow = f"uint{whole.itemsize * 8}", f"uint{bits}"

    def define(x: Any) -> Any:  # noqa: ANN401
        def element(*index: Any) -> Any:  # noqa: ANN401
            if ratio == 1:
                return tirx.reinterpret(target.name, x(*index))
            if target is part:
                shift = index[-1].astype(wide) * tirx.const(bits, wide)
                number = tirx.shift_right(tirx.reinterpret(wide, x(*index[:-1])), shift).astype(narrow)
                return tirx.reinterpret(target.name, number)
            total = tirx.const(0, wide)
            for place in range(ratio):
                number = tirx.reinterpret(narrow, x(*index, place)).astype(wide)
                total = total | tirx.shift_left(number, tirx.const(bits * place, wide))
            return tirx.reinterpret(target.name, total)

        return te.compute(result, element, name="bitcast")

    return (
        converter.bb.call_te(define, value, primfunc_name_hint="bitcast")
        if source != target
        else relax.op.astype(value, target.name)
    )


@handles("POW")
def _pow(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    left, right = (converter.get_tensor_expr(item) for item in converter.get_input_tensors(operator))
    dtype = _dtypes(converter, operator)[0]
    if dtype == "float32":
        return relax.op.power(left, right)
    wide = relax.op.power(relax.op.astype(left, "float64"), relax.op.astype(right, "float64"))
    return relax.op.astype(wide, dtype)


@handles("SQUARED_DIFFERENCE", "SQUARE")
def _square(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    left, *right = (converter.get_tensor_expr(item) for item in converter.get_input_tensors(operator))
    difference = converter.bb.emit(relax.op.subtract(left, right[0])) if right else left
    return relax.op.multiply(difference, difference)


@handles("GELU")
def _gelu(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    x, op = converter.get_tensor_expr(converter.get_input_tensors(operator)[0]), relax.op
    half = relax.const(0.5, "float32")
    if converter.options(operator, "GeluOptions").Approximate():
        cube = op.multiply(op.multiply(x, op.multiply(x, x)), relax.const(0.044715, "float32"))
        inner = op.tanh(op.multiply(op.add(x, cube), relax.const(math.sqrt(2 / math.pi), "float32")))
    else:
        inner = op.erf(op.multiply(x, relax.const(math.sqrt(0.5), "float32")))
    return op.multiply(op.multiply(x, half), op.add(inner, relax.const(1.0, "float32")))


@handles("BUCKETIZE")
def _bucketize(converter: TfliteConverter, operator: Operator) -> Expr:
    """The number of boundaries that are not above a value."""
    from tvm import te, tirx

    bounds = np.atleast_1d(converter.options(operator, "BucketizeOptions").BoundariesAsNumpy()).astype(np.float32)
    tensor = converter.get_input_tensors(operator)[0]
    shape = converter.shape_of(tensor)
    limits = converter.exp_tab.new_const(bounds, dtype="float32", source_name=b"boundaries")

    def define(x: Any, limit: Any) -> Any:  # noqa: ANN401
        k = te.reduce_axis((0, len(bounds)), "k")
        one, zero = tirx.const(1, "int32"), tirx.const(0, "int32")

        def element(*index: Any) -> Any:  # noqa: ANN401
            return te.sum(tirx.Select(x(*index).astype("float32") >= limit(k), one, zero), axis=k)

        return te.compute(shape, element, name="bucketize")

    return converter.bb.call_te(define, converter.get_tensor_expr(tensor), limits, primfunc_name_hint="bucketize")


@handles("EQUAL", "NOT_EQUAL")
def _equal(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    tensors = converter.get_input_tensors(operator)
    left, right = (converter.get_tensor_expr(item) for item in tensors)
    different = converter.name_of(operator) == "NOT_EQUAL"
    if _dtypes(converter, operator)[0] != "bool":
        return (relax.op.not_equal if different else relax.op.equal)(left, right)
    # LLVM code for a vector of bools compared by TVM's `equal` is not valid.
    apart = relax.op.logical_xor(left, right)
    return apart if different else relax.op.logical_not(apart)


@handles("BITWISE_XOR")
def _xor(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    left, right = (converter.get_tensor_expr(item) for item in converter.get_input_tensors(operator))
    is_bool = _dtypes(converter, operator)[0] == "bool"
    return (relax.op.logical_xor if is_bool else relax.op.bitwise_xor)(left, right)
