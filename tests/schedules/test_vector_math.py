"""The functions that are arithmetic (exp, log, sigmoid, tanh, erf, sin, cos, atan) against float64, edges too."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import helper
from tvm import relax

import ingot
from ingot.emulator import run_under_qemu
from ingot.target import load_target
from passes.build import finish, onnx_bytes, onnxruntime_outputs, relax_state
from passes.execute import execute
from schedules.common import TARGETS

op = relax.op
EDGES = (0.0, -0.0, 1e-30, -1e-30, 86.5, 87.5, 88.7, 88.72, -86.5, 200.0, -200.0, np.inf, -np.inf, np.nan)


def arguments():
    spread = np.linspace(-100, 100, 200_001)
    near = np.linspace(-9, 9, 100_000)
    return np.concatenate([spread, near, EDGES]).astype(np.float32)


def compute(target, folder, function, x=None):
    x = arguments() if x is None else x.astype(np.float32)
    (got,) = execute(finish(relax_state({"x": x.shape}, {}, lambda e, x: [e(function(x))], target)), [x], folder)
    return x.astype(np.float64), got


def ulps(got, want):
    """Errors in units of the last place of `want`, where it is a normal number."""
    normal = (np.abs(want) >= np.finfo(np.float32).tiny) & (np.abs(want) <= np.finfo(np.float32).max)
    spacing = np.spacing(np.abs(want[normal]).astype(np.float32)).astype(np.float64)
    return np.abs(got[normal].astype(np.float64) - want[normal]) / spacing


@pytest.mark.parametrize("target", TARGETS)
def test_exp(tmp_path, target):
    x, got = compute(target, tmp_path, op.exp)
    with np.errstate(over="ignore"):
        want = np.exp(x)
    inside = (x >= -86.6) & (x <= 88.7)
    assert ulps(got[inside], want[inside]).max() <= 1.2
    assert (got[x < -86.7] == 0).all()
    assert np.isposinf(got[x > 88.73]).all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))


@pytest.mark.parametrize("target", TARGETS)
def test_the_powers_of_softmax(tmp_path, target):
    below = np.concatenate([np.linspace(-87, 0, 50_001), [-88.1, -89.0, -200.0, -1e30, -np.inf]])
    pairs = np.stack([np.zeros_like(below), below], 1).astype(np.float32)
    _, got = compute(target, tmp_path, lambda x: op.nn.softmax(x, -1), pairs)
    powers = np.exp(pairs.astype(np.float64))
    # What the sum and its inverse add to the error is within two units.
    want = powers[:, 1] / powers.sum(1)
    assert ulps(got[:, 1], want).max() <= 3
    assert (got[below < -88, 1] == 0).all()
    assert np.isnan(compute(target, tmp_path, lambda x: op.nn.softmax(x, -1), np.array([[0, np.nan]]))[1]).all()


@pytest.mark.parametrize("target", TARGETS)
def test_sigmoid(tmp_path, target):
    x, got = compute(target, tmp_path, op.sigmoid)
    with np.errstate(over="ignore"):
        want = 1 / (1 + np.exp(-x))
    inside = x >= -86.9
    assert ulps(got[inside], want[inside]).max() <= 2.6
    beyond = x < -86.9
    assert ((got[beyond] >= 0) & (got[beyond] < 2e-38)).all()
    assert (got[x > 20] == 1).all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "bound"), [("tanh", 4e-7), ("erf", 4e-7)])
def test_tanh_and_erf(tmp_path, target, name, bound):
    x, got = compute(target, tmp_path, getattr(op, name))
    want = np.tanh(x) if name == "tanh" else np.array([math.erf(v) for v in x])
    fine = ~np.isnan(x)
    assert np.abs(got[fine] - want[fine]).max() <= bound
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))


@pytest.mark.parametrize("target", TARGETS)
def test_log(tmp_path, target):
    spread = np.exp(np.linspace(-87.3, 88.7, 200_001))
    near = np.linspace(0.5, 2, 100_001)
    edges = (0.0, -0.0, -1.0, -1e-40, -np.inf, np.inf, np.nan, 1e-40, 2e-45, 3.4e38)
    x, got = compute(target, tmp_path, op.log, np.concatenate([spread, near, edges]))
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.log(x)
    fine = (x > 0) & (x < np.inf)
    assert ulps(got[fine], want[fine]).max() <= 1.1
    np.testing.assert_array_equal(got[~fine], want[~fine].astype(np.float32))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sin_and_cos(tmp_path, target, name):
    turns = np.pi / 2 * np.arange(-15_900, 15_901)  # the nearest floats to the zeros of both
    edges = (0.0, -0.0, 1e-30, 1e-40, 25_000.0, -25_000.1, 1e6, -3e38, np.inf, -np.inf, np.nan)
    x = np.concatenate([np.linspace(-26_000, 26_000, 200_001), np.linspace(-7, 7, 100_001), turns, edges])
    x, got = compute(target, tmp_path, getattr(op, name), x)
    with np.errstate(invalid="ignore"):
        want = getattr(np, name)(x)
    fine = np.isfinite(x)
    assert ulps(got[fine], want[fine]).max() <= 2.2
    np.testing.assert_array_equal(np.isnan(got), ~fine)
    assert np.signbit(got[x == 0]).tolist() == np.signbit(want[x == 0]).tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_atan(tmp_path, target):
    far = np.exp(np.linspace(-40, 80, 50_001))
    x, got = compute(target, tmp_path, op.atan, np.concatenate([np.linspace(-4, 4, 200_001), far, -far, EDGES]))
    want, fine = np.arctan(x), ~np.isnan(x)
    assert ulps(got[fine], want[fine]).max() <= 2.7
    np.testing.assert_array_equal(np.isnan(got), ~fine)
    assert np.signbit(got[x == 0]).tolist() == np.signbit(want[x == 0]).tolist()


@pytest.mark.qemu
@pytest.mark.parametrize("board", ["raspberry-pi-4", "raspberry-pi-4-32bit"])
def test_a_long_chain_on_a_board(tmp_path, qemu, board):
    """Twelve functions in one expression; nested names once made every further one several times slower to compile."""
    qemu(load_target(board).arch)
    kinds = ["Sigmoid", "Tanh", "Erf", "Sin", "Atan", "Cos"] * 2
    names = ["x", *(f"t{i}" for i in range(len(kinds)))]
    nodes = [helper.make_node(k, [a], [b]) for k, a, b in zip(kinds, names, names[1:], strict=False)]
    x = np.concatenate([np.linspace(-9, 9, 101), EDGES]).astype(np.float32)
    model = onnx_bytes(nodes, {"x": x.shape}, [names[-1]], {})
    (tmp_path / "chain.onnx").write_bytes(model)
    path = ingot.compile(tmp_path / "chain.onnx", target=board, selftest=False).save(tmp_path / "chain.so")
    (got,) = run_under_qemu(path, [x], load_target(board))
    (want,) = onnxruntime_outputs(model, {"x": x})
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    np.testing.assert_allclose(got[~np.isnan(x)], want[~np.isnan(x)], rtol=0, atol=1e-6)
