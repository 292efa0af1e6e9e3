"""Winograd convolution: sizes at the edges of tiles and vectors, every place for the patches, error and choice."""

from __future__ import annotations

import numpy as np
import pytest
import tvm_ffi
from tvm import tirx

import ingot
from ingot.emulator import run_under_qemu
from ingot.passes.lower import split_nests
from ingot.schedules import apply, conv2d, winograd, winograd_nests
from ingot.target import load_target
from passes.build import finish, normal, onnx_state, onnxruntime_outputs
from passes.execute import Executable
from schedules.common import CHANNELS, EPILOGUES, TARGETS, Branches, check, compare

PIECES = (1, 2, 3, 7)
#: How the transformed patches of all tiles are kept: in the arena, in a few workspaces, or each block on its stack.
PLACES = ("whole", "parts", "stack")
ROOM = 1 << 30


def workload(size, channels, out_channels, batch=1, padding=(1, 1, 1, 1)):
    return conv2d.Conv2DWorkload(batch, *size, channels, out_channels, (3, 3), (1, 1), padding, (1, 1), "float32")


def in_place(config, work, place):
    tiling = winograd.Tiling(work, config)
    if place == "whole":
        return config.parts == 0
    return tiling.on_stack if place == "stack" else config.parts > 0 and not tiling.on_stack


@pytest.fixture
def force(monkeypatch):
    """Make every convolution the family covers use one size and place; returns the configs that were used."""

    def apply_to(size, place, blocks=1):
        used = []

        def choose(work, target, workspace):
            if not winograd.supports(work, target):
                return None
            if place == "parts":  # also where the estimate would not have several blocks of tiles in a part
                found = [
                    winograd.WinogradConfig(c.size, c.tiles, c.block, c.unroll, min(2, blocks_of(work, c)))
                    for c in winograd.configs(work, target, ROOM)
                ]
            else:
                found = winograd.configs(work, target, ROOM)
            fitting = [c for c in found if c.size == size and in_place(c, work, place)]
            fitting = fitting or [c for c in winograd.configs(work, target, ROOM) if c.size == size]
            best = min(fitting, key=lambda c: (winograd.cost(work, c, target), c.tiles))
            used.append((work, best))
            return best

        monkeypatch.setattr(winograd, "default_config", choose)
        return used

    return apply_to


def blocks_of(work, config):
    return winograd.Tiling(work, config).tile_blocks


def model(*layers, **same):
    branches = Branches()
    for layer in layers:
        branches.conv(**{"batch": 1, "size": (6, 9), "kernel": (3, 3), "pads": (1, 1, 1, 1), **same, **layer})
    return branches


@pytest.mark.parametrize("size", winograd.POINTS)
def test_matrices_compute_a_correlation(size):
    at, g, bt = winograd.matrices(size)
    rng = np.random.default_rng(size)
    d, w = rng.standard_normal(size + 2), rng.standard_normal(3)
    want = [d[i : i + 3] @ w for i in range(size)]
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ d)), want, rtol=1e-12)


@pytest.mark.parametrize("size", winograd.POINTS)
def test_coefficients_of_the_run_time_transforms_are_exact(size):
    at, _, bt = winograd.matrices(size)
    for matrix in (at, bt):
        np.testing.assert_array_equal(matrix, matrix.astype(np.float32))


