"""Dot product instructions: what their meaning computes, and which instruction each target's layers are made of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import s_tir

from ingot.packager.codegen import generate_object
from ingot.schedules.columns import column_name, takes_columns
from ingot.schedules.microkernels import DOTS, dots_of, intrinsic_name
from ingot.target import load_target
from passes.execute import compile_state
from schedules.quantised import Layers
from targets.isa import llvm_objdump

BOARDS = ("sapphirerapids", "intel-n100", "x86-64-v3", "x86-64-v2", "raspberry-pi-4", "raspberry-pi-4-32bit")


def extremes(random: np.random.Generator, shape: tuple[int, ...], low: int, high: int, dtype: str) -> np.ndarray:
    """Random values, half of them the least or the greatest."""
    values = random.integers(low, high + 1, shape)
    return np.where(random.random(shape) < 0.5, random.choice([low, high], shape), values).astype(dtype)


@pytest.mark.parametrize("board", [*BOARDS, "raspberry-pi-5", "visionfive-2"])
def test_the_meaning_is_a_sum_of_products(board: str) -> None:
    random = np.random.default_rng(1)
    for dot in dots_of(load_target(board)):
        meaning = s_tir.TensorIntrin.get(intrinsic_name(dot)).desc
        run = tvm.compile(tvm.IRModule({"main": meaning.with_attr("global_symbol", "main")}), target="llvm")["main"]
        data = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-255, 255)}[dot.data]
        low = next(value for value in (-255, -128, -127) if dot.fits(np.array([value])))
        high = next(value for value in (255, 127) if dot.fits(np.array([value])))
        a = extremes(random, (dot.group,), *data, dot.data)
        b = extremes(random, (dot.split, dot.lanes, dot.group // dot.split), low, high, dot.weight)
        c = random.integers(-(10**6), 10**6, dot.lanes).astype(np.int32)
        wanted = c + np.einsum("slw,sw->l", b.astype(np.int64), a.astype(np.int64).reshape(dot.split, -1))
        tensors = [tvm.runtime.tensor(x) for x in (a, b, c)]
        run(*tensors)
        np.testing.assert_array_equal(tensors[2].numpy(), wanted, err_msg=dot.name)


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_the_meaning_of_a_column_is_a_sum_of_its_rows(rows: int) -> None:
    """Of the weights, only those of its rows count: others are zeros that the machine form multiplies."""
    random = np.random.default_rng(2)
    for lanes in (8, 16):
        meaning = s_tir.TensorIntrin.get(column_name(rows, lanes)).desc
        names = [str(param.name) for param in meaning.params]
        assert len(names) == 3 and takes_columns(load_target("raspberry-pi-5"))
        a = extremes(random, (rows, 1, lanes), -128, 127, "int8")
        b = extremes(random, (lanes, rows), -128, 127, "int8")
        c = random.integers(-(10**6), 10**6, lanes).astype(np.int32)
        wanted = c + np.einsum("kl,lk->l", a[:, 0].astype(np.int64), b.astype(np.int64))
        run = tvm.compile(tvm.IRModule({"main": meaning.with_attr("global_symbol", "main")}), target="llvm")["main"]
        tensors = [tvm.runtime.tensor(x) for x in (a, b, c)]
        run(*tensors)
        np.testing.assert_array_equal(tensors[2].numpy(), wanted)


@pytest.mark.parametrize(
    ("board", "words"),
    [
        ("x86-64-v4 pairs", ("vpmaddubsw", "vpmaddwd", "%zmm")),
        ("x86-64-v3 pairs", ("vpmaddubsw", "vpmaddwd", "%ymm")),
        ("sapphirerapids", ("vpdpbusd", "%zmm")),
        ("intel-n100", ("vpdpbusd", "%ymm")),
        ("x86-64-v4", ("vpmaddwd", "%zmm")),
        ("x86-64-v3", ("vpmaddwd", "vpsignb", "vpmaddubsw", "%ymm")),
        ("x86-64-v2", ("pmaddwd", "psignb", "pmaddubsw", "%xmm")),
        ("raspberry-pi-5", ("sdot", "srshl", "sqadd", "zip2")),
        ("raspberry-pi-4", ("smull", "smlal", "sadalp", "sqrdmulh")),
        ("raspberry-pi-4-32bit", ("vmull.s8", "vmlal.s8", "vpadal.s16", "vqrdmulh.s32")),
    ],
)
def test_the_machine_code_is_made_of_the_instruction(tmp_path: Path, board: str, words: tuple[str, ...]) -> None:
    tool = llvm_objdump()
    if tool is None:
        pytest.skip("llvm-objdump is not installed")
    board, _, pairs = board.partition(" ")
    layers = Layers("int8", pairs=bool(pairs))
    layers.conv(16, 32, kernel=(1, 1) if pairs else (3, 3))
    layers.conv(16, 16, depthwise=True)
    layers.dense(1, 16, 32)
    state = compile_state(layers.imported(tmp_path), board)
    assert state.lowered is not None
    code, _ = generate_object({k.symbol: k.function for k in state.lowered.kernels}, state.target)
    (tmp_path / "k.o").write_bytes(code)
    arguments = [tool, "-d", "--no-show-raw-insn", str(tmp_path / "k.o")]
    if state.target.arch == "aarch64":
        arguments.insert(1, "--mattr=+dotprod")
    text = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert [word for word in words if word not in text] == []


def test_every_instruction_is_some_targets() -> None:
    known = {dot.name for board in (*BOARDS, "raspberry-pi-5", "x86-64-v4") for dot in dots_of(load_target(board))}
    assert all(any(name.startswith(dot.name) for name in known) for dot in DOTS)
