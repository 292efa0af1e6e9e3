"""Weights stored in few bits: what a code means, how codes are packed, and how a kernel decodes them.

A weight is scale * meaning(code). Codes lie along the input channels of a packed weight: eight of them take as many
bytes as one of them has bits, so that the lanes of a register (output channels) unpack with the same shifts. A kernel
decodes what it is about to multiply; no float32 copy of the weights is made.

    format      code                          scale
    int8        whole number                  one for each output channel, applied to the sums
    int4        whole number + 8              one for each GROUP input channels of an output channel, bfloat16
    codebook4   place in the layer's table    one for each output channel, applied to the sums
    ...
    codebook8
    pow2        sign, then m: +-2^(m - 7)     one for each output channel, applied to the sums

int4: Dettmers and Zettlemoyer 2022 (arXiv:2212.09720) on groups. codebook: Han et al. 2015 (arXiv:1510.00149). pow2:
Zhou et al. 2017 (arXiv:1702.03044): multiplying by a power of two only adds to the exponent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import te, tirx

from ingot.schedules.half import BF16, widen_bf16
from ingot.schedules.vector import ceil_div

Array = np.ndarray[Any, Any]
Expr = Any  # TVM ships no types; a TE or TIR expression

#: Input channels that share one scale of an int4 weight.
GROUP = 32
#: Codes that are packed together.
_OCTET = 8
#: Bits of a pow2 code without the sign: m from 1 to 7 stands for 2^-6 to 1, and m = 0 for zero.
_POWER_BITS = 3


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored. kind: "whole", "table" or "power"; grouped: a scale for each GROUP input channels."""

    name: str
    bits: int
    kind: str
    grouped: bool = False

    def meaning(self, codes: Array, table: Array) -> Array:
        """Return what codes (uint8, one each) stand for, without their scales, in float32."""
        if self.kind == "table":
            return np.asarray(table[codes], np.float32)
        if self.kind == "whole":
            return (codes.astype(np.int16) - self.offset).astype(np.float32)
        return power_levels()[codes]

    @property
    def offset(self) -> int:
        """Return what is added to a whole number to make its code."""
        return 1 << (self.bits - 1)

    @property
    def registers(self) -> int:
        """Return how many vector registers decoding needs besides the decoded weights: masks, scales, factors."""
        return 0 if self.kind == "whole" and not self.grouped else 2

    @property
    def dtype(self) -> str:
        """Return the element type of packed codes."""
        return "int8" if self.kind == "whole" and self.bits == _OCTET else "uint8"

    @property
    def limit(self) -> int:
        """Return the largest whole number; the smallest is its negative."""
        return self.offset - 1


FORMATS = {
    one.name: one
    for one in (
        WeightFormat("int8", 8, "whole"),
        WeightFormat("int4", 4, "whole", grouped=True),
        *(WeightFormat(f"codebook{bits}", bits, "table") for bits in range(4, 9)),
        WeightFormat("pow2", 4, "power"),
    )
}


def power_levels() -> Array:
    """Return what each of the 16 codes of pow2 stands for."""
    half = np.concatenate([[0.0], 2.0 ** np.arange(-6, 1)])
    return np.concatenate([half, -half]).astype(np.float32)


@dataclass(frozen=True)
class StoredWeight:
    """A layer's weights in codes.

    codes: uint8, one each, OHWI or, for a table whose rows are looked up, [rows, columns]. scales: float32, of the same
    rank: along the inputs (the last dimension) one for each GROUP, along dimensions of extent 1 one for all. table: the
    float32 values of a codebook, else empty.
    """

    format: WeightFormat
    codes: Array = field(repr=False)
    scales: Array = field(repr=False)
    table: Array = field(repr=False)

    def decoded(self) -> Array:
        """Return the float32 weights: the meaning of a kernel, and of the stored bytes."""
        scales = self.scales
        if self.format.grouped:
            scales = np.repeat(scales, GROUP, axis=-1)[..., : self.codes.shape[-1]]
        return self.format.meaning(self.codes, self.table) * scales

    @property
    def bytes(self) -> int:
        """Return the size of codes and scales, without padding."""
        scale_bytes = 2 if self.format.grouped else 4
        return ceil_div(self.codes.size * self.format.bits, 8) + self.scales.size * scale_bytes + self.table.nbytes

    @property
    def share(self) -> float:
        """Return the size over that of the float32 weights."""
        return self.bytes / (4 * self.codes.size)


def pack_codes(stored: StoredWeight, block: int) -> Array:
    """Pack OHWI codes to [CO/block][KH][KW][CI * bits / 8][block] bytes, padded with zeros.

    Whole numbers are packed in two's complement: a kernel extends the sign, and needs no register for an offset.
    """
    bits, codes = stored.format.bits, stored.codes
    if stored.format.kind == "whole":
        codes = codes ^ np.uint8(stored.format.offset)
    co, kh, kw, ci = codes.shape
    blocks = ceil_div(co, block)
    if bits == _OCTET:
        padded = np.zeros((blocks * block, kh, kw, ci), np.uint8)
        padded[:co] = codes
        return _blocked(padded, block).view(stored.format.dtype)
    octets = ceil_div(ci, _OCTET)
    padded = np.zeros((blocks * block, kh, kw, octets * _OCTET), np.uint8)
    padded[:co, ..., :ci] = codes
    shifts = np.arange(_OCTET, dtype=np.uint64) * np.uint64(bits)
    shaped = padded.reshape(*padded.shape[:-1], octets, _OCTET).astype(np.uint64)
    strings = np.bitwise_or.reduce(shaped << shifts, axis=-1)
    places = np.arange(bits, dtype=np.uint64) * np.uint64(8)
    split = ((strings[..., None] >> places) & np.uint64(255)).astype(np.uint8)
    return _blocked(split.reshape(*padded.shape[:-1], octets * bits), block)


