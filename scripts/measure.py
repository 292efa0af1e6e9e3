"""Measures what compiled models cost besides speed: size, memory, compile time, and the way to the first answer.

usage: measure.py [MODEL ...] [--no-write]

Every compile runs in a process of its own with empty caches. First answers are measured interleaved: each round starts
every contestant once, on the same input, and the median of the rounds is printed. Files are cached, and bytecode is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import py_compile
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ingot.packager.elf import Elf
from ingot.runtime.loader import read_metadata

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "measurements.md"
FIRST_ANSWER_MODEL = "mobilenet_v2_onnx_fp32/mobilenet_v2_1.0_224.onnx"
MODELS = (
    "squeezenet_fp32/squeezenet_fp32.onnx",
    "mobilenet_v1_025_fp32/mobilenet_v1_0.25_224.tflite",
    "mobilenet_v1_025_uint8/mobilenet_v1_0.25_224_quant.tflite",
    "mobilenet_v2_uint8/mobilenet_v2_1.0_224_quant.tflite",
    "mobilenet_v2_onnx_fp32/mobilenet_v2_1.0_224.onnx",
    "mobilenet_v2_ptq_int8/tf2_mobilenet_v2_1.0_224_ptq.tflite",
    "squeezenet_int8_qdq/squeezenet_int8_qdq.onnx",
    "mnist_cnn/mnist.onnx",
    "mlperf_tiny_kws/kws_ref_model_int8.tflite",
    "mlperf_tiny_vww/vww_96_float.tflite",
    "mlperf_tiny_vww/vww_96_int8.tflite",
    "mlperf_tiny_ic_resnet8/resnet8_float.onnx",
    "mlperf_tiny_ic_resnet8/resnet8_int8.tflite",
    "mlperf_tiny_ad/ad01_fp32.tflite",
    "mlperf_tiny_ad/ad01_int8.tflite",
    "ultraface_rfb320/version-RFB-320_simplified.onnx",
    "yolox_nano/yolox_nano.onnx",
    "deeplabv3_fp32/deeplabv3.tflite",
    "hand_keypoint_mlp/keypoint_classifier.tflite",
    "iris_mlp/network.onnx",
    "stories260k/stories260k_static64.onnx",
)
ROUNDS = 9

COMPILE = """
import sys, time, json
began = time.perf_counter()
import ingot
artifact = ingot.compile(sys.argv[1], target="native", selftest=False)
artifact.save(sys.argv[2])
labels = [line for line in artifact.entry_c.splitlines() if line.startswith("/* ")]
transposes = sum("transpose" in label for label in labels)
print(json.dumps({"seconds": time.perf_counter() - began, "transposes": transposes}))
"""

# Each prints: seconds to load, seconds of the first run, resident bytes gained by loading and running once.
CONTESTANTS = {
    "Python and numpy alone": """
import numpy
print(0, 0, 0)
""",
    "ingot, Python loader": """
import sys, time
sys.path.insert(0, sys.argv[3])
import numpy, loader
x = numpy.load(sys.argv[2])
before = rss()
a = time.perf_counter(); model = loader.load(sys.argv[1], threads=1)
b = time.perf_counter(); model(x)
print(b - a, time.perf_counter() - b, rss() - before)
""",
    "ONNX Runtime": """
import sys, time
import numpy
x = numpy.load(sys.argv[2])
before = rss()
import onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1
a = time.perf_counter(); session = onnxruntime.InferenceSession(sys.argv[1], options)
b = time.perf_counter(); session.run(None, {session.get_inputs()[0].name: x})
print(b - a, time.perf_counter() - b, rss() - before)
""",
    "LiteRT": """
