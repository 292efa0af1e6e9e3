"""Quantised operators that ONNX Runtime's quantiser and optimiser write: dequantize, compute, quantize.

What is exact on integers (MatMulInteger and its kin) stays on integers.
"""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_contrib.attention import attend_with_past
from ingot.frontend.onnx_contrib.body import Body, expands


def _dequantized(body: Body, index: int, axis: int = 1) -> str:
    """Input `index`, whose scale and zero point follow it, as float32; scales per channel belong to `axis`."""
    parameters = [body.input(i) for i in range(index, index + 3) if body.has(i)]
    if body.shape(index + 1) in ((), (1,)):
        return body.op("DequantizeLinear", *parameters)
    if body.opset >= 13:
        return body.op("DequantizeLinear", *parameters, axis=axis)
    # DequantizeLinear has no axis yet.
    rank, size = len(body.shape(index)), body.shape(index + 1)[0]
    column = [size if place == axis % rank else 1 for place in range(rank)]
    number = body.cast(parameters[0], "float32")
    if len(parameters) > 2:
        number = body.op("Sub", number, body.reshape(body.cast(parameters[2], "float32"), column))
    return body.op("Mul", number, body.reshape(parameters[1], column))


def _quantized(body: Body, x: str, index: int) -> None:
    """Make x output 0, by the scale and zero point at inputs `index` and `index` + 1."""
    parameters = [body.input(i) for i in (index, index + 1) if body.has(i)]
    body.result(0, body.op("QuantizeLinear", x, *parameters))


@expands("QLinearAdd", "QLinearMul")
def _binary(body: Body) -> None:
    _quantized(body, body.op(body.node.op_type[7:], _dequantized(body, 0), _dequantized(body, 3)), 6)


@expands("QLinearSigmoid", "QLinearLeakyRelu")
def _unary(body: Body) -> None:
    kept = {"alpha": float(body.attr("alpha", 0.01))} if body.node.op_type == "QLinearLeakyRelu" else {}
    _quantized(body, body.op(body.node.op_type[7:], _dequantized(body, 0), **kept), 3)


@expands("QLinearSoftmax")
def _softmax(body: Body) -> None:
    """By the opset that the node names: before 13 all axes from `axis` on are one."""
    shape, axis = body.shape(), int(body.attr("axis", -1)) % max(len(body.shape()), 1)
    x = _dequantized(body, 0)
    if int(body.attr("opset", body.opset)) < 13:
        x = body.reshape(x, (int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))))
        x = body.reshape(body.softmax(x, 2), shape)
    else:
        last = [*[place for place in range(len(shape)) if place != axis], axis]
        x = body.softmax(body.transpose(x, last), len(shape))
        x = body.transpose(x, np.argsort(last).tolist())
    _quantized(body, x, 3)


@expands("QLinearReduceMean")
def _reduce_mean(body: Body) -> None:
    rank, kept = len(body.shape()), bool(body.attr("keepdims", 1))
    axes = sorted(int(axis) % rank for axis in body.attr("axes", range(rank)))
    x = body.mean(_dequantized(body, 0), axes)
    if not kept:
        x = body.reshape(x, [size for place, size in enumerate(body.shape()) if place not in axes])
    _quantized(body, x, 3)


@expands("QLinearWhere")
def _where(body: Body) -> None:
    _quantized(body, body.op("Where", body.input(0), _dequantized(body, 1), _dequantized(body, 4)), 7)


@expands("QLinearConcat")
def _concat(body: Body) -> None:
    parts = [_dequantized(body, index) for index in range(2, len(body.node.input), 3)]
    _quantized(body, body.op("Concat", *parts, axis=int(body.attr("axis"))), 0)


def _channels_first(body: Body, x: str, rank: int) -> str:
    return body.transpose(x, (0, rank - 1, *range(1, rank - 1)))


def _channels_last(body: Body, x: str, rank: int) -> str:
    return body.transpose(x, (0, *range(2, rank), 1))


@expands("QLinearAveragePool", "QLinearGlobalAveragePool")
def _pool(body: Body) -> None:
    last, rank = bool(body.attr("channels_last", 0)), len(body.shape())
    x = _dequantized(body, 0)
    x = _channels_first(body, x, rank) if last else x
    x = body.op(body.node.op_type[7:], x, **body.attributes("channels_last"))
    _quantized(body, _channels_last(body, x, rank) if last else x, 3)


@expands("NhwcMaxPool")
def _nhwc_max_pool(body: Body) -> None:
    rank = len(body.shape())
    x = body.op("MaxPool", _channels_first(body, body.input(0), rank), **body.attributes())
    body.result(0, _channels_last(body, x, rank))


