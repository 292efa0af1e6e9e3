"""Operators into which ONNX Runtime's optimiser joins float operators: activations, products, convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ingot.frontend.onnx_contrib.body import Body, expands


def gelu(body: Body, x: str) -> str:
    """x * P(a normal variable < x), by the error function."""
    spread = body.op("Erf", body.op("Mul", x, body.scalar(math.sqrt(0.5))))
    return body.op("Mul", body.op("Mul", x, body.scalar(0.5)), body.op("Add", spread, body.scalar(1.0)))


def _fast_gelu(body: Body, x: str) -> str:
    """Its approximation by tanh (Hendrycks and Gimpel, 2016)."""
    linear = math.sqrt(2 / math.pi)
    cubic = body.op("Mul", body.op("Mul", x, x), body.scalar(0.044715 * linear))
    inner = body.op("Mul", x, body.op("Add", cubic, body.scalar(linear)))
    outer = body.op("Add", body.op("Tanh", inner), body.scalar(1.0))
    return body.op("Mul", body.op("Mul", x, body.scalar(0.5)), outer)


@expands("Gelu")
def _gelu(body: Body) -> None:
    body.real_result(0, gelu(body, body.real(0)))


@expands("BiasGelu")
def _bias_gelu(body: Body) -> None:
    body.real_result(0, gelu(body, body.op("Add", body.real(0), body.real(1))))


@expands("FastGelu")
def _fast(body: Body) -> None:
    x = body.op("Add", body.real(0), body.real(1)) if body.has(1) else body.real(0)
    body.real_result(0, _fast_gelu(body, x))


@expands("QuickGelu")
def _quick_gelu(body: Body) -> None:
    x = body.real(0)
    inner = body.op("Mul", x, body.scalar(float(body.attr("alpha", 1.702))))
    body.real_result(0, body.op("Mul", x, body.op("Sigmoid", inner)))


@expands("BiasSoftmax")
def _bias_softmax(body: Body) -> None:
    shape = body.shape()
    axis, rank = int(body.attr("axis", 1)) % len(shape), len(shape)
    x = body.op("Add", body.real(0), body.real(1))
    # All axes from `axis` on are one.
    flat = body.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:]))) if axis != rank - 1 else x
    result = body.softmax(flat, 2 if flat != x else rank)
    body.real_result(0, body.reshape(result, shape) if flat != x else result)


def _activated(body: Body, x: str, name: str, parameters: Sequence[float]) -> str:
    """The activation that a fused operator names, with its parameters in the order of ONNX's attributes."""
    first, second = [*parameters, None, None][:2]
    if name in ("", "Relu", "Tanh", "Sigmoid", "Softplus", "Softsign"):
        return body.op(name, x) if name else x
    if name in ("LeakyRelu", "Elu", "ThresholdedRelu"):
        return body.op(name, x, **({} if first is None else {"alpha": float(first)}))
    if name == "Clip":
        low, high = (float(np.finfo("float32").min), float(np.finfo("float32").max))
        return body.clip(x, low if first is None else float(first), high if second is None else float(second))
    if name == "HardSigmoid":
        alpha, beta = 0.2 if first is None else float(first), 0.5 if second is None else float(second)
        return body.op(name, x, alpha=alpha, beta=beta)
    if name == "HardSwish":
        inner = body.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        return body.op("Mul", x, inner)
    if name == "Gelu":
        return gelu(body, x)
    if name == "QuickGelu":
        return body.op("Mul", x, body.op("Sigmoid", body.op("Mul", x, body.scalar(1.702 if first is None else first))))
    raise body.unsupported(f"activation {name!r}", "Relu, Tanh, Sigmoid, LeakyRelu, Clip, HardSigmoid")


@expands("FusedConv")
def _fused_conv(body: Body) -> None:
    """activation(conv(x, w, bias) + z)."""
    attributes = body.attributes("activation", "activation_params")
    inputs = [body.real(index) for index in (0, 1, 2)]
    result = body.op("Conv", *[name for name in inputs if name], **attributes)
    if body.has(3):
        result = body.op("Add", result, body.real(3))
    parameters = list(body.attr("activation_params", ()))
    body.real_result(0, _activated(body, result, body.attr("activation", ""), parameters))


@expands("FusedGemm")
def _fused_gemm(body: Body) -> None:
    names = ("activation", "activation_alpha", "activation_beta", "activation_gamma")
    inputs = [body.real(index) for index in (0, 1, 2)]
    result = body.op("Gemm", *[name for name in inputs if name], **body.attributes(*names))
    parameters = [body.attr(name) for name in names[1:]]
    while parameters and parameters[-1] is None:
        parameters.pop()
    body.real_result(0, _activated(body, result, body.attr("activation", ""), parameters))


@expands("FusedMatMul", "TransposeMatMul")
def _fused_matmul(body: Body) -> None:
    """alpha * a @ b; transBatch moves the first axis behind the batch axes, trans swaps the last two."""
    factors = []
    for index, letter in ((0, "A"), (1, "B")):
        rank = len(body.shape(index))
        axes = list(range(rank))
        if rank > 2 and body.attr(f"transBatch{letter}", 0):
            axes = [*axes[1:-1], axes[0], axes[-1]]
        if rank > 1 and body.attr(f"trans{letter}", 0):
            axes[-2:] = axes[:-3:-1]
        x = body.real(index)
        factors.append(x if axes == list(range(rank)) else body.transpose(x, axes))
    result, alpha = body.op("MatMul", *factors), float(body.attr("alpha", 1.0))
    body.real_result(0, result if alpha == 1.0 else body.op("Mul", result, body.scalar(alpha)))


@expands("ConvTransposeWithDynamicPads")
def _conv_transpose(body: Body) -> None:
    """ConvTranspose whose pads are an input, which must be constant."""
    attributes = body.attributes("pads")
    if body.has(2):
        attributes["pads"] = [int(value) for value in body.need(2, "pads").reshape(-1)]
    inputs = [body.real(index) for index in (0, 1, 3)]
    body.real_result(0, body.op("ConvTranspose", *[name for name in inputs if name], **attributes))