import sys, time
import numpy
x = numpy.load(sys.argv[2])
before = rss()
from ai_edge_litert.interpreter import Interpreter
a = time.perf_counter(); session = Interpreter(sys.argv[1], num_threads=1); session.allocate_tensors()
b = time.perf_counter()
session.set_tensor(session.get_input_details()[0]["index"], x); session.invoke()
print(b - a, time.perf_counter() - b, rss() - before)
""",
}
RSS = """
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
"""

C_MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include "model.h"
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static long rss(void) {
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%*d %ld", &pages) != 1) pages = 0;
    if (f) fclose(f);
    return pages * 4096;
}
static ingot_tensor zeros(const ingot_tensor_info *info) {
    const ingot_tensor t = {calloc(1, info->bytes), info->bytes, info->dtype, info->ndim, info->shape, INGOT_CPU, 0};
    return t;
}
int main(void) {
    const ingot_api *api = MODEL_API();
    const ingot_model_info *info;
    api->describe(&info);
    const ingot_tensor in = zeros(info->inputs), out = zeros(info->outputs);
    const ingot_options options = {.struct_size = sizeof options, .threads = 1};
    ingot_model *m;
    const long before = rss();
    const double a = now();
    if (api->create(&options, &m)) return 1;
    const double b = now();
    if (api->run(m, &in, 1, &out, 1)) return 2;
    printf("%.6f %.6f %ld\\n", b - a, now() - b, rss() - before);
    return 0;
}
"""


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a command and return what it prints; ends the program with its last words if it fails."""
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def section_bytes(elf: Elf, name: str) -> int:
    """Return the size of a section, 0 if there is none."""
    section = elf.section(name)
    return 0 if section is None else section.size


def artifact_row(model: Path, folder: Path) -> str:
    """Compile one model cold and return its line of the table."""
    library = folder / (model.stem.replace(".", "_") + ".so")
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {"XDG_CACHE_HOME": str(cache), "ZIG_GLOBAL_CACHE_DIR": str(cache / "zig")}
    facts = json.loads(run([sys.executable, "-c", COMPILE, str(model), str(library)], environment).splitlines()[-1])
    metadata, elf = read_metadata(str(library)), Elf(library.read_bytes(), str(library))
    peak = metadata["source"]["peak_bytes"]
    beyond = library.stat().st_size - metadata["weights_bytes"]
    ratio = f"{metadata['arena_bytes'] / peak:.2f}" if peak else "-"
    return (
        f"| {model.stem} | {facts['seconds']:.1f} | {metadata['weights_bytes'] / 1024:.0f} | {beyond / 1024:.0f} | "
        f"{section_bytes(elf, '.text') / 1024:.0f} | {metadata['arena_bytes'] / 1024:.0f} | {ratio} | "
        f"{metadata['kernels']} / {metadata['steps']} | {facts['transposes']} | {' '.join(elf.needed)} |"
    )


def first_answer_rows(model: Path, folder: Path) -> list[str]:
    """Measure the way from a process's start to its first answer, interleaved, and return the table's lines."""
    import ingot
    from ingot.cli.peers import random_feeds

    artifact = ingot.compile(str(model), selftest=False)
    library = artifact.save(folder / "first.so")
    (folder / "model.h").write_text(str(artifact.emit("c-header")))
    (folder / "main.c").write_text(C_MAIN.replace("MODEL_API", f"ingot_{artifact.name}_api"))
    compiler = shutil.which("cc") or shutil.which("gcc")
    model_input = folder / "x.npy"
    feeds = random_feeds(ingot.load(library).inputs, seed=1)
    np.save(model_input, next(iter(feeds.values())))
    # The loader lies next to the artifact, with the bytecode that Python leaves there at its first import, as numpy's.
    loader = shutil.copy(Path(ingot.runtime.loader.__file__), folder / "loader.py")
    py_compile.compile(str(loader), doraise=True)
    commands: dict[str, list[str]] = {}
    for name, text in CONTESTANTS.items():
        if {"LiteRT": ".tflite", "ONNX Runtime": ".onnx"}.get(name, model.suffix) != model.suffix:
            continue
        what = str(library) if name.startswith("ingot") else str(model)
        commands[name] = [sys.executable, "-c", RSS + text, what, str(model_input), str(folder)]
    if compiler is not None:
        program = folder / "first"
        run([compiler, "-O1", str(folder / "main.c"), str(library), "-Wl,-rpath,$ORIGIN", "-o", str(program)])
        commands["ingot, C program"] = [str(program)]
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            began = time.perf_counter()
            output = run(command)
            total = time.perf_counter() - began
            times[name].append((total, *(float(word) for word in output.split())))
    rows = []
    for name, samples in times.items():
        total, load, first, memory = (statistics.median(column) for column in zip(*samples, strict=True))
        rows.append(f"| {name} | {total * 1e3:.1f} | {load * 1e3:.2f} | {first * 1e3:.2f} | {memory / 2**20:.1f} |")
    return rows


def machine() -> str:
    """Name this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def default_models() -> tuple[list[Path], Path | None]:
    """Return the models to measure and the one whose first answer is timed."""
    shared = Path(os.environ.get("INGOT_MODELS", REPO.parent / "shared" / "models"))
    if not shared.is_dir():
        return [], None
    return [shared / name for name in MODELS if (shared / name).exists()], shared / FIRST_ANSWER_MODEL


def main() -> int:
    """Measure and print; write the page unless told not to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments: Any = parser.parse_args()
    models, first = (arguments.models, arguments.models[0]) if arguments.models else default_models()
    if not models:
        sys.exit("no models: name some, or set INGOT_MODELS to the folder of the shared models")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Measurements",
        "",
        f"Written by `scripts/measure` on {today}: {machine()}. Compile times are of a cold process with empty caches.",
        "",
        "| model | compile s | weights KiB | .so beyond weights KiB | .text KiB | arena KiB | arena / source's peak | "
        "kernels / steps | transposes | needs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="ingot-") as name:
        folder = Path(name)
        for model in models:
            row = artifact_row(model, folder)
            print(row, flush=True)
            lines.append(row)
        if first is not None and first.exists():
            lines += [
                "",
                f"## First answer: {first.stem}",
                "",
                f"One thread, medians of {ROUNDS} interleaved rounds, files and bytecode cached. RSS: what loading and "
                "one run add.",
                "",
                "| | start to answer ms | open + create ms | first run ms | RSS MiB |",
                "|---|---:|---:|---:|---:|",
                *first_answer_rows(first, folder),
            ]
    text = "\n".join(lines) + "\n"
    print(text)
    if not arguments.no_write:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
