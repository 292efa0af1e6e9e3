"""Instructions that multiply two rows with two rows: their meaning, their portable form, and layers made of them."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import s_tir, te

import ingot
from ingot.emulator import run_under_qemu
from ingot.packager.codegen import generate_object
from ingot.passes.lower import raw_function, split_nests
from ingot.schedules import conv2d_mmla
from ingot.schedules.apply import schedule_function
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload, TileConfig
from ingot.schedules.half import BF16
from ingot.schedules.mmla import ALL, BFMMLA, INTEGERS, Mmla, integer_mmla, intrinsic_name
from ingot.target import load_target
from schedules.common import property_settings
from schedules.quantised import Layers
from targets import isa

CHANNELS = (1, 7, 8, 9, 16, 17, 33, 65)


def values(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Integers, half of them the least or the greatest; bfloat16 values as their bits."""
    if dtype == "uint16":
        return BF16.round(random.standard_normal(shape).astype(np.float32))
    info = np.iinfo(dtype)
    inside = random.integers(info.min, info.max + 1, shape)
    return np.where(random.random(shape) < 0.5, random.choice([info.min, info.max], shape), inside).astype(dtype)


def real(mmla: Mmla, array: np.ndarray) -> np.ndarray:
    return BF16.restore(array).astype(np.float64) if mmla is BFMMLA else array.astype(np.int64)


def agree(mmla: Mmla, got: np.ndarray, wanted: np.ndarray) -> None:
    if mmla is BFMMLA:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))
    else:
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("mmla", ALL, ids=lambda m: m.name)
def test_the_meaning_is_a_product_of_two_by_two_rows(mmla: Mmla) -> None:
    random = np.random.default_rng(1)
    meaning = s_tir.TensorIntrin.get(intrinsic_name(mmla)).desc
    run = tvm.compile(tvm.IRModule({"main": meaning.with_attr("global_symbol", "main")}), target="llvm")["main"]
    a, b = (values(random, (2, mmla.group), dtype) for dtype in (mmla.data, mmla.weight))
    c = random.integers(-1000, 1000, (2, 2)).astype(mmla.total)
    tensors = [tvm.runtime.tensor(x) for x in (a, b, c)]
    run(*tensors)
    agree(mmla, tensors[2].numpy(), c + real(mmla, a) @ real(mmla, b).T)


def run_here(tensors: list, arrays: list[np.ndarray], out: np.ndarray, folder: Path) -> np.ndarray:
    """Schedule a layer for a board that has the instruction, and run it on this machine."""
    function = te.create_prim_func(tensors, index_dtype_override="int64").with_attr("global_symbol", "main")
    board = load_target("graviton-3")
    (nest,) = split_nests(schedule_function(function, board))
    code, _ = generate_object({"f": raw_function(nest).with_attr("global_symbol", "f")}, load_target("native"))
    (folder / "f.o").write_bytes(code)
    path = folder / f"f{len(list(folder.iterdir()))}.so"
    subprocess.run(["gcc", "-shared", "-o", str(path), str(folder / "f.o")], check=True)
    named = dict(zip([str(t.op.name) for t in tensors], [*arrays, out], strict=True))
    pointers = [ctypes.c_void_p(named[str(buffer.name)].ctypes.data) for buffer in nest.buffers]
    library = ctypes.CDLL(str(path))
    for task in range(nest.extent):
        library.f(*pointers, task, task + 1)
    return out


@st.composite
def cases(draw):
    window = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 5)]))
    size = (draw(st.integers(5, 7)), draw(st.integers(5, 19)))
    channels = draw(st.tuples(st.sampled_from(CHANNELS), st.sampled_from(CHANNELS)))
    workload = Conv2DWorkload(
        draw(st.integers(1, 2)),
        *size,
        *channels,
        window,
        draw(st.sampled_from([(1, 1), (2, 2), (1, 3)])),
        tuple(draw(st.integers(0, 2)) for _ in range(4)),
        draw(st.sampled_from([(1, 1), (1, 1), (2, 2)])) if max(window) < 5 else (1, 1),
        "float32",
    )
    return workload, TileConfig(draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([4, 8, 12])), 1)


@property_settings
@given(cases(), st.sampled_from(ALL), st.booleans())
def test_any_convolution(tmp_path_factory, drawn, mmla, flipped):
    workload, config = drawn
    w, random = workload, np.random.default_rng(2)
    flipped = flipped and mmla.data == "uint8"  # stored as int8, read with the top bit turned
    padding = 0 if mmla is BFMMLA else 3
    x = values(random, (w.batch, w.height, w.width, w.in_channels), "int8" if flipped else mmla.data)
    weight = values(random, (w.out_channels, *w.kernel, w.in_channels), mmla.weight)
    turn = (lambda stored: tvm.tirx.reinterpret("uint8", stored ^ tvm.tirx.const(-128, "int8"))) if flipped else None
    tensors = conv2d_mmla.compute(w, config, mmla, conv2d_mmla.Operands(str(x.dtype), padding, turn))
    out = np.zeros((w.batch, w.out_height, w.out_width, w.out_channels), mmla.total)
    packed = conv2d_mmla.pack_weight(weight, config.block, mmla)
    got = run_here(list(tensors), [x, packed], out, tmp_path_factory.mktemp("mmla"))
    read = real(mmla, x) + (128 if flipped else 0)
    (top, left, bottom, right), wide = w.padding, real(mmla, weight)
    padded = np.pad(read, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=padding)
    wanted = np.zeros(out.shape, wide.dtype)
    for y in range(w.kernel[0]):
        for c in range(w.kernel[1]):
            first = y * w.dilation[0], c * w.dilation[1]
            end = [first[i] + (out.shape[1 + i] - 1) * w.strides[i] + 1 for i in range(2)]
            part = padded[:, first[0] : end[0] : w.strides[0], first[1] : end[1] : w.strides[1]]
            wanted += part @ wide[:, y, c].T
    agree(mmla, got, wanted)


