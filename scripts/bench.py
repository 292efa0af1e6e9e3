"""Times compiled models next to the interpreter of their format and keeps the table.

usage: bench.py [MODEL ...] [--threads 1,2] [--seconds 10] [--openvino] [--iree] [--inductor] [--no-append]

Each engine has a process of its own; they take turns on the same input, and those whose turn it is not are stopped
(`ingot bench --against` measures the same way). A time counts only if the outputs agree. An engine asked for that
cannot load a model, or computes something else, has the reason in its row.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from ingot.cli.engines import PACKAGES
from ingot.cli.peers import WORKER, Peer, distance, interleave, peers, random_feeds
from ingot.errors import RunError, ToolchainError

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "benchmarks.md"
TOLERANCE = 1e-4  # of max|error| / max|reference|; quantised outputs may differ by one step
#: Engines that would not fit into ingot's own environment, and the packages of theirs.
OWN_PACKAGES = {
    "iree": ("iree-base-compiler[onnx]==3.13.0", "iree-base-runtime==3.13.0", "onnx==1.23.2"),
    "inductor": ("torch==2.13.0", "onnx==1.23.2"),
    "nncf": ("nncf==3.4.0", "openvino==2026.4.1"),
}
#: Engines whose own choice of precision is no reference for the values.
OTHER_PRECISION = {"openvino-default"}


class DisagreementError(Exception):
    """Outputs differ by more than rounding."""


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in milliseconds, or none and in `error` the reason."""

    model: str
    threads: int
    peer: str
    ours: float
    theirs: float | None
    runs: int
    error: str

    @property
    def ratio(self) -> float:
        """How many times faster ingot is; NaN where the peer has no time."""
        return float("nan") if self.theirs is None else self.theirs / self.ours


def disagreement(ours: list[np.ndarray[Any, Any]], theirs: list[np.ndarray[Any, Any]], peer: str) -> str:
    """Compare outputs; returns the largest relative error as text. Raises DisagreementError if they do not agree."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.dtype.kind in "biu":
            steps = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0))
            if a.shape != b.shape or steps > 1:
                raise DisagreementError(f"ingot and {peer} differ by {steps:.0f} steps: no time is worth printing")
        else:
            worst = max(worst, distance(a, b))
    if worst > TOLERANCE:
        raise DisagreementError(
            f"ingot and {peer} differ by {worst:.1e} of the largest value: no time is worth printing"
        )
    return f"{worst:.0e}"


def outputs(peer: Peer) -> list[np.ndarray[Any, Any]]:
    """The outputs of a stopped peer."""
    peer.turn(True)
    result = peer.outputs()
    peer.turn(False)
    return result


def engines(model: Path, wanted: Sequence[str]) -> list[str]:
    """The peers a model is timed with: LiteRT for TFLite, else ONNX Runtime and those asked for."""
    return ["litert"] if model.suffix == ".tflite" else ["onnxruntime", *wanted]


def worker_of(engine: str) -> Sequence[str]:
    """The command of an engine's process, in the engine's own virtual environment if it has one.

    Raises ToolchainError.
    """
    if engine not in OWN_PACKAGES:
        return WORKER
    return (str(environment(engine)), str(REPO / "scripts" / "bench_worker.py"))


def environment(engine: str) -> Path:
    """The Python of an engine's own virtual environment, which is made if need be.

    It lies in build/bench and is made again when its packages change. Raises ToolchainError.
    """
    folder = REPO / "build" / "bench" / f"venv-{engine}"
    stamp, wanted = folder / "packages.txt", "\n".join([sys.version, *OWN_PACKAGES[engine]])
    python = folder / "bin" / "python"
    if not stamp.is_file() or stamp.read_text("utf-8") != wanted:
        print(f"installing {' '.join(OWN_PACKAGES[engine])} into {folder.relative_to(REPO)}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *OWN_PACKAGES[engine]],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
                raise ToolchainError(f"{engine} could not be installed", found=last, hint="check the network")
        stamp.write_text(wanted, "utf-8")  # last: a half-made environment has none
    return python


def measure(model: Path, so: Path, threads: int, seconds: float, wanted: Sequence[str] = ()) -> list[Row]:
    """Time one model with one thread count; one row for each peer, all from one interleaved run.

    The first engine judges ingot's outputs: raises IngotError if it fails, DisagreementError if they differ.
    """
    names = engines(model, wanted)
    with contextlib.closing(ingot.load(so, threads=1)) as net:
        feeds = random_feeds(net.inputs, seed=0)
    errors: dict[str, str] = {}
    others: dict[str, Peer] = {}
    with contextlib.ExitStack() as running:

        def start(engine: str, path: Path) -> Peer:
            return running.enter_context(peers([(engine, path)], threads, [feeds], worker_of(engine)))[0]

        ours = start("ingot", so)
        found = outputs(ours)
        for name in names:
            try:
                peer = start(name, model)
                # Of quantised TFLite models, LiteRT's fast kernels round otherwise than the reference kernels.
                judge = start("litert-reference", model) if name == "litert" else peer
                errors[name] = "-" if name in OTHER_PRECISION else disagreement(found, outputs(judge), name)
                others[name] = peer
            except (RunError, DisagreementError) as error:
                if name == names[0]:
                    raise
                errors[name] = f"{error.found}" if isinstance(error, RunError) else str(error)
        interleave([ours, *others.values()], seconds)
    mine = statistics.median(ours.seconds) * 1e3
    rows = []
    for name in names:
        times = others[name].seconds if name in others else []
        theirs = statistics.median(times) * 1e3 if times else None
        rows.append(Row(model.stem, threads, name, mine, theirs, min(len(ours.seconds), len(times)), errors[name]))
    return rows


def default_models() -> list[Path]:
    """The architectures of make_models, written once under build/bench."""
    import make_models

    folder = REPO / "build" / "bench"
    paths = {name: folder / f"{name}.onnx" for name in make_models.MODELS}
    return [path if path.is_file() else make_models.write(name, folder) for name, path in paths.items()]


def machine() -> str:
    """The processor, its cores for this process, and the C library."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"{name}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, {' '.join(platform.libc_ver())}"