@pytest.mark.parametrize("out_channels", [1, 15, 16, 17])
@pytest.mark.parametrize("size", winograd.POINTS)
def test_weights_are_transformed_in_float64_and_padded_with_zeros(size, out_channels):
    w = normal((out_channels, 3, 3, 5), 1)
    config = winograd.WinogradConfig(size, 4, 16, 1, 0)
    packed = winograd.pack_weight(w, config)
    assert packed.shape == (-(-out_channels // 16), (size + 2) ** 2, 5, 16)
    assert packed.dtype == np.float32
    _, g, _ = winograd.matrices(size)
    want = np.einsum("ik,oklc,jl->ijco", g, w.astype(np.float64), g).reshape(-1, 5, out_channels)
    flat = packed.transpose(1, 2, 0, 3).reshape(want.shape[0], 5, -1)
    np.testing.assert_allclose(flat[:, :, :out_channels], want, rtol=1e-7, atol=1e-7)
    assert not flat[:, :, out_channels:].any()


def channels(folder, force, target, place, size, some):
    used = force(size, place)
    layers = [{"channels": 5, "out_channels": c} for c in some] + [{"channels": c, "out_channels": 6} for c in some]
    check(model(*layers, epilogue="bias"), folder, target, PIECES)
    assert len(used) == len(layers)
    assert any(in_place(config, work, place) for work, config in used)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", winograd.POINTS)
def test_channels(tmp_path, force, place, size):
    channels(tmp_path, force, "native", place, size, (1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", winograd.POINTS)
def test_all_channels(tmp_path, force, target, place, size):
    channels(tmp_path, force, target, place, size, CHANNELS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", winograd.POINTS)
def test_heights_and_widths(tmp_path, force, place, size):
    force(size, place)
    layers = [{"size": (h, w)} for h, w in ((1, 1), (1, 9), (2, 3), (3, 2), (4, 4), (5, 8), (7, 13), (12, 6), (14, 15))]
    check(model(*layers, channels=8, out_channels=17), tmp_path, pieces=PIECES)


@pytest.mark.parametrize("size", winograd.POINTS)
def test_padding(tmp_path, force, size):
    force(size, "whole")
    pads = [(0, 0, 0, 0), (2, 1, 0, 3), (0, 2, 1, 0), (5, 4, 5, 4)]
    check(model(*[{"pads": p} for p in pads], channels=8, out_channels=16), tmp_path, pieces=(3,))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", winograd.POINTS)
def test_batch_of_three(tmp_path, force, place, size):
    force(size, place)
    check(model({"size": (5, 7)}, {"size": (8, 8)}, batch=3, channels=16, out_channels=32), tmp_path, pieces=PIECES)


@pytest.mark.parametrize("place", ["whole", "parts"])
@pytest.mark.parametrize("size", winograd.POINTS)
def test_epilogues(tmp_path, force, place, size):
    force(size, place)
    check(model(*[{"epilogue": e} for e in EPILOGUES], channels=8, out_channels=24, size=(7, 9)), tmp_path)


def test_many_channels_are_as_accurate_as_stated(tmp_path, force):
    x, w = normal((1, 192, 16, 16)), normal((64, 192, 3, 3), 1) / np.float32(41)
    branches = Branches()
    value = branches.node("Conv", [branches.input(x.shape), branches.weight(w)], pads=[1, 1, 1, 1])
    branches.output(value)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    want = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + 16, j : j + 16], w[:, :, i, j].astype(np.float64))
        for i in range(3)
        for j in range(3)
    )
    for size, bound in ((2, 1.5e-6), (4, 5e-6)):
        force(size, "whole")
        (got,) = Executable(finish(onnx_state(branches.bytes(), tmp_path)), tmp_path).run([x])
        assert float(np.abs(got - want).max() / np.abs(want).max()) < bound


def nests(work, config, change=None):
    """The loop nests of a convolution alone, its last block changed."""
    target = load_target("native")
    function = winograd_nests.primitive(work, config, target).with_attr("global_symbol", "main")
    if change is not None:
        function = change(function)
    return split_nests(apply.schedule_function(function.with_attr("tirx.noalias", True), target))


def test_patches_of_a_block_on_the_stack_take_no_arena():
    work, config = workload((32, 32), 16, 16), winograd.WinogradConfig(4, 8, 16, 4, 8)
    assert winograd.Tiling(work, config).on_stack
    assert winograd.Tiling(work, config).workspace_bytes == 0
    (nest,) = nests(work, config)
    assert [str(b.name) for b in nest.buffers] == ["data", "weight", "winograd_out"]
    assert nest.extent == 8


def test_workspaces_are_shared_out_by_parts_in_the_arena():
    work, config = workload((32, 32), 64, 64), winograd.WinogradConfig(4, 8, 32, 4, 2)
    (nest,) = nests(work, config)
    assert [str(b.name) for b in nest.buffers] == ["data", "weight", "winograd_out", "patches"]
    workspace = nest.buffers[3]
    assert int(np.prod([int(d) for d in workspace.shape])) * 4 == winograd.Tiling(work, config).workspace_bytes
    assert nest.extent == 2


def test_an_epilogue_that_is_not_elementwise_stays_a_nest_of_its_own():
    work = workload((8, 8), 16, 16)

    def transposed(function):
        def store(node):
            if str(node.buffer.name) != "winograd_out":
                return node
            n, y, x, c = node.indices
            return tirx.BufferStore(node.buffer, node.value, [n, x, y, c])

        return tvm_ffi.structural_map(function, [(tirx.BufferStore, store)])

    config = winograd.WinogradConfig(2, 8, 16, 4, 0)
    assert len(nests(work, config)) == 2
    assert len(nests(work, config, transposed)) == 3


@pytest.mark.parametrize(
    ("size", "channels", "out_channels", "chosen"),
    [((56, 56), 64, 64, True), ((14, 14), 256, 256, True), ((1, 1), 64, 64, False), ((80, 80), 3, 16, False)],
)
def test_choice(size, channels, out_channels, chosen):
    config = winograd.default_config(workload(size, channels, out_channels), load_target("native"), ROOM)
    assert (config is not None) == chosen


def test_choice_keeps_within_the_arena_it_is_given():
    target = load_target("native")
    for channels in (16, 64, 256):
        work = workload((56, 56), channels, channels)
        for room in (0, 100_000, 1_000_000):
            for config in winograd.configs(work, target, room):
                tiling = winograd.Tiling(work, config)
                assert tiling.workspace_bytes <= room
                assert tiling.product_bytes <= winograd.STACK_BYTES


def test_other_strides_windows_and_types_are_not_covered():
    target = load_target("native")
    assert winograd.supports(workload((8, 8), 4, 4), target)
    for kernel, strides, dilation, dtype in (
        ((3, 3), (2, 2), (1, 1), "float32"),
        ((3, 5), (1, 1), (1, 1), "float32"),
        ((3, 3), (1, 1), (2, 2), "float32"),
        ((3, 3), (1, 1), (1, 1), "float16"),
    ):
        work = conv2d.Conv2DWorkload(1, 9, 9, 4, 4, kernel, strides, (1, 1, 1, 1), dilation, dtype)
        assert not winograd.supports(work, target)


def test_the_pass_gives_it_no_more_of_the_arena_than_the_source_graph_leaves(tmp_path):
    branches, shape = Branches(), (1, 64, 28, 28)
    value = branches.input(shape)
    for i in range(3):
        weight = branches.weight(normal((64, 64, 3, 3), i) / np.float32(24))
        value = branches.node("Relu", [branches.node("Conv", [value, weight], pads=[1, 1, 1, 1])])
    branches.output(value)
    state = finish(onnx_state(branches.bytes(), tmp_path))
    kernels = [kernel.symbol for kernel in state.lowered.kernels]
    assert any("winograd" in symbol for symbol in kernels), kernels
    assert state.program.arena_bytes <= state.imported.source_peak_bytes * 1.1
    check(branches, tmp_path)


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["raspberry-pi-4", "raspberry-pi-4-32bit", "graviton-3"])
def test_on_a_board(tmp_path, qemu, force, target, place):
    board = load_target(target)
    qemu(board.arch)  # skips where no emulator is installed
    layers = [
        {"channels": c, "out_channels": o, "size": s} for c, o, s in ((8, 6, (5, 7)), (5, 17, (4, 9)), (16, 33, (7, 7)))
    ]
    branches = model(*layers, epilogue="relu")
    (tmp_path / "layers.onnx").write_bytes(branches.bytes())
    feeds = branches.feeds()
    for size in winograd.POINTS:
        used = force(size, place)
        path = ingot.compile(tmp_path / "layers.onnx", target=target, selftest=False).save(tmp_path / f"l{size}.so")
        assert len(used) == len(layers)
        got = run_under_qemu(path, list(feeds.values()), board, threads=3)
        compare(got, onnxruntime_outputs(branches.bytes(), feeds), branches.outputs)
