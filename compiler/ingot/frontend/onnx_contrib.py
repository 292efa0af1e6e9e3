"""Quantised operators of ONNX Runtime's own domain, com.microsoft, written out in ONNX's operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingot.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx

DOMAIN = "com.microsoft"
OPERATORS = frozenset(
    (
        "QLinearAdd",
        "QLinearMul",
        "QGemm",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "QLinearSigmoid",
        "QLinearSoftmax",
    )
)
# What the plain operator does not know.
_OWN_ATTRIBUTES = ("channels_last", "opset")


def contrib_body(
    node: onnx.NodeProto, label: str, prefix: str, shapes: dict[str, tuple[int, ...]], opset: int
) -> list[tuple[onnx.NodeProto, str]]:
    """The nodes that stand for `node`: dequantize, compute in float32, quantize. `shapes` are those of its inputs."""
    import onnx

    make, given = onnx.helper.make_node, list(node.input)
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    nodes: list[onnx.NodeProto] = []

    def real(index: int, name: str, axis: int = 1) -> str:
        parameters = [item for item in given[index : index + 3] if item]
        per_channel = shapes[given[index + 1]] not in ((), (1,))
        if per_channel and opset < 13:
            # DequantizeLinear has no axis yet; only QGemm's second factor, a matrix, comes here.
            data, scale, zero = given[index : index + 3]
            columns = [scale]
            nodes.append(make("Cast", [data], [prefix + name + "_number"], to=onnx.TensorProto.FLOAT))
            if zero:
                nodes.append(make("Cast", [zero], [prefix + name + "_zero"], to=onnx.TensorProto.FLOAT))
                columns.append(prefix + name + "_zero")
            if axis == 0:
                for place, column in enumerate(columns):
                    columns[place] = f"{prefix}{name}_column{place}"
                    nodes.append(make("Unsqueeze", [column], [columns[place]], axes=[1]))
            number = prefix + name + "_number"
            if zero:
                nodes.append(make("Sub", [number, columns[1]], [prefix + name + "_centred"]))
                number = prefix + name + "_centred"
            nodes.append(make("Mul", [number, columns[0]], [prefix + name]))
            return prefix + name
        nodes.append(make("DequantizeLinear", parameters, [prefix + name], **({"axis": axis} if per_channel else {})))
        return prefix + name

    if node.op_type in ("QLinearAdd", "QLinearMul"):
        nodes.append(make(node.op_type[7:], [real(0, "a"), real(3, "b")], [prefix + "real"]))
        output = 6
    elif node.op_type == "QGemm":
        turned = int(attributes.get("transB", 0))
        factors = [real(0, "a"), real(3, "b", 0 if turned else 1)]
        if len(given) > 6 and given[6]:
            alpha = float(attributes.get("alpha", 1.0))
            if alpha != 1.0:
                raise UnsupportedError("QGemm with alpha is not supported", where=label, found=str(alpha), allowed="1")
            nodes.append(make("Mul", [given[1], given[4]], [prefix + "scale"]))
            nodes.append(make("Cast", [given[6]], [prefix + "whole"], to=onnx.TensorProto.FLOAT))
            nodes.append(make("Mul", [prefix + "whole", prefix + "scale"], [prefix + "c"]))
            factors.append(prefix + "c")
        nodes.append(make("Gemm", factors, [prefix + "real"], **attributes))
        output = 7
    else:
        if attributes.get("channels_last", 0):
            raise UnsupportedError("channels_last is not supported", where=label, found="1", allowed="0")
        old = int(attributes.get("opset", opset)) < 13
        if node.op_type == "QLinearSoftmax" and old != (opset < 13) and attributes.get("axis", -1) != -1:
            raise UnsupportedError("this axis means another thing in the model's opset", where=label, allowed="-1")
        kept = {name: value for name, value in attributes.items() if name not in _OWN_ATTRIBUTES}
        nodes.append(make(node.op_type[7:], [real(0, "a")], [prefix + "real"], **kept))
        output = 3
    parameters = [item for item in given[output : output + 2] if item]
    kind = "QuantizeLinear" if parameters else "Identity"
    nodes.append(make(kind, [prefix + "real", *parameters], [node.output[0]]))
    return [(item, label) for item in nodes]
