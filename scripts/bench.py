"""Times compiled models next to the interpreter of their format, in one interleaved run.

usage: bench.py [MODEL ...] [--threads 1,2] [--seconds 10] [--no-append]

Each engine has a process of its own. They take turns on the same input, and those whose turn it is not are stopped
(SIGSTOP), because idle threads of one would spin into the other's time. A time counts only if the outputs agree.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import ingot

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "benchmarks.md"
TOLERANCE = 1e-4  # of max|error| / max|reference|; quantised outputs may differ by one step
TURN_SECONDS = 0.25
WARM_UP_SECONDS = 0.5

Array = npt.NDArray[Any]
Runner = Callable[[], list[Array]]


# ---------------------------------------------------------------------------------------------------------- workers


def ingot_runner(model: Path, threads: int, inputs: dict[str, Array]) -> Runner:
    """Run a compiled model."""
    net = ingot.load(model, threads=threads)
    return lambda: list(net.run(inputs).values())


def onnxruntime_runner(model: Path, threads: int, inputs: dict[str, Array]) -> Runner:
    """Run an ONNX model with ONNX Runtime, as it comes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return lambda: list(session.run(None, inputs))


def litert_runner(model: Path, threads: int, inputs: dict[str, Array]) -> Runner:
    """Run a TFLite model with LiteRT, as it comes."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(model), num_threads=threads)
    interpreter.allocate_tensors()
    into = {d["name"]: d["index"] for d in interpreter.get_input_details()}
    out = [d["index"] for d in interpreter.get_output_details()]

    def run() -> list[Array]:
        for name, value in inputs.items():
            interpreter.set_tensor(into[name], value)
        interpreter.invoke()
        return [interpreter.get_tensor(i) for i in out]

    return run


ENGINES = {"ingot": ingot_runner, "ONNX Runtime": onnxruntime_runner, "LiteRT": litert_runner}
PACKAGES = {"ONNX Runtime": "onnxruntime", "LiteRT": "ai-edge-litert"}


def work(engine: str, model: Path, threads: int, folder: Path) -> None:
    """A worker: write the outputs once, then for each line on stdin run for that many seconds and reply the times."""
    with np.load(folder / "inputs.npz") as stored:
        inputs = dict(stored)
    run = ENGINES[engine](model, threads, inputs)
    np.savez(folder / f"{engine}.npz", *run())
    print("ready", flush=True)
    for line in sys.stdin:
        until = time.perf_counter() + float(line)
        times: list[float] = []
        while not times or time.perf_counter() < until:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        print(json.dumps(times), flush=True)


class Worker:
    """A worker process, stopped unless it is its turn."""

    def __init__(self, engine: str, model: Path, threads: int, folder: Path) -> None:
        self.engine = engine
        self.times: list[float] = []
        command = [sys.executable, __file__, "--worker", engine, str(model), str(threads), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise SystemExit(f"{engine} could not run {model}; its message is above")
        self.process.send_signal(signal.SIGSTOP)

    def _line(self) -> str:
        return self.process.stdout.readline().strip() if self.process.stdout else ""

    def turn(self, seconds: float) -> list[float]:
        """Let the worker run; returns the seconds of each run."""
        if self.process.stdin is None:
            raise SystemExit(f"{self.engine} has no input")
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        line = self._line()
        self.process.send_signal(signal.SIGSTOP)
        if not line:
            raise SystemExit(f"{self.engine} stopped working; its message is above")
        return [float(t) for t in json.loads(line)]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in milliseconds."""

    model: str
    threads: int
    peer: str
    ours: float
    theirs: float
    runs: int
    error: str


def seeded_inputs(metadata: dict[str, Any]) -> dict[str, Array]:
    """Inputs by name: normal floats, small indices for 32- and 64-bit integers, the full range of 8-bit ones."""
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in metadata["inputs"]:
        dtype, shape = np.dtype(tensor["dtype"]), tensor["shape"]
        if dtype.kind == "f":
            inputs[tensor["name"]] = rng.standard_normal(shape).astype(dtype)
        elif dtype.itemsize == 1 and dtype.kind in "iu":
            info = np.iinfo(dtype)
            inputs[tensor["name"]] = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
        else:
            inputs[tensor["name"]] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


def disagreement(folder: Path, peer: str) -> str:
    """Compare the stored outputs; returns what to print. Raises SystemExit if they do not agree."""
    with np.load(folder / "ingot.npz") as a, np.load(folder / f"{peer}.npz") as b:
        pairs = [(a[name], b[name]) for name in b.files]
    worst = 0.0
    for ours, theirs in pairs:
        difference = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0))
        if theirs.dtype.kind != "f":
            if difference > 1:
                raise SystemExit(f"ingot and {peer} differ by {difference:.0f} steps: no time is worth printing")
        else:
            worst = max(worst, difference / max(float(np.abs(theirs).max(initial=0)), 1e-30))
    if worst > TOLERANCE:
        raise SystemExit(f"ingot and {peer} differ by {worst:.1e} of the largest value: no time is worth printing")
    return f"{worst:.0e}"


