"""TFLite's LSTMs on integers: every stored value, state and activation is LiteRT's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingot.errors import IngotError, UnsupportedError
from ingot.frontend import Imported, import_model
from passes.execute import Executable, compile_state

from .integer_lstms import IntegerLstm
from .tiny_models import Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]


def _litert(data: bytes, feed: np.ndarray, states: Sequence[int]) -> list[np.ndarray]:
    """The output and then the states after a run."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    runner = Interpreter(model_content=data, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    runner.allocate_tensors()
    runner.set_tensor(runner.get_input_details()[0]["index"], feed)
    runner.invoke()
    return [runner.get_tensor(place) for place in (runner.get_output_details()[0]["index"], *states)]


@st.composite
def _lstms(draw: st.DrawFn) -> IntegerLstm:
    units = draw(st.sampled_from([1, 3, 8, 17]))
    out = draw(st.sampled_from([0, 1, units])) if draw(st.booleans()) else 0
    single = draw(st.integers(0, 4)) == 0
    return IntegerLstm(
        batch=draw(st.integers(1, 3)),
        steps=1 if single else draw(st.integers(1, 5)),
        width=draw(st.sampled_from([1, 4, 33])),
        units=units,
        outputs=out,
        cifg=draw(st.booleans()),
        peephole=draw(st.booleans()),
        norm=draw(st.booleans()),
        time_major=draw(st.booleans()),
        single=single,
        cell_clip=draw(st.sampled_from([0.0, 0.3, 100.0])),
        projection_clip=draw(st.sampled_from([0.0, 0.4])),
        projection_bias=draw(st.booleans()),
        cell_scale=2.0 ** draw(st.integers(-15, -9)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(lstm=_lstms())
def test_outputs_are_litert_s(lstm: IntegerLstm) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.tflite"
        path.write_bytes(lstm.model())
        (found,) = Executable(compile_state(import_model(path)), Path(folder)).run([lstm.feed()])
    (wanted,) = _litert(lstm.model(), lstm.feed(), ())
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_the_activations_of_every_number_are_litert_s(write: Write, run_imported: Build) -> None:
    """In the first half of the units the input gate takes every value, in the second half the cell gate."""
    every, most = np.arange(-(1 << 15), 1 << 15, dtype=np.int32), np.full(1 << 16, (1 << 15) - 1, np.int32)
    lstm = IntegerLstm(batch=1, steps=1, width=1, units=1 << 17, outputs=1, cell_scale=2.0**-15)
    tensors, op = lstm.parts()
    for place in range(1, 9):
        tensors[op.inputs[place]] = replace(tensors[op.inputs[place]], scale=(2.0**-12,))
        tensors[op.inputs[place]].data[:] = 0  # type: ignore[index]
    tensors[0] = replace(tensors[0], scale=(1.0,))
    for place, parts in ((12, (every, most)), (13, (most, most)), (14, (most, every)), (15, (most, most))):
        tensors[op.inputs[place]] = replace(tensors[op.inputs[place]], data=np.concatenate(parts))
    data = tflite_of(tensors, [op], [0], [len(tensors) - 1])
    imported = import_model(write(data, "m.tflite"))
    found = run_imported(imported)(lstm.feed(), *(state.initial for state in imported.states))
    for left, right in zip(found, _litert(data, lstm.feed(), op.inputs[18:20]), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def _refused(write: Write, tensors: list[Tensor], op: Op) -> str:
    with pytest.raises(IngotError) as caught:
        import_model(write(tflite_of(tensors, [op], [0], [len(tensors) - 1]), "m.tflite"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "change", "what"),
    [
        (2, {"dtype": "uint8"}, "constant is of another type"),
        (2, {"shape": (5, 6)}, "constant is of another type"),
        (2, {"data": None, "variable": True}, "lacks weights"),
        (6, {"scale": (0.1,) * 6, "axis": 0}, "has not one scale"),
        (9, {"dtype": "int8", "data": np.zeros(6, np.int8)}, "constant is of another type"),
        (18, {"shape": (3, 6)}, "states do not fit"),
        (19, {"scale": (0.0005,)}, "cell state has this scale"),
        (19, {"scale": (2.0**-4,)}, "cell state has this scale"),
        (19, {"dtype": "int8"}, "tensor is of another type"),
    ],
)
def test_a_damaged_one_is_refused(write: Write, place: int, change: dict[str, object], what: str) -> None:
    tensors, op = IntegerLstm(peephole=True).parts()
    tensors[op.inputs[place]] = replace(tensors[op.inputs[place]], **change)  # type: ignore[arg-type]
    assert what in _refused(write, tensors, op)


def test_forms_that_litert_s_kernel_has_not(write: Write) -> None:
    tensors, op = IntegerLstm().parts()
    assert "of this form" in _refused(write, tensors, replace(op, intermediates=()))
    assert "lacks weights" in _refused(write, tensors, replace(op, inputs=(*op.inputs[:8], -1, *op.inputs[9:])))
    assert "this limit" in _refused(write, tensors, replace(op, fields={**op.fields, "CellClip": -1.0}))
    tensors, op = IntegerLstm(units=3, outputs=5, peephole=True).parts()
    assert "more outputs than units" in _refused(write, tensors, op)
    tensors, op = IntegerLstm(units=3, outputs=5).parts()
    assert "other outputs" in _refused(write, tensors, replace(op, inputs=(*op.inputs[:16], -1, -1, *op.inputs[18:])))


def test_the_first_form_of_lstm_on_eight_bits_is_refused(write: Write) -> None:
    def stored(name: str, *shape: int) -> Tensor:
        return Tensor(name, shape, "uint8", np.zeros(shape, np.uint8) if name == "w" else None, (0.1,), (128,))

    state = Tensor("c", (1, 2), "int16", None, (2.0**-11,))
    bias = Tensor("b", (8,), "int32", np.zeros(8, np.int32), (0.01,))
    ends = [
        replace(stored("y", 1, 2)),
        replace(state, name="c2"),
        stored("xh", 1, 5),
        replace(state, name="g", shape=(1, 8)),
    ]
    tensors = [stored("x", 1, 3), stored("h", 1, 2), stored("w", 8, 5), bias, state, *ends]
    op = Op("LSTM", (0, 1, 2, 3, 4), (5, 6, 7, 8), "LSTMOptions", {"FusedActivationFunction": 4, "KernelType": 1})
    with pytest.raises(UnsupportedError, match="basic form"):
        import_model(write(tflite_of(tensors, [op], [0, 1, 4], [5]), "m.tflite"))
