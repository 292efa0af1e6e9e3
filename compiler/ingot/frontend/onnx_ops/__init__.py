"""ONNX operators -> Relax: one table, filled by one file per operator family.

An operator is supported if it stands in this table, or in TVM's own converter table and not on the list of those
that TVM has but that make tensors whose size depends on data, or values that are no tensors.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from ingot.frontend.custom import OpNode, Shapes, custom_op
from ingot.frontend.onnx_contrib import DOMAIN, contrib_operators, is_contrib
from ingot.frontend.onnx_ops.context import TABLE, TYPES, Context, Converter

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_FAMILIES = (
    "activation",
    "along",
    "convolution",
    "counted",
    "elementwise",
    "features",
    "grid_sample",
    "index",
    "linear",
    "linear_models",
    "normalization",
    "pad",
    "quantize",
    "recurrent",
    "reduce",
    "resize",
    "scatter",
    "search",
    "shape",
    "signal",
    "suppression",
    "support_vectors",
    "ngrams",
    "trees",
    "windows",
)

# Handled before conversion: they become constants, one of their branches, or their steps.
_STATIC = frozenset(("Constant", "ConstantOfShape", "Shape", "Size", "If", "Scan", "Loop"))

# In TVM's table, but without static tensors as results.
_NOT_TENSORS = frozenset(
    (
        "Optional", "OptionalHasElement", "OptionalGetElement", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
        "SequenceInsert", "SequenceLength", "ConcatFromSequence", "SplitToSequence", "SequenceAt", "AllClassNMS",
        "EmbedLayerNormalization",
    )
)  # fmt: skip
# Why operators of ONNX have no converter, where it is more than that nobody has written one.
_CHANCE, _STRINGS, _SEQUENCES = "makes random numbers", "works on strings", "works on sequences or optional values"
_REFUSED = {
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"), _CHANCE
    ),
    **dict.fromkeys(("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"), _STRINGS),
    **dict.fromkeys(
        (
            "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt",
            "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
            "SplitToSequence",
        ),
        _SEQUENCES,
    ),
    "ImageDecoder": "reads image files",
}  # fmt: skip
# TVM's converters take fewer forms of these than ONNX's own function bodies, which are used instead.
_BY_BODY = frozenset(("Attention", "GroupNormalization", "RMSNormalization", "MeanVarianceNormalization"))
# Operators whose float16 and bfloat16 forms compute in float32: sums of many terms, functions without 16-bit kernels.
IN_FLOAT32 = frozenset(
    (
        "MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "AveragePool", "GlobalAveragePool", "LpPool",
        "GlobalLpPool", "Softmax", "LogSoftmax", "LRN", "BatchNormalization", "LayerNormalization",
        "InstanceNormalization", "GroupNormalization", "LpNormalization", "RMSNormalization", "Resize", "Upsample",
        "LSTM", "GRU", "RNN", "ReduceMean", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceSumSquare", "Mean", "Sum", "CumSum", "CumProd", "Exp", "Log", "Sigmoid", "Tanh",
        "Erf", "Gelu", "Pow", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh",
        "Softplus", "Softsign", "Elu", "Selu", "Celu", "Mish", "HardSigmoid", "HardSwish", "Swish", "GridSample",
        "RoiAlign", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "DFT", "STFT", "Det", "Mod",
        "DeformConv", "Col2Im",
    )
)  # fmt: skip
# Operators of com.microsoft that TVM lists by bare name: written out by `onnx_contrib`.
_CONTRIB = frozenset(("FastGelu", "BiasGelu", "SkipLayerNormalization", "MatMulInteger16"))


@functools.cache
def _load_families() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")


@functools.cache
def tvm_converters() -> dict[str, Any]:
    """TVM's own converters that this compiler relies on, by operator."""
    from tvm.relax.frontend.onnx import onnx_frontend

    table = onnx_frontend._get_convert_map()
    return {name: table[name] for name in table if name not in _NOT_TENSORS | _BY_BODY | _CONTRIB}


def own_converter(domain: str, operator: str) -> Converter | None:
    """This compiler's converter of an operator, if it has its own."""
    _load_families()
    return TABLE.get(("" if domain == "ai.onnx" else domain, operator))


def operators_of_domain(domain: str) -> list[str]:
    """The operators of a domain other than ONNX's own that are supported, but for those that users registered."""
    _load_families()
    return sorted(
        {name for owner, name in TABLE if owner == domain} | {*(contrib_operators() if domain == DOMAIN else ())}
    )


def own_types(domain: str, operator: str) -> Callable[[OpNode], Shapes] | None:
    """What tells the outputs of an operator that the onnx package infers none for, if this compiler does."""
    _load_families()
    return TYPES.get(("" if domain == "ai.onnx" else domain, operator))


def is_supported(domain: str, operator: str) -> bool:
    """Whether some converter takes this operator."""
    if custom_op(domain, operator) is not None:
        return True
    if own_converter(domain, operator) is not None:
        return True
    if is_contrib(domain, operator):
        return True
    if domain not in ("", "ai.onnx"):
        return False
    return operator in _STATIC or operator in tvm_converters()


def why_refused(operator: str) -> str:
    """Why an operator that is not supported has no converter, as the rest of a sentence about it; may be empty."""
    return _REFUSED.get(operator, "")


__all__ = [
    "IN_FLOAT32",
    "Context",
    "Converter",
    "is_supported",
    "operators_of_domain",
    "own_converter",
    "own_types",
    "tvm_converters",
    "why_refused",
]
