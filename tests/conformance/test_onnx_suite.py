"""ONNX's node suite: a seeded sample of the cases that pass must go on passing, and the runner must be able to fail."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import helper

from conformance.onnx_suite import KINDS, is_outside, load_cases, passing, run_case, shape_inputs

SAMPLE = 120


def _case(expected: np.ndarray, op: str = "Neg") -> SimpleNamespace:
    value = helper.make_tensor_value_info
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", [value("x", 1, [3])], [value("y", 1, [3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.array([1, -2, 3], np.float32)
    return SimpleNamespace(name="test_it", model=model, data_sets=[([x], [expected])], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("expected", "status"),
    [
        (np.array([-1, 2, -3], np.float32), "pass"),
        (np.array([-1, 2, -3.1], np.float32), "wrong"),
        (np.array([-1, 2, -3], np.float64), "wrong"),
        (np.array([[-1, 2, -3]], np.float32), "wrong"),
    ],
)
def test_a_result_is_held_against_the_expected_one(expected: np.ndarray, status: str, tmp_path: Path) -> None:
    assert run_case(_case(expected), tmp_path).status == status


def test_an_operator_nobody_has_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Bernoulli", ["x"], ["y"])], "g", [value("x", 1, [3])], [value("y", 1, [3])]
    )
    case = _case(np.zeros(3, np.float32))
    case.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = run_case(case, tmp_path)
    assert result.status == "refused"
    assert "Bernoulli" in result.detail


def test_strings_are_outside_and_numbers_are_not() -> None:
    case = _case(np.zeros(3, np.float32))
    assert not is_outside(case)
    case.model.graph.input[0].type.tensor_type.elem_type = 8
    assert is_outside(case)


def test_only_inputs_that_decide_shapes_are_bound() -> None:
    value = helper.make_tensor_value_info
    inputs = [value("x", 1, [6]), value("s", 7, [2])]
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "s"], ["y"])], "g", inputs, [value("y", 1, None)])
    assert shape_inputs(helper.make_model(graph), ["x", "s"]) == ["s"]
    assert shape_inputs(helper.make_model(graph), ["x"]) == []


@pytest.mark.slow
def test_cases_that_passed_still_pass(tmp_path: Path) -> None:
    names = passing()
    assert len(names) > 1400
    chosen = sorted(random.Random(20).sample(names, SAMPLE))  # the same cases every time
    suite = Path(__file__).with_name("onnx_suite.py")
    command = [sys.executable, str(suite), "--exact", "--limit", "120", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert f"{SAMPLE} cases: pass {SAMPLE}," in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_other_suites_pass_but_for_what_is_outside(kind: str, tmp_path: Path) -> None:
    cases = [case for case in load_cases(kind) if not is_outside(case)]
    assert len(cases) == {"simple": 7, "pytorch-converted": 82, "pytorch-operator": 35}[kind]
    for case in random.Random(4).sample(cases, 3):  # the same cases every time; scripts/conformance runs all
        result = run_case(case, tmp_path)
        assert result.status == "pass", result
