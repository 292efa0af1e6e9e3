"""Times compiled models next to the interpreter of their format and keeps the table.

usage: bench.py [MODEL ...] [--threads 1,2] [--seconds 10] [--openvino] [--no-append]

Each engine has a process of its own; they take turns on the same input, and those whose turn it is not are stopped
(`ingot bench --against` measures the same way). A time counts only if the outputs agree.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ingot
from ingot.cli.engines import PACKAGES
from ingot.cli.peers import Peer, distance, interleave, peers, random_feeds

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "benchmarks.md"
TOLERANCE = 1e-4  # of max|error| / max|reference|; quantised outputs may differ by one step


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


def disagreement(ours: list[np.ndarray[Any, Any]], theirs: list[np.ndarray[Any, Any]], peer: str) -> str:
    """Compare outputs; returns the largest relative error as text. Raises SystemExit if they do not agree."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.dtype.kind in "biu":
            steps = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0))
            if a.shape != b.shape or steps > 1:
                raise SystemExit(f"ingot and {peer} differ by {steps:.0f} steps: no time is worth printing")
        else:
            worst = max(worst, distance(a, b))
    if worst > TOLERANCE:
        raise SystemExit(f"ingot and {peer} differ by {worst:.1e} of the largest value: no time is worth printing")
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


def measure(model: Path, so: Path, threads: int, seconds: float, wanted: Sequence[str] = ()) -> list[Row]:
    """Time one model with one thread count; one row for each peer, all from one interleaved run."""
    names = engines(model, wanted)
    with contextlib.closing(ingot.load(so, threads=1)) as net:
        feeds = random_feeds(net.inputs, seed=0)
    # Of quantised TFLite models, LiteRT's fast kernels round otherwise than the reference kernels, which judge ours.
    judges = ["litert-reference"] if model.suffix == ".tflite" else []
    contestants = [("ingot", so), *((name, model) for name in (*names, *judges))]
    with peers(contestants, threads, [feeds] * len(contestants)) as (ours, *others):
        found = outputs(ours)
        references = others[len(names) :] or others
        others = others[: len(names)]
        # OpenVINO's own choice of precision is no reference for the values.
        errors = [
            "-" if n == "openvino-default" else disagreement(found, outputs(o), n)
            for n, o in zip(names, references, strict=True)
        ]
        interleave([ours, *others], seconds)
    mine = statistics.median(ours.seconds) * 1e3
    return [
        Row(model.stem, threads, n, mine, statistics.median(o.seconds) * 1e3, min(len(ours.seconds), len(o.seconds)), e)
        for n, o, e in zip(names, others, errors, strict=True)
    ]


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


def markdown(rows: list[Row], command: str, seconds: float) -> str:
    """The dated section for docs/benchmarks.md."""
    engines = sorted({row.peer for row in rows}, reverse=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(PACKAGES[name])}" for name in engines)
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
    lines += [
        f"| {r.model} | {r.threads} | {r.ours:.3g} | {r.peer} | {r.theirs:.3g} | {r.theirs / r.ours:.2f} "
        f"| {r.error} | {r.runs} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


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
                    print(
                        f"{row.model:<24} threads {count}  ingot {row.ours:8.3f} ms  {row.peer} {row.theirs:8.3f} ms  "
                        f"ratio {row.theirs / row.ours:5.2f}",
                        flush=True,
                    )
    return rows


def main() -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="ingot next to ONNX Runtime or LiteRT")
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="ONNX or TFLite files")
    parser.add_argument("--threads", default="1,2", help="comma separated counts (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each engine for each row (default: 10)")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO too, in float32 and as it chooses")
    parser.add_argument("--no-append", action="store_true", help=f"do not add the table to {PAGE.relative_to(REPO)}")
    args = parser.parse_args()
    if not all(word.isascii() and word.isdecimal() for word in args.threads.split(",")):
        parser.error(f"--threads takes numbers with commas between them, not {args.threads!r}")
    try:
        wanted = ("openvino", "openvino-default") if args.openvino else ()
        counts = [int(n) for n in args.threads.split(",")]
        rows = measure_all(args.models or default_models(), counts, args.seconds, wanted)
    except ingot.IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not args.no_append:
        files = {str(path): path.name for path in args.models}  # where they lie on this machine is nobody's concern
        command = shlex.join(["scripts/bench", *(files.get(word, word) for word in sys.argv[1:])])
        PAGE.write_text(PAGE.read_text("utf-8").rstrip() + "\n\n" + markdown(rows, command, args.seconds), "utf-8")
        print(f"added to {PAGE.relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
