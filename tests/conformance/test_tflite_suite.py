"""TFLite's operators: one form of each in two dtypes goes on giving LiteRT's results; what is refused says so."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tflite

from conformance.tflite_cases import Case, Out, V
from conformance.tflite_suite import Judged, cases, compare, judge, passing, refusals, run_together, sample
from frontend.tiny_models import Op, Tensor, tflite_of
from ingot.errors import UnsupportedError
from ingot.frontend import import_model


def _chosen() -> list[Case]:
    """Of each operator the first dtype and one more, the same every time; scripts/conformance runs all."""
    known, kinds = set(passing()), defaultdict(list)
    for case in sample(cases()):
        if case.name in known:
            kinds[case.operator].append(case)
    more = [random.Random(name).choice(found[1:]) for name, found in kinds.items() if len(found) > 1]
    return [*(found[0] for found in kinds.values()), *more]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_cases_that_passed_still_pass(part: int, tmp_path: Path) -> None:
    chosen = _chosen()[part::3]
    assert len(chosen) > 60
    judged = [item for case in chosen if isinstance(item := judge(case), Judged)]
    assert len(judged) == len(chosen)
    wrong = [result for result in run_together(judged, tmp_path) if result.status != "pass"]
    assert not wrong


def test_a_result_is_held_against_litert() -> None:
    case = Case("x", "ABS", "int8", (V((3,)),), (Out(),))
    expected = np.array([1, 2, 100], np.int8)
    judged = Judged(case, (expected,))
    assert compare(judged, [expected]).status == "pass"
    assert compare(judged, [np.array([1, 2, 101], np.int8)]).steps == 1
    assert compare(judged, [np.array([1, 2, 102], np.int8)]).status == "wrong"
    assert compare(judged, [expected.astype(np.int16)]).status == "wrong"
    plain = Judged(replace(case, kind="int32", outputs=(Out("int8"),)), (expected,))
    assert compare(plain, [np.array([1, 2, 101], np.int8)]).status == "wrong"
    real = Judged(replace(case, kind="float32"), (np.ones(3, np.float32),))
    assert compare(real, [np.full(3, 1.001, np.float32)]).status == "wrong"


def test_every_operator_of_the_schema_has_a_case_or_a_reason() -> None:
    assert all(refusals().values()), [name for name, why in refusals().items() if not why]


@pytest.mark.parametrize("name", sorted(refusals()))
def test_a_refused_operator_is_named_with_its_reason(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(tflite_of([Tensor("x", (2,)), Tensor("y", (2,))], [Op(name, (0,), (1,))], [0], [1]))
    with pytest.raises(UnsupportedError, match=f"{name}, which {refusals()[name]}"):
        import_model(path)


def test_an_operator_of_a_newer_schema_is_refused_by_number(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(tflite_of([Tensor("x", (2,)), Tensor("y", (2,))], [Op("REDUCE_WINDOW", (0,), (1,))], [0], [1]))
    data = path.read_bytes()
    number = tflite.BuiltinOperator.REDUCE_WINDOW.to_bytes(4, "little")
    assert data.count(number) == 1
    path.write_bytes(data.replace(number, (250).to_bytes(4, "little")))
    with pytest.raises(UnsupportedError, match="operator code 250"):
        import_model(path)
