"""Operators on windows, at indices and on whole matrices, through the whole compiler against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from ingot.frontend import import_model
from passes.build import onnxruntime_outputs
from passes.execute import compile_state, execute

Array = np.ndarray


def against_onnxruntime(
    folder: Any, nodes: list[Any], feeds: dict[str, Array], outputs: dict[str, str], opset: int = 18
) -> list[tuple[Array, Array]]:
    """Pairs of this compiler's and ONNX Runtime's outputs; `outputs` maps names to numpy dtypes."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()],
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(d)), None)
            for n, d in outputs.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    found = execute(compile_state(import_model(path)), list(feeds.values()), folder)
    return list(zip(found, onnxruntime_outputs(model.SerializeToString(), feeds), strict=True))


def normal(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_regions_are_pooled(tmp_path):
    rois = np.array([[0, 0, 0, 5, 5], [1, 2.4, 1.6, 7, 9], [0, -3, -4, 30, 2], [1, 9, 9, 1, 1]], np.float32)
    node = helper.make_node("MaxRoiPool", ["x", "r"], ["y"], pooled_shape=[3, 2], spatial_scale=0.7)
    ((found, wanted),) = against_onnxruntime(tmp_path, [node], {"x": normal(2, 3, 8, 9), "r": rois}, {"y": "f4"})
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_regions_are_aligned(tmp_path, mode, ratio):
    rois = np.array([[0.2, 0.3, 5, 5], [2.4, 1.6, 7, 9], [-3, -4, 30, 2]], np.float32)
    node = helper.make_node(
        "RoiAlign", ["x", "r", "b"], ["y"], output_height=3, output_width=2, mode=mode, sampling_ratio=ratio
    )
    feeds = {"x": normal(2, 3, 8, 9), "r": rois, "b": np.array([0, 1, 1])}
    ((found, wanted),) = against_onnxruntime(tmp_path, [node], feeds, {"y": "f4"})
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [0, 1])
def test_places_of_the_largest(tmp_path, order):
    node = helper.make_node(
        "MaxPool", ["x"], ["y", "i"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], storage_order=order
    )
    for found, wanted in against_onnxruntime(tmp_path, [node], {"x": normal(2, 3, 7, 6)}, {"y": "f4", "i": "i8"}):
        np.testing.assert_array_equal(found, wanted)


def test_a_pool_is_undone(tmp_path):
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("MaxUnpool", ["p", "i"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    ((found, wanted),) = against_onnxruntime(tmp_path, nodes, {"x": normal(2, 3, 6, 8)}, {"y": "f4"})
    np.testing.assert_array_equal(found, wanted)


def test_determinants(tmp_path):
    ((found, wanted),) = against_onnxruntime(
        tmp_path, [helper.make_node("Det", ["x"], ["y"])], {"x": normal(2, 3, 9, 9)}, {"y": "f4"}
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_many_updates_for_few_places(tmp_path, reduction):
    places = np.random.default_rng(0).integers(-4, 4, (200, 5))
    if reduction == "none":  # two updates of one place: which one is kept is not defined
        places = np.stack([np.random.default_rng(i).permutation(300)[:200] for i in range(5)], 1)
    feeds = {"x": normal(300, 6), "i": places, "u": 1 + normal(200, 5) / 100}
    node = helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=0, reduction=reduction)
    ((found, wanted),) = against_onnxruntime(tmp_path, [node], feeds, {"y": "f4"})
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
