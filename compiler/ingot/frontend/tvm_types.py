"""Names for what comes from TVM, which has no type information: they say what a value is, mypy takes any."""

from __future__ import annotations

from typing import Any, TypeAlias

Expr: TypeAlias = Any
"""A Relax expression."""
Binding: TypeAlias = Any
"""A binding of a dataflow block."""
Function: TypeAlias = Any
"""A Relax function."""
Module: TypeAlias = Any
"""A tvm.IRModule."""
Builder: TypeAlias = Any
"""A relax.BlockBuilder."""
RelaxType: TypeAlias = Any
"""The type of a Relax expression."""
Value: TypeAlias = Any
"""An attribute's value: number, text, list or tensor."""
TfliteConverter: TypeAlias = Any
"""The converter of `ingot.frontend.tflite_ops`."""
Wrapper: TypeAlias = Any
"""TVM's wrapper of a TFLite tensor: index, tensor, buffer and quantisation."""
Operator: TypeAlias = Any
"""A tflite.Operator."""
Options: TypeAlias = Any
"""An operator's options table."""
