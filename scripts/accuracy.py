"""Accuracy after quantisation, next to other tools, on samples that calibration never saw."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from accuracy_tasks import Task, tasks

Array = np.ndarray[Any, Any]
REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "quantisation.md"
BEGIN, END = "<!-- accuracy: written by scripts/accuracy -->", "<!-- end of accuracy -->"
Engine = Callable[[Path, Array, Array], Array]  # model, calibration samples, samples to judge -> first outputs


def run_all(model: ingot.Model, data: Array) -> Array:
    first = model.outputs[0].name
    name = model.inputs[0].name
    return np.stack([model.run({name: sample})[first] for sample in data])


def compiled(model: Path, options: dict[str, Any] | None = None) -> ingot.Model:
    with tempfile.TemporaryDirectory() as folder:
        artifact = ingot.compile(model, selftest=False, **(options or {}))
        return ingot.load(artifact.save(Path(folder) / "model.so"))


def by_ingot(calibrator: str | None) -> Engine:
    def engine(model: Path, samples: Array, data: Array) -> Array:
        name = _input_name(model)
        options: dict[str, Any] = {"precision": "int8", "calibrate": {name: samples}}
        if calibrator is not None:
            options["calibrator"] = calibrator
        return run_all(compiled(model, options), data)

    return engine


def _input_name(model: Path) -> str:
    from ingot.frontend import import_model

    return import_model(model).inputs[0].name


def _ready(model: Path, folder: Path) -> Path:
    """The model as the other tools like it best: a recent opset, constants folded."""
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if model.suffix != ".onnx":
        return model
    raised, ready = folder / "raised.onnx", folder / "ready.onnx"
    loaded = onnx.load(model)
    if loaded.opset_import[0].version < 13:
        loaded = version_converter.convert_version(loaded, 17)
    onnx.save(loaded, raised)
    quant_pre_process(str(raised), str(ready), skip_symbolic_shape=True)
    return ready


class _Reader:
    """ONNX Runtime's calibration reader."""

    def __init__(self, name: str, samples: Array) -> None:
        self.feeds: Iterator[dict[str, Array]] = iter([{name: sample} for sample in samples])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


def by_onnxruntime(method: str) -> Engine:
    def engine(model: Path, samples: Array, data: Array) -> Array:
        import onnxruntime
        from onnxruntime import quantization as q

        if model.suffix != ".onnx":
            raise RuntimeError("reads ONNX only")
        with tempfile.TemporaryDirectory() as folder:
            ready, out = _ready(model, Path(folder)), Path(folder) / "out.onnx"
            name = onnxruntime.InferenceSession(str(ready)).get_inputs()[0].name
            q.quantize_static(
                str(ready),
                str(out),
                _Reader(name, samples),
                quant_format=q.QuantFormat.QDQ,
                per_channel=True,
                calibrate_method=q.CalibrationMethod[method],
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
                # It fails on biases of one dimension with several scales.
                extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
            )
            options = onnxruntime.SessionOptions()
            # Without this, pairs of int8 products saturate in 16 bits on CPUs without VNNI, which is no fault of the
            # quantisation: the graph is computed as it is written.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
            return np.stack([session.run(None, {name: sample})[0] for sample in data])

    return engine


def by_nncf(python: str) -> Engine:
    def engine(model: Path, samples: Array, data: Array) -> Array:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("samples.npy", "data.npy", "out.npz")]
            np.save(paths[0], samples)
            np.save(paths[1], data)
            command = [
                python,
                str(REPO / "scripts" / "accuracy_nncf.py"),
                str(_ready(model, Path(folder))),
                *map(str, paths),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:])[:200])
            return np.asarray(np.load(paths[2])["output"])

    return engine


def sqnr(reference: Array, other: Array) -> float:
    """Signal to quantisation noise over all outputs, in decibels."""
    signal = reference.astype(np.float64).reshape(-1)
    noise = signal - other.astype(np.float64).reshape(-1)
    return float(10 * np.log10(np.sum(signal**2) / max(float(np.sum(noise**2)), 1e-30)))


