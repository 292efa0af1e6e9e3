"""Accuracy after quantisation, next to other tools, on samples that calibration never saw."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ingot
import quantisers
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


def by_onnxruntime(method: str) -> Engine:
    def engine(model: Path, samples: Array, data: Array) -> Array:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            name, out = _input_name(model), Path(folder) / "out.onnx"
            quantisers.by_onnxruntime(model, {name: samples}, out, method)
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
            outputs = quantisers.by_nncf(python, model, {"x": samples}, Path(folder) / "out.xml", data)
            return np.asarray(outputs)

    return engine


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
    return quantisers.sqnr(wanted, found), task.metric(wanted, found.reshape(wanted.shape), where)


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
