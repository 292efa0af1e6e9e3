"""Winograd convolution of 8-bit integers: the direct convolution's results, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ingot.schedules import conv2d_int8, winograd, winograd_int8
from ingot.schedules.conv2d import Conv2DWorkload
from ingot.target import load_target
from passes.execute import Executable, compile_state
from schedules.quantised import Layers

ROOM = 1 << 30


def _place(choice: winograd_int8.Choice, work: Conv2DWorkload) -> str:
    tiling = winograd.Tiling(work, choice.config, choice.form)
    return "stack" if tiling.on_stack else "parts" if choice.config.parts else "whole"


@pytest.fixture(params=["whole", "parts", "stack"])
def used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[winograd_int8.Choice]]:
    """Every layer the family covers uses it, with its patches in one place where some config has them there."""
    found: list[winograd_int8.Choice] = []

    def choose(work, target, stored, weight, workspace=0):
        best = winograd_int8.choose(work, target, weight, ROOM) if isinstance(work, Conv2DWorkload) else None
        if best is None:
            return direct(work, target, stored, weight, workspace)
        choices = [winograd_int8.Choice(best.form, c, 0.0) for c in winograd.configs(work, target, ROOM, best.form)]
        fitting = [c for c in choices if _place(c, work) == request.param] or [best]
        found.append(fitting[len(found) * 7 % len(fitting)])
        return found[-1]

    direct = conv2d_int8.choose
    monkeypatch.setattr(conv2d_int8, "choose", choose)
    yield found


@pytest.mark.parametrize(
    ("target", "dtype", "per_channel"),
    [("x86-64-v3", "int8", True), ("x86-64-v3", "uint8", False), ("x86-64-v2", "int8", True)],
)
def test_results_are_exact(tmp_path: Path, used, target: str, dtype: str, per_channel: bool) -> None:
    layers = Layers(dtype, per_channel)
    for channels, out_channels, size in (
        (2, 1, (2, 3)),
        (6, 17, (5, 9)),
        (16, 8, (1, 2)),
        (34, 33, (7, 8)),
        (48, 64, (9, 14)),
    ):
        layers.conv(channels, out_channels, size, kernel=(3, 3))
    layers.conv(3, 9, (5, 5), kernel=(3, 3))  # odd: the direct convolution
    program = Executable(compile_state(layers.imported(tmp_path), target), tmp_path)
    assert len(used) == 5
    layers.compare(program.run(layers.feeds))
    layers.compare(program.run(layers.feeds, 3))


def test_sums_may_wrap_around_on_the_way(tmp_path: Path, used) -> None:
    layers = Layers("int8")
    layers.conv(1840, 8, (3, 4), kernel=(3, 3))
    program = Executable(compile_state(layers.imported(tmp_path), "x86-64-v3"), tmp_path)
    assert used
    layers.compare(program.run(layers.feeds))


@pytest.mark.parametrize(("channels", "fits"), [(1841, True), (1842, False)])
def test_layers_whose_results_could_overflow_are_left_alone(channels: int, fits: bool) -> None:
    assert winograd_int8.exact(np.full((2, 3, 3, channels), -127, np.int8)) == fits


def test_large_layers_use_it_where_integers_are_multiplied_in_16_bits() -> None:
    work = Conv2DWorkload(1, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), "float32")
    weight = np.full((128, 3, 3, 128), 127, np.int8)
    for name, wanted in (("x86-64-v3", True), ("sapphirerapids", False), ("raspberry-pi-5", False)):
        choice = conv2d_int8.choose(work, load_target(name), "int8", weight, ROOM)
        assert isinstance(choice, winograd_int8.Choice) == wanted, name
