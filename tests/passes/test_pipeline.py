"""The pipeline as a whole: order, names, checks, stopping and printing, and every small shared model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tvm import relax

from frontend.shared_cases import CASES
from ingot.errors import CompilerError, OptionError
from ingot.frontend import import_model
from ingot.passes import pipeline
from ingot.passes.invariants import INVARIANTS
from ingot.passes.pipeline import CHECK_VARIABLE, IMPORTED, PIPELINE, STEPS, run, text_of, validate
from ingot.passes.state import Pass, State
from ingot.target import load_target
from passes.build import close, normal, relax_state
from passes.execute import execute

op = relax.op


def small():
    def body(e, x, w):
        return [e(op.nn.softmax(e(op.matmul(e(op.nn.relu(e(op.reshape(x, (3, 8))))), w)), -1))]

    return relax_state({"x": (4, 6)}, {"w": normal((8, 5), 1)}, body)


def test_the_order_is_valid():
    validate(PIPELINE)


def test_names_are_unique_and_the_table_is_the_documentation():
    assert len(set(STEPS)) == len(STEPS)
    for step in PIPELINE:
        assert step.summary.endswith("."), step.name
        assert set(step.requires) | set(step.ensures) | set(step.breaks) <= set(INVARIANTS)


@pytest.mark.parametrize("i", range(len(PIPELINE) - 1))
def test_a_pass_that_is_left_out_is_missed_if_anyone_needs_it(i):
    step, rest = PIPELINE[i], PIPELINE[i + 1 :]
    without = (*PIPELINE[:i], *rest)
    held = set(IMPORTED)
    for other in PIPELINE[:i]:
        held = (held - set(other.breaks)) | set(other.ensures)
    needed = set()
    ensured: set[str] = set()
    for other in rest:
        needed |= set(other.requires) - ensured
        ensured |= set(other.ensures)
    if (set(step.ensures) - held) & needed:
        with pytest.raises(CompilerError, match="cannot stand here"):
            validate(without)
    else:
        validate(without)


@pytest.mark.parametrize(
    ("first", "second"),
    [("simplify", "fold_constants"), ("nhwc_layout", "select_templates"), ("fuse", "lower"), ("lower", "plan_memory")],
)
def test_a_pipeline_in_the_wrong_order_is_refused(first, second):
    order = list(PIPELINE)
    i, j = STEPS.index(first), STEPS.index(second)
    order[i], order[j] = order[j], order[i]
    with pytest.raises(CompilerError, match="cannot stand here") as error:
        validate(tuple(order))
    assert any(name in str(error.value) for name in STEPS)


def test_an_invariant_nobody_wrote_is_refused():
    with pytest.raises(CompilerError, match="tidy"):
        validate((*PIPELINE, Pass("sweep", lambda state: state, ensures=("tidy",))))


def test_what_a_pass_breaks_is_no_longer_held():
    breaker = Pass("breaker", lambda state: state, breaks=("nhwc",))
    order = list(PIPELINE)
    order.insert(STEPS.index("select_templates"), breaker)
    with pytest.raises(CompilerError, match="nhwc"):
        validate(tuple(order))


@pytest.mark.parametrize("name", STEPS)
def test_stop_after_stops_there(name):
    seen = []
    state = run(small(), stop_after=name, progress=seen.append)
    assert seen == list(STEPS[: STEPS.index(name) + 1])
    assert (state.lowered is not None) == (STEPS.index(name) >= STEPS.index("lower"))
    assert (state.program is not None) == (name == "plan_memory")


def test_print_ir_after_shows_each_named_step_once():
    shown = []
    run(
        small(), print_ir_after=["lower", "simplify", "plan_memory"], show=lambda name, text: shown.append((name, text))
    )
    assert [name for name, _ in shown] == ["simplify", "lower", "plan_memory"]
    relax_text, tir_text, steps_text = (text for _, text in shown)
    assert "R.matmul" in relax_text
    assert "T.func" in tir_text or "T.prim_func" in tir_text
    assert steps_text.startswith("arena ")
    assert "ingot_tiny_" in steps_text


def test_print_ir_after_without_a_viewer_is_silent(capsys):
    run(small(), print_ir_after=["simplify"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", [{"stop_after": "fusee"}, {"print_ir_after": ["simplify", "fusee"]}])
def test_an_unknown_step_is_refused_with_the_names(option):
    with pytest.raises(OptionError) as error:
        run(small(), **option)
    assert "fusee" in str(error.value)
    assert all(name in str(error.value) for name in STEPS)


def test_text_shows_copies():
    state = run(relax_state({"x": (3,)}, {}, lambda e, x: [x]))
    assert "copy(input0+0, output0+0)" in text_of(state)


def test_a_pass_that_breaks_its_promise_is_named(monkeypatch):
    def nothing(state):
        """Do nothing."""
        return state

    broken = tuple(dataclasses.replace(p, run=nothing) if p.name == "simplify" else p for p in PIPELINE)
    monkeypatch.setattr(pipeline, "PIPELINE", broken)
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    state = relax_state({"x": (1, 6)}, {}, lambda e, x: [e(op.nn.relu(e(op.squeeze(x))))])
    with pytest.raises(CompilerError, match="after pass simplify") as error:
        run(state)
    assert "no_identities" in str(error.value)


def test_without_the_variable_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(pipeline, "check", lambda *_: pytest.fail("checked"))
    monkeypatch.delenv(CHECK_VARIABLE, raising=False)
    run(small())


@pytest.mark.parametrize("target", ["native", "x86-64-v2", "x86-64-v3"])
def test_numbers_of_the_whole_pipeline(tmp_path, monkeypatch, target):
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    state = run(dataclasses.replace(small(), target=load_target(target)))
    x = normal((4, 6))
    y = np.maximum(x.reshape(3, 8), 0) @ normal((8, 5), 1)
    want = np.exp(y - y.max(-1, keepdims=True))
    close(execute(state, [x], tmp_path)[0], want / want.sum(-1, keepdims=True))


SMALL = [case for case in CASES if any(s in case.file for s in ("mnist", "mlperf", "iris", "keypoint", "stories"))]


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in SMALL if c.required], ids=lambda case: case.id)
def test_every_small_model_keeps_every_invariant(shared_models, monkeypatch, case):
    from ingot.errors import UnsupportedError

    monkeypatch.setenv(CHECK_VARIABLE, "1")
    try:
        imported = import_model(shared_models / case.file, case.shape)
    except UnsupportedError:
        assert case.file == "mlperf_tiny_kws/kws_ref_model_float32.tflite"  # dynamic-range weights
        return
    state = run(State(imported.module, imported.weights, imported, load_target("native")))
    assert state.program is not None
    assert state.macs > 0
