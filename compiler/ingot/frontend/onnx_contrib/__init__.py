"""Operators of ONNX Runtime's own domain, com.microsoft, written out in ONNX's: one file for each family."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ingot.frontend.onnx_contrib.body import TABLE, Body

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from ingot.frontend.onnx_static import TensorType

DOMAIN = "com.microsoft"
_FAMILIES = ("attention", "fused", "norms", "packed", "quantized", "rotary")
# ONNX Runtime writes these under ONNX's own domain, whatever the opset.
UNDER_ONNX = frozenset(("LayerNormalization", "SimplifiedLayerNormalization"))


@functools.cache
def _load_families() -> None:
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")


def is_contrib(domain: str, operator: str) -> bool:
    """Whether this is an operator of com.microsoft that can be written out."""
    _load_families()
    return domain == DOMAIN and operator in TABLE


def contrib_operators() -> list[str]:
    """The operators of com.microsoft that can be written out."""
    _load_families()
    return sorted(TABLE)


def contrib_body(
    node: onnx.NodeProto,
    label: str,
    prefix: str,
    opset: int,
    types: Mapping[str, TensorType],
    constants: Mapping[str, np.ndarray],
    make_constant: Callable[[str, np.ndarray], None],
) -> list[tuple[onnx.NodeProto, str]]:
    """The nodes of ONNX, of the model's opset, that stand for `node`; what they make has `prefix` in its name.

    `types` has the types of its inputs, `constants` the values of those that are constant; make_constant(name, array)
    makes another one. Raises UnsupportedError for a form that cannot be written out.
    """
    _load_families()
    body = Body(node, label, prefix, opset, types, constants, make_constant)
    TABLE[node.op_type](body)
    return body.nodes


__all__ = ["DOMAIN", "UNDER_ONNX", "contrib_body", "contrib_operators", "is_contrib"]
