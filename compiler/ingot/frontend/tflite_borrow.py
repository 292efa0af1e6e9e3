"""TFLite operators that are an ONNX operator under another name: converted by the ONNX operator's own converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ingot.frontend.tvm_types import Expr, TfliteConverter, Value

_OPSET = 22


def onnx_operator(
    converter: TfliteConverter,
    operator: str,
    inputs: Sequence[Expr],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    attributes: Mapping[str, Value] | None = None,
    constants: Mapping[int, np.ndarray] | None = None,
) -> list[Expr]:
    """The results of an ONNX operator that this compiler has its own converter for.

    inputs: Relax expressions, None where one is left out. outputs: their shapes and dtypes. constants: values of inputs
    by place, which are used in place of the expression.
    """
    import onnx
    from tvm import relax

    from ingot.frontend.onnx_ops import own_converter
    from ingot.frontend.onnx_ops.context import Context
    from ingot.frontend.onnx_static import TensorType

    def elem(dtype: str) -> int:
        return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def weight(name: str, value: np.ndarray) -> Expr:
        return converter.exp_tab.new_const(value, dtype=value.dtype.name, source_name=name.encode())

    convert = own_converter("", operator)
    if convert is None:
        raise LookupError(operator)
    given: list[Expr] = []
    types, values = {}, {}
    for place, item in enumerate(inputs):
        fixed = (constants or {}).get(place)
        name = f"x{place}"
        if fixed is not None:
            values[name] = fixed
            item = relax.const(fixed, fixed.dtype.name) if fixed.size <= 1 else weight(name, fixed)
        given.append(None if item is None else converter.bb.emit(item))
        if item is not None:
            kind = given[-1].ty
            types[name] = TensorType(elem(str(kind.dtype.dtype)), tuple(int(dim) for dim in kind.shape))
    ends = [f"y{place}" for place in range(len(outputs))]
    for name, (shape, dtype) in zip(ends, outputs, strict=True):
        types[name] = TensorType(elem(dtype), tuple(shape))
    names = [f"x{place}" if item is not None else "" for place, item in enumerate(given)]
    node = onnx.helper.make_node(operator, names, ends, **(attributes or {}))
    found = convert(Context(converter.bb, node, operator, _OPSET, given, types, values, weight))
    return list(found) if isinstance(found, list) else [found]