def pack_scales(stored: StoredWeight, block: int) -> Array:
    """Return the scales as the kernel reads them.

    One for each output channel: float32 [CO]. Grouped: bfloat16 [CO/block][KH][KW][groups][block].
    """
    if not stored.format.grouped:
        return np.ascontiguousarray(stored.scales.reshape(-1), np.float32)
    co = stored.scales.shape[0]
    padded = np.zeros((ceil_div(co, block) * block, *stored.scales.shape[1:]), np.float32)
    padded[:co] = stored.scales
    return BF16.round(_blocked(padded, block))


def _blocked(weight: Array, block: int) -> Array:
    """Bring [CO][KH][KW][X] to [CO/block][KH][KW][X][block]."""
    co, *rest = weight.shape
    return np.ascontiguousarray(np.moveaxis(weight.reshape(co // block, block, *rest), 1, -1))


class Decoder:
    """The weights of `schedules.conv2d` as codes: placeholders for their parts, and what a kernel does with them."""

    def __init__(self, form: WeightFormat, shape: tuple[int, int, int, int, int], channels: int) -> None:
        """Take the shape of the float32 weights it stands for, [CO/b][KH][KW][CI][b], and the output channels CO."""
        blocks, kh, kw, ci, block = shape
        self.format = form
        size = ci if form.bits == _OCTET else ceil_div(ci, _OCTET) * form.bits
        self._codes = te.placeholder((blocks, kh, kw, size, block), form.dtype, name="weight")
        groups = ceil_div(ci, GROUP)
        scale_shape, dtype = ((blocks, kh, kw, groups, block), "uint16") if form.grouped else ((channels,), "float32")
        self._scales = te.placeholder(scale_shape, dtype, name="scales")
        self._table = te.placeholder((1 << form.bits,), "float32", name="codebook") if form.kind == "table" else None

    @property
    def placeholders(self) -> list[Expr]:
        """Return the TE tensors of the codes, the scales and, if there is one, the codebook."""
        return [self._codes, self._scales, *([] if self._table is None else [self._table])]

    def at(self, block: Expr, ry: Expr, rx: Expr, rc: Expr, lane: Expr) -> Expr:
        """Return one weight, without the scale that `finish` applies."""
        if self._table is not None:
            return self._table[self._code(block, ry, rx, rc, lane)]
        if self.format.kind == "power":
            return _power(self._code(block, ry, rx, rc, lane))
        value = self._code(block, ry, rx, rc, lane).astype("float32")
        if self.format.grouped:
            return value * widen_bf16(self._scales[block, ry, rx, rc // GROUP, lane])
        return value

    def finish(self, total: Expr, channel: Expr) -> Expr:
        """Return the sum of an output channel, scaled where the scale is one for all of it."""
        return total if self.format.grouped else total * self._scales[channel]

    def _code(self, block: Expr, ry: Expr, rx: Expr, rc: Expr, lane: Expr) -> Expr:
        """Return one code as int32; of whole numbers, the number."""
        bits = self.format.bits

        def byte(place: Expr) -> Expr:
            return self._codes[block, ry, rx, place, lane].astype("int32")

        if bits == _OCTET:
            return byte(rc)
        if self.format.kind == "whole":
            # Through unsigned numbers, whose sign bit may be shifted into.
            upper = byte(rc // 2).astype("uint32") << (28 - rc % 2 * 4).astype("uint32")
            return tirx.reinterpret("int32", upper) >> 28
        if bits == _OCTET // 2:
            return (byte(rc // 2) >> (rc % 2 * 4).astype("int32")) & 15
        first, bit = rc // _OCTET * bits, rc % _OCTET * bits
        place = bit // 8
        both = byte(first + place) | (byte(first + tirx.min(place + 1, bits - 1)) << 8)
        return (both >> (bit % 8).astype("int32")) & ((1 << bits) - 1)


def _power(code: Expr) -> Expr:
    """Return +-2^(m - 7) of a pow2 code, or 0: its bits moved to the sign and the exponent of a float32.

    One multiplication copies them to both places (an expression that reads the code twice would be bound to a name,
    which TVM cannot vectorise). The exponent is then m with a bias of 127 missing: 2^120 brings it to m - 7.
    """
    copies, kept = (1 << (31 - _POWER_BITS)) + (1 << 23), (1 << 31) + (7 << 23)
    bits = (code.astype("uint32") * tirx.const(copies, "uint32")) & tirx.const(kept, "uint32")
    return tirx.reinterpret("float32", bits) * tirx.const(2.0**120, "float32")
