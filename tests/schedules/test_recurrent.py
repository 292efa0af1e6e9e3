"""LSTM, GRU and RNN as one kernel each: right at every width around a vector, in both directions, with threads."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import ingot
from ingot.emulator import run_under_qemu
from ingot.passes.pipeline import run
from ingot.target import load_target
from passes.build import close, normal, onnx_state, onnxruntime_outputs
from schedules.common import TARGETS, Branches, check

GATES = {"LSTM": 4, "GRU": 3, "RESET_GRU": 3, "RNN": 1}
HIDDEN = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64)


def layer(model: Branches, kind: str, steps: int, batch: int, hidden: int, way: str, *, bias: bool = True) -> None:
    """Add a recurrent layer with a first state of its own; its outputs are the model's."""
    gates, directions, width = GATES[kind], 2 if way == "bidirectional" else 1, 5
    shape = (directions, batch, hidden)
    x, h = model.input((steps, batch, width)), model.input(shape)
    w = model.weight(normal((directions, gates * hidden, width), hidden))
    r = model.weight(normal((directions, gates * hidden, hidden), hidden + 1) / np.float32(np.sqrt(hidden)))
    b = model.weight(normal((directions, 2 * gates * hidden), hidden + 2)) if bias else ""
    inputs = [x, w, r, b, "", h, *([model.input(shape)] if kind == "LSTM" else [])]
    count = 3 if kind == "LSTM" else 2
    outputs = [f"{kind}{len(model.outputs)}_{i}" for i in range(count)]
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    operator = kind.removeprefix("RESET_")
    model.nodes.append(helper.make_node(operator, inputs, outputs, hidden_size=hidden, direction=way, **more))
    for name in outputs:
        model.output(name)


def several(kind: str) -> Branches:
    model = Branches()
    ways = ("forward", "reverse", "bidirectional")
    for i, hidden in enumerate(HIDDEN):
        layer(model, kind, 1 + i % 4, 1 + i % 3, hidden, ways[i % 3], bias=i % 5 != 4)
    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", GATES)
def test_every_width_equals_onnxruntime(tmp_path, kind, target):
    check(several(kind), tmp_path, target)


@pytest.mark.parametrize("kind", GATES)
def test_a_layer_is_one_kernel_however_long(tmp_path, kind):
    counts = []
    for steps in (2, 2000):
        model = Branches()
        layer(model, kind, steps, 1, 8, "forward")
        state = run(onnx_state(model.bytes(), tmp_path))
        kernels = [k for k in state.program.kernels if k.rounds > 1]
        assert [k.rounds for k in kernels] == [steps * (2 if kind == "RESET_GRU" else 1)]
        counts.append(len(state.program.steps))
    assert counts[0] == counts[1]


def large(steps: int) -> Branches:
    """A layer whose steps are worth a second thread."""
    model = Branches()
    layer(model, "LSTM", steps, 1, 256, "bidirectional")
    layer(model, "GRU", steps, 2, 200, "reverse")
    layer(model, "RESET_GRU", steps, 2, 320, "forward")
    return model


def test_threads_give_the_same_bits(tmp_path):
    model = large(9)
    (tmp_path / "model.onnx").write_bytes(model.bytes())
    ingot.compile(tmp_path / "model.onnx", selftest=False).save(tmp_path / "model.so")
    kernels = [k for k in run(onnx_state(model.bytes(), tmp_path)).program.kernels if k.rounds > 1]
    assert all(k.extent // k.rounds // k.grain >= 2 for k in kernels), "worth a thread"
    feeds = model.feeds()
    alone = ingot.load(tmp_path / "model.so", threads=1).run(feeds)
    together = ingot.load(tmp_path / "model.so", threads=2)
    for _ in range(20):
        again = together.run(feeds)
        assert all(again[name].tobytes() == alone[name].tobytes() for name in alone)


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.parametrize("name", ["raspberry-pi-4", "raspberry-pi-3-32bit"])
def test_on_a_board(tmp_path, qemu, name):
    board = load_target(name)
    qemu(board.arch)
    model = several("LSTM")
    (tmp_path / "model.onnx").write_bytes(model.bytes())
    ingot.compile(tmp_path / "model.onnx", target=name, selftest=False).save(tmp_path / "model.so")
    feeds = model.feeds()
    got = run_under_qemu(tmp_path / "model.so", list(feeds.values()), board, threads=2)
    for mine, want in zip(got, onnxruntime_outputs(model.bytes(), feeds), strict=True):
        close(mine, want, 2e-5)
