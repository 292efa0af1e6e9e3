"""Random ONNX graphs of 2 to 20 operators, through the whole compiler against ONNX Runtime.

Values are compared relative to the largest of an output. Operators whose result jumps (comparisons, ArgMax, rounding to
integers) are only given values that both sides compute exactly, so any difference is a bug.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

TOLERANCE = 2e-4
_MAX_ELEMENTS = 20_000
Shape = tuple[int, ...]


@dataclass
class Graph:
    """A graph in the making: float32 tensors by name with their shapes, and which of them are exact."""

    rng: random.Random
    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    count: int = 0

    def name(self) -> str:
        """A new tensor name."""
        self.count += 1
        return f"t{self.count}"

    def weight(self, value: np.ndarray) -> str:
        """A constant of the model."""
        name = self.name()
        self.weights[name] = value
        return name

    def normal(self, *shape: int) -> str:
        """A float32 constant."""
        generator = np.random.default_rng(self.rng.randrange(2**31))
        return self.weight((generator.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32))

    def add(
        self, op: str, inputs: Sequence[str], shape: Shape | None, *, exact: bool = False, **attributes: Any
    ) -> str:
        """One node; `shape` None leaves its result (not float32) out of what later nodes may take."""
        name = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        if shape is not None:
            self.shapes[name] = shape
            if exact:
                self.exact.add(name)
        return name

    def take(self, rank: int | None = None, *, exact: bool = False) -> str | None:
        """Some tensor, of this rank, that is exact."""
        fitting = [
            name
            for name, shape in self.shapes.items()
            if (rank is None or len(shape) == rank) and (not exact or name in self.exact)
        ]
        return self.rng.choice(fitting[-4:]) if fitting else None


def _unary(g: Graph) -> None:
    x = g.take()
    op = g.rng.choice(
        ["Relu", "Sigmoid", "Tanh", "Abs", "Neg", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus", "Erf",
         "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Softsign", "Selu", "Clip", "Exp", "Sqrt", "Reciprocal"]
    )  # fmt: skip
    if op in ("Floor", "Ceil", "Round", "Sign"):
        x = g.take(exact=True)
    if x is None:
        return
    shape, exact = g.shapes[x], op in ("Relu", "Abs", "Neg") and x in g.exact
    if op in ("Sqrt", "Reciprocal"):
        x = g.add("Add", [g.add("Abs", [x], shape), g.weight(np.float32(0.5).reshape(()))], shape)
    if op in ("Exp", "Sin", "Cos"):
        x = g.add("Tanh", [x], shape)
    inputs = [x]
    if op == "Clip":
        inputs += [g.weight(np.array(-0.5, np.float32)), g.weight(np.array(1.5, np.float32))]
    g.add(op, inputs, shape, exact=exact)


def _binary(g: Graph) -> None:
    x = g.take()
    if x is None:
        return
    shape = g.shapes[x]
    partners = [name for name, other in g.shapes.items() if other == shape]
    if g.rng.random() < 0.5 or not partners:
        cut = g.rng.randrange(len(shape) + 1)
        y = g.normal(*(size if g.rng.random() < 0.5 else 1 for size in shape[cut:]))
    else:
        y = g.rng.choice(partners)
    g.add(g.rng.choice(["Add", "Sub", "Mul", "Max", "Min"]), g.rng.sample([x, y], 2), shape)


def _compare(g: Graph) -> None:
    x = g.take(exact=True)
    if x is None:
        return
    shape = g.shapes[x]
    test = g.add(g.rng.choice(["Greater", "Less", "GreaterOrEqual", "Equal"]), [x, g.normal(*shape)], None)
    if g.rng.random() < 0.3:
        test = g.add("Not", [test], None)
    g.add("Where", [test, x, g.normal(*shape[-1:])], shape)


def _conv(g: Graph) -> None:
    x = g.take(4)
    if x is None:
        return
    batch, channels, *size = g.shapes[x]
    groups = g.rng.choice([d for d in (1, 1, 2, channels) if channels % d == 0])
    filters = groups * g.rng.choice([1, 2, 3, 5, 8])
    kernel = [g.rng.randint(1, min(3, s)) for s in size]
    dilations = [g.rng.choice([1, 2]) if (k - 1) * 2 < s else 1 for k, s in zip(kernel, size, strict=True)]
    strides, pads = [g.rng.choice([1, 1, 2]) for _ in size], [g.rng.randint(0, 2) for _ in range(4)]
    out = [
        (s + pads[i] + pads[i + 2] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i, s in enumerate(size)
    ]
    inputs = [x, g.normal(filters, channels // groups, *kernel), *([g.normal(filters)] if g.rng.random() < 0.6 else [])]
    common = {"strides": strides, "pads": pads, "dilations": dilations, "group": groups}
    g.add("Conv", inputs, (batch, filters, *out), kernel_shape=kernel, **common)


def _conv_transpose(g: Graph) -> None:
    x = g.take(4)
    if x is None:
        return
    batch, channels, *size = g.shapes[x]
    filters, kernel, strides = (
        g.rng.choice([1, 3, 4]),
        [g.rng.randint(1, 3) for _ in size],
        [g.rng.randint(1, 2) for _ in size],
    )
    out = [(s - 1) * strides[i] + kernel[i] for i, s in enumerate(size)]
    g.add("ConvTranspose", [x, g.normal(channels, filters, *kernel)], (batch, filters, *out), strides=strides)


def _pool(g: Graph) -> None:
    x = g.take(4)
    if x is None:
        return
    batch, channels, *size = g.shapes[x]
    if g.rng.random() < 0.2:
        g.add(g.rng.choice(["GlobalAveragePool", "GlobalMaxPool"]), [x], (batch, channels, 1, 1))
        return
    kernel = [g.rng.randint(1, min(3, s)) for s in size]
    strides = [g.rng.randint(1, 2) for _ in size]
    pads = [g.rng.randint(0, (k - 1) // 2) for k in kernel * 2]
    out = [(s + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i, s in enumerate(size)]
    if g.rng.random() < 0.5:
        g.add(
            "MaxPool", [x], (batch, channels, *out), kernel_shape=kernel, strides=strides, pads=pads, exact=x in g.exact
        )
    else:
        include = g.rng.randint(0, 1)
        common = {"kernel_shape": kernel, "strides": strides, "pads": pads, "count_include_pad": include}
        g.add("AveragePool", [x], (batch, channels, *out), **common)


def _product(g: Graph) -> None:
    x = g.take()
    if x is None or len(g.shapes[x]) < 2:
        return
    shape = g.shapes[x]
    if g.rng.random() < 0.3:
        order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        turned = g.add("Transpose", [x], tuple(shape[i] for i in order), perm=order, exact=x in g.exact)
        g.add("MatMul", [x, turned], (*shape[:-1], shape[-2]))
        return
    units = g.rng.choice([1, 3, 7, 8, 16])
    if len(shape) == 2 and g.rng.random() < 0.5:
        g.add("Gemm", [x, g.normal(units, shape[1]), g.normal(units)], (shape[0], units), transB=1, alpha=0.5)
    else:
        g.add("MatMul", [x, g.normal(shape[-1], units)], (*shape[:-1], units))


def _normalise(g: Graph) -> None:
    x = g.take()
    if x is None or len(g.shapes[x]) < 2:
        return
    shape = g.shapes[x]
    kind = g.rng.choice(["BatchNormalization", "LayerNormalization", "Softmax", "InstanceNormalization", "LogSoftmax"])
    if kind == "BatchNormalization":
        variance = g.weight(np.abs(np.random.default_rng(g.count).standard_normal(shape[1])).astype(np.float32) + 0.5)
        g.add(kind, [x, g.normal(shape[1]), g.normal(shape[1]), g.normal(shape[1]), variance], shape)
    elif kind == "LayerNormalization" and shape[-1] > 3:
        g.add(kind, [x, g.normal(shape[-1]), g.normal(shape[-1])], shape, axis=-1, epsilon=0.1)
    elif kind == "InstanceNormalization" and len(shape) == 4:
        g.add(kind, [x, g.normal(shape[1]), g.normal(shape[1])], shape, epsilon=0.1)
    else:
        g.add(g.rng.choice(["Softmax", "LogSoftmax"]), [x], shape, axis=g.rng.randrange(-1, len(shape)))


def _reduce(g: Graph) -> None:
    x = g.take()
    if x is None or not g.shapes[x]:
        return
    shape, keep = g.shapes[x], g.rng.randint(0, 1)
    axes = sorted(g.rng.sample(range(len(shape)), g.rng.randint(1, len(shape))))
    out = tuple(1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes)
    op = g.rng.choice(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceLogSumExp", "ReduceL1"])
    exact = op in ("ReduceMax", "ReduceMin") and x in g.exact
    g.add(op, [x, g.weight(np.array(axes))], out, keepdims=keep, exact=exact)


def _moves(g: Graph) -> None:
    x = g.take()
    if x is None or not g.shapes[x]:
        return
    shape, exact = g.shapes[x], x in g.exact
    rank = len(shape)
    axis = g.rng.randrange(rank)
    kind = g.rng.choice(
        ["Transpose", "Reshape", "Concat", "Split", "Slice", "Pad", "Gather", "Unsqueeze", "Tile", "CumSum", "Flatten"]
    )
    if kind == "Transpose":
        order = g.rng.sample(range(rank), rank)
        g.add(kind, [x], tuple(shape[i] for i in order), perm=order, exact=exact)
    elif kind == "Reshape":
        whole = int(np.prod(shape))
        first = g.rng.choice([d for d in range(1, whole + 1) if whole % d == 0][:8])
        wanted = (first, whole // first)
        g.add(kind, [x, g.weight(np.array(wanted))], wanted, exact=exact)
    elif kind == "Concat":
        rest = (shape[:axis], shape[axis + 1 :])
        fitting = [n for n, s in g.shapes.items() if len(s) == rank and (s[:axis], s[axis + 1 :]) == rest]
        parts = [x, *fitting][:3]
        out = (*shape[:axis], sum(g.shapes[p][axis] for p in parts), *shape[axis + 1 :])
        g.add(kind, parts, out, axis=axis, exact=all(p in g.exact for p in parts))
    elif kind == "Split" and shape[axis] > 1:
        first = g.rng.randint(1, shape[axis] - 1)
        names = [g.name(), g.name()]
        g.nodes.append(helper.make_node(kind, [x, g.weight(np.array([first, shape[axis] - first]))], names, axis=axis))
        for name, size in zip(names, (first, shape[axis] - first), strict=True):
            g.shapes[name] = (*shape[:axis], size, *shape[axis + 1 :])
            if exact:
                g.exact.add(name)
    elif kind == "Slice":
        step = g.rng.choice([1, 1, 2, -1])
        begin, end = (shape[axis] - 1, -shape[axis] - 1) if step < 0 else (g.rng.randrange(shape[axis]), shape[axis])
        size = len(range(shape[axis])[slice(begin, None if step < 0 else end, step)])
        values = [g.weight(np.array([v])) for v in (begin, end, axis, step)]
        g.add(kind, [x, *values], (*shape[:axis], size, *shape[axis + 1 :]), exact=exact)
    elif kind == "Pad":
        widths = [g.rng.randint(0, min(2, s - 1)) for s in shape * 2]
        out = tuple(s + widths[i] + widths[i + rank] for i, s in enumerate(shape))
        g.add(
            kind, [x, g.weight(np.array(widths))], out, mode=g.rng.choice(["constant", "edge", "reflect"]), exact=exact
        )
    elif kind == "Gather":
        places = g.weight(np.array([g.rng.randrange(-shape[axis], shape[axis]) for _ in range(g.rng.randint(1, 4))]))
        out = (*shape[:axis], len(g.weights[places]), *shape[axis + 1 :])
        g.add(kind, [x, places], out, axis=axis, exact=exact)
    elif kind == "Unsqueeze" and rank < 4:
        g.add(kind, [x, g.weight(np.array([axis]))], (*shape[:axis], 1, *shape[axis:]), exact=exact)
    elif kind == "Tile":
        times = [g.rng.randint(1, 2) for _ in shape]
        g.add(
            kind, [x, g.weight(np.array(times))], tuple(s * t for s, t in zip(shape, times, strict=True)), exact=exact
        )
    elif kind == "CumSum":
        g.add(kind, [x, g.weight(np.array(axis))], shape, exclusive=g.rng.randint(0, 1), reverse=g.rng.randint(0, 1))
    elif kind == "Flatten":
        out = (int(np.prod(shape[:axis], dtype=np.int64)), int(np.prod(shape[axis:], dtype=np.int64)))
        g.add(kind, [x], out, axis=axis, exact=exact)


def _resize(g: Graph) -> None:
    x = g.take(4)
    if x is None:
        return
    shape = g.shapes[x]
    scales = [1.0, 1.0, *(g.rng.choice([1.0, 2.0, 3.0]) for _ in range(2))]
    out = tuple(int(s * f) for s, f in zip(shape, scales, strict=True))
    factor = g.weight(np.array(scales, np.float32))
    if g.rng.random() < 0.5:
        common = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        common = {"mode": "linear", "coordinate_transformation_mode": g.rng.choice(["half_pixel", "align_corners"])}
    g.add("Resize", [x, "", factor], out, **common)


def _quantise(g: Graph) -> None:
    x = g.take(exact=True)
    if x is None:
        return
    kind = g.rng.choice([np.int8, np.uint8])
    scale, zero = g.weight(np.array(2.0**-5, np.float32)), g.weight(np.array(g.rng.randint(0, 9), kind))
    q = g.add("QuantizeLinear", [x, scale, zero], None)
    g.add("DequantizeLinear", [q, scale, zero], g.shapes[x], exact=True)


def _arg(g: Graph) -> None:
    x = g.take(exact=True)
    if x is None or not g.shapes[x]:
        return
    shape = g.shapes[x]
    axis = g.rng.randrange(len(shape))
    found = g.add(g.rng.choice(["ArgMax", "ArgMin"]), [x], None, axis=axis, keepdims=1)
    g.add("Cast", [found], (*shape[:axis], 1, *shape[axis + 1 :]), to=onnx.TensorProto.FLOAT, exact=True)


_FAMILIES: tuple[tuple[Callable[[Graph], None], int], ...] = (
    (_unary, 5), (_binary, 5), (_compare, 1), (_conv, 4), (_conv_transpose, 1), (_pool, 2), (_product, 3),
    (_normalise, 3), (_reduce, 2), (_moves, 6), (_resize, 1), (_quantise, 1), (_arg, 1),
)  # fmt: skip


def random_graph(rng: random.Random) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model with 2 to 20 operators, and values for its inputs."""
    g = Graph(rng)
    feeds = {}
    for index in range(rng.randint(1, 2)):
        name = f"x{index}"
        sizes = rng.choice([(1, 3, 8, 8), (2, 4, 5, 7), (1, 16, 6, 9), (3, 8), (2, 5, 6), (1, 17), (2, 3, 32)])
        values = np.random.default_rng(rng.randrange(2**31)).standard_normal(sizes).astype(np.float32)
        feeds[name], g.shapes[name] = values, sizes
        g.exact.add(name)
    wanted = rng.randint(2, 20)
    families, shares = zip(*_FAMILIES, strict=True)
    for _ in range(200):
        if len(g.nodes) >= wanted:
            break
        before = (len(g.nodes), dict(g.shapes), dict(g.weights), set(g.exact))
        rng.choices(families, shares)[0](g)
        if any(np.prod(shape, dtype=np.float64) > _MAX_ELEMENTS for shape in g.shapes.values()):
            del g.nodes[before[0] :]
            g.shapes, g.weights, g.exact = before[1:]
    read = {name for node in g.nodes for name in node.input}
    outputs = [name for name in g.shapes if name not in read and name not in feeds] or [g.nodes[-1].output[0]]
    graph = helper.make_graph(
        g.nodes,
        "random",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape) for name, value in feeds.items()],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, g.shapes[name]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in g.weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), feeds


