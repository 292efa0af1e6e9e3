"""Half precision: what the microkernels mean, what machine code they become, and layers of odd sizes."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ingot
from ingot.emulator import run_under_qemu
from ingot.packager.codegen import generate_object
from ingot.passes.pipeline import run
from ingot.schedules import conv2d, conv2d_half
from ingot.schedules.conv2d import Conv2DWorkload
from ingot.schedules.half import BF16, FP16, HALVES
from ingot.target import load_target
from passes.build import onnx_state, onnxruntime_outputs
from passes.execute import Executable
from schedules.common import CHANNELS, Branches, compare, property_settings
from targets import isa

#: Targets whose kernels multiply bfloat16, and the instruction that does it.
DOT_TARGETS = {"znver4": "vdpbf16ps", "graviton-3": "bfmmla"}


def exact(branches: Branches) -> Branches:
    """The same model with weights that bfloat16 holds: then the inputs' rounding is all that half precision does."""
    for name, value in branches.weights.items():
        branches.weights[name] = BF16.restore(BF16.round(value)).reshape(value.shape)
    return branches


def lowered(branches: Branches, folder, target: str, precision: str = "bf16"):
    return run(onnx_state(branches.bytes(), folder, target).having(precision=precision))


def check(branches: Branches, folder, target: str, pieces=(1,)) -> None:
    """Compile for `target`; run on this machine, with its instructions where it has them, and with portable forms.

    Weights and inputs are exact in bfloat16, and each output is float32: ONNX Runtime computes the same products.
    """
    feeds = {name: BF16.restore(BF16.round(value)) for name, value in branches.feeds().items()}
    wanted = onnxruntime_outputs(branches.bytes(), feeds)
    state = lowered(branches, folder, target)
    assert sum(layer.arithmetic == "bf16" for layer in state.layers) >= len(state.layers) / 2
    native = load_target("native")
    plain = native.model_copy(update={"features": tuple(f for f in native.features if f not in ("avx512bf16", "bf16"))})
    for host in dict.fromkeys((native, plain)):
        program = Executable(replace(state, target=host), folder)
        for count in pieces:
            compare(program.run(list(feeds.values()), count), wanted, branches.outputs)


@pytest.mark.parametrize("target", DOT_TARGETS)
def test_products_of_every_edge_size(tmp_path, target):
    branches = Branches()
    for size in CHANNELS:
        branches.matmul((7,), 34, size, "bias")
        branches.matmul((size,), size + 1, 20, "relu")
    check(exact(branches), tmp_path, target, (1, 3))


@pytest.mark.parametrize("target", DOT_TARGETS)
def test_convolutions_of_every_edge_size(tmp_path, target):
    branches = Branches()
    for i, size in enumerate(CHANNELS):
        branches.conv(1, size, 24, (5, 9), (1, 1))
        branches.conv(1, 6, size, (7, 5), (3, 3), (1 + i % 2, 1), (1, 1, 0, 2), (1 + i % 3 // 2, 1), epilogue="bias")
    check(exact(branches), tmp_path, target, (1, 3))


@st.composite
def convolutions(draw):
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 2)]))
    strides = draw(st.sampled_from([(1, 1), (2, 2), (1, 2)]))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    size = (draw(st.integers(5, 15)), draw(st.integers(5, 15)))
    epilogue = draw(st.sampled_from(["none", "bias", "relu", "clip", "sigmoid"]))
    channels = draw(st.tuples(st.sampled_from(CHANNELS[2:]), st.sampled_from(CHANNELS)))
    return 1, *channels, size, kernel, strides, pads, (1, 1), 1, epilogue


@property_settings
@given(convolutions(), st.sampled_from(list(DOT_TARGETS)))
def test_any_convolution(tmp_path_factory, drawn, target):
    branches = Branches()
    branches.conv(*drawn)
    branches.matmul((3,), 64, 64)  # always in half precision, whatever was drawn
    check(exact(branches), tmp_path_factory.mktemp("half"), target)


@pytest.mark.slow
@pytest.mark.qemu
def test_the_machine_form_on_an_emulated_board(tmp_path, qemu):
    board = load_target("graviton-3")
    qemu(board.arch)  # skips where no emulator is installed
    branches = Branches()
    for size in CHANNELS:
        branches.matmul((5,), size + 1, 33, "bias")
        branches.conv(1, 6, size, (7, 5), (3, 3), (1, 1), (1, 1, 1, 1))
    exact(branches)
    feeds = {name: BF16.restore(BF16.round(value)) for name, value in branches.feeds().items()}
    (tmp_path / "layers.onnx").write_bytes(branches.bytes())
    artifact = ingot.compile(tmp_path / "layers.onnx", target="graviton-3", precision="bf16", selftest=False)
    assert artifact.metadata["half"]["multiplied"] > len(CHANNELS)
    got = run_under_qemu(artifact.save(tmp_path / "layers.so"), list(feeds.values()), board, threads=2)
    compare(got, onnxruntime_outputs(branches.bytes(), feeds), branches.outputs)


