"""Weights in few bits: what the kernels decode is what was stored, and what was stored is near what was there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

import ingot
from frontend.tiny_models import model_of
from ingot.errors import OptionError
from ingot.passes.pipeline import run
from ingot.passes.rewriter import Rewriter, bindings_of, op_name
from ingot.passes.state import State
from ingot.passes.stored_weights import is_stored
from ingot.quantize import weight_only
from ingot.quantize.codes import encode, k_means
from ingot.quantize.prepare import prepare
from ingot.quantize.weight_only import format_named, store_weights
from ingot.schedules.stored import FORMATS, GROUP, StoredWeight, pack_codes, power_levels
from ingot.target import load_target
from passes.build import onnx_state, onnxruntime_outputs
from passes.execute import Executable
from quantize.models import small_net, small_samples, sqnr
from schedules.common import CHANNELS, Branches, compare, property_settings

#: Signal to noise that normally distributed weights keep at least, in decibels.
LEAST = {"int8": 38, "int4": 19, "codebook4": 19, "codebook5": 25, "codebook6": 30, "codebook7": 35, "codebook8": 40}
LEAST["pow2"] = 14


def decoded(weight: StoredWeight, inputs: int) -> np.ndarray:
    """The float32 weights in their own layout; `inputs` is the dimension of the input channels."""
    codes, scales = (np.moveaxis(part, inputs, -1) for part in (weight.codes, weight.scales))
    whole = StoredWeight(weight.format, codes, scales, weight.table).decoded()
    return np.ascontiguousarray(np.moveaxis(whole, -1, inputs), np.float32)


def check(branches: Branches, folder: Path, target: str, form: str, inputs: dict[int, int]) -> None:
    """Compare with ONNX Runtime on the decoded weights. inputs: where input channels lie, by the weights' rank."""
    state = onnx_state(branches.bytes(), folder, target)
    build = lambda _: pytest.fail("there is nothing to run")  # noqa: E731
    done, _ = store_weights(
        prepare(state.imported, state.target), format_named(form), None, build=build, tick=lambda *_: None
    )
    state = State(done.module, done.weights, done, state.target)
    reader, count = Rewriter(state, lambda *_: None), 0
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) == "relax.call_dps_packed":
            weight: Any = is_stored(reader, binding.value)
            name = str(binding.value.args[1].fields[0].name).removesuffix("_codes")
            # A constant of a few elements has no name in the program.
            name = name if name in branches.weights else min(branches.weights)
            branches.weights[name] = decoded(weight, inputs[weight.codes.ndim])
            count += 1
    assert count == len(branches.outputs)
    feeds = branches.feeds()
    program = Executable(run(state).having(target=load_target("native")), folder)
    compare(program.run(list(feeds.values())), onnxruntime_outputs(branches.bytes(), feeds), branches.outputs)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "SMALLEST", 1)


@pytest.mark.parametrize("form", ["int8", "int4", "codebook4", "codebook7", "pow2"])
@pytest.mark.usefixtures("everything")
def test_kernels_compute_with_the_decoded_weights(form: str, tmp_path: Path) -> None:
    branches = Branches()
    branches.conv(1, 3, 20, (7, 9), (3, 3), (2, 1), (1, 1, 0, 2), epilogue="bias")
    branches.conv(1, 41, 17, (3, 5), (1, 1), epilogue="relu")
    branches.matmul((9,), 70, 33, "bias")
    branches.matmul((1,), 32, 16)
    check(branches, tmp_path, "native", form, {4: 1, 2: 0})


@pytest.mark.parametrize("target", ["raspberry-pi-4", "raspberry-pi-3-32bit"])
@pytest.mark.usefixtures("everything")
def test_other_targets_decode_the_same(target: str, tmp_path: Path) -> None:
    """Their tiles are others; the codes and what they mean are not."""
    branches = Branches()
    branches.conv(1, 8, 18, (5, 7), (3, 3), (1, 1), (1, 1, 1, 1))
    branches.matmul((5,), 64, 24)
    check(branches, tmp_path, target, "int4", {4: 1, 2: 0})


@property_settings
@given(st.sampled_from(CHANNELS), st.sampled_from(CHANNELS), st.integers(1, 9), st.sampled_from(list(FORMATS)))
def test_any_product(tmp_path_factory: pytest.TempPathFactory, k: int, n: int, rows: int, form: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_only, "SMALLEST", 1)
        branches = Branches()
        branches.matmul((rows,), k, n)
        check(branches, tmp_path_factory.mktemp("product"), "native", form, {2: 0})