def reference(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, without rewriting the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def difference(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> str:
    """What differs, in words; empty if nothing does."""
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index}: {a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
        both = np.isfinite(b)
        if not np.array_equal(np.isfinite(a), both) or not np.array_equal(a[~both], b[~both], equal_nan=True):
            return f"output {index}: other infinities or NaN"
        scale = max(1.0, float(np.abs(b[both]).max(initial=0)))
        worst = float(np.abs(a[both].astype(np.float64) - b[both]).max(initial=0)) / scale
        if worst > TOLERANCE:
            return f"output {index}: {worst:.1e} of the largest"
    return ""


def check(seed: int, folder: Path, target: str = "native") -> str:
    """Compile the graph of this seed for a target, run it (under emulation), and say what is wrong."""
    from ingot.frontend import import_model
    from passes.execute import compile_state, execute

    model, feeds = random_graph(random.Random(seed))
    data = model.SerializeToString()
    path = folder / f"random{seed}.onnx"
    path.write_bytes(data)
    try:
        wanted = reference(data, feeds)
    except Exception as error:  # a generator's mistake, not the compiler's
        return f"ONNX Runtime: {' '.join(str(error).split())[:200]}"
    try:
        if target == "native":
            imported = import_model(path)
            found = execute(compile_state(imported), [feeds[s.name] for s in imported.inputs], folder)
        else:
            import ingot
            from ingot.emulator import run_under_qemu
            from ingot.target import load_target

            library = ingot.compile(path, target=target, selftest=False).save(folder / f"random{seed}.so")
            found = run_under_qemu(library, list(feeds.values()), load_target(target), threads=1)
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {' '.join(str(error).split())[-250:]}"
    return difference(found, wanted)


def _quiet_check(job: tuple[int, str]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        return job[0], check(job[0], Path(folder), job[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run many seeds; see --help."""
    parser = argparse.ArgumentParser(description="random graphs against ONNX Runtime")
    parser.add_argument("count", nargs="?", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--target", default="native")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="write one graph, that of --seed, to this file and stop")
    options = parser.parse_args(arguments)
    if options.keep:
        model, feeds = random_graph(random.Random(options.seed))
        options.keep.write_bytes(model.SerializeToString())
        np.savez(options.keep.with_suffix(".npz"), **feeds)
        return 0
    started, wrong = time.monotonic(), 0
    jobs = [(seed, options.target) for seed in range(options.seed, options.seed + options.count)]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=50) as pool:
        for done, (seed, problem) in enumerate(pool.imap_unordered(_quiet_check, jobs), 1):
            if problem:
                wrong += 1
                print(f"seed {seed}: {problem}", flush=True)
            if done % 100 == 0 and done < len(jobs):
                left = (time.monotonic() - started) / done * (len(jobs) - done)
                print(f"{done} of {len(jobs)} graphs, {wrong} differ, {left / 60:.0f} min left", flush=True)
    print(f"{options.count} graphs for {options.target}: {wrong} differ, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
