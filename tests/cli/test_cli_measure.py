"""`ingot bench` and `ingot verify`: other engines in processes of their own, and what they are compared with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from onnx import helper

from cli.models import save, value
from ingot.cli.peers import distance

Ingot = Callable[..., Result]
Refused = Callable[..., None]


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny model's interface with other answers."""
    weights = {"d": np.ones((192, 5), np.float32)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["m"]),
        helper.make_node("Softmax", ["m"], ["y"], axis=1),
    ]
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    return save(path, nodes, [value("x", [1, 3, 8, 8])], [value("y", [1, 5])], weights)


def test_bench_tells_times_and_memory(ingot: Ingot, tiny_so: Path) -> None:
    result = ingot("bench", tiny_so, "--seconds", 0.1)
    assert result.exit_code == 0, result.output
    assert "1 thread, random inputs (seed 0): x: float32[1, 3, 8, 8]" in result.stdout
    name, median, p90, p99, least, runs, load, *ram = result.stdout.splitlines()[-1].split()
    assert name == "ingot"
    assert 0 < float(least) <= float(median) <= float(p90) <= float(p99)
    assert int(runs) >= 3
    assert float(load) > 0
    assert ram[1] in ("KiB", "MiB")


def test_bench_against_another_engine(ingot: Ingot, tiny_so: Path, tiny_model: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = ingot("bench", tiny_so, "--seconds", 0.1, "--against", "onnxruntime", tiny_model)
    assert result.exit_code == 0, result.output
    assert "\nonnxruntime " in result.stdout
    assert "ratio of medians: " in result.stdout
    error = float(result.stdout.splitlines()[-1].rpartition(" ")[2])
    assert error < 1e-5


def test_bench_gives_another_engine_what_the_library_holds_itself(ingot: Ingot, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["m"]),
        helper.make_node("Add", ["m", "h"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    ends = [value("k", [1]), value("x", [1, 4]), value("h", [1, 4])], [value("s", [1, 4]), value("y", [1, 4])]
    model = save(tmp_path / "m.onnx", nodes, *ends, {})
    options = ("--bind", "k=3", "--state", "h=s", "-o", tmp_path / "m.so")
    assert ingot("compile", model, *options).exit_code == 0
    result = ingot("bench", tmp_path / "m.so", "--seconds", 0.1, "--against", "onnxruntime", model)
    assert result.exit_code == 0, result.output
    assert float(result.stdout.splitlines()[-1].rpartition(" ")[2]) < 1e-6


def test_bench_takes_bound_values_that_a_library_does_not_hold(ingot: Ingot, refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [helper.make_node("Mul", ["x", "k"], ["y"])]
    model = save(tmp_path / "m.onnx", nodes, [value("x", [1, 400]), value("k", [400])], [value("y", [1, 400])], {})
    np.save(tmp_path / "k.npy", np.linspace(-1, 1, 400, dtype=np.float32))
    bind, library = f"k={tmp_path / 'k.npy'}", tmp_path / "m.so"
    assert ingot("compile", model, "--bind", bind, "-o", library).exit_code == 0
    bench = ("bench", library, "--seconds", 0.1, "--against", "onnxruntime", model)
    refused(ingot(*bench), "a bound value is not known")
    result = ingot(*bench, "--bind", bind)
    assert result.exit_code == 0, result.output
    assert float(result.stdout.splitlines()[-1].rpartition(" ")[2]) < 1e-6


def test_bench_against_another_library(ingot: Ingot, tiny_so: Path, tmp_path: Path) -> None:
    copy = shutil.copy(tiny_so, tmp_path / "copy.so")
    result = ingot("bench", tiny_so, "--seconds", 0.1, "--against", "ingot", copy)
    assert result.exit_code == 0, result.output
    assert f"\ningot {tiny_so.name} " in result.stdout
    assert "\ningot copy.so " in result.stdout
    assert "= 0\n" in result.stdout


def test_bench_refuses(ingot: Ingot, refused: Refused, tiny_so: Path, pi_so: Path, tmp_path: Path) -> None:
    refused(ingot("bench", pi_so), "built for aarch64")
    refused(ingot("bench", tiny_so, "--against", "onnxruntime", tmp_path / "none.onnx"), "no such file")
    refused(ingot("bench", tiny_so, "--against", "onnxruntime", tmp_path), "a folder")
    refused(ingot("bench", tiny_so, "--against", "abacus", tiny_so), "'abacus' is not one of")
    refused(ingot("bench", tiny_so, "--threads", 0), "--threads")
    refused(ingot("bench", tiny_so, "--threads", 65), "--threads")


def test_an_engine_that_fails_is_named(ingot: Ingot, tiny_so: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = ingot("bench", tiny_so, "--against", "onnxruntime", tiny_so)
    assert result.exit_code == 1
    assert "error: onnxruntime failed" in result.stderr
    assert "Traceback" not in result.output


def test_an_engine_that_is_not_installed_says_what_to_install(
    ingot: Ingot, tiny_so: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = ingot("bench", tiny_so, "--against", "onnxruntime", tiny_model)
    assert result.exit_code == 2
    assert "onnxruntime is not installed" in result.stderr
    assert "pip install onnxruntime" in result.stderr


def test_an_engine_that_crashes_takes_only_its_process(
    ingot: Ingot, tiny_so: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = ingot("bench", tiny_so, "--against", "onnxruntime", tiny_model)
    assert result.exit_code == 1
    assert "it ended by SIGABRT" in result.stderr


# ----------------------------------------------------------------------------------------------------------- verify


def test_verify_says_yes(ingot: Ingot, tiny_so: Path, tiny_model: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = ingot("verify", tiny_so, tiny_model)
    assert result.exit_code == 0, result.output
    assert "next to onnxruntime" in result.stdout
    assert "1 of 1  yes" in result.stdout
    assert result.stderr == ""


def test_verify_says_no(ingot: Ingot, tiny_so: Path, other_model: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = ingot("verify", tiny_so, other_model)
    assert result.exit_code == 1
    assert "not within the tolerance (0.0001" in result.stdout
    assert "compiled from another file" in result.stderr
    assert ingot("verify", tiny_so, other_model, "--tolerance", 1e6).exit_code == 0


def test_verify_falls_back_to_the_reference_interpreter(
    ingot: Ingot, tiny_so: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = ingot("verify", tiny_so, tiny_model)
    assert result.exit_code == 0, result.output
    assert "next to reference" in result.stdout


def test_verify_on_given_data(ingot: Ingot, tiny_so: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    r = np.random.default_rng(3)
    np.savez(tmp_path / "one.npz", x=r.random((1, 3, 8, 8), np.float32))
    np.savez(tmp_path / "many.npz", x=r.random((7, 3, 8, 8), np.float32), unused=np.zeros(3))
    one = ingot("verify", tiny_so, tiny_model, "--data", tmp_path / "one.npz")
    many = ingot("verify", tiny_so, tiny_model, "--data", tmp_path / "many.npz")
    assert one.exit_code == many.exit_code == 0, one.output + many.output
    assert "1 sample of" in one.stdout
    assert "7 samples of" in many.stdout
    assert "7 of 7" in many.stdout


def test_verify_refuses(
    ingot: Ingot, refused: Refused, tiny_so: Path, pi_so: Path, pair_so: Path, tiny_model: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "z.npz", z=np.zeros(3))
    np.savez(tmp_path / "f8.npz", x=np.zeros((2, 3, 8, 8)))
    np.savez(tmp_path / "shape.npz", x=np.zeros((2, 3, 8, 9), np.float32))
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 3, 8, 8), np.float32))
    np.save(tmp_path / "x.npy", np.zeros(3))
    refused(ingot("verify", pi_so, tiny_model), "built for aarch64", "--on qemu")
    refused(ingot("verify", tiny_so, tmp_path / "none.onnx"), "does not exist")
    refused(ingot("verify", tiny_model, tiny_model), "not a shared library")
    given = ["verify", tiny_so, tiny_model, "--data"]
    refused(ingot(*given, tmp_path / "z.npz"), "an input is missing in --data", "x: float32[1, 3, 8, 8]")
    refused(ingot(*given, tmp_path / "x.npy"), "not an .npz file")
    refused(ingot(*given, tmp_path / "f8.npz"), "wrong dtype", "float64")
    refused(ingot(*given, tmp_path / "shape.npz"), "wrong shape")
    refused(ingot(*given, tmp_path / "none.npz"), "wrong shape")
    refused(ingot(*given, tmp_path / "nothing.npz"), "No such file")


@pytest.mark.qemu
def test_verify_under_an_emulator(
    ingot: Ingot, pi_so: Path, tiny_model: Path, qemu: Callable[[str], list[str]]
) -> None:
    pytest.importorskip("onnxruntime")
    qemu("aarch64")  # skips where there is none
    result = ingot("verify", pi_so, tiny_model, "--on", "qemu")
    assert result.exit_code == 0, result.output
    assert "under qemu (cortex-a72)" in result.stdout


@pytest.mark.parametrize(
    ("found", "wanted", "error"),
    [
        ([1, 2], [1, 2], 0),
        ([1, 2.5], [1, 2], 0.25),
        ([0, 0], [0, 0], 0),
        ([1e-9], [0], float("inf")),
        ([float("nan"), 1], [float("nan"), 1], 0),
        ([float("nan"), 1], [1, 1], float("inf")),
        ([1, 1], [float("nan"), 1], float("inf")),
        ([float("inf"), 1], [float("inf"), 1], 0),
        ([float("inf"), 1], [-float("inf"), 1], float("inf")),
        ([], [], 0),
        ([1], [1, 1], float("inf")),
        ([255], [0], float("inf")),
    ],
)
def test_distance(found: list[float], wanted: list[float], error: float) -> None:
    assert distance(np.array(found, np.float64), np.array(wanted, np.float64)) == error


def test_distance_does_not_wrap_around() -> None:
    assert distance(np.array([0], np.uint8), np.array([255], np.uint8)) == 1
    assert distance(np.array([-128], np.int8), np.array([127], np.int8)) == 255 / 127


def test_tolerances_by_dtype() -> None:
    from ingot.cli.verify import _Score
    from ingot.runtime.loader import TensorSpec

    def score(dtype: str, found: list[float], wanted: list[float]) -> _Score:
        made = _Score(TensorSpec({"name": "y", "dtype": dtype, "shape": [len(found)], "quantization": None}))
        made.add(np.array(found, dtype), np.array(wanted, dtype))
        return made

    assert score("float32", [1.00009], [1]).within(None)
    assert not score("float32", [1.00011], [1]).within(None)
    assert score("uint8", [1, 5], [2, 5]).within(None)
    assert not score("uint8", [1, 5], [3, 5]).within(None)
    assert not score("int64", [1000001], [1000000]).within(None)
    assert score("int64", [1000001], [1000000]).within(1e-5)
    assert not score("bool", [True], [False]).within(None)
