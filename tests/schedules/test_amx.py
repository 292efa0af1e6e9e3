"""Intel's tile instructions: their meaning, their machine form, and layers made of them, run or emulated."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import s_tir

from ingot.errors import CompilerError
from ingot.packager.artifact import package
from ingot.packager.codegen import generate_object
from ingot.passes.lower import raw_function, split_nests
from ingot.passes.pipeline import run
from ingot.passes.state import State
from ingot.runtime.loader import load
from ingot.schedules import amx, conv2d_amx, written
from ingot.schedules.amx import ALL, INTEGERS, TDPBF16, Block, Tdp
from ingot.schedules.apply import schedule_function
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload
from ingot.schedules.half import BF16
from ingot.schedules.statements import integer, loop_over, realized
from ingot.target import Target, load_target
from passes.build import onnx_state, onnxruntime_outputs
from passes.execute import Executable
from schedules.amx import Tiles, board, build, running
from schedules.common import Branches, compare
from schedules.quantised import SIZES, Layers
from targets import isa

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="tile instructions are x86-64's")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("amx"))


@pytest.fixture
def tiles(library: ctypes.CDLL) -> Iterator[Tiles]:
    with running(library) as found:
        yield found
        found.check()


def values(random: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Integers, half of them the least or the greatest; bfloat16 values as their bits."""
    if dtype == "uint16":
        return BF16.round(random.standard_normal(shape).astype(np.float32))
    info = np.iinfo(dtype)
    inside = random.integers(info.min, info.max + 1, shape)
    return np.where(random.random(shape) < 0.5, random.choice([info.min, info.max], shape), inside).astype(dtype)


def real(tdp: Tdp, array: np.ndarray) -> np.ndarray:
    return BF16.restore(array).astype(np.float64) if tdp is TDPBF16 else array.astype(np.int64)


def agree(tdp: Tdp, got: np.ndarray, wanted: np.ndarray, what: object = "") -> None:
    if tdp is TDPBF16:
        scale = 1e-5 * max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=scale, err_msg=str(what))
    else:
        np.testing.assert_array_equal(got, wanted, err_msg=str(what))


def machine(tdp: Tdp, block: Block, steps: int) -> Any:
    """The machine form of what `amx.meaning` says, as a PrimFunc of the same parameters."""
    data, weight, sums = amx.meaning(tdp, block, steps).params
    zero = integer(0)

    def step(s: Any) -> Any:
        rows = [amx.address(data, [integer(i), zero, s * block.k]) for i in range(block.down)]
        columns = [amx.address(weight, [integer(j), s, zero, zero, zero]) for j in range(block.across)]
        return amx.step(tdp, block, sums, rows, steps * block.k * (4 // tdp.group), columns)

    body = [amx.zero(tdp, block, sums), loop_over(steps, step, "s"), amx.store(tdp, block, sums)]
    nest = written.nest([data, weight], [sums], "tiles", tvm.tirx.SeqStmt(body))
    root = s_tir.SBlock([], [], [], "root", nest)
    return tvm.tirx.PrimFunc([data, weight, sums], realized(root)).with_attr("s_tir", True)


class Kernels:
    """Kernels of one nest or two each in a library of this machine's."""

    def __init__(self, functions: Mapping[str, Any], folder: Path, target: Target | None = None) -> None:
        self.nests = {name: split_nests(function) for name, function in functions.items()}
        raw = {
            f"{name}_{i}": raw_function(nest).with_attr("global_symbol", f"{name}_{i}")
            for name, nests in self.nests.items()
            for i, nest in enumerate(nests)
        }
        code, _ = generate_object(raw, target or board())
        folder.mkdir(exist_ok=True)
        (folder / "k.o").write_bytes(code)
        subprocess.run(["gcc", "-shared", "-o", str(folder / "k.so"), str(folder / "k.o")], check=True)
        self.library = ctypes.CDLL(str(folder / "k.so"))

    def run(self, name: str, tiles: Tiles, arrays: Mapping[str, np.ndarray]) -> None:
        """Run the nests one after another, tasks one by one, each with a configuration of its own."""
        named = dict(arrays)
        for i, nest in enumerate(self.nests[name]):
            for buffer in nest.buffers:
                if str(buffer.name) not in named:
                    shape = [int(d) for d in buffer.shape]
                    named[str(buffer.name)] = tiles.fenced(np.zeros(shape, str(buffer.dtype)))
            pointers = [ctypes.c_void_p(named[str(buffer.name)].ctypes.data) for buffer in nest.buffers]
            for task in range(nest.extent):
                getattr(self.library, f"{name}_{i}")(*pointers, task, task + 1)


#: Down, across, rows, groups of a step, columns: of one tile every size, and every block of several.
BLOCKS = [
    *((1, 1, *sizes) for sizes in ((1, 16, 9), (7, 9, 15), (8, 1, 16), (9, 15, 1), (15, 8, 7), (16, 7, 8))),
    *((down, across, 16, 16, 16) for down, across in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1))),
    (2, 2, 9, 15, 7),
]


