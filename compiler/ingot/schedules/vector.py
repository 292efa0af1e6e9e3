"""What a target's registers allow, in the units the templates think in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingot.target import Target

DTYPE_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Registers:
    """The vector registers of one core.

    lanes: float32 values in one register. count: architectural registers.
    """

    lanes: int
    count: int


def registers(target: Target) -> Registers:
    """Return the vector registers LLVM may use for `target`; a scalar core counts as four lanes of its 32 registers."""
    bits = target.vector_bits
    if bits <= 64:
        return Registers(lanes=4, count=16)
    return Registers(lanes=bits // 32, count=target.vector_registers)


def lanes_for(target: Target, dtype: str, extent: int) -> int:
    """Return the widest power-of-two vector of `dtype` that divides `extent`, at most one register."""
    widest = max(1, registers(target).lanes * 4 // DTYPE_BYTES.get(dtype, 4))
    lanes = 1
    while lanes * 2 <= widest and extent % (lanes * 2) == 0:
        lanes *= 2
    return lanes


def interleaved(node: Any, target: Target) -> int:  # noqa: ANN401 - a block
    """Return how many registers of a block's elements to compute side by side: four where it calls functions.

    exp and sigmoid are one long chain of instructions each, functions of functions a longer one: a core keeps few of
    them in flight unless those of neighbouring registers take turns. tanh or erf alone is wide enough by itself.
    """
    text = str(node.body)
    calls = sum(text.count(f"{name}(") for name in ("T.exp", "T.sigmoid", "ingot_decay"))
    functions = calls + sum(text.count(f"T.{name}(") for name in ("tanh", "erf"))
    return 1 if target.vector_bits <= 64 or (calls == 0 and functions < 2) else 4


def interleaved_lanes(node: Any, lanes: int, extent: int, target: Target) -> int:  # noqa: ANN401 - a block
    """Return the lanes of a loop over `extent` elements of a block: of as many registers as `interleaved` says."""
    most = interleaved(node, target)
    return next(wide * lanes for wide in (4, 2, 1) if wide <= most and extent % (wide * lanes) == 0)


def largest_divisor(value: int, limit: int) -> int:
    """Return the largest divisor of `value` that is at most `limit`."""
    return max(d for d in range(1, max(1, min(value, limit)) + 1) if value % d == 0)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def annotate_block(name: str, template: str, config: Any) -> dict[str, str]:  # noqa: ANN401 - a frozen dataclass
    """Return the block annotations by which the scheduling step recognises a template."""
    return {"ingot.template": template, "ingot.config": repr(config), "ingot.name": name}
