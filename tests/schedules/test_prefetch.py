"""Weights fetched ahead: all lines of the next block, whatever the sizes, and the numbers stay right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm_ffi
from hypothesis import given
from hypothesis import strategies as st
from tvm import ir, sym, tirx

from ingot.packager.codegen import generate_object
from ingot.schedules import conv2d, prefetch
from ingot.schedules.conv2d import Conv2DWorkload, TileConfig
from ingot.schedules.winograd import WinogradConfig
from ingot.target import load_target
from passes.build import finish, onnx_state, onnxruntime_outputs
from passes.execute import Executable
from schedules.common import Branches, compare, property_settings

LAYERS = (
    {"channels": 7, "out_channels": 33, "kernel": (1, 1), "size": (5, 7)},
    {"channels": 64, "out_channels": 17, "kernel": (1, 1), "size": (9, 5), "strides": (2, 2)},
    {"channels": 9, "out_channels": 65, "kernel": (3, 3), "size": (1, 1), "pads": (1, 1, 1, 1)},
    {"channels": 8, "out_channels": 31, "kernel": (3, 3), "size": (9, 14), "strides": (2, 2), "batch": 2},
)


def ahead(choice):
    """The config with its weights fetched ahead."""
    if isinstance(choice.default, TileConfig):
        return replace(choice.default, order=conv2d.POSITIONS_INNER, prefetch=1)
    return replace(choice.default, prefetch=1)


def program_of(branches, folder, picks):
    return finish(onnx_state(branches.bytes(), folder).having(picks=picks))


def test_the_numbers_stay_right(tmp_path):
    branches = Branches()
    for layer in LAYERS:
        branches.conv(**{"batch": 1, "epilogue": "bias", **layer})
    branches.matmul((17,), 33, 65, "relu")
    state, feeds = program_of(branches, tmp_path, ahead), branches.feeds()
    _, text = generate_object({k.symbol: k.function for k in state.lowered.kernels}, state.target)
    assert text.count("call void @llvm.prefetch") >= len(LAYERS)
    got = Executable(state, tmp_path).run(list(feeds.values()), 3)
    compare(got, onnxruntime_outputs(branches.bytes(), feeds), branches.outputs)


@property_settings
@given(tile=st.integers(1, 9), tiles=st.integers(1, 40), padding=st.integers(0, 8), count=st.integers(1, 12))
def test_the_tiles_ask_for_every_line_of_a_step_and_for_few_twice(tile, tiles, padding, count):
    positions = tile * tiles - min(padding, tile - 1)
    buffer = tirx.decl_buffer([4, 3, 16 * count], "float32", "weight")
    var = tirx.Var("position", "int64")
    place = [tirx.IntImm("int64", 1), tirx.IntImm("int64", 2)]
    asked = []
    for index in range(tiles):
        at = tirx.IntImm("int64", index * tile)
        for statement in prefetch.ask(buffer, place, var, positions, tile, count):
            found = []
            here = tvm_ffi.structural_map(statement, [(ir.Var, lambda v, at=at: at if v.same_as(var) else v)])
            tvm_ffi.structural_walk(here, [(ir.TensorLoad, found.append)])
            offset = int(sym.Analyzer().simplify(found[0].indices[-1]))
            assert offset % (prefetch.LINE_BYTES // 4) == 0
            asked.append(offset // (prefetch.LINE_BYTES // 4))
    assert set(asked) >= set(range(count))
    assert max(asked) <= count
    assert len(asked) <= tiles + 2 * count


def test_who_fetches_ahead():
    avx2, pi = load_target("x86-64-v3"), load_target("raspberry-pi-4")

    def layer(size, channels, out_channels):
        one, none = (1, 1), (0, 0, 0, 0)
        return Conv2DWorkload(1, size, size, channels, out_channels, one, one, none, one, "float32")

    assert conv2d.default_config(layer(7, 512, 2048), avx2).prefetch == 1
    assert conv2d.default_config(layer(7, 16, 16), avx2).prefetch == 0
    assert conv2d.default_config(layer(1, 512, 2048), avx2).prefetch == 0
    assert conv2d.default_config(layer(7, 512, 2048), pi).prefetch == 0
    for work in (layer(7, 512, 2048), layer(7, 16, 16)):
        assert conv2d.default_config(work, avx2) in conv2d.variants(work, avx2)
        assert {c.prefetch for c in conv2d.variants(work, pi)} == {0, 1}


@pytest.mark.parametrize("group", [2, 3])
def test_winograd_in_groups(tmp_path, group):
    branches = Branches()
    for size, out_channels in (((5, 5), 16), ((13, 9), 33), ((7, 14), 24)):
        branches.conv(1, 8, out_channels, size, (3, 3), pads=(1, 1, 1, 1), epilogue="bias")
    seen = []

    def picks(choice):
        space = [c for c in choice.space() if isinstance(c, WinogradConfig) and c.group == 1]
        seen.append(replace(min(space, key=lambda c: (c.tiles, c.parts)), group=group, prefetch=1))
        return seen[-1]

    feeds = branches.feeds()
    program = Executable(program_of(branches, tmp_path, picks), tmp_path)
    assert len(seen) == 3
    compare(program.run(list(feeds.values()), 2), onnxruntime_outputs(branches.bytes(), feeds), branches.outputs)
