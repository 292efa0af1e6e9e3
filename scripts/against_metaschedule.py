"""Tunes the heaviest layers of ResNet-18 with ingot and with TVM's MetaSchedule on the same number of trials.

usage: against_metaschedule.py [--trials N] [--target NAME] [--layers N] [--folder DIR] [--write]

Both search on this machine, one thread, float32, batch 1: a convolution, a bias for each channel and a rectifier in one
kernel; both kernels read and write NHWC. Then the artifact that `ingot compile` makes with the log is timed next to the
five best that MetaSchedule found, in turn, in the thread's own time; the fastest counts. Each output is compared with
ONNX Runtime's first.

ingot packs weights at compile time. MetaSchedule's weights lie as TVM's operator has them, HWIO: it can rewrite their
layout (`layout_free_buffers`), but its runner cannot measure that in TVM 0.27, as it hands the kernel weights of the
rank they had before, and every trial fails.

Searches that DIR holds from an earlier run are not repeated. --write puts the table into docs/tuning.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuned import put_table

os.environ["TVM_NUM_THREADS"] = "1"
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "compiler"))
PAGE = REPO / "docs" / "tuning.md"
BEGIN, END = "<!-- metaschedule: written by scripts/against_metaschedule.py -->", "<!-- end of metaschedule -->"
HEAD = (
    "| layer | ingot, GFLOP/s | MetaSchedule, GFLOP/s | times as fast | ingot, trials a minute | MetaSchedule's "
    "| ingot, processor seconds a trial | MetaSchedule's |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)
#: The best of MetaSchedule's records that are timed again.
FINALISTS = 5
#: Seconds that MetaSchedule may take to build or to run one candidate: its own 30 are too few on a busy machine.
PATIENCE = 300.0
#: Seconds in which the kernels of one layer take turns.
SECONDS = 15.0
Array = npt.NDArray[np.float32]
Call = Callable[[], Array]


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of stride 1 with padding 1 on `size` x `size` positions, `channels` in and out."""

    size: int
    channels: int

    @property
    def gflop(self) -> float:
        return 2 * 9 * self.size**2 * self.channels**2 * 1e-9

    def __str__(self) -> str:
        return f"3x3, {self.channels} channels, {self.size}x{self.size}"


#: Those with the most multiply-adds in an inference; the first runs four times, the others three.
LAYERS = (Layer(56, 64), Layer(28, 128), Layer(14, 256))


@dataclass(frozen=True)
class Data:
    """Seeded random values: data NHWC, weight OHWI, bias."""

    data: Array
    weight: Array
    bias: Array

    @classmethod
    def of(cls, layer: Layer) -> Data:
        draw = np.random.default_rng(0)
        c, s = layer.channels, layer.size
        shapes = (1, s, s, c), (c, 3, 3, c), (c,)
        return cls(*(draw.standard_normal(shape).astype(np.float32) for shape in shapes))


