"""TFLite operators that choose how many results they have: WHERE, UNIQUE, and non-maximum suppression.

Of WHERE and UNIQUE the results have their largest size and a counter, an int64[1] tensor; an operator may follow such a
tensor where it computes each entry from that entry alone. The suppressions say themselves how many results are valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.extents import Extent, Situation, follow
from ingot.frontend.loops import call_loops, scalar
from ingot.frontend.tflite_borrow import onnx_operator
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter

_NEVER = -3.0e38  # the score of a box that is out
# Operators that may follow a tensor whose size depends on data, by the ONNX operator whose rule is theirs.
_FOLLOWERS = {
    "ABS": "Abs", "ADD": "Add", "CAST": "Cast", "CEIL": "Ceil", "COS": "Cos", "DEQUANTIZE": "Identity", "DIV": "Div",
    "EQUAL": "Equal", "EXP": "Exp", "FLOOR": "Floor", "GATHER_ND": "GatherND", "GREATER": "Greater", "LESS": "Less",
    "LOG": "Log", "LOGICAL_AND": "And", "LOGICAL_NOT": "Not", "LOGICAL_OR": "Or", "LOGISTIC": "Sigmoid",
    "MAXIMUM": "Max", "MINIMUM": "Min", "MUL": "Mul", "NEG": "Neg", "QUANTIZE": "Identity", "RELU": "Relu",
    "RELU6": "Relu", "SIN": "Sin", "SQRT": "Sqrt", "SUB": "Sub", "TANH": "Tanh",
}  # fmt: skip


def followed(
    converter: TfliteConverter, operator: Operator, counted: Mapping[int, Extent], shape: tuple[int, ...]
) -> Extent:
    """The extent of the result (of largest size `shape`) of an operator on tensors whose size depends on data.

    Raises UnsupportedError if the operator would need the count itself.
    """
    import onnx

    name = converter.name_of(operator)
    tensors = [item for item in converter.get_input_tensors(operator) if item.tensor_idx >= 0]
    places = {
        place: counted[int(item.tensor_idx)] for place, item in enumerate(tensors) if int(item.tensor_idx) in counted
    }
    kind, attributes = _FOLLOWERS.get(name, ""), {}
    if name == "GATHER":
        options = converter.options(operator, "GatherOptions")
        kind = "" if options.BatchDims() else "Gather"
        attributes = {"axis": options.Axis()}
    found = None
    if kind:
        node = onnx.helper.make_node(kind, ["x"] * len(tensors), ["y"], **attributes)
        shapes = [converter.shape_of(item) for item in tensors]
        found = follow(Situation(node, shapes, [None] * len(tensors), shape), places)
    if found is None:
        raise UnsupportedError(
            "an operator works on a tensor whose size depends on data",
            where=name,
            found=f"at most {list(converter.shape_of(tensors[min(places)]))}",
            allowed="elementwise operators, GATHER, GATHER_ND",
        )
    return found


@handles("WHERE")
def _where(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    """The places of all elements that are not zero, and their number."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    (condition,) = converter.get_input_tensors(operator)
    shape, value = converter.shape_of(condition), converter.get_tensor_expr(condition)
    if not shape:
        raise UnsupportedError("WHERE of a scalar is not supported", found="a scalar", allowed="a tensor")
    size, rank = int(np.prod(shape, dtype=np.int64)), len(shape)
    dtype = str(value.ty.dtype.dtype)

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        (given,), (places, count) = ins, outs
        count[0] = T.int64(0)
        with T.grid(size, rank) as (row, column):
            places[row, column] = T.int64(0)
        with T.grid(*shape) as point:
            at = tuple(point) if rank > 1 else (point,)
            hit = given[at] if dtype == "bool" else tirx.NE(given[at], tirx.const(0, dtype))
            with T.If(hit), T.Then():
                for axis, index in enumerate(at):
                    places[count[0], T.int64(axis)] = T.Cast("int64", index)
                count[0] = count[0] + T.int64(1)

    places, count = call_loops(converter.bb, "where", [value], [((size, rank), "int64"), ((1,), "int64")], body)
    converter.counters[0] = (0, count)
    return [places]


