"""Quantisation without the division: the same integers as numpy's division for every number, and no division left."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from ingot.packager.codegen import generate_object
from ingot.schedules import quotients
from ingot.schedules.quotients import reciprocal
from passes.build import finish, onnx_bytes, onnx_state
from passes.execute import Executable

SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


def once_rounded(x, factor, addend):
    """x * factor + addend as float32, by exact arithmetic."""
    exact = Fraction(float(x)) * Fraction(float(factor)) + Fraction(float(addend))
    near = np.float32(float(exact))
    around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.int32)) & 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scale=st.floats(2.0**-99, 2.0**99, width=32),
    zero=st.integers(0, 255),
    place=st.integers(0, 254),
    step=st.integers(-9, 9),
)
def test_integers_are_those_of_the_division(scale, zero, place, step):
    s = np.float32(scale)
    by = reciprocal(float(s), -zero, 255 - zero)
    assert by is not None
    x = np.float32((place - zero + 0.5) * np.float64(s))
    for _ in range(abs(step)):
        x = np.nextafter(x, np.float32(np.copysign(np.inf, step)))
    x = np.clip(x, np.float32(by.low), np.float32(by.high))
    quotient = once_rounded(x, by.first, x * np.float32(by.second))
    assert np.rint(quotient) == np.rint(x / s)


def test_rounds_once_whatever_the_parts():
    random = np.random.default_rng(0)
    x, y, z = ((random.standard_normal(400) * 2.0 ** random.integers(-9, 9, 400)).astype(np.float32) for _ in range(3))
    z *= np.float32(2.0**-24)
    found = quotients._fma(x, np.float32(y[0]), z)
    assert all(f == once_rounded(a, y[0], c) for f, a, c in zip(found, x, z, strict=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan, 3e38, 1e-45])
def test_scales_without_a_usable_reciprocal_keep_the_division(scale):
    assert reciprocal(float(np.float32(scale)), -128, 127) is None


def model(scale, zero, dtype):
    """A QuantizeLinear of each size."""
    weights = {"scale": np.float32(scale), "zero": np.array(zero, dtype)}
    nodes = [helper.make_node("QuantizeLinear", [f"x{n}", "scale", "zero"], [f"y{n}"]) for n in SIZES]
    return onnx_bytes(nodes, {f"x{n}": (3, n) for n in SIZES}, [f"y{n}" for n in SIZES], weights)


@pytest.mark.parametrize(
    ("scale", "zero", "dtype"), [(0.1, 139, "uint8"), (2**-4, 0, "uint8"), (0.0036754, -7, "int8"), (3.3, 0, "int8")]
)
def test_machine_form_quantises_like_numpy(monkeypatch, tmp_path, scale, zero, dtype):
    monkeypatch.setattr(quotients, "_WIDE", 128)
    state = finish(onnx_state(model(scale, zero, dtype), tmp_path))
    limits, random = np.iinfo(dtype), np.random.default_rng(0)
    ties = (np.arange(-300, 300) + 0.5) * scale
    odd = np.array([np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, 1e10, -1e10])
    feeds = [
        random.choice(np.concatenate([ties, random.normal(0, 100 * scale, 600), odd]), (3, n)).astype(np.float32)
        for n in SIZES
    ]
    for x, y in zip(feeds, Executable(state, tmp_path).run(feeds), strict=True):
        with np.errstate(over="ignore"):
            wanted = np.clip(np.rint(x / np.float32(scale)) + zero, limits.min, limits.max)
        np.testing.assert_array_equal(y, wanted.astype(dtype))


@pytest.mark.parametrize(
    ("target", "divides"), [("sapphirerapids", False), ("x86-64-v4", False), ("graviton-2", False), ("x86-64-v3", True)]
)
def test_where_vectors_divide_slowly_no_division_is_left(tmp_path, target, divides):
    state = finish(onnx_state(model(0.1, 3, "uint8"), tmp_path, target))
    _, text = generate_object({k.symbol: k.function for k in state.lowered.kernels}, state.target)
    assert ("fdiv" in text) == divides
