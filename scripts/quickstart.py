"""Shows what ingot does: a digits classifier from training to answers, and ResNet-50 next to ONNX Runtime.

usage: quickstart.py [--fresh] [--folder DIR]      (scripts/quickstart calls it in the repository's environment)

Exit status 0 only if the compiled models were right: 1 for a wrong result, 2 for an error with its message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import ingot
import make_models
import train_digits

REPO = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # of max|error| / max|reference|
LEAST_ACCURACY = 0.96
MEASURE_SECONDS = 6.0
SHADES = " ░▒▓█"

Array = npt.NDArray[Any]
console = Console(highlight=False)


@dataclass(frozen=True)
class Compiled:
    """A compiled model on disk, and how long the compilation took when it was done."""

    path: Path
    seconds: float
    reused: bool


def fingerprint(model: Path) -> str:
    """What a compiled model depends on: the model, the compiler's own files, and the Python under it."""
    digest = hashlib.sha256(model.read_bytes())
    package = Path(ingot.__file__).parent
    for folder, patterns in ((package, ("*.py", "*.c", "*.h")), (REPO / "targets", ("*.toml",))):
        for file in sorted(p for pattern in patterns for p in folder.rglob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest() + platform.python_version() + platform.machine()


def compile_model(model: Path, fresh: bool) -> Compiled:
    """Compile for this machine, with a progress bar; reuse an earlier result if nothing it depends on changed."""
    so, facts = model.with_suffix(".so"), model.with_suffix(".so.json")
    key = fingerprint(model)
    if not fresh and so.is_file() and facts.is_file():
        known = json.loads(facts.read_text("utf-8"))
        if known["key"] == key:
            return Compiled(so, known["seconds"], reused=True)
    facts.unlink(missing_ok=True)
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"compiling {model.name}", total=1)

        def progress(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"compiling {model.name}: {stage:<16}", completed=done, total=total)

        ingot.compile(model, target="native", progress=progress).save(so)
    seconds = time.perf_counter() - started
    facts.write_text(json.dumps({"key": key, "seconds": seconds}), "utf-8")
    return Compiled(so, seconds, reused=False)


def size(count: int) -> str:
    """Bytes for people: 61 KiB, 97.5 MiB."""
    return f"{count / 2**10:,.0f} KiB" if count < 2**20 else f"{count / 2**20:,.1f} MiB"


def reference(model: Path) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """An ONNX Runtime session on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def facts_table(rows: list[tuple[str, RenderableType]]) -> Table:
    """A borderless table of names and facts."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=12, no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def compiled_row(compiled: Compiled) -> tuple[str, str]:
    """How long the compilation took, now or earlier."""
    when = " (earlier; --fresh compiles again)" if compiled.reused else ""
    return "compiled", f"in [b]{compiled.seconds:.1f} s[/] for this machine{when}"


def picture(image: Array, answer: int, confidence: float, truth: int) -> Text:
    """One digit as block art, two characters a pixel, with the network's answer under it."""
    art = Text()
    for line in image.reshape(8, 8):
        art.append("".join(SHADES[round(float(v) * (len(SHADES) - 1))] * 2 for v in line) + "\n", style="cyan")
    right = answer == truth
    says = f"{answer}  {confidence:4.0%} {'✓' if right else f'✗ is {truth}'}"
    art.append(f"{says:^16}", style="bold green" if right else "bold red")
    return art


def choose(answers: Array, truths: Array, count: int) -> list[int]:
    """Indices of `count` held-out digits to show: different digits, and last a mistake if there is one."""
    wrong = np.flatnonzero(answers != truths)
    shown = [int(np.flatnonzero(truths == digit)[0]) for digit in (3, 8, 5, 2, 6, 9, 4, 7, 0, 1)]
    right = [i for i in shown if answers[i] == truths[i]]
    return [*right[: count - 1], int(wrong[0])] if len(wrong) else right[:count]


