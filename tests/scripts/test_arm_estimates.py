"""The instruction counts and loop estimates for ARM: on text, and on a small model under emulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import arm_estimates
from ingot.errors import ToolchainError
from ingot.target import load_target
from passes.build import onnx_bytes

LOOPS = """
   10:      \tmov\tx0, #0x0
   14:      \tldr\tq1, [x1], #16
   18:      \tldr\tq2, [x2]
   1c:      \tfmla\tv0.4s, v1.4s, v2.s[1]
   20:      \tsubs\tx3, x3, #0x1
   24:      \tb.ne\t0x14 <f+0x14>
   28:      \tb.gt\t0x10 <f+0x10>
   2c:      \tbl\t0x8 <g>
"""


def test_the_innermost_loop_is_found() -> None:
    (loop,) = arm_estimates.innermost_loops(LOOPS)
    assert (loop.first, loop.last, len(loop.lines)) == (0x14, 0x24, 5)
    assert loop.multiplications == ["fmla v0.4s, v1.4s, v2.s[1]"]


def test_classes_of_instructions() -> None:
    # ldr q1, [x1], #16; fmla v0.4s, v1.4s, v2.s[1]; subs x3, x3, #1
    code = b"".join(word.to_bytes(4, "little") for word in (0x3CC10421, 0x4FA21020, 0xF1000463))
    np.testing.assert_array_equal(arm_estimates.totals([arm_estimates.Block(5, code)]), [15, 5, 5])


@pytest.mark.qemu
def test_a_small_model(tmp_path: Path, qemu) -> None:
    board = load_target("raspberry-pi-4")
    qemu(board.arch)
    for tool in ("llvm-mca", "llvm-objdump"):
        try:
            arm_estimates.tool(tool)
        except ToolchainError as missing:
            pytest.skip(str(missing))
    weight = np.ones((64, 48), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    (tmp_path / "product.onnx").write_bytes(onnx_bytes(nodes, {"x": (24, 64)}, ["y"], {"w": weight}))
    found = arm_estimates.estimate(tmp_path / "product.onnx", board, 16)
    total, memory, simd = found.counts * 1e6
    assert 24 * 64 * 48 / 4 <= simd < total < 3 * 24 * 64 * 48 / 4
    assert memory < total / 2
    assert found.loops
    assert all(0.2 < efficiency <= 1.05 and 0 < share < 1 for efficiency, share in found.loops)
    text = arm_estimates.table([found], {"cortex-a72": {"product": ["another", 1.0, None]}})
    assert "| product | cortex-a72 |" in text and "another" in text
