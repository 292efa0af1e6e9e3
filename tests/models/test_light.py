"""The nine `light_*` graphs of the onnx wheel, with seeded weights, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import ingot
from frontend.light import NAMES, he_model
from models.conftest import error, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_matches_onnx_runtime(tmp_path, name):
    import onnxruntime

    model = he_model(name)
    path = tmp_path / f"{name}.onnx"
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    weights = {tensor.name for tensor in model.graph.initializer}
    rng = np.random.default_rng(1)
    feeds = {
        value.name: rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
        if value.name not in weights
    }
    want = session.run(None, feeds)
    built = ingot.load(ingot.compile(path, selftest=False).save(tmp_path / f"{name}.so"))
    for got, reference in zip(run(built, list(feeds.values())), want, strict=True):
        # An output that is nearly the same everywhere would judge nothing.
        assert np.ptp(reference) > 0.1 * np.abs(reference).max()
        assert error(got, reference) <= 1e-4
