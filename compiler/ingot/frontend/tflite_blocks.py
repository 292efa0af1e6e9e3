"""TFLite operators that cut tensors into blocks or put them on diagonals: they work on stored integers as they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter


@handles("DENSIFY")
def _densify(converter: TfliteConverter, operator: Operator) -> Expr:
    """Sparse constants are written out before any operator sees them."""
    return converter.get_tensor_expr(converter.get_input_tensors(operator)[0])


def _cells(blocks: list[int], shape: tuple[int, ...], margins: list[list[int]]) -> None:
    fits = len(shape) > len(blocks) and len(margins) == len(blocks) and min([*blocks, 1]) > 0
    if not fits or any(margin < 0 for pair in margins for margin in pair):
        raise UnsupportedError("blocks do not fit the tensor", found=f"{blocks}, {margins}", allowed=str(list(shape)))


@handles("SPACE_TO_BATCH_ND")
def _space_to_batch(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, block, padding = converter.get_input_tensors(operator)
    op, shape, value = relax.op, converter.shape_of(source), converter.get_tensor_expr(source)
    blocks = [int(size) for size in converter.constant(block, "block").reshape(-1)]
    margins = converter.constant(padding, "padding").reshape(-1, 2).tolist()
    _cells(blocks, shape, margins)
    rank = len(blocks)
    sizes = [size + sum(pair) for size, pair in zip(shape[1:], margins, strict=False)]
    if any(size % cell for size, cell in zip(sizes, blocks, strict=True)):
        raise UnsupportedError("blocks do not fit the tensor", found=str(blocks), allowed=f"divisors of {sizes}")
    rest = list(shape[1 + rank :])
    fill = float(converter.zero_of(source))
    value = op.nn.pad(value, [0, 0, *(part for pair in margins for part in pair), *[0, 0] * len(rest)], pad_value=fill)
    cells = [part for size, cell in zip(sizes, blocks, strict=True) for part in (size // cell, cell)]
    value = op.reshape(value, (shape[0], *cells, *rest))
    inner, outer = [2 + 2 * i for i in range(rank)], [1 + 2 * i for i in range(rank)]
    value = op.permute_dims(value, [*inner, 0, *outer, *range(1 + 2 * rank, 1 + 2 * rank + len(rest))])
    batch = shape[0] * int(np.prod(blocks))
    return op.reshape(value, (batch, *(size // cell for size, cell in zip(sizes, blocks, strict=True)), *rest))


@handles("BATCH_TO_SPACE_ND")
def _batch_to_space(converter: TfliteConverter, operator: Operator) -> Expr:
    from tvm import relax

    source, block, crops = converter.get_input_tensors(operator)
    op, shape, value = relax.op, converter.shape_of(source), converter.get_tensor_expr(source)
    blocks = [int(size) for size in converter.constant(block, "block").reshape(-1)]
    margins = converter.constant(crops, "crops").reshape(-1, 2).tolist()
    _cells(blocks, shape, margins)
    rank, total = len(blocks), int(np.prod(blocks))
    sizes = [size * cell for size, cell in zip(shape[1:], blocks, strict=False)]
    if shape[0] % total or any(sum(pair) >= size for size, pair in zip(sizes, margins, strict=True)):
        raise UnsupportedError("blocks do not fit the tensor", found=f"{blocks}, {margins}", allowed=str(list(shape)))
    rest = list(shape[1 + rank :])
    value = op.reshape(value, (*blocks, shape[0] // total, *shape[1:]))
    order = [rank, *(part for i in range(rank) for part in (rank + 1 + i, i))]
    value = op.permute_dims(value, [*order, *range(1 + 2 * rank, 1 + 2 * rank + len(rest))])
    value = op.reshape(value, (shape[0] // total, *sizes, *rest))
    if not any(part for pair in margins for part in pair):
        return value
    begins, ends = [pair[0] for pair in margins], [s - pair[1] for s, pair in zip(sizes, margins, strict=True)]
    return op.strided_slice(value, list(range(1, 1 + rank)), begins, ends, [1] * rank)


@handles("MATRIX_DIAG", "MATRIX_SET_DIAG")
def _diagonal(converter: TfliteConverter, operator: Operator) -> Expr:
    """The last tensor's rows on the diagonals of matrices of zeros, or of the first tensor."""
    from tvm import te, tirx

    tensors = converter.get_input_tensors(operator)
    values = [converter.get_tensor_expr(item) for item in tensors]
    shape = converter.shape_of(tensors[0])
    matrix = shape if len(tensors) == 2 else (*shape, shape[-1])
    if converter.shape_of(tensors[-1]) != (*matrix[:-2], min(matrix[-2:])):
        raise UnsupportedError("a diagonal does not fit its matrix", found=str(list(shape)), allowed=str(matrix))
    dtype = converter.get_tensor_type_str(tensors[0].tensor.Type())

    def define(*given: Any) -> Any:  # noqa: ANN401 - TE tensors
        def element(*index: Any) -> Any:  # noqa: ANN401
            row, column = index[-2:]
            other = given[0](*index) if len(given) == 2 else tirx.const(0, dtype)
            on = given[-1](*index[:-2], tirx.min(row, column))
            return tirx.if_then_else(row.equal(column), on, other)

        return te.compute(matrix, element, name="diagonal")

    return converter.bb.call_te(define, *values, primfunc_name_hint="diagonal")