@contextlib.contextmanager
def workers(pairs: list[tuple[str, Path]], threads: int, folder: Path) -> Iterator[list[Worker]]:
    """Start one worker per (engine, model); end them all, however the block ends."""
    started: list[Worker] = []
    try:
        for engine, model in pairs:
            started.append(Worker(engine, model, threads, folder))
        yield started
    finally:
        for worker in started:
            worker.close()


def measure(model: Path, so: Path, threads: int, seconds: float, folder: Path) -> Row:
    """Time one model with one thread count."""
    peer = "LiteRT" if model.suffix == ".tflite" else "ONNX Runtime"
    with workers([("ingot", so), (peer, model)], threads, folder) as (ours, theirs):
        error = disagreement(folder, peer)
        for worker in (ours, theirs):
            worker.turn(WARM_UP_SECONDS)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(theirs.times) < 3:
            for worker in (ours, theirs):
                worker.times += worker.turn(TURN_SECONDS)
    a, b = (statistics.median(w.times) * 1e3 for w in (ours, theirs))
    return Row(model.stem, threads, peer, a, b, min(len(ours.times), len(theirs.times)), error)


def default_models() -> list[Path]:
    """The architectures of make_models, written once under build/bench."""
    import make_models

    folder = REPO / "build" / "bench"
    paths = {name: folder / f"{name}.onnx" for name in make_models.MODELS}
    return [path if path.is_file() else make_models.write(name, folder) for name, path in paths.items()]


def compiled(model: Path, folder: Path) -> Path:
    """Compile for this machine; returns the path of the library."""
    digest = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]
    path = folder / f"{model.stem}-{digest}.so"
    ingot.compile(model, target="native", selftest=False).save(path)
    return path


# ---------------------------------------------------------------------------------------------------------- reporting


def machine() -> str:
    """The processor, its cores for this process, and the C library."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"{name}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, {' '.join(platform.libc_ver())}"


def markdown(rows: list[Row], command: str, seconds: float) -> str:
    """The dated section for docs/benchmarks.md."""
    peers = sorted({row.peer for row in rows}, reverse=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(PACKAGES[name])}" for name in peers)
    lines = [
        f"## {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "",
        f"- machine: {machine()}",
        f"- versions: ingot {ingot.__version__}, {versions}, Python {platform.python_version()}",
        f"- command: `{command}`",
        f"- method: batch 1, seeded input, {seconds:g} s a row in turns of {TURN_SECONDS:g} s, medians, same outputs",
        "",
        "| model | threads | ingot, ms | peer | peer, ms | peer / ingot | max error | runs |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.model} | {r.threads} | {r.ours:.3g} | {r.peer} | {r.theirs:.3g} | {r.theirs / r.ours:.2f} "
        f"| {r.error} | {r.runs} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and report."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(prog="scripts/bench", description="ingot next to ONNX Runtime or LiteRT")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="ONNX or TFLite files")
    parser.add_argument("--threads", default="1,2", help="comma separated counts (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row (default: 10)")
    parser.add_argument("--no-append", action="store_true", help=f"do not add the table to {PAGE.relative_to(REPO)}")
    args = parser.parse_args()
    models: list[Path] = args.models or default_models()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ingot-bench-") as temporary:
        folder = Path(temporary)
        for model in models:
            try:
                so = compiled(model, folder)
                with contextlib.closing(ingot.load(so, threads=1)) as net:
                    np.savez(folder / "inputs.npz", **seeded_inputs(net.metadata))  # type: ignore[arg-type]
            except ingot.IngotError as error:
                print(error, file=sys.stderr)
                sys.exit(error.exit_code)
            for threads in (int(n) for n in args.threads.split(",")):
                row = measure(model, so, threads, args.seconds, folder)
                print(
                    f"{row.model:<24} {threads} thread{'s' * (threads > 1):<1}  ingot {row.ours:8.3f} ms  "
                    f"{row.peer} {row.theirs:8.3f} ms  ratio {row.theirs / row.ours:5.2f}",
                    flush=True,
                )
                rows.append(row)
    if not args.no_append:
        command = shlex.join(["scripts/bench", *sys.argv[1:]])
        PAGE.write_text(PAGE.read_text("utf-8").rstrip() + "\n\n" + markdown(rows, command, args.seconds), "utf-8")
        print(f"added to {PAGE.relative_to(REPO)}")


if __name__ == "__main__":
    main()
