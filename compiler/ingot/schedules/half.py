"""The two half-precision formats: how tensors of them are stored, widened to float32 and rounded back.

All arithmetic between a load and a store is float32. bfloat16 is stored as the upper 16 bits of a float32, so that
widening is a shift; in the kernels its dtype is uint16, because TVM's code generator has no bfloat16 vectors. Rounding
is to nearest, ties to even, in both formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import ir, tirx
from tvm.ir import _ffi_api as ir_api

from ingot.target import Target

Expr = Any  # TVM ships no types; a TIR expression

#: Our own operator on expressions: float32 to the bits of the nearest bfloat16. `packager.codegen` lowers it.
NARROW_BF16 = "ingot.narrow_bf16"

#: The feature by which a target converts float16 in hardware; without it each value would take a function call.
_FP16_FEATURE = {"x86_64": "f16c", "aarch64": "neon", "arm": "vfp4", "riscv64": "zfh"}


@dataclass(frozen=True)
class Half:
    """A format: `name` as in `--precision`, `dtype` of its tensors in the kernels, largest finite value."""

    name: str
    dtype: str
    largest: float

    def widen(self, value: Expr) -> Expr:
        """Return the float32 value of a stored one."""
        return widen_bf16(value) if self.dtype == "uint16" else value.astype("float32")

    def narrow(self, value: Expr) -> Expr:
        """Return the stored form of a float32 value."""
        if self.dtype == "uint16":
            return tirx.call_intrin("uint16", NARROW_BF16, value)
        return value.astype("float16")

    def round(self, array: np.ndarray) -> np.ndarray:
        """Return a float32 array as it is stored."""
        return round_bf16(array) if self.dtype == "uint16" else array.astype(np.float16)

    def restore(self, array: np.ndarray) -> np.ndarray:
        """Return the float32 values of a stored array."""
        if self.dtype == "uint16":
            wide: np.ndarray = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return wide
        return array.astype(np.float32)

    def holds(self, array: np.ndarray) -> bool:
        """Say whether every finite value stays finite when rounded."""
        with np.errstate(over="ignore"):
            return bool(np.isfinite(self.restore(self.round(array[np.isfinite(array)]))).all())


BF16 = Half("bf16", "uint16", 3.3895314e38)
FP16 = Half("fp16", "float16", 65504.0)
HALVES = {half.name: half for half in (BF16, FP16)}


def _register() -> None:
    ir_api.RegisterOp(NARROW_BF16, "The bits of the bfloat16 nearest to a float32.")
    ir.register_op_attr(NARROW_BF16, "TVectorizable", True)
    ir.register_op_attr(NARROW_BF16, "TCallEffectKind", 1)  # pure
    ir.register_op_attr(NARROW_BF16, "TScriptPrinterName", NARROW_BF16)


_register()


def widen_bf16(value: Expr) -> Expr:
    """Return the float32 whose upper half is `value`, a uint16."""
    return tirx.reinterpret("float32", tirx.shift_left(value.astype("uint32"), tirx.const(16, "uint32")))


def round_bf16(array: np.ndarray) -> np.ndarray:
    """Return float32 values as the bits of the nearest bfloat16 (uint16); a NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(array), quiet, rounded), np.uint16)


def converts(target: Target, half: Half) -> bool:
    """Say whether a target converts between float32 and the format without calling a function for each value."""
    return half is BF16 or _FP16_FEATURE[target.arch] in target.features


def half_of(precision: str) -> Half | None:
    """Return the format of a precision, or None for one that is not half."""
    return HALVES.get(precision)
