"""Quantises float32 models with each engine's own tool, times the results side by side, and keeps the table.

usage: scripts/bench --int8 [MODEL ...] [--samples FOLDER] [--tflite MODEL=INT8.tflite] [--threads 1,2] [--seconds 10]

Of each model: ingot's quantisation after training (`--precision int8`), ingot's float32, ONNX Runtime's static
quantisation (QDQ, per channel), OpenVINO's after NNCF's, and LiteRT on a quantised TFLite model of the same net where
one is given. All calibrate on the same samples, and are judged on others: an engine whose outputs are no longer those
of the float32 model has no time. What the other tools make is kept in build/bench/int8.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import bench
import ingot
import quantisers
from ingot.cli.peers import WORKER, Peer, interleave, peers
from ingot.errors import InputError, RunError
from ingot.frontend import import_model
from ingot.packager.selftest import random_inputs
from ingot.target import load_target
from quantisers import Array, Samples

Feeds = dict[str, Array]
#: Samples to judge by; at most so many others calibrate.
JUDGED, CALIBRATING = 4, 64
#: Seeded samples that calibrate where no file has any.
SEEDED = 32
#: Of outputs with more noise than this, in decibels below the float32 model's, no time is printed.
LEAST_DB = 10.0
#: The peers, in the order of the table.
PEERS = ("onnxruntime", "openvino", "litert")


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in milliseconds, signal to noise in decibels; no time, and why, in `error`."""

    model: str
    threads: int
    ours: float
    single: float
    ours_db: float
    peer: str
    theirs: float | None = None
    peer_db: float | None = None
    runs: int = 0
    error: str = ""


@dataclass(frozen=True)
class Contestants:
    """One model, quantised: the files that the engines load, or why an engine has none."""

    int8: Path
    fp32: Path
    others: dict[str, Path | str]


def samples_of(model: Path, folder: Path | None) -> tuple[Samples, list[Feeds]]:
    """Return the samples that calibrate, and those that judge: the last of FOLDER/NAME.npz, or seeded ones.

    Raises InputError for a file with too few.
    """
    inputs = import_model(model).inputs
    path = None if folder is None else folder / f"{model.stem}.npz"
    if path is not None and path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            arrays = {spec.name: archive[spec.name] for spec in inputs if spec.name in archive.files}
        missing = [spec.name for spec in inputs if spec.name not in arrays]
        if missing:
            raise InputError("the samples lack an input", where=str(path), found=f"none for {', '.join(missing)}")
        every = [
            {s.name: arrays[s.name][i].reshape(s.shape) for s in inputs} for i in range(min(map(len, arrays.values())))
        ]
    else:
        every = [random_inputs(inputs, seed) for seed in range(SEEDED + JUDGED)]
    if len(every) <= JUDGED:
        raise InputError("too few samples", where=str(path), found=str(len(every)), allowed=f"more than {JUDGED}")
    calibrating = every[:-JUDGED][:CALIBRATING]
    return {s.name: np.stack([feeds[s.name] for feeds in calibrating]) for s in inputs}, every[-JUDGED:]


def kept(name: str, model: Path, samples: Samples, tool: str, make: Callable[[Path], object]) -> Path | str:
    """Return what `make` wrote into the file `name` for this model and these samples, now or before; or why not."""
    key = hashlib.sha256(model.read_bytes())
    key.update(
        "".join([tool, *(p.read_text("utf-8") for p in sorted(bench.REPO.glob("scripts/quantise*.py")))]).encode()
    )
    for sample_name, array in samples.items():
        key.update(sample_name.encode() + str(array.shape).encode() + array.tobytes())
    folder = bench.REPO / "build" / "bench" / "int8" / f"{model.stem}-{key.hexdigest()[:16]}"
    if not (folder / name).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            try:
                make(Path(made) / name)
            except Exception as error:  # whatever another tool raises is its result
                return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            folder.mkdir(exist_ok=True)
            for file in Path(made).iterdir():  # the model itself last, as it says that all is there
                if file.name != name:
                    file.replace(folder / file.name)
            (Path(made) / name).replace(folder / name)
    return folder / name


def quantised(model: Path, samples: Samples, folder: Path, tflite: Path | None) -> Contestants:
    """Quantise a model with each engine's tool; ingot's libraries lie in `folder`. Raises IngotError."""
    options: dict[str, Any] = {"target": "native", "selftest": False}
    fp32 = ingot.compile(model, **options).save(folder / "fp32.so")
    int8 = ingot.compile(model, precision="int8", calibrate=samples, **options).save(folder / "int8.so")
    # Without VNNI its 8-bit products saturate in 16 bits: its documentation says to use 7-bit weights then.
    narrow = platform.machine() == "x86_64" and not {"avx512vnni", "avxvnni"} & set(load_target("native").features)

    def onnxruntime(out: Path) -> None:
        quantisers.by_onnxruntime(model, samples, out, "MinMax", reduce_range=narrow)

    def nncf(out: Path) -> None:
        quantisers.by_nncf(str(bench.environment("nncf")), model, samples, out)

    others: dict[str, Path | str] = {
        "onnxruntime": kept("qdq.onnx", model, samples, f"{bench.version('onnxruntime')} {narrow}", onnxruntime),
        "openvino": kept("nncf.xml", model, samples, " ".join(bench.OWN_PACKAGES["nncf"]), nncf),
    }
    if tflite is not None:
        others["litert"] = tflite
    return Contestants(Path(int8), Path(fp32), others)


