"""Times single layers of random shapes next to ONNX Runtime, on one thread, and prints the worst of each family.

usage: bench_layers.py [--families conv,softmax,...] [--count 50] [--seed 0] [--seconds 0.3] [--worst 3] [--keep FILE]
                       [--write]

Shapes are drawn from the seed, and the same ones each time. Both engines run in this process, in turn, on the same
input; their processor time is compared, which on one thread is the time, whatever else the machine does. A time counts
only if the outputs agree. A layer that comes out slow is measured again, for longer, before it counts. --keep appends
each layer's times to a file, and takes those there from it: a run that was ended early goes on. --write puts the
families that were measured into docs/layers.md and leaves the others there.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import ingot
from bench import machine
from ingot.cli.engines import ENGINES, Runner
from ingot.cli.peers import distance, random_feeds

PAGE = Path(__file__).resolve().parent.parent / "docs" / "layers.md"
#: Layers slower than this, as a ratio of times, are counted on the page.
SLOW = 0.7
#: Layers slower than this are measured again, so many times as long.
DOUBTFUL, AGAIN = 0.9, 5
#: mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
TOLERANCE = 1e-4  # of max|error| / max|reference|
#: Layers that take less would measure the call.
SMALLEST_WORK = 200_000


@dataclass
class Layer:
    """One layer as a small ONNX graph; `work` is about how many operations it takes."""

    text: str
    work: int
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)

    def node(self, kind: str, operands: list[str], **attributes: Any) -> str:  # noqa: ANN401 - what ONNX takes
        """Add a node; returns its result's name."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, operands, [name], **attributes))
        return name

    def weight(self, value: np.ndarray[Any, Any]) -> str:
        """Add a constant; returns its name."""
        self.weights[f"w{len(self.weights)}"] = value
        return f"w{len(self.weights) - 1}"

    def save(self, path: Path) -> None:
        """Write the model; its output is the last node's."""
        graph = helper.make_graph(
            self.nodes,
            "layer",
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in self.inputs.items()],
            [onnx.ValueInfoProto(name=self.nodes[-1].output[0])],
            [numpy_helper.from_array(v, n) for n, v in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.save(inferred, path)


Draw = np.random.Generator
CHANNELS = (3, 8, 12, 16, 20, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512)
SIZES = (5, 7, 10, 13, 14, 19, 20, 26, 28, 35, 40, 52, 56, 65, 80, 104, 112)
LENGTHS = (16, 33, 64, 100, 128, 197, 256, 384, 500, 768, 1000, 1536, 2048)


def _one(draw: Draw, values: tuple[int, ...]) -> int:
    return int(draw.choice(values))


def _normal(draw: Draw, *shape: int) -> np.ndarray[Any, Any]:
    return draw.standard_normal(shape).astype(np.float32)


def _image(draw: Draw, most: int = 512) -> tuple[int, int, int]:
    return _one(draw, tuple(c for c in CHANNELS if c <= most)), _one(draw, SIZES), _one(draw, SIZES)


def _convolution(draw: Draw, kernel: int, stride: int, groups: bool, least: int = 3) -> Layer:
    ci, h, w = _image(draw)
    ci = max(ci, least)
    co = ci if groups else _one(draw, CHANNELS)
    pad = kernel // 2
    work = (h // stride) * (w // stride) * co * kernel * kernel * (1 if groups else ci)
    kind = "depthwise " if groups else ""
    layer = Layer(f"{kind}{ci}x{h}x{w} to {co}, {kernel}x{kernel} stride {stride}", work, {"x": (1, ci, h, w)})
    weight = layer.weight(_normal(draw, co, 1 if groups else ci, kernel, kernel) / np.float32(kernel))
    options = {"strides": [stride] * 2, "pads": [pad] * 4, "group": ci if groups else 1}
    value = layer.node("Conv", ["x", weight, layer.weight(_normal(draw, co))], **options)
    layer.node("Relu", [value])
    return layer


def conv(draw: Draw) -> Layer:
    """A convolution with a window of 3 to 7 and stride 1 or 2."""
    return _convolution(draw, _one(draw, (3, 5, 7)), _one(draw, (1, 2, 2)), False)


def pointwise(draw: Draw) -> Layer:
    """A 1x1 convolution."""
    return _convolution(draw, 1, _one(draw, (1, 1, 1, 2)), False, 8)


def depthwise(draw: Draw) -> Layer:
    """A depthwise convolution."""
    return _convolution(draw, _one(draw, (3, 3, 5)), _one(draw, (1, 2)), True, 8)


def winograd(draw: Draw) -> Layer:
    """A 3x3 convolution of stride 1."""
    return _convolution(draw, 3, 1, False, 16)


def matmul(draw: Draw) -> Layer:
    """A product with a constant matrix, and its bias."""
    m, k, n = _one(draw, (1, 2, 7, 16, 49, 64, 100, 128, 197, 256)), _one(draw, LENGTHS[2:]), _one(draw, LENGTHS)
    layer = Layer(f"{m}x{k} by {k}x{n}", m * k * n, {"x": (m, k)})
    product = layer.node("MatMul", ["x", layer.weight(_normal(draw, k, n))])
    layer.node("Add", [product, layer.weight(_normal(draw, n))])
    return layer


def attention(draw: Draw) -> Layer:
    """Scaled dot-product attention of computed queries, keys and values."""
    heads, length, width = _one(draw, (1, 4, 8, 12)), _one(draw, (16, 49, 64, 128, 197, 256)), _one(draw, (16, 32, 64))
    shape = (1, heads, length, width)
    layer = Layer(
        f"{heads} heads, {length} x {width}", 2 * heads * length * length * width, dict.fromkeys("qkv", shape)
    )
    scores = layer.node("MatMul", ["q", layer.node("Transpose", ["k"], perm=[0, 1, 3, 2])])
    scaled = layer.node("Mul", [scores, layer.weight(np.float32(width**-0.5))])
    layer.node("MatMul", [layer.node("Softmax", [scaled], axis=-1), "v"])
    return layer


def pooling(draw: Draw) -> Layer:
    """Maximum or average pooling, over a window or all of the image."""
    c, h, w = _image(draw)
    kind = str(draw.choice(["MaxPool", "AveragePool", "GlobalAveragePool"]))
    kernel, stride = _one(draw, (2, 3)), _one(draw, (1, 2))
    window = kind != "GlobalAveragePool"
    text = f"{kind} {c}x{h}x{w}" + (f", {kernel}x{kernel} stride {stride}" if window else "")
    layer = Layer(text, c * h * w * (kernel**2 if window else 1), {"x": (1, c, h, w)})
    options = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4} if window else {}
    layer.node(kind, ["x"], **options)
    return layer


def softmax(draw: Draw) -> Layer:
    """Softmax or layer norm over the last axis."""
    rows, length = _one(draw, (1, 16, 64, 128, 512)), _one(draw, LENGTHS)
    kind = str(draw.choice(["Softmax", "LayerNormalization"]))
    layer = Layer(f"{kind} {rows}x{length}", 8 * rows * length, {"x": (1, rows, length)})
    scales = [layer.weight(_normal(draw, length)) for _ in range(2)] if kind != "Softmax" else []
    layer.node(kind, ["x", *scales], axis=-1)
    return layer


def reduction(draw: Draw) -> Layer:
    """A mean, maximum or sum of squares over one or two axes."""
    shape = (1, _one(draw, (8, 32, 64)), _one(draw, (16, 49, 128)), _one(draw, LENGTHS[:8]))
    kind = str(draw.choice(["ReduceMean", "ReduceMax", "ReduceL2"]))
    axes = [[1], [2], [3], [2, 3], [1, 2]][int(draw.integers(5))]
    layer = Layer(f"{kind} {'x'.join(map(str, shape))} over {axes}", int(np.prod(shape)), {"x": shape})
    layer.node(kind, ["x"], axes=axes, keepdims=1)
    return layer


def resize(draw: Draw) -> Layer:
    """Nearest or bilinear resize by a whole factor."""
    c, h, w = _image(draw, 256)
    factor, mode = _one(draw, (2, 3)), str(draw.choice(["nearest", "linear"]))
    layer = Layer(f"{mode} {c}x{h}x{w} by {factor}", c * h * w * factor**2, {"x": (1, c, h, w)})
    scales = layer.weight(np.array([1, 1, factor, factor], np.float32))
    layer.node(
        "Resize", ["x", "", scales], mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    return layer


def elementwise(draw: Draw) -> Layer:
    """A chain of elementwise operators."""
    c, h, w = _image(draw, 256)
    kinds = [str(k) for k in draw.choice(["Relu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Exp", "Add", "Mul"], 3)]
    layer = Layer(f"{'+'.join(kinds)} {c}x{h}x{w}", 4 * c * h * w, {"x": (1, c, h, w)})
    value, low, high = "x", layer.weight(np.float32(-3)), layer.weight(np.float32(3))
    for kind in kinds:
        if kind in ("Add", "Mul"):
            value = layer.node(kind, [value, layer.weight(_normal(draw, 1, c, 1, 1))])
        else:
            value = layer.node(kind, [layer.node("Clip", [value, low, high])])
    return layer


def gather(draw: Draw) -> Layer:
    """Rows of a table by constant indices, as many as a long sentence."""
    rows, length, count = _one(draw, (100, 1000)), _one(draw, LENGTHS), _one(draw, (128, 512, 1024))
    layer = Layer(f"{count} of {rows}x{length}", 4 * count * length, {"x": (rows, length)})
    layer.node("Gather", ["x", layer.weight(draw.integers(0, rows, count))], axis=0)
    return layer


def movement(draw: Draw) -> Layer:
    """A transpose or a concatenation."""
    c, h, w = _image(draw, 256)
    if draw.integers(2):
        perm = [[0, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1, 3], [0, 1, 3, 2]][int(draw.integers(4))]
        layer = Layer(f"transpose {c}x{h}x{w} {perm}", 4 * c * h * w, {"x": (1, c, h, w)})
        layer.node("Transpose", ["x"], perm=perm)
    else:
        other = _one(draw, CHANNELS)
        inputs: dict[str, tuple[int, ...]] = {"x": (1, c, h, w), "y": (1, other, h, w)}
        layer = Layer(f"concat {c}+{other} x{h}x{w}", 4 * (c + other) * h * w, inputs)
        layer.node("Concat", ["x", "y"], axis=1)
    return layer


_HEAVY = (conv, pointwise, depthwise, winograd, matmul, attention)
_LIGHT = (pooling, softmax, reduction, resize, elementwise, gather, movement)
FAMILIES: dict[str, Callable[[Draw], Layer]] = {family.__name__: family for family in (*_HEAVY, *_LIGHT)}


def layers(family: str, count: int, seed: int) -> list[Layer]:
    """The first `count` layers of a family that take long enough to measure, and not for ever."""
    draw = np.random.default_rng([seed, list(FAMILIES).index(family)])
    found: list[Layer] = []
    while len(found) < count:
        layer = FAMILIES[family](draw)
        if SMALLEST_WORK <= layer.work <= 1000 * SMALLEST_WORK:
            found.append(layer)
    return found


def processor_time(run: Runner, repeats: int) -> float:
    """Seconds of processor time of one run: the mean of `repeats`."""
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats


def compare(layer: Layer, folder: Path, seconds: float) -> tuple[float, float]:
    """Microseconds of ingot and of ONNX Runtime. Raises SystemExit if their outputs differ."""
    model, so = folder / "layer.onnx", folder / "layer.so"
    layer.save(model)
    ingot.compile(model, target="native", selftest=False).save(so)
    with ingot.load(so, threads=1) as net:
        feeds = random_feeds(net.inputs, seed=0)
    runners = [ENGINES[name](path, 1, feeds)() for name, path in (("ingot", so), ("onnxruntime", model))]
    (mine,), (theirs,) = (run() for run in runners)
    if (error := distance(mine, theirs)) > TOLERANCE:
        raise SystemExit(f"{layer.text}: outputs differ by {error:.1e} of the largest value")
    ours, other = measure(runners, seconds)
    return (ours, other) if other >= DOUBTFUL * ours else measure(runners, AGAIN * seconds)


def measure(runners: list[Runner], seconds: float) -> tuple[float, float]:
    """Microseconds of processor time of one run of each of two runners, which take turns: medians."""
    repeats = [max(1, int(0.01 / max(processor_time(run, 3), 1e-6))) for run in runners]
    times: list[list[float]] = [[], []]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < 5:
        for found, run, count in zip(times, runners, repeats, strict=True):
            found.append(processor_time(run, count))
    ours, other = (statistics.median(found) * 1e6 for found in times)
    return ours, other


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: else the heap's state decides which engine pays for the pages of results."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most it takes


class Kept:
    """Times of layers in a file of JSON lines, appended as they are measured; without a file, none are kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path is not None and path.is_file() else []
        self.times: dict[str, tuple[float, float]] = {}
        for line in lines:
            row = json.loads(line)
            self.times[row["layer"]] = row["ingot"], row["onnxruntime"]

    def get(self, layer: str, measured: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Return the times of a layer, measured now if they are not in the file."""
        if layer not in self.times:
            self.times[layer] = ours, theirs = measured()
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"layer": layer, "ingot": ours, "onnxruntime": theirs}) + "\n")
        return self.times[layer]


