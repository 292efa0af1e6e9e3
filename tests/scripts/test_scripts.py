"""The scripts' own code: the digits network's gradients, the model writer, the quickstart and the bench."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import bench
import bench_layers
import bench_worker
import ingot
import kernels
import make_models
import quickstart
import train_digits
from ingot.errors import ToolchainError


def test_gradients_match_finite_differences() -> None:
    rng = np.random.default_rng(3)
    network = train_digits.Network(rng)
    # Double precision, so that the difference quotient is exact enough to judge by.
    network.weights = {k: v.astype(np.float64) for k, v in network.weights.items()}  # type: ignore[misc]
    x, y = rng.random((5, 1, 8, 8)), rng.integers(0, 10, 5)
    _, gradients = network.gradients(x, y)  # type: ignore[arg-type]
    for name, weight in network.weights.items():
        for index in rng.integers(0, weight.size, 12):
            place = np.unravel_index(index, weight.shape)
            old, losses = weight[place], []
            for step in (1e-6, -1e-6):
                weight[place] = old + step
                losses.append(network.gradients(x, y)[0])  # type: ignore[arg-type]
            weight[place] = old
            expected = (losses[0] - losses[1]) / 2e-6
            # col2im adds up in single precision, hence no more digits.
            assert gradients[name][place] == pytest.approx(expected, rel=1e-3, abs=1e-6), f"{name}{place}"


def test_the_digits_network_learns_and_its_onnx_file_computes_the_same(tmp_path: Path) -> None:
    import onnxruntime

    x, y, held_x, held_y = train_digits.load()
    assert len(held_x) == train_digits.HELD_OUT
    assert not {a.tobytes() for a in held_x} & {a.tobytes() for a in x}
    *_, (epoch, loss, network) = train_digits.train(x, y)
    assert epoch == train_digits.EPOCHS
    assert loss < 0.05
    scores, _ = network.forward(held_x)
    assert (scores.argmax(1) == held_y).mean() >= quickstart.LEAST_ACCURACY
    train_digits.save_onnx(network, tmp_path / "digits.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    for i in (0, 1, 359):
        np.testing.assert_allclose(
            session.run(None, {"image": held_x[i : i + 1]})[0], scores[i : i + 1], rtol=1e-4, atol=1e-4
        )


# Published parameter counts (weights and biases, gamma and beta), plus a mean and a variance per normalised channel.
@pytest.mark.parametrize(
    ("name", "parameters", "normalised"),
    [("resnet18", 11_689_512, 4_800), ("resnet50", 25_557_032, 26_560), ("mobilenet_v2", 3_504_872, 17_056)],
)
def test_architectures_have_the_published_number_of_parameters(name: str, parameters: int, normalised: int) -> None:
    model = make_models.MODELS[name](1)
    counts = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer if t.name not in ("zero", "six")}
    assert sum(n for k, n in counts.items() if k.endswith((".mean", ".var"))) == 2 * normalised
    assert sum(n for k, n in counts.items() if not k.endswith((".mean", ".var"))) == parameters


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (make_models.write("resnet18", tmp_path / str(i), seed=5).read_bytes() for i in range(2))
    assert first == second
    assert make_models.write("resnet18", tmp_path, seed=6).read_bytes() != first
    onnx.checker.check_model(tmp_path / "resnet18.onnx", full_check=True)
    assert not list(tmp_path.glob("*.partial"))


def test_a_picture_shows_the_digit_and_the_mistake() -> None:
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 2, 3] = 1.0
    lines = quickstart.picture(image, 5, 0.554, 0).plain.splitlines()
    assert lines[2] == " " * 6 + "██" + " " * 8
    assert lines[8].split() == ["5", "55%", "✗", "is", "0"]
    assert quickstart.picture(image, 7, 1.0, 7).plain.splitlines()[8].split() == ["7", "100%", "✓"]


def test_a_mistake_is_shown_where_there_is_one() -> None:
    truths = np.arange(20) % 10
    answers = truths.copy()
    assert len(quickstart.choose(answers, truths, 4)) == 4
    answers[13] = 8
    assert quickstart.choose(answers, truths, 4)[-1] == 13
    assert 13 not in quickstart.choose(answers, truths, 4)[:-1]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 KiB"), (2048, "2 KiB"), (2**20, "1.0 MiB"), (102_000_000, "97.3 MiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert quickstart.size(count) == text


@pytest.mark.slow
def test_the_quickstart_shows_both_models_and_reuses_what_it_made(repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo / "scripts" / "quickstart.py"), "--folder", str(tmp_path)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repo / "compiler"), "HOME": str(tmp_path)}
    for run in (1, 2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("--fresh compiles again") == (0 if run == 1 else 2)
        accuracy = re.search(r"(\d+) of 360 unseen digits, ([\d.]+)%", done.stdout)
        assert accuracy and float(accuracy[2]) >= 96
        error = re.search(r"largest error / largest value = ([\d.e+-]+)", done.stdout)
        assert error and float(error[1]) <= 1e-4
        assert re.search(r"one image, 1 thread.* [\d.]+ ms +[\d.]+ ms", done.stdout)
        assert re.search(r"the arena\) +[\d.]+ MiB", done.stdout)
        assert "ingot compile" in done.stdout


@pytest.mark.slow
def test_the_quickstart_fails_when_the_answers_are_not_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "LEAST_ACCURACY", 1.01)
    assert quickstart.digits(tmp_path, fresh=False) is False
    monkeypatch.setattr(quickstart, "LEAST_ACCURACY", 0.5)
    assert quickstart.digits(tmp_path, fresh=False) is True


@pytest.mark.slow
def test_the_bench_measures_and_writes_a_table(tmp_path: Path, repo: Path) -> None:
    train_digits.save_onnx(train_digits.Network(np.random.default_rng(0)), tmp_path / "digits.onnx")
    before = bench.PAGE.read_bytes()
    done = subprocess.run(
        [
            sys.executable,
            str(repo / "scripts/bench.py"),
            str(tmp_path / "digits.onnx"),
            "--seconds",
            "0.1",
            "--no-append",
        ],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repo / "compiler"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        len(re.findall(r"^digits +threads \d +ingot +[\d.]+ ms +onnxruntime +[\d.]+ ms +ratio", done.stdout, re.M)) == 2
    )
    assert bench.PAGE.read_bytes() == before


def test_the_bench_refuses_outputs_that_differ() -> None:
    def compare(ours: object, theirs: object, dtype: str) -> str:
        return bench.disagreement([np.array(ours, dtype)], [np.array(theirs, dtype)], "onnxruntime")

    assert compare([1, 2], [1, 2.0001], "float32") == "5e-05"
    assert compare([3, 255], [4, 254], "uint8") == "0e+00"
    with pytest.raises(bench.DisagreementError, match="no time is worth printing"):
        compare([1, 2], [1, 2.001], "float32")
    with pytest.raises(bench.DisagreementError, match="2 steps"):
        compare([3, 255], [5, 254], "uint8")
    with pytest.raises(bench.DisagreementError):
        compare([float("nan")], [1], "float32")


def test_the_bench_table_is_markdown() -> None:
    row = bench.Row("resnet50", 2, "onnxruntime", 21.04, 42.08, 99, "2e-06")
    lines = bench.markdown([row], "scripts/bench", 10).splitlines()
    assert re.fullmatch(r"## \d{4}-\d\d-\d\d", lines[0])
    assert lines[-1] == "| resnet50 | 2 | 21 | onnxruntime | 42.1 | 2.00 | 2e-06 | 99 |"
    row = bench.Row("resnet50", 2, "iree", 21.04, None, 0, "no 'a|b' in <stdin>")
    lines = bench.markdown([row], "scripts/bench", 10).splitlines()
    assert lines[-1] == "| resnet50 | 2 | 21 | iree | - | - | no time: no 'a/b' in &lt;stdin> | 0 |"
    assert any(", iree 3." in line for line in lines)


WORKER = """
import sys
import numpy as np
from ingot.cli.worker import serve