def judge(task: Task, models: Path, engine: Engine, reference: Array) -> tuple[float | None, str]:
    """SQNR and the task's own metric, over both halves; None and the reason where an engine cannot."""
    outputs, index = [], []
    try:
        for calibration, judged in task.folds:
            outputs.append(engine(models / task.file, task.data[calibration], task.data[judged]))
            index.append(judged)
    except Exception as error:  # whatever another tool raises is its result
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    where = np.concatenate(index)
    found, wanted = np.concatenate(outputs), reference[where]
    return sqnr(wanted, found), task.metric(wanted, found.reshape(wanted.shape), where)


def table(rows: list[tuple[Task, dict[str, tuple[float | None, str]]]], engines: list[str]) -> str:
    """The results in Markdown, and how often ingot's error is the smallest."""
    lines = ["| model | " + " | ".join(f"{name}, dB" for name in engines) + " | ingot, float to int8 |"]
    lines.append("|---|" + "---:|" * len(engines) + "---|")
    first = compared = 0
    for task, results in rows:
        cells = ["-" if results[name][0] is None else f"{results[name][0]:.1f}" for name in engines]
        others = [results[name][0] for name in engines[1:] if results[name][0] is not None]
        mine = results["ingot"][0]
        if others and mine is not None:
            compared += 1
            first += mine > max(x for x in others if x is not None)
        lines.append(f"| {task.name} | " + " | ".join(cells) + f" | {results['ingot'][1]} |")
    lines += ["", f"ingot's error is the smallest on {first} of the {compared} models that another tool quantised too."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="the folder of shared models")
    parser.add_argument("--nncf", help="a Python that has nncf and openvino")
    parser.add_argument("--only", default="", help="words of the models' names, separated by commas")
    parser.add_argument("--calibrators", default="", help="ingot's calibrators to compare instead of other tools")
    parser.add_argument(
        "--results", type=Path, help="a JSON file: what is in it is not run again, and results go there"
    )
    parser.add_argument("--print", action="store_true", help="write nothing into docs")
    options = parser.parse_args()
    engines: dict[str, Engine] = {"ingot": by_ingot(None)}
    if options.calibrators:
        engines.update({name: by_ingot(name) for name in options.calibrators.split(",")})
    else:
        engines.update({"ORT entropy": by_onnxruntime("Entropy"), "ORT percentile": by_onnxruntime("Percentile")})
        if options.nncf:
            engines["NNCF"] = by_nncf(options.nncf)
    words = [word.lower() for word in options.only.split(",") if word]
    known: dict[str, dict[str, tuple[float | None, str]]] = {}
    if options.results is not None and options.results.exists():
        known = json.loads(options.results.read_text(encoding="utf-8"))
    every = tasks(options.models)
    for task in every:
        if words and not any(word in task.name.lower() for word in words):
            continue
        results, reference = known.setdefault(task.name, {}), None
        for name, engine in engines.items():
            if name in results:
                continue
            start = time.perf_counter()
            if reference is None:
                reference = run_all(compiled(options.models / task.file), task.data)
            results[name] = judge(task, options.models, engine, reference)
            seconds = time.perf_counter() - start
            print(f"{task.name}: {name}: {results[name]} {seconds:.0f} s", file=sys.stderr, flush=True)
            if options.results is not None:
                options.results.write_text(json.dumps(known, indent=1), encoding="utf-8")
    done = [task for task in every if set(engines) <= set(known.get(task.name, {}))]
    text = table([(task, known[task.name]) for task in done], list(engines))
    if len(done) < len(every):
        text += "\nNot run here: " + ", ".join(task.name for task in every if task not in done) + "."
    if options.print or options.calibrators or (words and options.results is None):
        print(text)
        return 0
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    how = "`scripts/accuracy --models MODELS" + (" --nncf PYTHON" if options.nncf else "") + "`"
    PAGE.write_text(f"{before}{BEGIN}\n\n{today}, {how}:\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