def answers(peer: Peer, judged: Sequence[Feeds]) -> Array:
    """Return all outputs of a stopped peer on these inputs, one after the other. It keeps the first input."""
    found = []
    for feeds in [*judged, judged[0]]:
        peer.turn(True)
        peer.feed(feeds)
        found.append(np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in peer.outputs()]))
        peer.turn(False)
    return np.concatenate(found[:-1])


def openvino() -> Sequence[str]:
    """Return the command of OpenVINO's process: that of NNCF's environment, which brought it."""
    return (str(bench.environment("nncf")), "-m", "ingot.cli.worker")


def noise(reference: Array, found: Array) -> float:
    """Return the signal to noise ratio in decibels; raises DisagreementError for other shapes and for noise alone."""
    db = quantisers.sqnr(reference, found) if reference.shape == found.shape else float("-inf")
    if not db >= LEAST_DB:
        raise bench.DisagreementError(f"outputs are not those of float32: {db:.1f} dB")
    return db


def measure(model: Path, made: Contestants, judged: Sequence[Feeds], threads: int, seconds: float) -> list[Row]:
    """Time one model's contestants with one thread count; one row for each peer, all from one interleaved run.

    Raises IngotError or DisagreementError where ingot's own outputs are not those of the float32 model.
    """
    rows: dict[str, Row] = {}
    others: dict[str, Peer] = {}
    with contextlib.ExitStack() as running:

        def start(engine: str, path: Path, feeds: Feeds = judged[0], worker: Sequence[str] = WORKER) -> Peer:
            return running.enter_context(peers([(engine, path)], threads, [feeds], worker))[0]

        with contextlib.ExitStack() as for_now:
            judge = "litert" if model.suffix == ".tflite" else "onnxruntime"
            reference = answers(for_now.enter_context(peers([(judge, model)], threads, [judged[0]]))[0], judged)
        single, ours = start("ingot", made.fp32), start("ingot", made.int8)
        bench.disagreement([answers(single, judged)], [reference], judge)
        empty = Row(model.stem, threads, 0.0, 0.0, noise(reference, answers(ours, judged)), "")
        for name, file in made.others.items():
            rows[name] = replace(empty, peer=name, error=file if isinstance(file, str) else "")
            if isinstance(file, str):
                continue
            try:
                if name == "litert":  # other weights, so other outputs: judged by its own reference kernels
                    feeds = tflite_feeds(file)
                    peer, exact = start(name, file, feeds), start("litert-reference", file, feeds)
                    noise(answers(exact, [feeds]), answers(peer, [feeds]))
                    db = float("nan")
                else:
                    peer = (
                        start("openvino-default", file, worker=openvino()) if name == "openvino" else start(name, file)
                    )
                    db = noise(reference, answers(peer, judged))
                others[name], rows[name] = peer, replace(rows[name], peer_db=db)
            except (RunError, bench.DisagreementError) as error:
                rows[name] = replace(rows[name], error=f"{error.found}" if isinstance(error, RunError) else str(error))
        interleave([ours, single, *others.values()], seconds)
    mine, floats = (statistics.median(peer.seconds) * 1e3 for peer in (ours, single))
    found = []
    for name, row in rows.items():
        times = others[name].seconds if name in others else []
        theirs = statistics.median(times) * 1e3 if times else None
        runs = min(len(ours.seconds), len(single.seconds), len(times))
        found.append(replace(row, ours=mine, single=floats, theirs=theirs, runs=runs))
    return found


def tflite_feeds(model: Path) -> Feeds:
    """Return seeded inputs of a TFLite model."""
    return random_inputs(import_model(model).inputs, seed=0)


def geometric_means(rows: Sequence[Row]) -> list[str]:
    """Return, for each thread count, the mean gains over the fastest peer of each model and over ingot's float32."""
    lines = []
    for threads in sorted({row.threads for row in rows}):
        best: dict[str, float] = {}
        gain: dict[str, float] = {}
        for row in (row for row in rows if row.threads == threads):
            gain[row.model] = row.single / row.ours
            if row.theirs is not None:
                best[row.model] = min(best.get(row.model, float("inf")), row.theirs / row.ours)
        text = f"float32 / int8 of ingot {statistics.geometric_mean(gain.values()):.2f}"
        if best:
            text = f"fastest peer / ingot {statistics.geometric_mean(best.values()):.2f}, {text}"
        lines.append(f"- {threads} thread{'s' if threads > 1 else ''}, geometric means: {text}")
    return lines


