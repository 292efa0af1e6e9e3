"""Layers of 8-bit integers: exact at every edge size, on every instruction set."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.emulator import run_under_qemu
from ingot.passes.picks import Choice
from ingot.passes.pipeline import run
from ingot.passes.state import State
from ingot.schedules import conv2d, conv2d_int8
from ingot.schedules.microkernels import dot_of, dots_of
from ingot.target import load_target
from passes.execute import Executable, compile_state
from schedules.quantised import SIZES, Layers, convolutions, depthwise, in_groups

#: A few sizes where the machine code differs little from another case's.
FEW = SIZES[1::3]


@pytest.mark.parametrize(("name", "wanted"), [("x86-64-v3", "uint8"), ("raspberry-pi-4", "int8")])
def test_the_preferred_activation_is_the_instructions_own(name: str, wanted: str) -> None:
    assert conv2d_int8.preferred_activation(load_target(name)) == wanted


@pytest.mark.parametrize(
    ("target", "dtype", "per_channel", "sizes"),
    [
        ("native", "int8", True, SIZES),
        ("native", "uint8", False, FEW),
        ("x86-64-v3", "int8", False, FEW),
        ("x86-64-v2", "uint8", False, FEW),
    ],
)
def test_sums_and_roundings_are_exact(
    tmp_path: Path, target: str, dtype: str, per_channel: bool, sizes: tuple[int, ...]
) -> None:
    layers = convolutions(dtype, per_channel, sizes)
    program = Executable(compile_state(layers.imported(tmp_path), target), tmp_path)
    layers.compare(program.run(layers.feeds))
    layers.compare(program.run(layers.feeds, 3))


@pytest.mark.parametrize(("target", "sizes"), [("x86-64-v3", SIZES), ("x86-64-v2", FEW)])
def test_pairs_of_products_are_summed_in_16_bits_where_they_fit(
    tmp_path: Path, target: str, sizes: tuple[int, ...]
) -> None:
    layers = convolutions("int8", True, sizes, pairs=True)
    program = Executable(compile_state(layers.imported(tmp_path), target), tmp_path)
    layers.compare(program.run(layers.feeds))
    layers.compare(program.run(layers.feeds, 3))


def test_only_pairs_that_fit_are_summed_in_16_bits() -> None:
    board = load_target("x86-64-v3")

    def form(*taps: tuple[int, ...]) -> str:
        return dot_of(board, np.array(taps, np.float32).reshape(1, 1, len(taps), -1)).form

    assert form((64, 64, -128, 127)) == form((127, 1, -64, -64)) == form((-127, 127, 100, 28)) == "bytes"
    assert form((64, 65, 0, 0)) == form((0, 0, -64, -65)) == form((127, -127, 127, 127)) == "madd"
    assert form((1, 2, 3, 100), (100, 1, 2, 3)) == "bytes"  # of two taps
    # Three channels: the last of a tap is alone, or has the first of the next tap beside it.
    assert form((0, 0, 100), (0, 0, 0)) == "bytes" and form((0, 0, 100), (100, 0, 0)) == "madd"


@pytest.mark.parametrize(
    ("target", "dtype", "per_channel"),
    [("native", "int8", True), ("native", "uint8", False), ("x86-64-v2", "int8", True)],
)
def test_depthwise_layers_are_exact(tmp_path: Path, target: str, dtype: str, per_channel: bool) -> None:
    layers = depthwise(dtype, per_channel, SIZES if target == "native" else FEW)
    program = Executable(compile_state(layers.imported(tmp_path), target), tmp_path)
    layers.compare(program.run(layers.feeds))
    layers.compare(program.run(layers.feeds, 3))


@pytest.mark.parametrize(
    ("target", "dtype", "pairs", "sizes"),
    [("native", "int8", False, SIZES[::2]), ("x86-64-v3", "int8", True, FEW)],
)
def test_groups_are_exact(tmp_path: Path, target: str, dtype: str, pairs: bool, sizes: tuple[int, ...]) -> None:
    layers = in_groups(dtype, dtype == "int8", sizes, pairs)
    state = compile_state(layers.imported(tmp_path), target)
    assert sum("conv2d_int8" in kernel.symbol for kernel in state.lowered.kernels) == len(layers.ops)
    program = Executable(state, tmp_path)
    layers.compare(program.run(layers.feeds))
    layers.compare(program.run(layers.feeds, 3))


@pytest.mark.parametrize(("target", "dtype"), [("native", "int8"), ("x86-64-v3", "uint8")])
def test_configs_of_a_search_are_exact(tmp_path: Path, target: str, dtype: str) -> None:
    """One drawn for each of many layers: orders, groups, steps and tiles that no formula chooses."""
    layers = Layers(dtype, per_channel=dtype == "int8")
    for _ in range(4):
        layers.conv(24, 40, (6, 11))
        layers.conv(32, 72, (7, 9), strides=(2, 2))
        layers.conv(32, 72, (4, 5), kernel=(1, 1))
        layers.conv(32, 32, (5, 9), depthwise=True)
        layers.dense(7, 48, 40)
    draw, drawn = random.Random(0), []
    imported = layers.imported(tmp_path)

    def pick(choice: Choice) -> object:
        space = choice.space()
        assert choice.default in space
        drawn.append(draw.choice(space))
        return drawn[-1]

    state = State(imported.module, imported.weights, imported, load_target(target), picks=pick)
    program = Executable(run(state), tmp_path)
    tiles = [config for config in drawn if isinstance(config, conv2d.TileConfig)]
    assert len(drawn) == len(layers.ops)
    assert {config.order for config in tiles} == {0, 1, 2}
    assert max(config.group for config in tiles) > 1
    layers.compare(program.run(layers.feeds))
    layers.compare(program.run(layers.feeds, 3))


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("raspberry-pi-4", "int8"),
        ("raspberry-pi-4", "uint8"),
        ("raspberry-pi-5", "int8"),
        ("raspberry-pi-4-32bit", "int8"),
    ],
)
def test_depthwise_layers_are_exact_on_a_board(tmp_path: Path, qemu, target: str, dtype: str) -> None:
    board = load_target(target)
    qemu(board.arch)  # skips where no emulator is installed
    layers = depthwise(dtype, dtype == "int8", FEW)
    model = ingot.compile(layers.save(tmp_path), target=target, selftest=False).save(tmp_path / "layers.so")
    layers.compare(run_under_qemu(model, layers.feeds, board, threads=3))


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("raspberry-pi-4", "int8"),
        ("raspberry-pi-5", "int8"),
        ("raspberry-pi-5", "uint8"),
        ("raspberry-pi-4-32bit", "int8"),
        ("visionfive-2", "uint8"),
    ],
)
def test_sums_and_roundings_are_exact_on_a_board(tmp_path: Path, qemu, target: str, dtype: str) -> None:
    board = load_target(target)
    qemu(board.arch)  # skips where no emulator is installed
    layers = convolutions(dtype, dtype == "int8", FEW)
    model = ingot.compile(layers.save(tmp_path), target=target, selftest=False).save(tmp_path / "layers.so")
    layers.compare(run_under_qemu(model, layers.feeds, board, threads=3))


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize(
    ("target", "dtype"), [("raspberry-pi-4", "uint8"), ("raspberry-pi-5", "int8"), ("raspberry-pi-4-32bit", "int8")]
)
def test_groups_are_exact_on_a_board(tmp_path: Path, qemu, target: str, dtype: str) -> None:
    board = load_target(target)
    qemu(board.arch)  # skips where no emulator is installed
    layers = in_groups(dtype, dtype == "int8", FEW)
    model = ingot.compile(layers.save(tmp_path), target=target, selftest=False).save(tmp_path / "layers.so")
    layers.compare(run_under_qemu(model, layers.feeds, board, threads=3))


def test_rows_of_taps_are_joined_where_groups_of_channels_would_not_be_whole() -> None:
    first = conv2d.Conv2DWorkload(1, 96, 96, 3, 8, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1), "float32")
    dot = dots_of(load_target("raspberry-pi-5"))[0]
    joined = conv2d_int8.of_rows(first)
    assert dot.group == 4 and conv2d_int8.joins_rows(first, dot)
    assert (joined.out_height, joined.out_width, joined.macs) == (48, 48, first.macs)
    assert conv2d_int8.grouped(first, dot).in_channels == 3  # nine values of a row
    for other in ({"in_channels": 8}, {"kernel": (1, 1)}, {"dilation": (1, 2)}, {"width": 1 << 16}):
        assert not conv2d_int8.joins_rows(dataclasses.replace(first, **other), dot)


def test_wide_weights_take_an_instruction_that_holds_them() -> None:
    board = load_target("raspberry-pi-4")
    best = dots_of(board)[0]
    small, lowest, wide = (np.full((1, 1, 1, 1), value, np.float32) for value in (-127, -128, 200))
    assert dot_of(board, small) == best and best.form == "pairs"
    assert dot_of(board, lowest) != best and dot_of(board, wide).weight == "int16"
    pair = np.full((1, 1, 1, 2), -127, np.float32)
    forms = [dot_of(load_target("x86-64-v3"), pair, positions).form for positions in (1, 2)]
    assert forms == ["signs", "madd"] and dot_of(load_target("x86-64-v3"), lowest + 0 * pair, 1).form == "madd"
    assert dot_of(board, np.full((1, 1, 1, 1), 0.5, np.float32)) is None
    assert dot_of(board, np.full((1, 1, 1, 1), 256, np.float32)) is None
