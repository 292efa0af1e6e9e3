"""Matrices of a few bits for each number, with a scale for each block: unpacked when the model is compiled."""

from __future__ import annotations

import numpy as np

from ingot.frontend.onnx_contrib.body import Body, expands

# The 16 values of a normal distribution's quantiles (NF4: Dettmers et al., 2023, appendix E), and of 4-bit floats.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (
    0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    -0.0, -0.0052083333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The numbers in the bytes of the last axis, the lowest bits first."""
    count = 8 // bits
    shifts = np.arange(count, dtype=np.uint8) * bits
    numbers: np.ndarray = (packed.astype(np.uint8)[..., None] >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(*packed.shape[:-1], packed.shape[-1] * count)


@expands("MatMulNBits")
def _matmul_n_bits(body: Body) -> None:
    """x [..., k] by the transpose of a matrix [n, blocks of k, bytes] of 2, 4 or 8 bits, with a scale for each block.

    A zero point for each block is packed like the matrix, or a float; without one it is half the range. `g_idx`
    (input 4) names another block for each of the k columns. Input 5 is a bias.
    """
    bits, n, k, block = (int(body.attr(name)) for name in ("bits", "N", "K", "block_size"))
    if bits not in (2, 4, 8):
        raise body.unsupported(f"{bits} bits", "2, 4 or 8")
    blocks = -(-k // block)
    numbers = _unpacked(body.need(1, "matrix").reshape(n, -1), bits)[:, : blocks * block].astype(np.float32)
    scale = body.need(2, "scale").astype(np.float32).reshape(n, blocks)
    zero = np.full((n, blocks), 2 ** (bits - 1), dtype=np.float32)
    if body.has(3):
        given = body.need(3, "zero point")
        if given.dtype == np.uint8:
            given = _unpacked(given.reshape(n, -1), bits)[:, :blocks]
        zero = given.astype(np.float32).reshape(n, blocks)
    owner = np.arange(k) // block
    if body.has(4):
        owner = body.need(4, "g_idx").reshape(-1).astype(np.int64)[:k]
        if owner.size != k or owner.min() < 0 or owner.max() >= blocks:
            raise body.unsupported("a g_idx that names blocks that are not there", f"{k} numbers of 0 to {blocks - 1}")
    real = (numbers[:, :k] - zero[:, owner]) * scale[:, owner]
    _product(body, real, 5)


def _product(body: Body, matrix: np.ndarray, bias: int) -> None:
    """The output: input 0 times the transpose of a matrix [n, k], plus the bias if there is one."""
    x = body.op("MatMul", body.real(0), body.constant(np.ascontiguousarray(matrix.T).astype(body.kind)))
    body.real_result(0, body.op("Add", x, body.real(bias)) if body.has(bias) else x)


@expands("MatMulBnb4")
def _matmul_bnb4(body: Body) -> None:
    """x by the transpose of a matrix [n, k] of 4-bit codes, the highest bits first, with a largest value a block."""
    n, k, block = (int(body.attr(name)) for name in ("N", "K", "block_size"))
    packed, largest = body.need(1, "matrix").reshape(-1), body.need(2, "absmax").astype(np.float32).reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: n * k]
    table = np.array(_NF4 if int(body.attr("quant_type", 1)) == 1 else _FP4, dtype=np.float32)
    matrix = (table[codes] * np.repeat(largest, block)[: n * k]).reshape(n, k)
    _product(body, matrix, 3)


@expands("GatherBlockQuantized")
def _gather(body: Body) -> None:
    """Rows of a table with a scale for each block of an axis; bytes hold 8 / bits numbers of the last axis."""
    data, scale = body.need(0, "table"), body.need(2, "scale").astype(np.float32)
    bits, block = int(body.attr("bits", 4)), int(body.attr("block_size", 128))
    if data.dtype == np.uint8:
        numbers, half = _unpacked(data, bits).astype(np.float32), float(2 ** (bits - 1))
    else:
        numbers, half = data.astype(np.float32), 0.0
    axis = int(body.attr("quantize_axis", 1)) % numbers.ndim
    zero = np.full(scale.shape, half, dtype=np.float32)
    if body.has(3):
        given = body.need(3, "zero point")
        packed = given.dtype == np.uint8 and bits < 8
        zero = (_unpacked(given, bits)[..., : scale.shape[-1]] if packed else given).astype(np.float32)
    cut = tuple(slice(size) for size in numbers.shape)
    zero, scale = (np.repeat(item, block, axis=axis)[cut] for item in (zero, scale))
    table = body.constant(((numbers - zero) * scale).astype(np.float32))
    rows = body.op("Gather", table, body.input(1), axis=int(body.attr("gather_axis", 0)))
    body.result(0, rows, body.dtype(2) if body.dtype(2) != "float32" else "")