@pytest.mark.parametrize("mmla", ALL, ids=lambda m: m.name)
def test_products(tmp_path, mmla):
    random, k = np.random.default_rng(3), {"bfmmla": 7, "smmla": 16, "usmmla": 33, "ummla": 65}[mmla.name]
    for lead, n in (((9,), 17), ((2, 8), 8)):
        x, weight = values(random, (*lead, k), mmla.data), values(random, (n, 1, 1, k), mmla.weight)
        config = TileConfig(4, 8, 1)
        workload = MatmulWorkload(lead, k, n, "float32")
        tensors = conv2d_mmla.compute_matmul(workload, config, mmla, conv2d_mmla.Operands(mmla.data, 0, None))
        packed = conv2d_mmla.pack_weight(weight, 8, mmla)
        got = run_here(list(tensors), [x, packed], np.zeros((*lead, n), mmla.total), tmp_path)
        agree(mmla, got, real(mmla, x) @ real(mmla, weight).reshape(n, k).T)


def test_which_instruction_an_integer_layer_gets() -> None:
    board, older = load_target("graviton-3"), load_target("graviton-2")
    signed, unsigned, wide = (np.full((1, 1, 1, 1), value, np.float32) for value in (-128, 255, 256))
    smmla, usmmla, ummla = INTEGERS
    assert integer_mmla(board, "int8", signed) == smmla
    assert integer_mmla(board, "uint8", signed) == usmmla
    assert integer_mmla(board, "int8", unsigned) == integer_mmla(board, "uint8", unsigned) == ummla
    assert integer_mmla(board, "int8", wide) is None
    assert integer_mmla(older, "int8", signed) is None


def layers() -> Layers:
    """Layers that an instruction on two rows computes fastest: more than a few columns and channels."""
    made = Layers("int8")
    made.conv(16, 24, (5, 12))
    made.conv(9, 17, (6, 9), strides=(2, 2))
    made.conv(24, 16, (4, 8), kernel=(1, 1), same=False)
    made.dense(7, 40, 20)
    return made


@pytest.mark.qemu
def test_integer_layers_on_a_board(tmp_path, qemu):
    board = load_target("graviton-3")
    qemu(board.arch)  # skips where no emulator is installed
    made = layers()
    model = ingot.compile(made.save(tmp_path), target=board.name, selftest=False)
    path = model.save(tmp_path / "layers.so")
    made.compare(run_under_qemu(path, made.feeds, board, threads=2))
    tool = isa.llvm_objdump()
    if tool is None:
        pytest.skip("llvm-objdump is not installed")
    command = [tool, "-d", "--mattr=+i8mm,+dotprod", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.count("smmla") > 100
    assert isa.foreign_instructions(path.read_bytes(), board) == []


@pytest.mark.qemu
def test_a_board_without_the_feature_gets_none_of_it(tmp_path, qemu):
    """Graviton 2 has dotprod alone: its library holds no instruction of i8mm, and a CPU without it runs it."""
    board = load_target("graviton-2")
    qemu(board.arch)
    made = layers()
    path = ingot.compile(made.save(tmp_path), target=board.name, selftest=False).save(tmp_path / "layers.so")
    assert isa.foreign_instructions(path.read_bytes(), board) == []
    made.compare(run_under_qemu(path, made.feeds, board, threads=2))


def test_the_machine_form_needs_the_feature(tmp_path):
    """For one target without the features the same kernels are made of plain arithmetic."""
    board = load_target("graviton-3")
    plain = board.model_copy(update={"features": tuple(f for f in board.features if f not in ("i8mm", "bf16"))})
    workload = MatmulWorkload((8,), 16, 8, "float32")
    for mmla in ALL:
        tensors = conv2d_mmla.compute_matmul(
            workload, TileConfig(4, 8, 1), mmla, conv2d_mmla.Operands(mmla.data, 0, None)
        )
        function = te.create_prim_func(list(tensors), index_dtype_override="int64").with_attr("global_symbol", "main")
        (nest,) = split_nests(schedule_function(function, board))
        raw = {"f": raw_function(nest).with_attr("global_symbol", "f")}
        for target, has in ((board, True), (plain, False)):
            _, text = generate_object(raw, target)
            assert (mmla.intrinsic in text) is has
