"""Real models: all import into the normal form with the user's names; the small ones give the stored outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ingot.errors import UnsupportedError
from ingot.frontend import Imported, import_model
from ingot.frontend.normal_form import check_normal_form

from . import light
from .shared_cases import CASES, Case
from .test_import_tflite import litert

Build = Callable[[Imported], Callable[..., list[np.ndarray]]]
# Those that TVM's own lowering builds in a second; tests/models runs all of them through the whole compiler.
QUICK = [
    case
    for case in CASES
    if case.file.split("/")[0] in ("mnist_cnn", "iris_mlp", "hand_keypoint_mlp")
    or case.file.endswith("resnet8_int8.tflite")
]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_models_import_into_the_normal_form(case: Case, shared_models: Path) -> None:
    imported = import_model(shared_models / case.file, case.shape)
    check_normal_form(imported)
    assert imported.source_peak_bytes > 0
    manifest = json.loads((shared_models / "MANIFEST.json").read_text())
    facts = next(file for model in manifest["models"] for file in model["files"] if file["path"] == case.file)
    assert imported.source_sha256 == facts["sha256"]
    for specs, declared in ((imported.inputs, facts["inputs"]), (imported.outputs, facts["outputs"])):
        assert [spec.name for spec in specs] == [item["name"] for item in declared]
        for spec, item in zip(specs, declared, strict=True):
            assert spec.dtype == {"float": "float32"}.get(item["dtype"], item["dtype"])
            fixed = [(size, dim) for size, dim in zip(spec.shape, item["shape"], strict=True) if isinstance(dim, int)]
            assert all(size == dim for size, dim in fixed if dim > 0)
            if "quantization" in item:
                assert spec.quantization is not None
                assert spec.quantization.scales == (pytest.approx(item["quantization"]["scale"]),)
                assert spec.quantization.zero_points == (item["quantization"]["zero_point"],)


@pytest.mark.parametrize("case", QUICK, ids=[case.id for case in QUICK])
def test_small_models_reproduce_their_outputs(case: Case, shared_models: Path, run_imported: Build) -> None:
    run = run_imported(import_model(shared_models / case.file, case.shape))
    for index in range(min(6, case.runs)):
        inputs = case.inputs(shared_models, index)
        # Integers are those of the reference kernels; the stored ones come from kernels that round otherwise.
        wanted = litert(shared_models / case.file, inputs) if case.quantized else case.reference(shared_models, index)
        found = run(*inputs)
        for left, right in zip(found, wanted, strict=True):
            if case.quantized:
                np.testing.assert_array_equal(left, right)
            else:
                limit = 1e-4 * np.abs(right).max()
                np.testing.assert_allclose(left.reshape(right.shape), right, rtol=0, atol=limit)


def test_old_operators_are_named_all_at_once(shared_models: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        import_model(shared_models / "style_candy_old_operators" / "candy.onnx")
    for word in ("ImageScaler (scalerPreprocessor)", "Crop (crop, crop1", "crop6", "Affine (activation11)", "9 nodes"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", light.NAMES)
def test_light_graphs_import(name: str) -> None:
    imported = import_model(light.path_of(name))
    check_normal_form(imported)
    assert len(imported.inputs) == 1 and imported.inputs[0].shape[0] == 1