@pytest.mark.parametrize("tdp", ALL, ids=lambda t: t.name)
def test_the_machine_form_computes_the_meaning(tmp_path: Path, tiles: Tiles, tdp: Tdp) -> None:
    cases = {
        f"b{i}": (Block(down, across, rows, groups * tdp.group, n), 1 + i % 3)
        for i, (down, across, rows, groups, n) in enumerate(BLOCKS)
        if tdp in (TDPBF16, INTEGERS[2]) or i % 3 == ALL.index(tdp) % 3
    }
    meanings = {name: amx.meaning(tdp, *case).with_attr("global_symbol", name) for name, case in cases.items()}
    plain = tvm.compile(tvm.IRModule(meanings), target="llvm")
    functions = {name: machine(tdp, *case) for name, case in cases.items()}
    kernels = Kernels(functions, tmp_path)
    portable = Kernels(functions, tmp_path / "portable", load_target("x86-64-v3"))
    random = np.random.default_rng(1)
    for name, (block, _) in cases.items():
        shapes = [[int(d) for d in p.shape] for p in meanings[name].params]
        data, weight = values(random, shapes[0], tdp.data), values(random, shapes[1], tdp.weight)
        wanted = tvm.runtime.tensor(np.zeros(shapes[2], tdp.total))
        plain[name](tvm.runtime.tensor(data), tvm.runtime.tensor(weight), wanted)
        tiles.reset()
        arrays = {"data": tiles.fenced(data), "weight": tiles.fenced(weight), "sums": tiles.fenced(wanted.numpy() + 1)}
        kernels.run(name, tiles, arrays)
        agree(tdp, arrays["sums"], wanted.numpy(), block)
        arrays["sums"][...] = 2
        portable.run(name, tiles, arrays)
        agree(tdp, arrays["sums"], wanted.numpy(), block)
        tiles.check()
        if not tiles.native:
            assert tiles.count(tdp.name) == block.down * block.across * shapes[1][1]