def one(model, threads, inputs):
    def refuse():
        raise ValueError("no translation of Relu")
    return refuse

def other(model, threads, inputs):
    return lambda: lambda: [np.maximum(x, 0) + 1 for x in inputs.values()]

def right(model, threads, inputs):
    return lambda: lambda: [np.maximum(x, 0) for x in inputs.values()]

sys.exit(serve({"iree": one, "inductor": other, "right": right}))
"""


def test_engines_with_an_environment_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "relu", [value("x", 1, [2, 9])], [value("y", 1, [2, 9])])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "relu.onnx")
    (tmp_path / "worker.py").write_text(WORKER, "utf-8")
    own = {"iree", "inductor", "right"}
    command = (sys.executable, str(tmp_path / "worker.py"))
    monkeypatch.setattr(bench, "worker_of", lambda name: command if name in own else bench.WORKER)
    ingot.compile(tmp_path / "relu.onnx", selftest=False).save(tmp_path / "relu.so")
    rows = bench.measure(tmp_path / "relu.onnx", tmp_path / "relu.so", 1, 0.01, ["iree", "inductor", "right"])
    assert [row.peer for row in rows] == ["onnxruntime", "iree", "inductor", "right"]
    assert [row.theirs is None for row in rows] == [False, True, True, False]
    assert rows[1].error == "no translation of Relu"
    assert "differ by" in rows[2].error
    assert rows[1].runs == 0 < rows[3].runs


def test_the_bench_makes_an_environment_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        (tmp_path / "build/bench/venv-iree").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, status, "", "first\nno such package\n")

    monkeypatch.setattr(bench, "REPO", tmp_path)
    monkeypatch.setattr(bench.subprocess, "run", run)
    status = 1
    with pytest.raises(ToolchainError, match="no such package"):
        bench.worker_of("iree")
    status = 0
    for _ in range(2):
        python, script = bench.worker_of("iree")
    assert Path(python) == tmp_path / "build/bench/venv-iree/bin/python"
    assert Path(script).name == "bench_worker.py"
    assert [command[2] for command in ran] == ["venv", "venv", "pip"]  # not after a failure, and not twice
    assert set(bench.OWN_PACKAGES["iree"]) < set(ran[-1])
    assert all("==" in package for packages in bench.OWN_PACKAGES.values() for package in packages)
    monkeypatch.setitem(bench.OWN_PACKAGES, "iree", ("iree-base-compiler==4",))
    bench.worker_of("iree")
    assert len(ran) == 5
    assert tuple(bench.worker_of("onnxruntime")) == bench.WORKER


def test_other_engines_get_the_model_with_the_shapes_of_its_inputs(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = onnx.numpy_helper.from_array(np.ones((3, 4), np.float32), "w")
    inputs = [value("w", 1, [3, 4]), value("x", 1, ["batch", 3])]  # older files list weights among the inputs
    graph = onnx.helper.make_graph([node], "matmul", inputs, [value("y", 1, ["batch", 4])], [weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    feeds = {"x": np.zeros((5, 3), np.float32)}
    proto = bench_worker.fixed(tmp_path / "model.onnx", feeds)
    assert [d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == [5, 4]
    assert bench_worker.in_order(proto, feeds) == ["x"]


def test_the_page_of_layers_keeps_the_families_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layers, "PAGE", tmp_path / "layers.md")
    rows = [(0.5, 20.0, 10.0, "the worst"), (2.0, 1.0, 2.0, "the best")]
    bench_layers.write({"gather": bench_layers.summary("gather", rows, "first"), "conv": "| conv | old |"})
    bench_layers.write({"conv": bench_layers.summary("conv", rows[1:], "second")})
    head, *lines = (tmp_path / "layers.md").read_text("utf-8").split("|---|\n")[-1].splitlines()
    assert head.startswith("| conv | 1 | 2.00 | 0 | 2.00 | the best | 2")
    assert head.endswith("`second` |")
    assert [line.split("|")[1:6] for line in lines] == [[" gather ", " 2 ", " 1.00 ", " 1 ", " 0.50 "]]


def test_times_of_layers_are_kept_and_those_there_are_not_measured(tmp_path: Path) -> None:
    kept = bench_layers.Kept(tmp_path / "times.jsonl")
    assert kept.get("conv 0 0: a", lambda: (2.0, 3.0)) == (2.0, 3.0)
    again = bench_layers.Kept(tmp_path / "times.jsonl")
    assert again.get("conv 0 0: a", lambda: pytest.fail("measured again")) == (2.0, 3.0)
    assert again.get("conv 0 1: a", lambda: (4.0, 5.0)) == (4.0, 5.0)
    assert len((tmp_path / "times.jsonl").read_text("utf-8").splitlines()) == 2


def test_a_layer_that_comes_out_slow_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seconds = [(10.0, 6.0), (10.0, 9.5)], []

    def measure(_: object, took: float) -> tuple[float, float]:
        seconds.append(took)
        return found.pop(0)

    monkeypatch.setattr(bench_layers, "measure", measure)
    (layer,) = bench_layers.layers("gather", 1, 0)
    assert bench_layers.compare(layer, tmp_path, 0.1) == (10.0, 9.5)
    assert seconds == pytest.approx([0.1, 0.1 * bench_layers.AGAIN])


def test_the_page_of_kernels_sums_up_each_model() -> None:
    rows = [kernels.Row("net", "conv | relu", 20e6, 2, 1e-3, 0.5), kernels.Row("net", "matmul", 5e6, 1, 1e-3, 1.0)]
    lines = kernels.markdown(rows, 40.0, "scripts/kernels", 8).splitlines()
    assert "| net | 2 | 3.00 | 15.0 | 38% | 50% | 1 of 2 | 33% |" in lines
    assert lines[-2] == "| net | conv then relu | 2 | 20.0 | 20.0 | 50% | 2.00 |"


@pytest.mark.slow
def test_the_kernels_of_a_model_are_measured(tmp_path: Path, repo: Path) -> None:
    train_digits.save_onnx(train_digits.Network(np.random.default_rng(0)), tmp_path / "digits.onnx")
    done = subprocess.run(
        [sys.executable, str(repo / "scripts/kernels.py"), str(tmp_path / "digits.onnx"), "--configs=1", "--no-write"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repo / "compiler"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| digits \| \d+ \| [\d.]+ \| [\d.]+ \| \d+% \|", done.stdout, re.M)
    assert re.search(r"the core's peak, measured: [1-9]\d* GFLOP/s", done.stdout)
