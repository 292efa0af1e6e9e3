"""Arithmetic on shapes inside TFLite models: known at import, so that what it decides is static."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conformance.tflite_suite import litert
from ingot.errors import UnsupportedError
from ingot.frontend import Imported, import_model

from .tiny_models import Op, Tensor, tflite_of

Write = Callable[..., Path]
Build = Callable[[Imported], Callable[..., list[np.ndarray]]]


def _ints(name: str, *values: int) -> Tensor:
    return Tensor(name, (len(values),), "int32", np.array(values, np.int32))


def _one(name: str, value: int) -> Tensor:
    return Tensor(name, (), "int32", np.array(value, np.int32))


def _frames(length: int, window: int, step: int) -> bytes:
    """Overlapping windows of rows [2, length], as TensorFlow's signal.frame writes them: sizes are open in the file."""
    tensors = {
        item.name: item
        for item in (
            Tensor("x", (2, length)), Tensor("shape", (2,), "int32"), _ints("sizes", 1, 1, 0), _one("last", 0),
            Tensor("rows", (1,), "int32"), Tensor("columns", (1,), "int32"), Tensor("nothing", (0,), "int32"),
            Tensor("scalar", (0,), "int32", np.zeros(0, np.int32)), Tensor("length", (), "int32"),
            _one("window", window), _one("step", step), _one("one", 1), _one("zero", 0),
            Tensor("rest", (), "int32"), Tensor("steps", (), "int32"), Tensor("count", (), "int32"),
            Tensor("starts", (1,), "int32", signature=(-1,)), Tensor("places", (1,), "int32", signature=(-1,)),
            Tensor("column", (2,), "int32"), Tensor("first", (1, 1), "int32", signature=(-1, 1)),
            Tensor("offsets", (1, window), "int32", np.arange(window, dtype=np.int32)[None]),
            Tensor("indices", (1, window), "int32", signature=(-1, window)),
            Tensor("y", (2, 1, window), signature=(2, -1, window)),
        )
    }  # fmt: skip
    number = {name: place for place, name in enumerate(tensors)}

    def op(name: str, inputs: str, outputs: str, options: str = "", **fields: float) -> Op:
        ins, outs = (tuple(number[item] for item in names.split()) for names in (inputs, outputs))
        return Op(name, ins, outs, options, fields)

    ops = [
        op("SHAPE", "x", "shape", "ShapeOptions", OutType=2),
        op("SPLIT_V", "shape sizes last", "rows columns nothing", "SplitVOptions", NumSplits=3),
        op("RESHAPE", "columns scalar", "length"),
        op("SUB", "length window", "rest", "SubOptions"),
        op("FLOOR_DIV", "rest step", "steps"),
        op("ADD", "steps one", "count", "AddOptions"),
        op("RANGE", "zero count one", "starts"),
        op("MUL", "starts step", "places", "MulOptions"),
        op("PACK", "count one", "column", "PackOptions", Axis=0, ValuesCount=2),
        op("RESHAPE", "places column", "first"),
        op("ADD", "first offsets", "indices", "AddOptions"),
        op("GATHER", "x indices", "y", "GatherOptions", Axis=1),
    ]
    return tflite_of(list(tensors.values()), ops, [0], [number["y"]])


@pytest.mark.parametrize(("length", "window", "step"), [(64, 16, 8), (37, 5, 7), (2050, 512, 160)])
def test_windows_of_a_signal(write: Write, run_imported: Build, length: int, window: int, step: int) -> None:
    data = _frames(length, window, step)
    imported = import_model(write(data, "m.tflite"))
    x = np.random.default_rng(0).standard_normal((2, length)).astype(np.float32)
    (found,) = run_imported(imported)(x)
    np.testing.assert_array_equal(found, litert(data, [x])[0])
    assert imported.outputs[0].shape == (2, (length - window) // step + 1, window)


def test_a_division_by_zero_is_refused(write: Write) -> None:
    with pytest.raises(UnsupportedError):
        import_model(write(_frames(64, 16, 0), "m.tflite"))


def test_the_real_part_of_a_spectrum(write: Write, run_imported: Build) -> None:
    tensors = [Tensor("x", (3, 1, 16)), _ints("lengths", 1, 16), Tensor("spectrum", (3, 1, 9), "complex64")]
    tensors += [Tensor("flat", (3, 9), "complex64"), Tensor("y", (3, 9))]
    ops = [
        Op("RFFT2D", (0, 1), (2,)),
        Op("SQUEEZE", (2,), (3,), "SqueezeOptions", {"SqueezeDims": np.array([1], np.int32)}),
        Op("CAST", (3,), (4,)),
    ]
    data = tflite_of(tensors, ops, [0], [4])
    x = np.random.default_rng(1).standard_normal((3, 1, 16)).astype(np.float32)
    (found,) = run_imported(import_model(write(data, "m.tflite")))(x)
    np.testing.assert_allclose(found, np.fft.rfft(x[:, 0]).real, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, litert(data, [x])[0], rtol=1e-5, atol=1e-5)