@pytest.mark.parametrize(("target", "instruction"), DOT_TARGETS.items())
def test_the_machine_code_has_the_instruction(tmp_path, target, instruction):
    board = load_target(target)
    if missing := isa.missing_tools("aarch64"):  # llvm-objdump, for every architecture
        pytest.skip(f"no disassembler for {board.arch}: apt-get install {' '.join(missing)}")
    branches = Branches()
    branches.matmul((16,), 64, 64, "relu")
    branches.conv(1, 32, 48, (9, 9), (3, 3), (1, 1), (1, 1, 1, 1))
    state = lowered(branches, tmp_path, target)
    code, _ = generate_object({k.symbol: k.function for k in state.lowered.kernels}, board)
    (tmp_path / "k.o").write_bytes(code)
    command = [isa.llvm_objdump(), "-d", "--mattr=+" + {"x86_64": "avx512bf16", "aarch64": "bf16"}[board.arch]]
    text = subprocess.run([*command, str(tmp_path / "k.o")], capture_output=True, text=True, check=True).stdout
    count = sum(1 for line in text.splitlines() if instruction in line.split())
    assert count > 20
    assert isa.foreign_instructions(code, board) == []


@pytest.mark.parametrize("half", HALVES.values(), ids=lambda half: half.name)
def test_rounding_of_arrays(half):
    values = np.concatenate([
        np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 100,
        np.array([0.0, -0.0, 1.00390625, 1.01171875, np.inf, -np.inf, np.nan, 1e-30, 6e-8], np.float32),
    ])  # fmt: skip
    import ml_dtypes

    with np.errstate(over="ignore"):
        dtype = ml_dtypes.bfloat16 if half is BF16 else np.float16
        wanted = values.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(half.restore(half.round(values)), wanted)
    assert half.holds(values)
    assert half.holds(np.float32([1e20])) == (half is BF16)
    assert not half.holds(np.float32([3.4e38]))


@pytest.mark.parametrize("half", HALVES.values(), ids=lambda half: half.name)
@pytest.mark.parametrize("count", CHANNELS)
def test_rounding_in_kernels(tmp_path, half, count):
    from tvm import te

    from ingot.passes.lower import raw_function, split_nests
    from ingot.schedules.apply import schedule_function

    x = te.placeholder((count,), "float32", name="x")
    y = te.compute((count,), lambda i: half.narrow(x[i]), name="y")
    z = te.compute((count,), lambda i: half.widen(y[i]), name="z")
    host = load_target("native")
    specials = [np.nan, np.inf, -np.inf, 1.00390625, 1.01171875, -0.0, 3.3e38, 1e-40]
    values = np.resize(np.array([*specials, *np.linspace(-9, 9, 57)], np.float32), count)
    for last, want in ((y, half.round(values)), (z, half.restore(half.round(values)))):
        tensors = [x, y] if last is y else [x, z]
        function = schedule_function(te.create_prim_func(tensors).with_attr("global_symbol", "main"), host)
        (nest,) = split_nests(function)
        code, _ = generate_object({"f": raw_function(nest).with_attr("global_symbol", "f")}, host)
        path = tmp_path / f"{last.op.name}.so"
        (tmp_path / "f.o").write_bytes(code)
        subprocess.run(["gcc", "-shared", "-o", str(path), str(tmp_path / "f.o")], check=True)
        import ctypes

        out = np.zeros(count, want.dtype)
        arrays = {"x": values, "y": out, "z": out}
        pointers = [ctypes.c_void_p(arrays[str(b.name)].ctypes.data) for b in nest.buffers]
        ctypes.CDLL(str(path)).f(*pointers, 0, nest.extent)
        if last is z or half is FP16:
            np.testing.assert_array_equal(out, want)
        else:
            np.testing.assert_array_equal(out[~np.isnan(values)], want[~np.isnan(values)])


@pytest.mark.parametrize(
    ("channels", "kernel", "padding", "gains"), [(3, 3, 1, False), (3, 1, 0, False), (24, 1, 0, True), (6, 3, 1, True)]
)
def test_cores_with_amx_multiply_pairs_where_data_are_read_in_place(channels, kernel, padding, gains):
    """The first layer of a model has 3 channels and a border: copying it as four costs more than float32 does."""
    target = load_target("sapphirerapids")
    layer = Conv2DWorkload(1, 56, 56, channels, 32, (kernel, kernel), (2, 2), (padding,) * 4, (1, 1), "float32")
    choice = conv2d_half.choose(layer, target, BF16)
    assert choice is not None
    assert (choice.cost < conv2d.cost(layer, conv2d.default_config(layer, target), target)) == gains