def version(engine: str) -> str:
    """The version of an engine's package."""
    if engine in OWN_PACKAGES:
        return OWN_PACKAGES[engine][0].partition("==")[2]
    return importlib.metadata.version(PACKAGES[engine])


def cells(row: Row) -> str:
    """One line of the table, without what Markdown would read as a column or a tag."""
    error = row.error.replace("|", "/").replace("<", "&lt;")
    if row.theirs is None:
        theirs, error = "- | -", f"no time: {error}"
    else:
        theirs = f"{row.theirs:.3g} | {row.ratio:.2f}"
    return f"| {row.model} | {row.threads} | {row.ours:.3g} | {row.peer} | {theirs} | {error} | {row.runs} |"


def without_folders(word: str) -> str:
    """A word of the command line; where files lie on this machine is nobody's concern."""
    return "=".join(Path(part).name if "/" in part else part for part in word.split("="))


def markdown(rows: list[Row], command: str, seconds: float) -> str:
    """The dated section for docs/benchmarks.md."""
    engines = sorted({row.peer for row in rows}, reverse=True)
    versions = ", ".join(f"{name} {version(name)}" for name in engines)
    lines = [
        f"## {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "",
        f"- machine: {machine()}",
        f"- versions: ingot {ingot.__version__}, {versions}, Python {platform.python_version()}",
        f"- command: `{command}`",
        f"- method: batch 1, seeded input, one interleaved run of {seconds:g} s an engine for each row, medians",
        "",
        "| model | threads | ingot, ms | peer | peer, ms | peer / ingot | max error | runs |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *map(cells, rows)]) + "\n"


def measure_all(models: list[Path], threads: list[int], seconds: float, wanted: Sequence[str] = ()) -> list[Row]:
    """Compile each model for this machine and time it; prints each row as it comes. Raises IngotError."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="ingot-bench-") as folder:
        for model in models:
            so = Path(folder) / "model.so"
            ingot.compile(model, target="native", selftest=False).save(so)
            for count in threads:
                for row in measure(model, so, count, seconds, wanted):
                    rows.append(row)
                    head = f"{row.model:<24} threads {count}  ingot {row.ours:8.3f} ms  {row.peer}"
                    if row.theirs is None:
                        print(f"{head}: no time: {row.error}", flush=True)
                    else:
                        print(f"{head} {row.theirs:8.3f} ms  ratio {row.ratio:5.2f}", flush=True)
    return rows


def main() -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="ingot next to ONNX Runtime or LiteRT",
        epilog="scripts/bench --int8 compares float32 models after quantisation; scripts/bench --int8 --help says how",
    )
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="ONNX or TFLite files")
    parser.add_argument("--threads", default="1,2", help="comma separated counts (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each engine for each row (default: 10)")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO too, in float32 and as it chooses")
    parser.add_argument("--iree", action="store_true", help="IREE too, in an environment of its own")
    parser.add_argument("--inductor", action="store_true", help="PyTorch's compiler too, in an environment of its own")
    parser.add_argument("--no-append", action="store_true", help=f"do not add the table to {PAGE.relative_to(REPO)}")
    args = parser.parse_args()
    if not all(word.isascii() and word.isdecimal() for word in args.threads.split(",")):
        parser.error(f"--threads takes numbers with commas between them, not {args.threads!r}")
    try:
        wanted = ["openvino", "openvino-default"] if args.openvino else []
        wanted += [name for name in OWN_PACKAGES if getattr(args, name, False)]
        counts = [int(n) for n in args.threads.split(",")]
        rows = measure_all(args.models or default_models(), counts, args.seconds, wanted)
    except ingot.IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except DisagreementError as error:
        print(error, file=sys.stderr)
        return 1
    if not args.no_append:
        command = shlex.join(["scripts/bench", *map(without_folders, sys.argv[1:])])
        PAGE.write_text(PAGE.read_text("utf-8").rstrip() + "\n\n" + markdown(rows, command, args.seconds), "utf-8")
        print(f"added to {PAGE.relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
