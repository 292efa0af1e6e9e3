"""Moving scale between layers: the float model stays what it was, and 8 bits hold more of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import ingot
from frontend.tiny_models import model_of
from ingot.frontend import import_model
from ingot.frontend.interface import TensorSpec
from ingot.passes.pipeline import run
from ingot.passes.rewriter import op_name
from ingot.quantize import ptq
from ingot.quantize.balance import Pair, balanced, choose, noise_of, pairs_of
from ingot.quantize.graph import Graph
from ingot.quantize.observe import ChannelStatistics, EverySecond
from ingot.quantize.prepare import prepare
from ingot.quantize.samples import ArraySamples
from ingot.target import load_target
from passes.execute import Executable
from quantize.models import small_samples, sqnr

SPREAD = np.geomspace(0.02, 2, 16).astype(np.float32)


def uneven_net(path: Path, first: str = "clip") -> Path:
    """conv, clip, depthwise, relu, conv, norm, two matrix products: channels of very different ranges between them.

    With "silu" as first, that stands for clip.
    """
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "w1": weight(16, 3, 3, 3) * SPREAD[:, None, None, None],
        "b1": random.standard_normal(16).astype(np.float32) * SPREAD,
        "w2": weight(16, 1, 3, 3),
        "w3": weight(16, 16, 1, 1) / SPREAD[:, None, None],
        "low": np.float32(-0.5),
        "high": np.float32(3),
        "flat": np.array([1, 16, -1]),
        "gamma": SPREAD[::-1].copy(),
        "beta": random.standard_normal(16).astype(np.float32) * SPREAD[::-1],
        "w4": weight(12, 16).T / SPREAD[::-1, None],
        "w5": weight(9, 16).T / SPREAD[::-1, None],
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        *(
            [node("Clip", ["c1", "low", "high"], ["r1"])]
            if first == "clip"
            else [node("Sigmoid", ["c1"], ["s1"]), node("Mul", ["c1", "s1"], ["r1"])]
        ),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], group=16),
        node("Relu", ["c2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"]),
        node("Reshape", ["c3", "flat"], ["f"]),
        node("Transpose", ["f"], ["t"], perm=[0, 2, 1]),
        node("LayerNormalization", ["t", "gamma", "beta"], ["n"]),
        node("MatMul", ["n", "w4"], ["y"]),
        node("MatMul", ["n", "w5"], ["z"]),
    ]
    onnx.save(model_of(nodes, {"x": ("float32", (1, 3, 16, 16))}, ["y", "z"], weights), path)
    return path


@pytest.fixture(scope="module", params=["clip", "silu"])
def net(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return uneven_net(tmp_path_factory.mktemp("uneven") / "net.onnx", request.param)


@pytest.fixture(scope="module")
def graph(net: Path) -> Graph:
    return Graph(prepare(import_model(net), load_target("native")))


def test_which_tensors_can_be_divided(graph: Graph) -> None:
    pairs = pairs_of(graph)
    assert [[layer.kind for layer in pair.readers] for pair in pairs] == [["depthwise"], ["conv2d"], ["matmul"] * 2]
    makers = [op_name(graph.value[pair.path[-1]]).removeprefix("relax.") for pair in pairs]
    silu = pairs[0].multiplied
    assert makers[0] == ("multiply" if silu else "nn.conv2d") and makers[1] == "nn.conv2d"
    assert makers[2] in ("nn.layer_norm", "multiply") and not any(pair.multiplied for pair in pairs[1:])
    assert silu == any(op_name(value) == "relax.sigmoid" for value in graph.value.values())


def test_the_divided_model_computes_the_same(graph: Graph, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    scales = [(pair, np.exp(random.standard_normal(16))) for pair in pairs_of(graph)]
    x = small_samples(1)
    results = []
    for state in (graph.state, balanced(graph, scales)):
        # Passes read the model that was imported: this one is it, in another form.
        results.append(Executable(run(state), tmp_path).run([x]))
    for before, after in zip(*results, strict=True):
        assert np.abs(before).max() > 0.1 and np.allclose(before, after, rtol=1e-4, atol=1e-4)
        assert not np.array_equal(before, after), "nothing was divided"


def statistics(high: np.ndarray) -> ChannelStatistics:
    """Return those of channels that go from 0 to their own end."""
    found = ChannelStatistics(high.size)
    for share in (0.0, 0.5, 1.0):
        found.add(np.outer(np.array([0.0, share]), high), 1)
    return found


def test_the_estimate_follows_the_ranges(graph: Graph) -> None:
    pair: Pair = pairs_of(graph)[0]
    even = statistics(np.ones(16))
    assert choose({pair.data: even}, [pair]) == [], "a depthwise layer's channels of one range have nothing to gain"
    high = SPREAD.astype(np.float64)
    uneven = statistics(high)
    ((_, scales),) = choose({pair.data: uneven}, [pair])
    assert noise_of(pair, uneven, scales) < noise_of(pair, uneven, np.ones(16)) / 3
    assert np.ptp(np.log(high / scales)) < 0.5 * np.ptp(np.log(high)), "ranges come nearer to each other"
    high[3] = 0
    ((_, scales),) = choose({pair.data: statistics(high)}, [pair])
    assert scales[3] == 1, "a channel that is always 0 stays"


def test_uneven_channels_gain_and_the_report_says_so(tmp_path: Path) -> None:
    net = uneven_net(tmp_path / "net.onnx", "silu")
    artifact = ingot.compile(
        net, precision="int8", calibrate={"x": small_samples(32)}, calibrator="minmax", selftest=False
    )
    report = artifact.quantization
    assert report is not None and report.balanced >= 2 and report.gained_db > 2
    assert "scale moved around" in report.as_text()
    reference = ingot.load(ingot.compile(net, selftest=False).save(tmp_path / "float.so"))
    quantised = ingot.load(artifact.save(tmp_path / "int8.so"))
    fresh = small_samples(16, seed=2)
    wanted, found = (np.concatenate([model(x[None])[0] for x in fresh]) for model in (reference, quantised))
    assert sqnr(wanted, found) > 30


def test_what_only_the_samples_themselves_gain_by_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even samples excite even channels, odd ones odd channels, and some are always small."""
    random, channels, count = np.random.default_rng(0), 32, 32
    large = np.arange(channels) < channels // 2
    weights = {
        "w1": np.diag(np.where(large, 8, 0.2)).astype(np.float32)[:, :, None, None],
        "b1": -4 * large.astype(np.float32),
        "w2": (random.standard_normal((24, channels)) * np.where(large, 1, 5)).astype(np.float32)[:, :, None, None],
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["y"]),
    ]
    onnx.save(model_of(nodes, {"x": ("float32", (1, channels, 4, 4))}, ["y"], weights), tmp_path / "net.onnx")
    samples = random.random((count, channels, 4, 4), dtype=np.float32)
    excited = np.arange(channels) == np.arange(count)[:, None] % (channels // 2)
    samples[large & ~excited] *= 0.55

    def moved() -> int:
        report = ingot.compile(
            tmp_path / "net.onnx", precision="int8", calibrate={"x": samples}, selftest=False
        ).quantization
        assert report is not None
        return report.balanced

    assert moved() == 0
    monkeypatch.setattr(ptq, "_FEW", count + 1)
    assert moved() == 1, "on the samples it looks worth it"


def test_halves_of_samples_share_none() -> None:
    every = ArraySamples({"x": np.arange(9, dtype=np.float32)[:, None]}, [TensorSpec("x", "float32", (1,))])
    halves = [[float(feeds["x"][0]) for feeds in EverySecond(every, start, 7)] for start in (0, 1)]
    assert halves == [[0, 2, 4, 6], [1, 3, 5]]
    assert [len(EverySecond(every, start, 7)) for start in (0, 1)] == [4, 3]