HEAD = """# Layers

Written by `scripts/bench_layers --write`: single layers of random shapes next to ONNX Runtime, each as a model of its
own in NCHW, on one thread; ratios of processor times, ONNX Runtime's by ingot's, so that more is better.

| family | shapes | geometric mean | below 0.7 | worst | the worst layer | measured |
|---|---:|---:|---:|---:|---|---|
"""


def summary(family: str, rows: list[tuple[float, float, float, str]], command: str) -> str:
    """The line of one family for the page; `rows` are sorted."""
    ratios = [row[0] for row in rows]
    slow, (worst, _, _, text) = sum(ratio < SLOW for ratio in ratios), rows[0]
    when = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {machine()}, `{command}`"
    mean = statistics.geometric_mean(ratios)
    return f"| {family} | {len(rows)} | {mean:.2f} | {slow} | {worst:.2f} | {text} | {when} |"


def write(found: dict[str, str]) -> None:
    """Put the lines of the families into the page."""
    old = PAGE.read_text("utf-8").splitlines() if PAGE.is_file() else []
    lines = {line.split("|")[1].strip(): line for line in old if line.startswith("| ")} | found
    PAGE.write_text(HEAD + "".join(lines[name] + "\n" for name in FAMILIES if name in lines), "utf-8")


def main() -> int:
    """Measure and report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench_layers", description="single layers next to ONNX Runtime")
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--count", type=int, default=50, help="shapes of each family (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the shapes (default: 0)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring for each shape (default: 0.3)")
    parser.add_argument("--worst", type=int, default=3, help="how many to print of each family (default: 3)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of times: append to it, measure what is not in it")
    parser.add_argument("--write", action="store_true", help=f"these families into docs/{PAGE.name}")
    args = parser.parse_args()
    wanted = args.families.split(",")
    if unknown := [name for name in wanted if name not in FAMILIES]:
        parser.error(f"there is no family {unknown[0]!r}: {', '.join(FAMILIES)}")
    keep_freed_memory()
    kept = Kept(args.keep)
    print(f"{'family':<12} {'ratio':>6} {'ingot, us':>10} {'ONNX Runtime, us':>17}  layer")
    try:
        with tempfile.TemporaryDirectory(prefix="ingot-layers-") as folder:
            for name in wanted:
                rows = []
                for i, layer in enumerate(layers(name, args.count, args.seed)):
                    place = Path(folder) / f"{name}{i}"
                    place.mkdir()
                    key = f"{name} {args.seed} {i}: {layer.text}"
                    ours, theirs = kept.get(key, functools.partial(compare, layer, place, args.seconds))
                    rows.append((theirs / ours, ours, theirs, layer.text))
                rows.sort()
                for ratio, ours, theirs, text in rows[: args.worst]:
                    print(f"{name:<12} {ratio:6.2f} {ours:10.0f} {theirs:17.0f}  {text}")
                mean = statistics.geometric_mean([row[0] for row in rows])
                print(f"{name:<12} {mean:6.2f} {'':>10} {'':>17}  geometric mean of {len(rows)}", flush=True)
                if args.write:
                    command = f"scripts/bench_layers --families {name} --count {args.count} --seed {args.seed}"
                    write({name: summary(name, rows, f"{command} --seconds {args.seconds:g} --write")})
    except ingot.IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
