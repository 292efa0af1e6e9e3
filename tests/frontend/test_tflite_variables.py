"""TFLite models that keep variables: the state leaves the interface, and every run is LiteRT's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ingot
from ingot.errors import IngotError, OptionError
from ingot.frontend import import_model

from .tiny_models import Graph, Op, Tensor, tflite_of

Write = Callable[..., Path]
FIRST = np.array([[1, 2, 3, 4]], np.float32)
ADD = {"options": "AddOptions"}


def handle(output: int, name: str) -> Op:
    return Op("VAR_HANDLE", (), (output,), "VarHandleOptions", {"SharedName": name})


def once(*more: Op, first: np.ndarray = FIRST) -> Graph:
    """Sets the variable `sum`."""
    tensors = [Tensor("h", (), "resource"), Tensor("first", first.shape, str(first.dtype), first)]
    return Graph([*tensors, Tensor("out", (1, 4))], [handle(0, "sum"), Op("ASSIGN_VARIABLE", (0, 1), ()), *more])


def model(others: tuple[Graph, ...] = (once(),), *, assign: bool = True, index: int = 1) -> bytes:
    """y = sum + x, where sum becomes sum + x and is read again: y = 2 * (sum + x)."""
    tensors = [
        Tensor("x", (1, 4)),
        Tensor("h", (), "resource"),
        Tensor("before", (1, 4)),
        Tensor("after", (1, 4)),
        Tensor("again", (1, 4)),
        Tensor("y", (1, 4)),
    ]
    ops = [
        Op("CALL_ONCE", (), (), "CallOnceOptions", {"InitSubgraphIndex": index}),
        handle(1, "sum"),
        Op("READ_VARIABLE", (1,), (2,), "ReadVariableOptions"),
        Op("ADD", (2, 0), (3,), **ADD),
        *([Op("ASSIGN_VARIABLE", (1, 3), (), "AssignVariableOptions")] if assign else []),
        Op("READ_VARIABLE", (1,), (4,), "ReadVariableOptions"),
        Op("ADD", (3, 4), (5,), **ADD),
    ]
    return tflite_of(tensors, ops, [0], [5], others)


def litert(data: bytes, steps: list[np.ndarray]) -> list[np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    x, y = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for step in steps:
        interpreter.set_tensor(x, step)
        interpreter.invoke()
        found.append(interpreter.get_tensor(y).copy())
    return found


@pytest.mark.parametrize("assign", [True, False])
def test_runs_in_a_row_equal_litert(write: Write, tmp_path: Path, assign: bool) -> None:
    data = model(assign=assign)
    artifact = ingot.compile(write(data, "m.tflite"))
    assert artifact.metadata["selftest"], artifact.notices
    assert [state["input"] for state in artifact.metadata["states"]] == (["sum"] if assign else [])
    steps = [np.full((1, 4), k, np.float32) for k in (1, -3, 5)]
    with ingot.load(artifact.save(tmp_path / "m.so")) as loaded:
        for found, wanted in zip(map(loaded, steps), litert(data, steps), strict=True):
            np.testing.assert_array_equal(found, wanted)
        loaded.reset()
        np.testing.assert_array_equal(loaded(steps[0]), litert(data, steps[:1])[0])
        assert loaded.selftest() == 0


def test_the_command_line_verifies_a_run_of_samples(write: Write, tmp_path: Path) -> None:
    path = write(model(), "m.tflite")
    np.savez(tmp_path / "steps.npz", x=np.arange(12, dtype=np.float32).reshape(3, 4))
    ingot.compile(path).save(tmp_path / "m.so")
    program = [sys.executable, "-c", "from ingot.cli.main import main; main()", "verify", "m.so", "m.tflite"]
    found = subprocess.run(
        [*program, "--data", "steps.npz"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(ingot.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_first_value_is_that_of_the_graph_that_runs_once(write: Write) -> None:
    imported = import_model(write(model(), "m.tflite"))
    (state,) = imported.states
    np.testing.assert_array_equal(state.initial, FIRST)
    assert [spec.name for spec in imported.user_inputs] == ["x"]
    assert [spec.name for spec in imported.user_outputs] == ["y"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (model(index=7), "a graph that does not exist"),
        (model((once(Op("NEG", (1,), (2,))),)), "more than set variables to constants"),
        (model((once(first=np.ones((1, 3), np.float32)),)), "changes its type"),
        (model((once(first=np.ones((1, 4), np.int32)),)), "changes its type"),
        (model((Graph([Tensor("h", (), "resource")], [handle(0, "other")]),), assign=False), "never set"),
    ],
)
def test_what_cannot_be_kept_is_refused(write: Write, data: bytes, word: str) -> None:
    with pytest.raises(IngotError, match=word):
        import_model(write(data, "m.tflite"))


def test_a_variable_is_no_state_of_the_user(write: Write) -> None:
    with pytest.raises(OptionError, match="keeps this state itself"):
        import_model(write(model(), "m.tflite"), state={"sum": "y"})
