"""The comparison of models quantised by each engine's own tool."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import bench
import bench_int8
import ingot
import quantisers
from ingot.errors import InputError

ROW = bench_int8.Row("r50", 2, 20.0, 30.0, 31.24, "onnxruntime", 25.0, 28.06, 9)


def _model(path: Path) -> Path:
    """A convolution, large enough that its integer kernel is chosen."""
    value = onnx.helper.make_tensor_value_info
    weight = np.random.default_rng(0).normal(size=(64, 64, 3, 3)).astype(np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    graph = onnx.helper.make_graph(
        [node],
        "conv",
        [value("x", 1, [1, 64, 9, 9])],
        [value("y", 1, [1, 64, 9, 9])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def test_the_table_is_markdown_and_has_the_means_over_the_fastest_peers() -> None:
    slower = bench_int8.Row("r50", 2, 20.0, 30.0, 31.24, "litert", 50.0, float("nan"), 9)
    none = bench_int8.Row("mbv2", 2, 10.0, 20.0, 31.24, "openvino", error="no 'a|b' in <x>")
    lines = bench_int8.markdown([ROW, slower, none], "scripts/bench --int8", 10).splitlines()
    assert re.fullmatch(r"## \d{4}-\d\d-\d\d, .*", lines[0])
    assert any("onnxruntime 1." in line and "nncf 3." in line and "litert 2." in line for line in lines)
    assert "- 2 threads, geometric means: fastest peer / ingot 1.25, float32 / int8 of ingot 1.73" in lines
    assert lines[-3] == "| r50 | 2 | 20 | 30 | 1.50 | onnxruntime | 25 | 1.25 | 31.2 | 28.1 | 9 |"
    assert lines[-2] == "| r50 | 2 | 20 | 30 | 1.50 | litert | 50 | 2.50 | 31.2 | - | 9 |"
    assert lines[-1] == "| mbv2 | 2 | 10 | 20 | 2.00 | openvino | - | - | 31.2 | no time: no 'a/b' in &lt;x> | 0 |"
    assert len({line.count("|") for line in lines[-5:]}) == 1


def test_outputs_that_are_no_longer_those_of_float32_are_refused() -> None:
    reference = np.array([1.0, -2.0, 3.0])
    assert bench_int8.noise(reference, reference * 1.1) == pytest.approx(20)
    for found in (reference * 2, reference * np.nan, reference[:2]):
        with pytest.raises(bench.DisagreementError, match="not those of float32"):
            bench_int8.noise(reference, found)


def test_the_last_samples_judge_and_the_others_calibrate(tmp_path: Path) -> None:
    model, every = _model(tmp_path / "conv.onnx"), np.random.default_rng(0).random((9, 1, 64, 9, 9), np.float32)
    seeded, judged = bench_int8.samples_of(model, tmp_path)
    assert (len(seeded["x"]), len(judged)) == (bench_int8.SEEDED, bench_int8.JUDGED)
    np.savez(tmp_path / "conv.npz", x=every, labels=np.arange(9))
    samples, judged = bench_int8.samples_of(model, tmp_path)
    np.testing.assert_array_equal(samples["x"], every[:5])
    np.testing.assert_array_equal(np.stack([feeds["x"] for feeds in judged]), every[5:])
    np.savez(tmp_path / "conv.npz", x=every[:4])
    with pytest.raises(InputError, match="too few"):
        bench_int8.samples_of(model, tmp_path)
    np.savez(tmp_path / "conv.npz", image=every)
    with pytest.raises(InputError, match="none for x"):
        bench_int8.samples_of(model, tmp_path)


def test_a_tflite_file_belongs_to_a_model_that_is_timed(tmp_path: Path) -> None:
    (tmp_path / "int8.tflite").touch()
    models = [Path("folder/net.onnx")]
    assert bench_int8.pairs([f"net.onnx={tmp_path}/int8.tflite"], models) == {"net.onnx": tmp_path / "int8.tflite"}
    for word in ("net.onnx", "net.onnx=", f"net.onnx={tmp_path}/none.tflite", f"other.onnx={tmp_path}/int8.tflite"):
        with pytest.raises(InputError, match="--tflite"):
            bench_int8.pairs([word], models)
    assert bench.without_folders("/home/me/net.onnx=/data/int8.tflite") == "net.onnx=int8.tflite"


def test_what_other_tools_make_is_kept_until_the_samples_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REPO", tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"net")
    made: list[Path] = []

    def make(out: Path) -> None:
        made.append(out)
        out.write_bytes(b"quantised")
        out.with_suffix(".bin").write_bytes(b"weights")

    def fail(_: Path) -> None:
        raise ValueError("cannot do that")

    samples = {"x": np.zeros((2, 3), np.float32)}
    first = bench_int8.kept("net.xml", tmp_path / "net.onnx", samples, "tool 1", make)
    assert isinstance(first, Path)
    assert first.with_suffix(".bin").read_bytes() == b"weights"
    assert bench_int8.kept("net.xml", tmp_path / "net.onnx", samples, "tool 1", fail) == first
    assert bench_int8.kept("net.xml", tmp_path / "net.onnx", samples, "tool 2", fail) == "ValueError: cannot do that"
    assert bench_int8.kept("net.xml", tmp_path / "net.onnx", {"x": samples["x"] + 1}, "tool 1", make) != first
    assert len(made) == 2


@pytest.mark.slow
def test_each_engine_is_judged_by_the_float_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tmp_path / "conv.onnx")
    monkeypatch.setattr(bench_int8, "SEEDED", 8)
    samples, judged = bench_int8.samples_of(model, None)
    quantisers.by_onnxruntime(model, samples, tmp_path / "qdq.onnx", "MinMax", reduce_range=True)
    broken = onnx.load(tmp_path / "qdq.onnx")
    next(n for n in broken.graph.node if n.op_type == "Conv").attribute[0].ints[:] = [0, 0, 2, 2]
    onnx.save(broken, tmp_path / "broken.onnx")
    monkeypatch.setattr(bench_int8, "openvino", lambda: bench_int8.WORKER)
    options = {"target": "native", "selftest": False}
    fp32 = ingot.compile(model, **options).save(tmp_path / "fp32.so")  # type: ignore[arg-type]
    int8 = ingot.compile(model, precision="int8", calibrate=samples, **options).save(tmp_path / "int8.so")  # type: ignore[arg-type]
    files: dict[str, Path | str] = {"onnxruntime": tmp_path / "qdq.onnx", "openvino": "ValueError: cannot"}
    made = bench_int8.Contestants(int8, fp32, files)
    rows = bench_int8.measure(model, made, judged, 1, 0.01)
    assert [(row.peer, row.theirs is None, row.error) for row in rows] == [
        ("onnxruntime", False, ""),
        ("openvino", True, "ValueError: cannot"),
    ]
    assert rows[0].runs > 0 < rows[0].ours
    assert rows[0].peer_db is not None
    assert min(rows[0].peer_db, rows[0].ours_db) > 25
    made = bench_int8.Contestants(int8, fp32, {"onnxruntime": tmp_path / "broken.onnx"})
    (row,) = bench_int8.measure(model, made, judged, 1, 0.01)
    assert row.theirs is None
    assert "not those of float32" in row.error
