"""How many multiply-adds a kernel executes on integers and on floating-point numbers, read from its loops."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from ingot.schedules.written import REAL_PRODUCTS, WHOLE_PRODUCTS

#: The kind of a reduction's iteration variable.
_REDUCTION = 2


def multiply_adds(function: Any) -> tuple[int, int]:  # noqa: ANN401 - a PrimFunc, not yet scheduled
    """Return the multiply-adds into integer sums and into all others.

    A block counts if it reduces products of what it reads: once for each product and each of its iterations, those
    for padding of a tile included. A block of machine forms says how many it executes.
    """
    whole, real = 0, 0

    def block(node: Any) -> None:  # noqa: ANN401
        nonlocal whole, real
        whole += int(node.annotations.get(WHOLE_PRODUCTS, "0"))
        real += int(node.annotations.get(REAL_PRODUCTS, "0"))
        if not any(int(var.iter_type) == _REDUCTION for var in node.iter_vars) or len(node.writes) != 1:
            return
        count = _products(node.body)
        for var in node.iter_vars:
            count *= int(var.dom.extent)
        if "int" in str(node.writes[0].source.dtype):
            whole += count
        else:
            real += count

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, block)])
    return whole, real


def _products(body: Any) -> int:  # noqa: ANN401
    """Return the number of multiplications of two values that are read from buffers."""
    found = 0

    def product(node: Any) -> None:  # noqa: ANN401
        nonlocal found
        found += _reads(node.a) and _reads(node.b)

    tvm_ffi.structural_walk(body, [(tirx.Mul, product)])
    return found


def _reads(expr: Any) -> bool:  # noqa: ANN401
    """Say whether an expression reads a buffer."""
    reads = False

    def load(_: Any) -> None:  # noqa: ANN401
        nonlocal reads
        reads = True

    tvm_ffi.structural_walk(expr, [(ir.TensorLoad, load)])
    return reads