def reference(tdp: Tdp, w: Conv2DWorkload, x: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
    """The convolution, in float64 or int64."""
    (top, left, bottom, right), wide = w.padding, real(tdp, weight)
    padded = np.pad(real(tdp, x), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=padding)
    out = np.zeros((w.batch, w.out_height, w.out_width, w.out_channels), wide.dtype)
    for y, c in product(range(w.kernel[0]), range(w.kernel[1])):
        first = y * w.dilation[0], c * w.dilation[1]
        end = [first[i] + (out.shape[1 + i] - 1) * w.strides[i] + 1 for i in range(2)]
        out += padded[:, first[0] : end[0] : w.strides[0], first[1] : end[1] : w.strides[1]] @ wide[:, y, c].T
    return out


def image(
    batch: int,
    size: tuple[int, int],
    channels: tuple[int, int],
    window: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Conv2DWorkload:
    return Conv2DWorkload(batch, *size, *channels, window, strides, padding, dilation, "float32")


CONVOLUTIONS = [
    image(1, (7, 7), (32, 24), (3, 3), padding=(1, 1, 1, 1)),
    image(2, (5, 33), (64, 16), (3, 3)),
    image(1, (9, 17), (3, 33), (7, 7), (2, 2), (3, 3, 3, 3)),
    image(1, (6, 19), (20, 65), (2, 5), (1, 3), (0, 2, 1, 2)),
    image(2, (11, 12), (36, 40), (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    image(1, (8, 18), (28, 7), (1, 3), dilation=(1, 2)),
    image(2, (9, 10), (64, 48), (1, 1), (2, 2)),
    image(1, (14, 14), (96, 64), (1, 1)),
    image(1, (5, 5), (9, 17), (1, 1)),
    image(1, (3, 3), (8, 8), (1, 1), padding=(1, 0, 0, 1)),
]


@pytest.mark.parametrize("tdp", (TDPBF16, INTEGERS[0], INTEGERS[2]), ids=lambda t: t.name)
def test_layers_of_every_size(tmp_path: Path, tiles: Tiles, tdp: Tdp) -> None:
    """Products and convolutions by the template, each size in each of the three dimensions."""
    layers: list[MatmulWorkload | Conv2DWorkload] = [
        MatmulWorkload((m,) if i % 3 else (1, m), SIZES[(i * 5 + 3) % 13], SIZES[(i * 7 + 6) % 13], "float32")
        for i, m in enumerate(SIZES)
    ]
    layers += CONVOLUTIONS if tdp is TDPBF16 else CONVOLUTIONS[INTEGERS.index(tdp) :: 3]
    plans = {}
    for i, layer in enumerate(layers):
        ways = conv2d_amx.plans_of(layer, tdp)
        plans[f"f{i}"] = ways[i % len(ways)]
    random = np.random.default_rng(2)
    configs = {name: conv2d_amx.configs(plan)[0] for name, plan in plans.items()}
    padding = 0 if tdp is TDPBF16 else 3
    kernels = Kernels(
        {
            name: schedule_function(conv2d_amx.primitive(plan, configs[name], board(), padding), board())
            for name, plan in plans.items()
        },
        tmp_path,
    )
    for name, plan in plans.items():
        w = plan.workload
        shape = (*plan.lead, w.in_channels) if plan.joined else (w.batch, w.height, w.width, w.in_channels)
        x = values(random, shape, tdp.data)
        weight = values(random, (w.out_channels, *w.kernel, w.in_channels), tdp.weight)
        packed = conv2d_amx.pack_weight(weight, plan, configs[name])
        tiles.reset()
        out = tiles.fenced(np.full((*plan.lead, w.out_channels), 99, tdp.total))
        kernels.run(name, tiles, {"data": tiles.fenced(x), "weight": tiles.fenced(packed), "tiles_out": out})
        wanted = reference(tdp, w, x.reshape(w.batch, w.height, w.width, w.in_channels), weight, padding)
        agree(tdp, out, wanted.reshape(out.shape), plan)
        tiles.check()


def test_blocks_that_do_not_fit() -> None:
    for block in (Block(2, 2, 17, 32, 16), Block(2, 2, 16, 34, 16), Block(2, 3, 16, 32, 16), Block(1, 1, 16, 31, 16)):
        with pytest.raises(CompilerError, match="does not fit"):
            amx.configuration(TDPBF16, block)


def test_a_target_without_tiles_gets_no_instruction_of_them() -> None:
    nest = split_nests(machine(TDPBF16, Block(1, 1, 16, 32, 16), 1))[0]
    for target, has in ((board(), True), (load_target("x86-64-v4"), False), (load_target("raspberry-pi-4"), False)):
        _, text = generate_object({"f": raw_function(nest).with_attr("global_symbol", "f")}, target)
        assert ("llvm.x86.tdpbf16ps" in text) is has


def test_one_kernel_has_tiles_of_one_size() -> None:
    sums = tvm.tirx.decl_buffer([integer(1)] * 4, "float32", "sums", layout=None)
    two = [amx.zero(TDPBF16, Block(1, 1, rows, 32, 16), sums) for rows in (15, 16)]
    with pytest.raises(CompilerError, match="several sizes"):
        amx.configured(tvm.tirx.SeqStmt(two))


def test_what_a_step_costs() -> None:
    layer = MatmulWorkload((64,), 256, 64, "float32")
    choice = conv2d_amx.choose(layer, TDPBF16, board())
    assert choice is not None
    assert not choice.plan.copied
    assert choice.block == Block(2, 2, 16, 32, 16)
    for small in (MatmulWorkload((8,), 256, 64, "float32"), MatmulWorkload((64,), 31, 64, "float32")):
        assert conv2d_amx.choose(small, TDPBF16, board()) is None
    # 148 bytes are 37 groups, a prime number: a copy with more channels takes fewer steps.
    long = conv2d_amx.choose(MatmulWorkload((640,), 148, 640, "float32"), INTEGERS[2], board())
    assert long is not None
    assert long.plan.copied


@pytest.mark.parametrize(
    ("place", "byte", "fault"),
    [
        (0, 0, "tiles are not configured"),
        (0, 2, "palette"),
        (5, 1, "reserved"),
        (16, 68, "too large"),
        (48, 0, "rows without columns"),
        (48, 8, "do not fit"),
        (18, 62, "no multiple"),
        (60, 1, "reserved"),
    ],
)
def test_the_emulator_sees_what_would_fault(tmp_path, tiles, monkeypatch, place, byte, fault):
    """A wrong configuration is found by the tests above wherever they run without the CPU's own instructions."""
    block, right = Block(1, 1, 16, 32, 16), amx.configuration
    assert right(TDPBF16, block)[place] != byte
    if tiles.native:
        return  # the process would end

    def wrong(tdp: Tdp, block: Block) -> bytes:
        return right(tdp, block)[:place] + bytes([byte]) + right(tdp, block)[place + 1 :]

    monkeypatch.setattr(amx, "configuration", wrong)
    kernels = Kernels({"f": machine(TDPBF16, block, 1)}, tmp_path)
    shapes = ((1, 16, 32), (1, 1, 16, 16, 2))
    arrays = {name: np.zeros(s, np.uint16) for name, s in zip(("data", "weight"), shapes, strict=True)}
    kernels.run("f", tiles, {**arrays, "sums": np.zeros((1, 1, 16, 16), np.float32)})
    assert fault in tiles.library.amx_faults().decode()
    tiles.reset()


def test_the_emulator_sees_reads_outside_a_buffer(tmp_path, tiles):
    if tiles.native:
        return
    kernels = Kernels({"f": machine(TDPBF16, Block(1, 1, 16, 32, 16), 1)}, tmp_path)
    data = tiles.fenced(np.zeros((15, 32), np.uint16))
    weight, sums = np.zeros((16, 16, 2), np.uint16), np.zeros((16, 16), np.float32)
    kernels.run("f", tiles, {"data": data, "weight": weight, "sums": sums})
    assert b"outside a buffer" in tiles.library.amx_faults()
    tiles.reset()


def kernels_with(state: State, name: str) -> int:
    """How many kernels of a program work on tiles by an instruction."""
    return sum(f"_{name}_" in str(kernel.function) for kernel in state.lowered.kernels)


def test_a_model_in_bfloat16(tmp_path, tiles):
    """Against ONNX Runtime; inputs and weights are exact in bfloat16, and so only the order of sums differs."""
    branches = Branches()
    branches.conv(1, 32, 40, (9, 14), (3, 3), (1, 1), (1, 1, 1, 1), epilogue="residual")
    branches.conv(1, 64, 64, (9, 9), (1, 1), epilogue="silu")
    branches.conv(2, 3, 24, (16, 20), (5, 5), (2, 2), (2, 2, 2, 2), epilogue="relu")
    branches.matmul((3, 17), 96, 65, "bias")
    branches.matmul((33,), 64, 200, "two-readers")
    for name, value in branches.weights.items():
        branches.weights[name] = BF16.restore(BF16.round(value)).reshape(value.shape)
    feeds = {name: BF16.restore(BF16.round(value)) for name, value in branches.feeds().items()}
    wanted = onnxruntime_outputs(branches.bytes(), feeds)
    state = run(replace(onnx_state(branches.bytes(), tmp_path), target=board(), precision="bf16"))
    assert kernels_with(state, "tdpbf16ps") == 5
    code, _ = generate_object({k.symbol: k.function for k in state.lowered.kernels}, board())
    # It claims less than it needs: the runtime would ask the CPU for the tiles that are emulated.
    plain = load_target("x86-64-v3")
    artifact = package(replace(state.program, objects=(code,)), state.imported, plain, precision="bf16", selftest=None)
    path = tmp_path / "model.so"
    path.write_bytes(artifact.library)
    for threads in (1, 2):
        with load(path, threads=threads) as model:
            compare(list(model.run(feeds).values()), wanted, branches.outputs)
        tiles.check()


class EightBits(Layers):
    """Layers whose unsigned weights, too, are eight bits wide."""

    weight_zero = 128


@pytest.mark.parametrize(("dtype", "instruction"), [("int8", "tdpbssd"), ("uint8", "tdpbusd")])
def test_a_model_of_integers_is_exact(tmp_path, tiles, dtype, instruction):
    layers = EightBits(dtype, per_channel=dtype == "int8")
    layers.conv(64, 32, (7, 9))
    layers.conv(20, 48, (9, 20), strides=(2, 2))
    layers.conv(128, 65, (8, 8), kernel=(1, 1), same=False)
    layers.dense(40, 100, 33, least=-128)
    imported = layers.imported(tmp_path)
    state = run(State(imported.module, imported.weights, imported, board()))
    assert kernels_with(state, instruction) == 4
    program = Executable(state, tmp_path)
    for pieces in (1, 3):
        layers.compare(program.run(layers.feeds, pieces))
        tiles.check()


def test_layers_that_gain_get_tiles_on_the_board_that_has_them(tmp_path):
    """Sapphire Rapids: large layers by tiles, small ones by vectors; no other x86 board has any of it."""
    branches, layers = Branches(), EightBits("uint8", per_channel=False)
    branches.matmul((128,), 384, 384, "relu")
    branches.matmul((1,), 384, 384)
    layers.dense(128, 384, 384)
    layers.dense(1, 384, 384)
    counts = {}
    for name in ("sapphirerapids", "znver5"):
        target = load_target(name)
        half = run(replace(onnx_state(branches.bytes(), tmp_path), target=target, precision="bf16"))
        imported = layers.imported(tmp_path)
        whole = run(State(imported.module, imported.weights, imported, target))
        code, _ = generate_object(
            {k.symbol: k.function for state in (half, whole) for k in state.lowered.kernels}, target
        )
        (tmp_path / "k.o").write_bytes(code)
        assert isa.foreign_instructions(code, target) == []
        text = subprocess.run(
            [str(isa.gnu_x86("objdump")), "-d", str(tmp_path / "k.o")], capture_output=True, text=True, check=True
        ).stdout
        counts[name] = [text.count(word) for word in ("tdpbf16ps", "tdpbusd ", "ldtilecfg", "tilerelease")]
        assert sum(whole.lowered.multiply_adds) >= 129 * 384 * 384
    assert counts["sapphirerapids"][0] >= 4
    assert counts["sapphirerapids"][1] >= 4
    assert counts["sapphirerapids"][2:] == [2, 2]
    assert counts["znver5"] == [0, 0, 0, 0]
