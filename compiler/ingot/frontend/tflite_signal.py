"""RFFT2D: the Fourier transform of real rows, then of the columns of the spectra."""

from __future__ import annotations

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.fourier import matrices, real_transform
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter


@handles("RFFT2D")
def _rfft2d(converter: TfliteConverter, operator: Operator) -> Expr:
    """[..., height, width] real -> [..., rows, columns / 2 + 1, 2]: real and imaginary part."""
    from tvm import relax

    source, lengths = converter.get_input_tensors(operator)
    rows, columns = (int(size) for size in converter.constant(lengths, "length of the transform").reshape(-1))
    shape = converter.shape_of(source)
    if len(shape) < 2 or rows < 1 or columns < 1:
        raise UnsupportedError("a transform of this length is not supported", found=f"{rows} x {columns}")
    bb, rank = converter.bb, len(shape)

    def fitted(x: Expr, axis: int, have: int, wanted: int) -> Expr:
        if have > wanted:
            return bb.emit(relax.op.strided_slice(x, [axis], [0], [wanted], [1]))
        widths = [0] * (2 * rank)
        widths[2 * axis + 1] = wanted - have
        return bb.emit(relax.op.nn.pad(x, widths)) if have < wanted else x

    def factors(length: int, wanted: int, name: str) -> tuple[Expr, Expr]:
        cosines, sines = matrices(length, wanted)
        make = converter.exp_tab.new_const
        return (
            make(cosines.astype(np.float32), source_name=f"{name}_cosines".encode()),
            make(sines.astype(np.float32), source_name=f"{name}_sines".encode()),
        )

    x = fitted(converter.get_tensor_expr(source), rank - 1, shape[-1], columns)
    x = fitted(x, rank - 2, shape[-2], rows)

    def weight(name: str, value: np.ndarray) -> Expr:
        return converter.exp_tab.new_const(value, dtype=str(value.dtype), source_name=f"row_{name}".encode())

    real, imaginary = real_transform(bb, weight, bb.emit(x), "float32")
    if rows > 1:
        # The matrices are symmetric, so they may stand on the left.
        cosines, sines = factors(rows, rows, "column")
        down_real = relax.op.subtract(relax.op.matmul(cosines, real), relax.op.matmul(sines, imaginary))
        imaginary = bb.emit(relax.op.add(relax.op.matmul(sines, real), relax.op.matmul(cosines, imaginary)))
        real = bb.emit(down_real)
    return relax.op.stack([real, imaginary], axis=rank)
