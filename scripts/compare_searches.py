"""Compares the tuner's search with random and grid search, on the same budget, and draws best so far against trials.

usage: compare_searches.py [--configs N] [--seeds N] [--target NAME] [--out docs/search.png]

For the heaviest layers of ResNet-18, N configs of each space, chosen at random, are measured once; then every strategy
searches among those, its measurements read from the table. So all see the same numbers, and chance is averaged over
seeds. The drawing needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "compiler"))

if TYPE_CHECKING:
    from ingot.autotune.pool import LocalPool
    from ingot.autotune.search import Sample
    from ingot.target import Target

BATCH = 4
KEYS = (
    "conv2d float32 n1 h56 w56 i64 o128 k3x3 s2x2 p1.1.1.1 d1x1 | add.v relu",
    "conv2d float32 n1 h14 w14 i256 o256 k3x3 s1x1 p1.1.1.1 d1x1 | add.v relu",
    "conv2d float32 n1 h28 w28 i128 o128 k3x3 s1x1 p1.1.1.1 d1x1 | add.v relu",
)


def layer_model(key: str) -> bytes:
    """An ONNX model of the one layer that a key names."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from ingot.autotune.features import workload_of

    w = workload_of(key)
    if w is None:
        raise SystemExit(f"no convolution: {key}")
    weights = {"w": np.ones((w.out_channels, w.in_channels, *w.kernel), np.float32), "b": np.ones(w.out_channels, "f4")}
    conv = helper.make_node("Conv", ["x", "w", "b"], ["t"], pads=list(w.padding), strides=list(w.strides))
    graph = helper.make_graph(
        [conv, helper.make_node("Relu", ["t"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, w.in_channels, w.height, w.width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, w.out_channels, w.out_height, w.out_width])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def measured(key: str, target: Target, count: int, pool: LocalPool, folder: Path) -> tuple[Any, dict[Any, float]]:
    """Measure `count` configs of a task at random; return its default and the ratio of each to it."""
    from ingot.autotune.board_local import LocalBoard
    from ingot.autotune.task import prepared, tasks_of
    from ingot.autotune.tuner import Settings, Tuner
    from ingot.frontend import import_model
    from ingot.passes.state import State

    path = folder / "layer.onnx"
    path.write_bytes(layer_model(key))
    imported = import_model(path)
    tasks = tasks_of(prepared(State(imported.module, imported.weights, imported, target)))
    settings = Settings(trials=count, strategy="random")
    tuner = Tuner(tasks, target, LocalBoard(target), folder / f"logs{len(list(folder.iterdir()))}", settings)
    allocator = type("All", (), {"next": lambda _, waiting: next(iter(waiting), None)})()
    while tuner.status.trials < count:
        batch = tuner._compose(allocator)
        if not batch:
            break
        tuner._measure(pool, batch)
    (progress,) = tuner.progress.values()
    return progress.search.default, dict(progress.search.ratios)


def replay(
    key: str,
    default: Any,  # noqa: ANN401 - a config
    table: dict[Any, float],
    target: Target,
    strategy: str,
    seed: int,
    known: Sequence[Sample] = (),
) -> list[float]:
    """Return the best ratio after each trial of one strategy that searches the measured configs.

    known: what the ranking has learned before, from other tasks.
    """
    from ingot.autotune.search import Ranker, Search
    from ingot.autotune.space import Space

    configs = list(table)
    if strategy == "grid":
        configs.sort(key=repr)
    else:
        random.Random(seed).shuffle(configs)  # noqa: S311 - no secret
    ranker = Ranker(target, seed) if strategy == "model" else None
    if ranker is not None:
        ranker.learn(known)
    search = Search(key, Space(configs), default, target, strategy, ranker, seed)
    best, curve = 1.0, []
    while batch := search.propose(BATCH):
        for config in batch:
            search.observe(config, table[config])
            best = min(best, table[config])
            curve.append(best)
    return curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--target", default="native")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "search.png")
    options = parser.parse_args()
    from ingot.autotune.pool import LocalPool
    from ingot.target import load_target

    target = load_target(options.target)
    tables = {}
    with tempfile.TemporaryDirectory() as folder, LocalPool() as pool:
        for key in KEYS:
            tables[key] = measured(key, target, options.configs, pool, Path(folder))
            print(f"{key}: {len(tables[key][1])} configs, the best {min(tables[key][1].values()):.3f} of the default")
    curves: dict[str, dict[str, list[float]]] = {}
    for key, (default, table) in tables.items():
        for strategy in ("model", "random", "grid"):
            seeds = range(1 if strategy == "grid" else options.seeds)
            runs = [replay(key, default, table, target, strategy, seed) for seed in seeds]
            curves.setdefault(key, {})[strategy] = [statistics.mean(values) for values in zip(*runs, strict=True)]
    for key, found in curves.items():
        floor = min(tables[key][1].values())
        for strategy, curve in found.items():
            reached = next((i + 1 for i, v in enumerate(curve) if v <= 1.02 * floor), None)
            at = ", ".join(f"{n}: {curve[n - 1]:.3f}" for n in (8, 16, 32, 64, 128) if n <= len(curve))
            print(f"{strategy:7} {key}: best at trials {at}; within 2 % of the best after {reached}")
    print(json.dumps({key: {s: [round(v, 4) for v in c] for s, c in found.items()} for key, found in curves.items()}))
    draw(curves, options.out)
    return 0


def draw(curves: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Write the picture: one panel a layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(4.4 * len(curves), 3.6), sharey=False)
    names = {"model": "xgboost", "random": "random", "grid": "grid"}
    for panel, (key, found) in zip(panels, curves.items(), strict=True):
        for strategy, curve in found.items():
            panel.plot(range(1, len(curve) + 1), curve, label=names[strategy])
        words = key.split()
        panel.set_title(" ".join(words[3:8]), fontsize=10)
        panel.set_xlabel("trials")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("best time so far / time of the default")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
