"""Calibration data and options that cannot be: one clear error each, and no file left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import helper

from frontend.tiny_models import model_of

Ingot = Callable[..., Result]
Refused = Callable[..., None]

GOOD = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)


def spoiled(value: float) -> np.ndarray:
    """Good samples but for one number."""
    array = GOOD.copy()
    array[5, 1, 2, 3] = value
    return array


#: Found in the file's headers, before anything is compiled.
HEADERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing": ({"a": GOOD, "b": GOOD}, ("no array for input 'x'", "a, b", "np.savez")),
    "shape": ({"x": GOOD[:, :2]}, ("wrong shape for input 'x'", "[8, 2, 8, 8]", "[N, 3, 8, 8]")),
    "dtype": ({"x": GOOD.astype(np.float64)}, ("wrong dtype for input 'x'", "float64", "float32")),
    "none": ({"x": GOOD[:0]}, ("wrong shape", "[0, 3, 8, 8]")),
}
#: Found when a sample is read.
VALUES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nan": ({"x": spoiled(np.nan)}, ("not finite", "sample 5, input 'x'", "1 of 192 values")),
    "infinity": ({"x": spoiled(-np.inf)}, ("not finite", "-inf")),
}
CASES = [
    *(pytest.param(("--precision", "int8"), *case, id=f"int8-{name}") for name, case in (HEADERS | VALUES).items()),
    pytest.param(("--weights", "int8"), *HEADERS["missing"], id="weights-missing"),
]


@pytest.mark.parametrize(("how", "arrays", "words"), CASES)
def test_calibration_data_that_cannot_be(
    how: tuple[str, str],
    arrays: dict[str, Any],
    words: tuple[str, ...],
    ingot: Ingot,
    refused: Refused,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)
    out = tmp_path / "out.so"
    refused(ingot("compile", tiny_model, *how, "--calibrate", tmp_path / "samples.npz", "-o", out), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "int3"), ("unknown weight format", "int3", "codebook4")),
        (("--weights", "int8", "--precision", "bf16"), ("multiplied in float32", "--weights out")),
        (("--weights", "int4", "--max-drop", "1%"), ("--max-drop limits", "int8")),
        (("--precision", "int8"), ("needs calibration samples",)),
        (("--weights", "int8", "--calibrate", "nowhere.npz"), ("nowhere.npz",)),
        (("--explain",), ("--explain tells about quantisation", "--weights")),
    ],
    ids=["format", "precision", "max-drop", "samples", "no-file", "explain"],
)
def test_options_that_do_not_go_together(
    options: tuple[str, ...], words: tuple[str, ...], ingot: Ingot, refused: Refused, tiny_model: Path, tmp_path: Path
) -> None:
    refused(ingot("compile", tiny_model, *options, "-o", tmp_path / "out.so"), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [("--precision", "int8"), ("--weights", "int4")], ids=["int8", "weights"])
def test_a_quantised_model_is_not_quantised_again(
    how: tuple[str, str], ingot: Ingot, refused: Refused, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    weights = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8), "w": np.ones((32, 32), np.float32)}
    onnx.save(model_of(nodes, {"x": ("float32", (1, 32))}, ["y"], weights), tmp_path / "q.onnx")
    np.savez(tmp_path / "samples.npz", x=np.ones((8, 32), np.float32))
    result = ingot(
        *("compile", tmp_path / "q.onnx", *how, "--calibrate", tmp_path / "samples.npz", "-o", tmp_path / "out.so")
    )
    refused(result, "quantised already", "without --precision int8 or --weights")
    assert not (tmp_path / "out.so").exists()


def test_one_constant_sample_is_taken_with_a_notice(ingot: Ingot, tiny_model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", x=np.full((1, 3, 8, 8), 0.5, np.float32))
    out = tmp_path / "out.so"
    result = ingot(
        *("compile", tiny_model, "--precision", "int8", "--calibrate", tmp_path / "samples.npz", "--max-drop", "0"),
        *("--calibrator", "minmax", "--no-selftest", "-o", out),
    )
    assert result.exit_code == 0, result.output
    assert "calibrated on 1 sample" in result.output, "ranges of one sample are narrow"
    assert "allowed 0.000%" in result.output and out.exists()
