"""The values that ONNX's Constant nodes hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.onnx_tensors import tensor_array

if TYPE_CHECKING:
    import onnx


def stays_true(body: onnx.GraphProto) -> bool:
    """Whether a Loop's body hands its condition on, or says true."""
    name = body.output[0].name
    makers = {output: node for node in body.node for output in node.output}
    while name in makers and makers[name].op_type == "Identity":
        name = makers[name].input[0]
    if name == body.input[1].name:
        return True
    maker = makers.get(name)
    if maker is not None and maker.op_type == "Constant":
        attributes = {attribute.name: attribute for attribute in maker.attribute}
        return bool(np.all(constant_value(attributes, "Loop")))
    return any(tensor.name == name and bool(np.all(tensor_array(tensor, "Loop"))) for tensor in body.initializer)


def constant_value(attributes: dict[str, onnx.AttributeProto], label: str) -> np.ndarray:
    """The value that a Constant node's attributes give."""
    if "value" in attributes:
        return tensor_array(attributes["value"].t, label)
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        if name in attributes:
            attribute = attributes[name]
            return np.array(attribute.f if dtype is np.float32 else attribute.i, dtype=dtype)
    if "value_floats" in attributes:
        return np.array(list(attributes["value_floats"].floats), dtype=np.float32)
    if "value_ints" in attributes:
        return np.array(list(attributes["value_ints"].ints), dtype=np.int64)
    found = ", ".join(attributes) or "no value"
    raise UnsupportedError("a Constant of this kind is not supported", where=label, found=found, allowed="numbers")