def cells(row: Row) -> str:
    """Return one line of the table, without what Markdown would read as a column or a tag."""
    head = f"| {row.model} | {row.threads} | {row.ours:.3g} | {row.single:.3g} | {row.single / row.ours:.2f}"
    if row.theirs is None or row.peer_db is None:
        error = row.error.replace("|", "/").replace("<", "&lt;")
        return f"{head} | {row.peer} | - | - | {row.ours_db:.1f} | no time: {error} | 0 |"
    peer_db = "-" if np.isnan(row.peer_db) else f"{row.peer_db:.1f}"
    times = f"{row.theirs:.3g} | {row.theirs / row.ours:.2f}"
    return f"{head} | {row.peer} | {times} | {row.ours_db:.1f} | {peer_db} | {row.runs} |"


def markdown(rows: list[Row], command: str, seconds: float) -> str:
    """Return the dated section for docs/benchmarks.md."""
    names = [name for name in PEERS if any(row.peer == name for row in rows)]
    versions = ", ".join(
        " and ".join(bench.OWN_PACKAGES["nncf"]).replace("==", " ") if n == "openvino" else f"{n} {bench.version(n)}"
        for n in names
    )
    lines = [
        f"## {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, quantised by each engine's own tool",
        "",
        f"- machine: {bench.machine()}",
        f"- versions: ingot {ingot.__version__}, {versions}, Python {platform.python_version()}",
        f"- command: `{command}`",
        f"- method: batch 1, one interleaved run of {seconds:g} s an engine for each row, medians; the same samples "
        f"calibrate all, {JUDGED} others judge: signal to noise of the outputs against float32",
        *geometric_means(rows),
        "",
        "| model | threads | ingot int8, ms | ingot float32, ms | float32 / int8 | peer | peer, ms | peer / ingot "
        "| ingot, dB | peer, dB | runs |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *map(cells, rows)]) + "\n"


def measure_all(
    models: Sequence[Path], tflite: dict[str, Path], folder: Path | None, threads: Sequence[int], seconds: float
) -> list[Row]:
    """Quantise and time each model; prints each row as it comes. Raises IngotError or DisagreementError."""
    rows = []
    for model in models:
        samples, judged = samples_of(model, folder)
        with tempfile.TemporaryDirectory(prefix="ingot-bench-") as made:
            contestants = quantised(model, samples, Path(made), tflite.get(model.name))
            for count in threads:
                for row in measure(model, contestants, judged, count, seconds):
                    rows.append(row)
                    print(cells(row), flush=True)
    return rows


def pairs(words: Sequence[str], models: Sequence[Path]) -> dict[str, Path]:
    """Return the TFLite files by the models' file names, of MODEL=FILE each. Raises InputError."""
    found = {}
    for word in words:
        name, _, file = word.partition("=")
        if Path(name).name not in {model.name for model in models} or not Path(file).is_file():
            allowed = "MODEL=INT8.tflite, a model that is timed and a file that exists"
            raise InputError("--tflite does not name a model and its file", found=word, allowed=allowed)
        found[Path(name).name] = Path(file)
    return found


def main() -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench --int8", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="float32 ONNX or TFLite files")
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help="NAME.npz of each model: its inputs, by name")
    parser.add_argument(
        "--tflite", action="append", default=[], metavar="MODEL=FILE", help="a quantised TFLite model of the same net"
    )
    parser.add_argument("--threads", default="1,2", help="comma separated counts (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each engine for each row (default: 10)")
    parser.add_argument("--no-append", action="store_true", help="do not add the table to docs/benchmarks.md")
    arguments = [word for word in sys.argv[1:] if word != "--int8"]
    args = parser.parse_args(arguments)
    if not all(word.isascii() and word.isdecimal() for word in args.threads.split(",")):
        parser.error(f"--threads takes numbers with commas between them, not {args.threads!r}")
    try:
        models = args.models or bench.default_models()
        files = pairs(args.tflite, models)
        rows = measure_all(models, files, args.samples, [int(n) for n in args.threads.split(",")], args.seconds)
    except (ingot.IngotError, bench.DisagreementError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, ingot.IngotError) else 1
    if not args.no_append:
        words = ["scripts/bench", "--int8", *map(bench.without_folders, arguments)]
        page = bench.PAGE.read_text("utf-8").rstrip()
        bench.PAGE.write_text(f"{page}\n\n{markdown(rows, shlex.join(words), args.seconds)}", "utf-8")
        print(f"added to {bench.PAGE.relative_to(bench.REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