@pytest.mark.parametrize("form", ["int4", "codebook5"])
def test_rows_are_decoded_as_they_are_looked_up(form: str, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((50, 37)).astype(np.float32)
    node = helper.make_node("Gather", ["t", "x"], ["y"])
    model = model_of([node], {"x": ("int64", (2, 7))}, ["y"], {"t": table})
    onnx.save(model, tmp_path / "rows.onnx")
    artifact = ingot.compile(tmp_path / "rows.onnx", weights=form, selftest=False)
    found = ingot.load(artifact.save(tmp_path / "rows.so"))
    index = np.array([[0, 49, -1, 7, 7, 3, -50], [1, 2, 3, 4, 5, 6, 48]])
    codes, scales, book, *_ = encode(table, 37, FORMATS[form], None)
    wanted = StoredWeight(FORMATS[form], codes, scales[:, 0], book).decoded()[index]
    assert np.array_equal(found(index), wanted)
    assert sqnr(table[index], wanted) > LEAST[form]
    assert artifact.metadata["weights_bytes"] < 0.4 * table.nbytes


@pytest.mark.parametrize("form", FORMATS)
def test_normal_weights_keep_their_signal(form: str) -> None:
    rows = np.random.default_rng(0).standard_normal((48, 160)) * np.geomspace(0.1, 10, 48)[:, None]
    codes, scales, _, real, shift = encode(rows, 80, FORMATS[form], None)
    assert codes.shape == rows.shape and not shift.any()
    assert scales.shape == ((48, 2, -(-80 // GROUP)) if FORMATS[form].grouped else (48, 1, 1))
    noise = [sqnr(row, other) for row, other in zip(rows, real, strict=True)]
    assert min(noise) > LEAST[form] - 3 and np.mean(noise) > LEAST[form], "rows of any size keep as much"


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros_and_a_row_of_them_has_a_scale(form: str) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    rows[2], rows[:, 5] = 0, 0
    codes, scales, book, real, _ = encode(rows, 64, FORMATS[form], None)
    assert np.isfinite(scales).all() and not real[2].any() and not real[:, 5].any()
    wide = StoredWeight(FORMATS[form], codes[:, None, None], scales[:, None], book)
    assert np.allclose(wide.decoded()[:, 0, 0], real, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 33])
def test_codes_are_packed_as_the_module_says(form: str, inputs: int) -> None:
    """Code j of eight begins at bit j * bits of the string of their bytes, for each output channel of a block.

    Of whole numbers, the number in two's complement is there.
    """
    bits, block = FORMATS[form].bits, 4
    codes = np.random.default_rng(inputs).integers(0, 1 << bits, (6, 1, 2, inputs)).astype(np.uint8)
    packed = pack_codes(StoredWeight(FORMATS[form], codes, np.ones(1), np.zeros(0)), block)
    assert packed.shape == (2, 1, 2, inputs if bits == 8 else -(-inputs // 8) * bits, block)
    for o in range(6):
        for x in range(2):
            string = int.from_bytes(packed[o // block, 0, x, :, o % block].tobytes(), "little")
            found = [string >> (i * bits) & ((1 << bits) - 1) for i in range(inputs)]
            flipped = FORMATS[form].offset if FORMATS[form].kind == "whole" else 0
            assert [code ^ flipped for code in found] == codes[o, 0, x].tolist()


def test_powers_of_two() -> None:
    levels = power_levels()
    assert levels[:8].tolist() == [0, 0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1]
    assert np.array_equal(levels[8:], -levels[:8])


def test_levels_are_where_values_are() -> None:
    values = np.repeat([-3.0, -1.0, 0.0, 0.5, 2.0], 40)[None] + np.linspace(-1e-3, 1e-3, 200)
    assert np.allclose(k_means(values, np.ones_like(values), 5, np.empty(0)), [-3, -1, 0, 0.5, 2], atol=5e-3)


def test_more_levels_are_nearer() -> None:
    values = np.random.default_rng(0).standard_normal((1, 5000))
    errors = []
    for count in (4, 8, 16, 64, 256):
        levels = k_means(values, np.ones_like(values), count, np.empty(0))
        errors.append(float(np.mean(np.abs(values[0][:, None] - levels).min(1) ** 2)))
    assert all(after < before / 2 for before, after in pairwise(errors))
    # Max 1960, "Quantizing for minimum distortion": 16 levels of a normal distribution have 0.0095 of its power.
    assert errors[2] < 0.0115


def test_samples_lower_the_error_and_the_report_says_what_it_is(tmp_path: Path) -> None:
    net = small_net(tmp_path / "net.onnx")
    reference = ingot.load(ingot.compile(net, selftest=False).save(tmp_path / "float.so"))
    fresh = small_samples(32, seed=2)
    wanted = np.concatenate([reference(x[None]) for x in fresh])
    found = {}
    for samples in (None, {"x": small_samples(32)}):
        artifact = ingot.compile(net, weights="int4", calibrate=samples)
        model = ingot.load(artifact.save(tmp_path / "int4.so"))
        found[samples is not None] = sqnr(wanted, np.concatenate([model(x[None]) for x in fresh]))
        report = artifact.quantization
        assert report is not None and [layer.decision for layer in report.layers].count("int4") == 2
        assert model.selftest()
        assert artifact.metadata["precision"] == "fp32+int4"
        (error,) = artifact.metadata["few_bits"]["errors"]
        assert artifact.metadata["few_bits"]["stored"] == 2 and 10 < error["sqnr_db"] < 60
        assert (report.output_sqnr_db is None) == (samples is None)
    assert found[True] > found[False] + 3


def test_what_goes_together_and_what_does_not(tmp_path: Path) -> None:
    net = small_net(tmp_path / "net.onnx")
    with pytest.raises(OptionError, match="unknown weight format"):
        ingot.compile(net, weights="int3")
    for precision in ("bf16", "int8"):
        with pytest.raises(OptionError, match="multiplied in float32"):
            ingot.compile(net, weights="int8", precision=precision, calibrate={"x": small_samples(8)})
    with pytest.raises(OptionError, match="limits what --precision int8 loses"):
        ingot.compile(net, weights="int8", max_drop=0.01)


def test_a_weight_that_is_not_finite_stays(tmp_path: Path) -> None:
    weight = np.ones((32, 32), np.float32)
    weight[3, 4] = np.inf
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("float32", (1, 32))}, ["y"], {"w": weight})
    onnx.save(model, tmp_path / "inf.onnx")
    artifact = ingot.compile(tmp_path / "inf.onnx", weights="codebook4", selftest=False)
    assert artifact.quantization is not None
    assert [layer.reason for layer in artifact.quantization.layers] == ["a weight is not finite"]
    assert "no weights can be stored as codebook4: the model stays as it is" in artifact.notices
