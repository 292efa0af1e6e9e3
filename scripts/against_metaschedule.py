"""Tunes the heaviest layers of ResNet-18 with ingot and with TVM's MetaSchedule on the same number of trials.

usage: against_metaschedule.py [--trials N] [--target NAME] [--layers N]

Both search on this machine, one thread, float32, batch 1, with bias and rectifier in the kernel. Their best kernels are
then timed in turn in the thread's own time, so that what else the machine does counts for neither; the medians are
printed, with how long each search took.
"""

from __future__ import annotations

import argparse
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

os.environ["TVM_NUM_THREADS"] = "1"
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "compiler"))


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


LAYERS = (Layer(56, 64), Layer(28, 128), Layer(14, 256))


def ours(layer: Layer, target_name: str, trials: int, folder: Path) -> float:
    """Tune with ingot; return the median seconds of its best kernel."""
    from onnx import TensorProto, helper, numpy_helper

    from ingot.autotune.board_local import LocalBoard
    from ingot.autotune.pool import LocalPool
    from ingot.autotune.task import prepared, tasks_of
    from ingot.autotune.tuner import Settings, Tuner
    from ingot.frontend import import_model
    from ingot.passes.state import State
    from ingot.target import load_target

    c, s = layer.channels, layer.size
    weights = {"w": np.ones((c, c, 3, 3), np.float32), "b": np.ones(c, np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["t"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["t"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, c, s, s])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, c, s, s])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = folder / "layer.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    target = load_target(target_name)
    imported = import_model(path)
    tasks = tasks_of(prepared(State(imported.module, imported.weights, imported, target)))
    tuner = Tuner(tasks, target, LocalBoard(target), folder / "logs", Settings(trials=trials))
    with LocalPool() as pool:
        tuner.run(pool)
    (progress,) = tuner.progress.values()
    return progress.now * 1e-9


def theirs(layer: Layer, cpu: str, trials: int, folder: Path) -> Callable[[], None]:
    """Tune with MetaSchedule; return a call of its best kernel."""
    import tvm
    from tvm import te, topi
    from tvm.s_tir import meta_schedule

    c, s = layer.channels, layer.size
    data = te.placeholder((1, s, s, c), "float32", name="data")
    weight = te.placeholder((3, 3, c, c), "float32", name="weight")
    bias = te.placeholder((c,), "float32", name="bias")
    conv = topi.nn.conv2d_nhwc(data, weight, 1, 1, 1)
    out = topi.nn.relu(te.compute(conv.shape, lambda *i: conv(*i) + bias[i[3]], name="biased"))
    function = te.create_prim_func([data, weight, bias, out])
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": 1})
    database = meta_schedule.tune_tir(
        function,
        target,
        str(folder),
        trials,
        num_trials_per_iter=min(16, trials),
        num_tuning_cores=max(1, len(os.sched_getaffinity(0))),
        seed=0,
    )
    schedule: Any = meta_schedule.tir_integration.compile_tir(database, function, target)
    if schedule is None:
        raise SystemExit("MetaSchedule found no valid schedule")
    built = tvm.compile(schedule.mod, target)
    arrays = [tvm.runtime.tensor(np.ones([int(d) for d in t.shape], np.float32)) for t in (data, weight, bias, out)]
    return lambda: built["main"](*arrays)


def seconds(call: Callable[[], None], runs: int = 60) -> float:
    """Return the median of a call's time of its own thread."""
    times = []
    for _ in range(runs):
        start = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - start) * 1e-9)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--target", default="native")
    parser.add_argument("--layers", type=int, default=len(LAYERS), choices=range(1, len(LAYERS) + 1))
    options = parser.parse_args()
    from ingot.target import load_target

    cpu = load_target(options.target).cpu
    print("| layer | ingot GFLOP/s | MetaSchedule GFLOP/s | ratio | ingot trials/min | MetaSchedule trials/min |")
    print("|---|---:|---:|---:|---:|---:|")
    for layer in LAYERS[: options.layers]:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            start = time.monotonic()
            mine = ours(layer, options.target, options.trials, Path(one))
            between = time.monotonic()
            call = theirs(layer, cpu, options.trials, Path(two))
            end = time.monotonic()
            other = seconds(call)
        rates = [60 * options.trials / t for t in (between - start, end - between)]
        print(
            f"| {layer} | {layer.gflop / mine:.0f} | {layer.gflop / other:.0f} | {other / mine:.2f}"
            f" | {rates[0]:.0f} | {rates[1]:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
