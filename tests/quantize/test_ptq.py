"""Post-training quantisation from end to end, judged by the float model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import ingot
from frontend.tiny_models import model_of
from ingot.driver import relax_after
from ingot.errors import OptionError
from ingot.frontend import import_model
from ingot.passes.rewriter import bindings_of, op_name
from ingot.quantize.graph import Graph, place
from ingot.quantize.prepare import prepare
from ingot.target import load_target
from quantize.models import small_net, small_samples, sqnr


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_net(tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture(scope="module")
def graph(net: Path) -> Graph:
    return Graph(prepare(import_model(net), load_target("native")))


def test_every_tensor_between_layers_is_stored_in_8_bits(graph: Graph) -> None:
    placement = place(graph)
    assert [layer.kind for layer in graph.layers.values()] == ["conv2d", "depthwise", "conv2d", "conv2d", "matmul"]
    producers = [op_name(graph.value.get(var)) or "input" for var in placement.stored]
    # conv1 + relu, conv2 + relu, conv3, the sum, conv4, two pools, their concatenation, its mean, flattened.
    assert producers.count("relax.nn.relu") == 2
    assert {"input", "relax.concat", "relax.mean", "relax.nn.max_pool2d", "relax.reshape"} <= set(producers)
    assert len(producers) == 11
    outputs = [var for var in placement.stored if not graph.readers.get(var)]
    assert not outputs, "nothing reads these in 8 bits"


def test_data_that_only_moves_keeps_its_scale(graph: Graph) -> None:
    placement = place(graph)
    by_operator: dict[str, set[int]] = {}
    for var in placement.stored:
        by_operator.setdefault(op_name(graph.value.get(var)), set()).add(placement.group[var])
    assert by_operator["relax.reshape"] == by_operator["relax.mean"]
    # c4 has no reader but its pool; s is read by conv4 too, whose precision the concatenation must not cost.
    pools = by_operator["relax.nn.max_pool2d"]
    assert len(pools) == 2 and by_operator["relax.concat"] < pools


def test_layers_kept_in_float_read_and_write_float(graph: Graph) -> None:
    first = next(iter(graph.layers))
    placement = place(graph, {first})
    assert not any(var in placement.group for var in graph.inputs)
    everything = place(graph, graph.layers)
    assert not everything.stored and not everything.integer


@pytest.mark.parametrize("calibrator", ["auto", "entropy"])
def test_a_quantised_network_computes_what_the_float_one_does(calibrator: str, net: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", x=small_samples(32))
    reference = ingot.load(ingot.compile(net, selftest=False).save(tmp_path / "float.so"))
    artifact = ingot.compile(
        net, precision="int8", calibrate=tmp_path / "samples.npz", calibrator=calibrator, selftest=False
    )
    quantised = ingot.load(artifact.save(tmp_path / "int8.so"))
    assert artifact.metadata["precision"] == "int8"
    fresh = small_samples(32, seed=2)
    wanted = np.concatenate([reference(x[None]) for x in fresh])
    found = np.concatenate([quantised(x[None]) for x in fresh])
    assert sqnr(wanted, found) > (20 if calibrator == "entropy" else 28)


def test_no_more_is_lost_than_allowed_and_the_report_says_how(net: Path) -> None:
    samples = {"x": small_samples(16)}
    tight = ingot.compile(net, precision="int8", calibrate=samples, calibrator="mse", max_drop=0.004, selftest=False)
    report = tight.quantization
    assert report.drop <= 0.004 and report.limit == 0.004
    kept = [layer for layer in report.layers if "limit" in layer.reason]
    assert kept and all(layer.decision == "float32" for layer in kept)
    quantised = [layer.sqnr_db for layer in report.layers if layer.decision == "int8"]
    assert not quantised or max(layer.sqnr_db for layer in kept) <= min(quantised), "the noisiest go first"
    # The model, the one with scale moved, the halving, and the best of it once more.
    assert report.measured <= 2 + np.ceil(np.log2(len(report.layers))) + 1
    decoded = json.loads(report.as_json())
    assert [layer["name"] for layer in decoded["layers"]] == [layer.name for layer in report.layers]
    for text in (report.as_text(), report.as_html()):
        assert all(layer.name[:48] in text for layer in report.layers) and "allowed 0.400%" in text


def test_nothing_may_be_lost_at_all(net: Path, tmp_path: Path) -> None:
    """A limit of zero is held by the float model: nothing is quantised, and a notice says so."""
    artifact = ingot.compile(
        net, precision="int8", calibrate={"x": small_samples(8)}, calibrator="mse", max_drop=0.0, selftest=False
    )
    assert "no layer is quantised" in artifact.notices
    reference = ingot.load(ingot.compile(net, selftest=False).save(tmp_path / "float.so"))
    x = small_samples(1, seed=5)
    assert np.array_equal(ingot.load(artifact.save(tmp_path / "int8.so"))(x), reference(x))


def test_weights_and_sums_are_integers(net: Path) -> None:
    board = "raspberry-pi-5"  # it gains by 8 bits in every layer
    text = relax_after(net, "whole_numbers", target=board, precision="int8", calibrate={"x": small_samples(8)})
    assert text.count('dtype="int8"') >= 5
    assert "w3_int8" in text or "w3_balanced_int8" in text


def test_wrong_options_are_refused(net: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs calibration"):
        ingot.compile(net, precision="int8")
    with pytest.raises(OptionError, match="only int8"):
        ingot.compile(net, calibrate={"x": small_samples(8)})
    with pytest.raises(OptionError, match="unknown calibrator"):
        ingot.compile(net, precision="int8", calibrate={"x": small_samples(8)}, calibrator="best")


def test_a_channel_of_zeros_and_a_constant_input(tmp_path: Path) -> None:
    """Zeros have no scale of their own, and an input that never varies has no range: neither may divide by zero."""
    net = small_net(tmp_path / "net.onnx")
    model = onnx.load(net)
    for weight in model.graph.initializer:
        if weight.name in ("w1", "w3"):
            array = onnx.numpy_helper.to_array(weight).copy()
            array[0] = 0
            weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, net)
    same = np.full((8, 3, 16, 16), 0.25, np.float32)
    reference = ingot.load(ingot.compile(net, selftest=False).save(tmp_path / "float.so"))
    artifact = ingot.compile(net, precision="int8", calibrate={"x": same}, selftest=False)
    quantised = ingot.load(artifact.save(tmp_path / "int8.so"))
    assert sqnr(reference(same[:1]), quantised(same[:1])) > 28


def test_an_already_quantised_model_is_refused(tmp_path: Path, net: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    weights = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    onnx.save(model_of(nodes, {"x": ("float32", (1, 4))}, ["y"], weights), tmp_path / "q.onnx")
    with pytest.raises(OptionError, match="quantised already"):
        ingot.compile(tmp_path / "q.onnx", precision="int8", calibrate={"x": np.ones((8, 4), np.float32)})


def test_that_a_model_is_quantised_is_said_before_its_samples_are_looked_at(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    weights = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    onnx.save(model_of(nodes, {"x": ("uint8", (1, 4))}, ["y"], weights), tmp_path / "q.onnx")
    np.savez(tmp_path / "float.npz", x=np.ones((8, 4), np.float32))
    for options in ({"precision": "int8"}, {"weights": "int8"}):
        for samples in (tmp_path / "float.npz", tmp_path / "none.npz", {"x": np.ones((8, 4), np.float32)}):
            with pytest.raises(OptionError, match="quantised already"):
                ingot.compile(tmp_path / "q.onnx", calibrate=samples, **options)  # type: ignore[arg-type]


def test_bindings_stay_one_block(graph: Graph) -> None:
    assert len(bindings_of(graph.main)) == len(graph.bindings)


def test_layers_of_rows_are_layers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"], group=8),
    ]
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 4, 3)).astype("f4"), "v": rng.standard_normal((8, 1, 5)).astype("f4")}
    path = tmp_path / "rows.onnx"
    onnx.save(model_of(nodes, {"x": ("float32", (1, 4, 30))}, ["y"], weights), path)
    graph = Graph(prepare(import_model(path), load_target("native")))
    assert [layer.kind for layer in graph.layers.values()] == ["conv2d", "depthwise"]


def test_rows_of_a_table_are_decoded_as_they_are_looked_up(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = (random.standard_normal((90, 40)) * np.geomspace(0.01, 10, 90)[:, None]).astype(np.float32)
    table[7] = 0
    nodes = [
        helper.make_node("Gather", ["t", "x"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    weights = {"t": table, "w": random.standard_normal((40, 24)).astype(np.float32)}
    onnx.save(model_of(nodes, {"x": ("int64", (1, 5))}, ["rows", "y"], weights), tmp_path / "rows.onnx")
    samples = {"x": random.integers(0, 90, (16, 5))}
    artifact = ingot.compile(tmp_path / "rows.onnx", precision="int8", calibrate=samples, selftest=False)
    index = np.array([[0, 89, -1, 7, 33]])
    scales = np.abs(table).max(1, keepdims=True) / np.float32(127)
    wanted = (np.rint(table / np.where(scales > 0, scales, 1)) * scales)[index]
    rows, product = ingot.load(artifact.save(tmp_path / "rows.so"))(index)
    assert np.allclose(rows, wanted, rtol=1e-6, atol=0)
    assert sqnr(table[index] @ weights["w"], product) > 30
    assert artifact.metadata["weights_bytes"] < 0.4 * (table.nbytes + weights["w"].nbytes)
    report = artifact.quantization
    assert report is not None and [(layer.kind, layer.decision) for layer in report.layers][-1] == ("take", "int8")
    exact = ingot.compile(tmp_path / "rows.onnx", precision="int8", calibrate=samples, max_drop=0.0, selftest=False)
    assert np.array_equal(ingot.load(exact.save(tmp_path / "exact.so"))(index)[0], table[index])
