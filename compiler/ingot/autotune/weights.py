"""Made-up weights that are small to send and large to use: outer products, whatever order they are packed in.

A canonical weight is w[o, ...] = a[o] * b[...] with seeded a and b. Every packing of a template only permutes, pads and
(Winograd) transforms along the other axes, so a packed weight is again an outer product of two short vectors, which is
all an executable of candidates carries. Neighbouring weights differ, so a kernel that reads the wrong ones gives the
wrong answer. a and b have four significant bits, and so their products are exact in half precision too.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from ingot.schedules.half import BF16
from ingot.schedules.microkernels import weight_kind

#: Up to this many elements a weight keeps its real values: scales, zero points, tables' shapes.
KEPT_ELEMENTS = 64
#: Weights of these types are indices or sizes: others would lead anywhere.
_INDICES = frozenset(("bool", "int32", "int64"))
#: Of whole weights of each kind (`microkernels.weight_kind`): the largest factor of an output channel, and the least
#: and largest of the others. "q7" also suits weights of any range that no instruction multiplies.
_FACTORS = {"p7": (8, -8, 8), "q7": (11, -11, 11), "q8": (8, -16, 15), "u8": (15, 0, 17), "q9": (15, -17, 17)}
#: Up to this many bytes a packed weight that is no outer product is stored as it is.
STORED_BYTES = 1 << 18


@dataclass(frozen=True)
class WeightSpec:
    """What a task knows of a weight. whole: its values are whole numbers, of a `kind`. values: only of a small one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    whole: bool
    values: bytes | None = field(default=None, repr=False)
    kind: str = "q7"


def spec_of(name: str, value: np.ndarray) -> WeightSpec:
    """Describe a weight."""
    kept = value.tobytes() if value.size <= KEPT_ELEMENTS or str(value.dtype) in _INDICES else None
    whole = value.dtype.kind in "iu" or bool(np.all(value == np.rint(value)))
    kind = weight_kind(value.T if value.ndim == 2 else value) if whole else "q7"  # a matrix is [K, N]
    return WeightSpec(name, str(value.dtype), tuple(value.shape), whole, kept, kind)


def synthesise(spec: WeightSpec) -> np.ndarray:
    """Return values for a weight: its own if they are known, else an outer product of its first and other axes.

    A matrix [K, N] is one too, so its axes' roles do not matter. Sums over all but one axis stay around 1.
    """
    if spec.values is not None:
        return np.frombuffer(spec.values, spec.dtype).reshape(spec.shape)
    generator = np.random.default_rng(zlib.crc32(spec.name.encode()))
    first, rest = spec.shape[0], int(np.prod(spec.shape[1:], dtype=np.int64))
    if spec.whole:
        most, low, high = _FACTORS["u8" if spec.dtype.startswith("u") else spec.kind]
        a, b = (
            generator.integers(-most if low == -high else 0, most + 1, first),
            generator.integers(low, high + 1, rest),
        )
        # The products that make them of this kind, whichever axis is that of the input channels.
        a[:2], b[0] = most, low or high
        b[1:2] = low or high if spec.kind != "u8" else b[1:2]
        return np.outer(a, b).reshape(spec.shape).astype(spec.dtype)
    a, b = (_four_bits(generator, count) for count in (first, rest))
    scale = 0.5 ** np.ceil(np.log2(max(first, rest, 1)) / 2) if len(spec.shape) > 1 else 1.0
    return np.outer(a * scale, b).reshape(spec.shape).astype(spec.dtype)


def _four_bits(generator: np.random.Generator, count: int) -> np.ndarray:
    """Return numbers of four significant bits from 0.5 to 1.875, of both signs."""
    size: np.ndarray = generator.integers(8, 16, count) * generator.choice((0.0625, 0.125), count)
    return np.asarray(size * generator.choice((-1.0, 1.0), count))


@dataclass(frozen=True)
class Factors:
    """A packed weight P, reshaped to `dims`, as P[i, j, o, k, n, m] = a[i, o, n] * b[j, k, m] of type `dtype`.

    dtype: a name in `packager.metadata.DTYPES`.
    """

    dims: tuple[int, int, int, int, int, int]
    dtype: str
    a: np.ndarray
    b: np.ndarray


def factorise(packed: np.ndarray) -> Factors | None:
    """Return the factors of a packed weight, or None if it is no outer product in any of the layouts we know.

    Case 1: [blocks, ..., lanes]. Case 2: [..., channels]. Case 3: [blocks, ..., lanes, group].
    Case 4: [blocks, KH, KW, groups, registers, split, lanes, group] of `conv2d_int8`.
    Case 5: [blocks, KH, KW, groups, pairs, 2, group] of `conv2d_mmla`. Case 6: [first, ...].
    Floats may differ from the product by rounding. uint16 may be bfloat16: then the shorter factors count.
    """
    found = [_product(packed, str(packed.dtype))]
    if packed.dtype == np.uint16:
        found.append(_product(BF16.restore(packed), "bfloat16"))
    return min((f for f in found if f is not None), key=lambda f: f.a.size + f.b.size, default=None)


def _product(packed: np.ndarray, dtype: str) -> Factors | None:
    """Return the factors of values that are stored as `dtype`."""
    shape = packed.shape
    if packed.size == 0 or packed.ndim < 2:
        return None
    layouts = [(shape[0], shape[-1], 1, 1, 1), (1, shape[-1], 1, 1, 1)]
    if packed.ndim > 3:
        layouts.append((shape[0], shape[-2], shape[-1], 1, 1))
    if packed.ndim == 8:
        layouts.append((shape[0], *shape[4:]))
    if packed.ndim == 7:
        layouts.append((shape[0], shape[4] * shape[5], shape[6], 1, 1))
    layouts.append((shape[0], 1, 1, 1, 1))
    for i, o, k, n, m in layouts:
        dims = (i, packed.size // (i * o * k * n * m), o, k, n, m)
        matrix = packed.reshape(dims).transpose(0, 2, 4, 1, 3, 5).reshape(i * o * n, -1).astype(np.float64)
        row, column = (int(v) for v in np.unravel_index(int(np.abs(matrix).argmax()), matrix.shape))
        pivot = matrix[row, column]
        if pivot == 0:
            return Factors(dims, dtype, *(np.zeros(size, np.float32) for size in matrix.shape))
        a, b = matrix[:, column], matrix[row] / pivot
        if packed.dtype.kind in "iu":
            a, b = _whole(a, b)
        if np.abs(np.outer(a, b) - matrix).max() <= (0 if packed.dtype.kind in "iu" else 1e-5 * abs(pivot)):
            return Factors(dims, dtype, a.astype(np.float32), b.astype(np.float32))
    return None


def _whole(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move a whole factor from `a` to `b` so that both are whole numbers."""
    divisor = int(np.gcd.reduce(np.abs(np.rint(a)).astype(np.int64)))
    return a / max(divisor, 1), np.rint(b * max(divisor, 1))


def expand(factors: Factors) -> np.ndarray:
    """Return the flat packed weight, as the runner computes it."""
    i, j, o, k, n, m = factors.dims
    cube: np.ndarray = (factors.a.reshape(i, 1, o, 1, n, 1) * factors.b.reshape(1, j, 1, k, 1, m)).reshape(-1)
    return BF16.round(cube) if factors.dtype == "bfloat16" else np.asarray(cube.astype(factors.dtype))
