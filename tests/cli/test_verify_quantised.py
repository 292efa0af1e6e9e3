"""verify judges quantised TFLite models by LiteRT's reference kernels, which they equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import ingot
from ingot.cli.engines import engines_for
from ingot.cli.main import cli
from schedules.quantised import Layers


def test_a_quantised_model_is_judged_by_the_reference_kernels(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert.interpreter")
    layers = Layers("int8")
    layers.conv(16, 24, (9, 13))
    layers.dense(3, 64, 33)
    model = layers.save(tmp_path)
    library = ingot.compile(model, selftest=False).save(tmp_path / "layers.so")
    done = CliRunner().invoke(cli, ["verify", str(library), str(model)])
    assert done.exit_code == 0, done.output
    assert "litert-reference" in done.output


def test_the_judges_of_a_format() -> None:
    assert engines_for("tflite", quantized=True) == ("litert-reference", "litert")
    assert engines_for("tflite") == ("litert",)
    assert engines_for("onnx", quantized=True) == engines_for("onnx") == ("onnxruntime-exact", "reference")