def write_model(values: Data, path: Path) -> None:
    """Write the layer as an ONNX model of NHWC data; its transposes cancel those that ingot puts at a model's edges."""
    from onnx import TensorProto, helper, numpy_helper

    shape = list(values.data.shape)
    nodes = [
        helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w", "b"], ["sum"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["sum"], ["positive"]),
        helper.make_node("Transpose", ["positive"], ["y"], perm=[0, 2, 3, 1]),
    ]
    oihw = np.ascontiguousarray(values.weight.transpose(0, 3, 1, 2))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(oihw, "w"), numpy_helper.from_array(values.bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def reference(path: Path, values: Data) -> Array:
    """What ONNX Runtime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values.data})[0], np.float32)


def search_ours(path: Path, target_name: str, trials: int, folder: Path) -> None:
    """Tune with ingot, into a log in `folder`."""
    from ingot.autotune.board_local import LocalBoard
    from ingot.autotune.pool import LocalPool
    from ingot.autotune.task import prepared, tasks_of
    from ingot.autotune.tuner import Settings, Tuner
    from ingot.frontend import import_model
    from ingot.passes.state import State
    from ingot.target import load_target

    target = load_target(target_name)
    imported = import_model(path)
    tasks = tasks_of(prepared(State(imported.module, imported.weights, imported, target)))
    tuner = Tuner(tasks, target, LocalBoard(target), folder, Settings(trials=trials))
    with LocalPool() as pool:
        tuner.run(pool)


def built_ours(path: Path, target: str, folder: Path, values: Data) -> Call:
    """A call of the artifact that a compile with the log makes."""
    import ingot

    artifact = path.with_suffix(".so")
    ingot.compile(path, target=target, log=folder, selftest=False).save(artifact)
    model = ingot.load(artifact, threads=1)
    return lambda: model(values.data)


def function_of(layer: Layer) -> Any:  # noqa: ANN401 - TVM ships no types
    """The layer as TVM's own operators say it."""
    from tvm import te, topi

    c, s = layer.channels, layer.size
    data = te.placeholder((1, s, s, c), "float32", name="data")
    weight = te.placeholder((3, 3, c, c), "float32", name="weight")
    bias = te.placeholder((c,), "float32", name="bias")
    conv = topi.nn.conv2d_nhwc(data, weight, 1, 1, 1)
    out = topi.nn.relu(te.compute(conv.shape, lambda *i: conv(*i) + bias[i[3]], name="biased"))
    return te.create_prim_func([data, weight, bias, out])


def search_theirs(layer: Layer, cpu: str, trials: int, folder: Path) -> None:
    """Tune with MetaSchedule, into a database in `folder`."""
    import tvm
    from tvm.s_tir import meta_schedule

    meta_schedule.tune_tir(
        function_of(layer),
        tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": 1}),
        str(folder),
        trials,
        num_trials_per_iter=min(16, trials),
        num_tuning_cores=max(1, len(os.sched_getaffinity(0))),
        builder=meta_schedule.builder.LocalBuilder(timeout_sec=PATIENCE),
        runner=meta_schedule.runner.LocalRunner(timeout_sec=PATIENCE),
        seed=0,
    )


def built_theirs(layer: Layer, cpu: str, folder: Path, values: Data, wanted: Array) -> list[Call]:
    """Calls of the best kernels in MetaSchedule's database."""
    import tvm
    from tvm.s_tir import Schedule, meta_schedule

    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": 1})
    database = meta_schedule.database.JSONDatabase(work_dir=str(folder))
    records = [r for r in database.get_all_tuning_records() if r.run_secs and float(r.run_secs[0]) < PATIENCE]
    records.sort(key=lambda record: statistics.median(float(s) for s in record.run_secs))
    if not records:
        raise SystemExit("MetaSchedule measured no schedule")
    hwio = np.ascontiguousarray(values.weight.transpose(1, 2, 3, 0))
    calls: list[Call] = []
    for record in records[:FINALISTS]:
        schedule = Schedule(function_of(layer))
        record.trace.apply_to_schedule(schedule, remove_postproc=False)
        kernel = tvm.compile(schedule.mod, target)
        arrays = [tvm.runtime.tensor(a) for a in (values.data, hwio, values.bias, np.zeros_like(wanted))]

        def call(kernel: Any = kernel, arrays: list[Any] = arrays) -> Array:  # noqa: ANN401
            kernel["main"](*arrays)
            return np.empty(0, np.float32)

        call()
        check(arrays[3].numpy(), wanted, "MetaSchedule's kernel")
        calls.append(call)
    return calls


def check(found: Array, wanted: Array, who: str) -> None:
    """End where two outputs differ by more than float32 sums in another order do."""
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not error < 1e-4:
        raise SystemExit(f"{who} computes something else: {error:.1e} of the largest value")


def in_turn(calls: list[Call], seconds: float) -> list[float]:
    """Return each call's median of the thread's own time."""
    times: list[list[int]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[0]) < 15:
        for place, call in enumerate(calls):
            start = time.thread_time_ns()
            call()
            times[place].append(time.thread_time_ns() - start)
    return [statistics.median(found) * 1e-9 for found in times]


@dataclass(frozen=True)
class Cost:
    """Seconds that a search took: of the clock, and of all processors together, its child processes' with them."""

    wall: float
    processors: float


def timed(folder: Path, name: str, search: Callable[[Path], None]) -> Cost:
    """Search into a folder of its own, unless an earlier run has done so; return what it took."""
    inside, note = folder / name, folder / f"{name}.json"
    if not note.exists():
        inside.mkdir(parents=True, exist_ok=True)
        start = os.times()
        search(inside)
        end = os.times()
        note.write_text(json.dumps([end.elapsed - start.elapsed, sum(end[:4]) - sum(start[:4])]))
    wall, processors = json.loads(note.read_text())
    return Cost(float(wall), float(processors))


def row(layer: Layer, options: argparse.Namespace, folder: Path) -> str:
    """Search both, time both, and return the line of the table."""
    from ingot.target import load_target

    cpu, trials = load_target(options.target).cpu, options.trials
    folder.mkdir(parents=True, exist_ok=True)
    values, path = Data.of(layer), folder / "layer.onnx"
    write_model(values, path)
    mine = timed(folder, "ingot", lambda inside: search_ours(path, options.target, trials, inside))
    other = timed(folder, "metaschedule", lambda inside: search_theirs(layer, cpu, trials, inside))
    wanted = reference(path, values)
    ours = built_ours(path, options.target, folder / "ingot", values)
    check(ours(), wanted, "ingot's kernel")
    theirs = built_theirs(layer, cpu, folder / "metaschedule", values, wanted)
    first, *rest = in_turn([ours, *theirs], SECONDS)
    best = min(rest)
    cells = [str(layer), f"{layer.gflop / first:.0f}", f"{layer.gflop / best:.0f}", f"{best / first:.2f}"]
    cells += [f"{60 * trials / cost.wall:.0f}" for cost in (mine, other)]
    cells += [f"{cost.processors / trials:.2f}" for cost in (mine, other)]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--target", default="native")
    parser.add_argument("--layers", type=int, default=len(LAYERS), choices=range(1, len(LAYERS) + 1))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ingot-") as temporary:
        folder = options.folder or Path(temporary)
        rows = []
        print(*HEAD, sep="\n", flush=True)
        for layer in LAYERS[: options.layers]:
            rows.append(row(layer, options, folder / str(layer.size)))
            print(rows[-1], flush=True)
        if options.write:
            how = f"one thread, `--trials {options.trials} --target {options.target}`"
            put_table(PAGE, (BEGIN, END), [*HEAD, *rows], how)
    return 0


if __name__ == "__main__":
    sys.exit(main())