@expands("QLinearConv")
def _conv(body: Body) -> None:
    """ONNX's own, which may have its channels last."""
    last, rank, inputs = bool(body.attr("channels_last", 0)), len(body.shape()), list(body.node.input)
    if last:
        inputs[0] = _channels_first(body, inputs[0], rank)
    x = body.op("QLinearConv", *inputs, **body.attributes("channels_last"))
    body.result(0, _channels_last(body, x, rank) if last else x)


@expands("QGemm")
def _gemm(body: Body) -> None:
    """alpha * (a @ b + c), where c counts in units of a's scale times b's."""
    turned = bool(body.attr("transB", 0))
    factors = [_dequantized(body, 0), _dequantized(body, 3, 0 if turned else 1)]
    if body.has(6):
        scale = body.op("Mul", body.input(1), body.input(4))
        factors.append(body.op("Mul", body.cast(body.input(6), "float32"), scale))
    x = body.op("Gemm", *factors, transA=int(body.attr("transA", 0)), transB=int(turned))
    alpha = float(body.attr("alpha", 1.0))
    if alpha != 1.0:
        x = body.op("Mul", x, body.constant(np.array(alpha, np.float32)))
    if body.has(7):
        _quantized(body, x, 7)
    else:
        body.result(0, x)


def _integer_product(body: Body, a: str, a_zero: str, b: int, b_zero: int) -> str:
    """a @ input `b` in int32, then as float32."""
    zeros = [a_zero, body.input(b_zero)]
    while zeros and not zeros[-1]:
        zeros.pop()
    return body.cast(body.op("MatMulInteger", a, body.input(b), *zeros), "float32")


@expands("MatMulIntegerToFloat")
def _matmul_to_float(body: Body) -> None:
    """(a - zero) @ (b - zero) * a's scale * b's scales + bias."""
    x = _integer_product(body, body.input(0), body.input(4), 1, 5)
    x = body.op("Mul", x, body.op("Mul", body.input(2), body.input(3)))
    body.result(0, body.op("Add", x, body.input(6)) if body.has(6) else x)


@expands("DynamicQuantizeMatMul")
def _dynamic_matmul(body: Body) -> None:
    """The product of x, quantised to 8 bits by its own range, with a quantised matrix."""
    number, scale, zero = body.ops("DynamicQuantizeLinear", 3, body.input(0))
    x = body.op("Mul", _integer_product(body, number, zero, 1, 3), body.op("Mul", scale, body.input(2)))
    body.result(0, body.op("Add", x, body.input(4)) if body.has(4) else x)


@expands("QAttention")
def _attention(body: Body) -> None:
    """Attention whose projection is a product of integers."""
    if body.attr("do_rotary", 0) or body.attr("past_present_share_buffer", 0):
        raise body.unsupported("rotary embedding or a shared cache", "neither")
    (batch, length, _), heads = body.shape(), int(body.attr("num_heads"))
    width = body.shape(1)[1] // 3
    x = _integer_product(body, body.input(0), body.input(6), 1, 7)
    x = body.op("Add", body.op("Mul", x, body.op("Mul", body.input(3), body.input(4))), body.input(2))
    parts = []
    for number in range(3):
        part = body.reshape(body.slice(x, 2, number * width, (number + 1) * width), (batch, length, heads, -1))
        parts.append(body.transpose(part, (0, 2, 1, 3)))
    attend_with_past(body, parts, width, mask=5, bias=9, past=8)


@expands("DynamicQuantizeLSTM")
def _lstm(body: Body) -> None:
    """An LSTM with quantised weights, [directions, in, 4 h]: in float32, so inputs are not rounded to 8 bits."""
    weights = []
    for index, scale in ((1, 8), (2, 10)):
        number = body.need(index, "weight").astype(np.float32)
        factor, zero = (
            body.need(scale + i, meaning).astype(np.float32) for i, meaning in enumerate(("scale", "zero point"))
        )
        shape = (number.shape[0], 1, -1)
        real = (number - zero.reshape(shape)) * factor.reshape(shape)
        weights.append(body.constant(np.ascontiguousarray(real.transpose(0, 2, 1))))
    inputs = [body.input(0), *weights, *(body.input(index) for index in range(3, 8))]
    while not inputs[-1]:
        inputs.pop()
    results = body.ops("LSTM", 3, *inputs, **body.attributes())
    for index, name in enumerate(results):
        body.result(index, name)