@handles("UNIQUE")
def _unique(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    """Each value once, in the order in which they come, and for every element which of them it is."""
    from tvm import relax

    (source,), outputs = converter.get_input_tensors(operator), converter.get_output_tensors(operator)
    (count,), dtype = converter.shape_of(source), converter.get_tensor_type_str(source.tensor.Type())
    ends = [((count,), dtype), *[((count,), "int64")] * 3, ((1,), "int64")]
    values, _, places, _, number = onnx_operator(
        converter, "Unique", [converter.get_tensor_expr(source)], ends[:4], {"sorted": 0}
    )
    converter.counters[0] = (0, converter.bb.emit(number))
    return [values, relax.op.astype(places, converter.get_tensor_type_str(outputs[1].tensor.Type()))]


@handles("NON_MAX_SUPPRESSION_V4", "NON_MAX_SUPPRESSION_V5")
def _non_max_suppression(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    """Take the best box again and again; what overlaps it is dropped, or (V5) lowered by a Gaussian of the overlap.

    A box is dropped at an intersection over union of the limit or more, and at a score of the threshold or less.
    """
    from tvm import relax, tirx
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    tensors = converter.get_input_tensors(operator)
    count = converter.shape_of(tensors[0])[0]
    most = int(converter.constant(tensors[2], "largest number of boxes").reshape(-1)[0])
    if most < 1:
        raise UnsupportedError("no box is asked for", found=str(most), allowed="at least one")
    soft = len(tensors) == 6
    values = [converter.get_tensor_expr(item) for item in (*tensors[:2], *tensors[3:])]
    values[2:] = [converter.bb.emit(relax.op.reshape(value, (1,))) for value in values[2:]]

    def overlap(boxes: Any, one: Any, other: Any) -> Any:  # noqa: ANN401
        def corners(row: Any) -> tuple[Any, Any, Any, Any]:  # noqa: ANN401
            a, b, c, d = (boxes[row, T.int64(k)] for k in range(4))
            return tirx.min(a, c), tirx.min(b, d), tirx.max(a, c), tirx.max(b, d)

        (y0, x0, y1, x1), (v0, u0, v1, u1) = corners(one), corners(other)
        zero = tirx.const(0.0, "float32")
        both = tirx.max(tirx.min(y1, v1) - tirx.max(y0, v0), zero) * tirx.max(tirx.min(x1, u1) - tirx.max(x0, u0), zero)
        first, second = (y1 - y0) * (x1 - x0), (v1 - v0) * (u1 - u0)
        valid = tirx.all(first > zero, second > zero)
        union = tirx.Select(valid, first + second - both, tirx.const(1.0, "float32"))
        return tirx.Select(valid, both / union, zero)

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        boxes, scores, limit, threshold, *sigma = ins
        chosen, levels, number, left, shares = outs
        top, place = scalar("float32"), scalar("int64")
        number[0] = T.int32(0)
        with T.serial(0, most) as k:
            chosen[k] = T.int32(0)
            levels[k] = T.float32(0)
        with T.serial(0, count) as i:
            left[i] = tirx.Select(scores[i] > threshold[0], scores[i], T.float32(_NEVER))
        with T.serial(0, most):
            place[0] = T.int64(0)
            top[0] = left[0]
            with T.serial(0, count) as i, T.If(left[i] > top[0]), T.Then():
                top[0] = left[i]
                place[0] = T.Cast("int64", i)
            with T.If(top[0] > T.float32(_NEVER)), T.Then():
                chosen[number[0]] = T.Cast("int32", place[0])
                levels[number[0]] = top[0]
                number[0] = number[0] + T.int32(1)
                left[place[0]] = T.float32(_NEVER)
                with T.serial(0, count) as i:
                    shares[0] = overlap(boxes, place[0], i)
                    if sigma:
                        with T.If(tirx.all(sigma[0][0] > T.float32(0), left[i] > T.float32(_NEVER))), T.Then():
                            scale = T.float32(-0.5) / sigma[0][0]
                            left[i] = left[i] * tirx.exp(scale * shares[0] * shares[0])
                    with T.If(tirx.any(shares[0] >= limit[0], left[i] <= threshold[0])), T.Then():
                        left[i] = T.float32(_NEVER)

    ends = [((most,), "int32"), ((most,), "float32"), ((1,), "int32"), ((count,), "float32"), ((1,), "float32")]
    chosen, levels, number, *_ = call_loops(converter.bb, "suppression", values, ends, body)
    number = relax.op.reshape(number, ())
    return [chosen, levels, number] if soft else [chosen, number]