def digits(folder: Path, fresh: bool) -> bool:
    """Train, compile, run on the held-out digits, draw. Returns whether the answers are good."""
    console.print(Rule("[b]1  A digits classifier, from training to answers", align="left", style="dim"))
    model = folder / "digits.onnx"
    x, y, held_x, held_y = train_digits.load()
    started = time.perf_counter()
    with console.status("training"):
        for _epoch, _loss, network in train_digits.train(x, y):
            last = network
    trained = time.perf_counter() - started
    train_digits.save_onnx(last, model)
    compiled = compile_model(model, fresh)
    net = ingot.load(compiled.path, threads=1)
    outputs = [net(image[None]) for image in held_x]
    scores = np.concatenate(outputs)
    judge = reference(model)
    expected = np.concatenate([judge.run(None, {"image": image[None]})[0] for image in held_x])
    answers = scores.argmax(1)
    odds = np.exp(scores - scores.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    accuracy = float((answers == held_y).mean())
    agree = int((answers == expected.argmax(1)).sum())
    library = compiled.path.stat().st_size
    shown = choose(answers, held_y, max(2, min(6, (console.width - 2) // 19)))
    art = [picture(held_x[i], int(answers[i]), float(odds[i].max()), int(held_y[i])) for i in shown]
    console.print(
        facts_table(
            [
                ("trained", f"in [b]{trained:.1f} s[/] with numpy on {len(x):,} images of 8 x 8 pixels → {model.name}"),
                compiled_row(compiled),
                ("the library", f"[b]{compiled.path.name}[/], {size(library)}; it needs libc and nothing else"),
            ]
        )
    )
    console.print(Padding(Columns(art, padding=(0, 3), expand=False), (1, 2)))
    good = accuracy >= LEAST_ACCURACY and agree == len(held_y)
    verdict = f"[b]{(answers == held_y).sum()} of {len(held_y)}[/] unseen digits, [b green]{accuracy:.1%}[/]"
    mistakes = int((answers != held_y).sum())
    told = f", the last picture being one of its {mistakes} mistakes" if mistakes else ""
    console.print(
        facts_table(
            [
                ("right", verdict + told),
                ("ONNX Runtime", f"gives the same answer for {agree} of {len(held_y)}"),
            ]
        )
    )
    console.print()
    net.close()
    if not good:
        console.print(f"[b red]wrong:[/] expected at least {LEAST_ACCURACY:.0%} right, and ONNX Runtime's answers")
    return good


def interleaved(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Time two functions in turns, so that both see the same machine; returns seconds per call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (first, second, first, second):
        function()
    until = time.perf_counter() + MEASURE_SECONDS
    while (time.perf_counter() < until and len(times[0]) < 100) or len(times[0]) < 3:
        for function, taken in ((first, times[0]), (second, times[1])):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return times


def resnet50(folder: Path, fresh: bool) -> bool:
    """Compile ResNet-50, check it against ONNX Runtime, time both. Returns whether the values agree."""
    console.print(Rule("[b]2  ResNet-50, next to ONNX Runtime", align="left", style="dim"))
    model = folder / "resnet50.onnx"
    if fresh or not model.is_file():
        with console.status("writing the model (random weights: speed and exactness do not need trained ones)"):
            make_models.write("resnet50", folder)
    compiled = compile_model(model, fresh)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    started = time.perf_counter()
    net = ingot.load(compiled.path, threads=1)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    judge = reference(model)
    judge_opened = time.perf_counter() - started
    y, expected = net(x), judge.run(None, {"x": x})[0]
    error = float(np.abs(y - expected).max() / np.abs(expected).max())
    with console.status("timing both in turns, one thread each"):
        ours, theirs = interleaved(lambda: net(x), lambda: judge.run(None, {"x": x}))
    facts = net.metadata
    net.close()
    good = error <= TOLERANCE
    console.print(
        facts_table(
            [
                compiled_row(compiled),
                ("arithmetic", f"{facts['macs'] / 1e9:.2f} billion multiply-adds per image"),
                (
                    "same values",
                    f"largest error / largest value = [b {'green' if good else 'red'}]{error:.1e}[/]"
                    f" (allowed {TOLERANCE:.0e})",
                ),
            ]
        )
    )
    table = Table(box=None, padding=(0, 3), header_style="bold")
    for name, justify in (("", "right"), ("ingot", "right"), ("ONNX Runtime", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    import onnxruntime

    engine = sum(p.stat().st_size for p in Path(onnxruntime.__file__).parent.rglob("*") if p.is_file())
    for row in [
        (
            f"one image, 1 thread (median of {len(ours)})",
            *(f"{statistics.median(t) * 1e3:.1f} ms" for t in (ours, theirs)),
        ),
        ("open and make ready", f"{opened * 1e3:.1f} ms", f"{judge_opened * 1e3:.1f} ms"),
        ("the model's file", size(compiled.path.stat().st_size), size(model.stat().st_size)),
        ("what must be there to run it", "libc", f"{size(engine)} package"),
        ("memory: weights, mapped from the file", size(facts["weights_bytes"]), "-"),
        ("memory: everything else (the arena)", size(facts["memory_bytes"]), "-"),
    ]:
        table.add_row(*row)
    console.print(Padding(Group(table), (1, 0)))
    if not good:
        console.print("[b red]wrong:[/] the compiled model's values are not ONNX Runtime's")
    return good


def what_next(folder: Path) -> None:
    """The commands to try next."""
    where = os.path.relpath(folder, REPO)
    console.print(Rule("[b]Try next", align="left", style="dim"))
    elsewhere = [(f"cd {shlex.quote(str(REPO))}", "")] if Path.cwd() != REPO else []
    commands = [
        *elsewhere,
        (". .venv/bin/activate", "so that the shell finds ingot"),
        ("ingot targets", "the boards it compiles for"),
        (f"ingot inspect {where}/resnet50.so", "what is inside"),
        (f"ingot bench {where}/resnet50.so", "how fast it is"),
        (f"ingot compile {where}/digits.onnx --target raspberry-pi-4 -o pi4.so", ""),
    ]
    for command, why in commands:
        console.print(f"  [b]{command}[/]{' ' * max(2, 50 - len(command))}[dim]{why}", soft_wrap=True)


def processor() -> str:
    """The processor's name as Linux tells it, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    """Run both parts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description="ingot in a few minutes")
    parser.add_argument("--fresh", action="store_true", help="compile again, whatever an earlier run left")
    parser.add_argument("--folder", type=Path, default=REPO / "build" / "quickstart", help="where the models go")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    console.print()
    console.print(f"[b]ingot {ingot.__version__}[/]  a trained model in, one self-contained shared library out")
    console.print(f"[dim]this machine: {processor()}, {platform.machine()}, {cores} core{'s' * (cores != 1)}")
    console.print()
    try:
        good = digits(args.folder, args.fresh)
        good = resnet50(args.folder, args.fresh) and good
    except ingot.IngotError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    what_next(args.folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
