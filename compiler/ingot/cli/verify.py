"""`ingot verify`: a library's outputs next to those of an independent interpreter."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ingot.cli.options import MAX_THREADS, PATH, bind_option, parse_binds, seed_option
from ingot.errors import IngotError, InputError, LoadError, ModelError, RunError, ToolchainError

if TYPE_CHECKING:
    from rich.text import Text

    from ingot.cli.peers import Peer
    from ingot.runtime.loader import TensorSpec
    from ingot.target import Target

    Array = np.ndarray[Any, Any]

#: In place of the precision of a model that came quantised.
QUANTIZED = "a quantised model"
#: Largest max|error| / max|reference| of float outputs, by the library's precision; 8-bit outputs may differ by one
#: step of their 255. In a quantised model a sum next to the middle of two steps may be rounded to either of them, and
#: later layers carry that on.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 6e-2, "int8": 2.5e-1, QUANTIZED: 2e-2}
#: The same where weights are stored in few bits: the precision is then "fp32+int4".
FEW_BITS_TOLERANCE = 2.5e-1


@dataclass
class _Score:
    """What the samples so far say of one output."""

    spec: TensorSpec
    precision: str = "fp32"
    error: float = 0.0  # max|error| / max|reference|
    steps: float = 0.0  # max|error|, as stored
    agreeing: int = 0
    rows: int = 0

    def add(self, found: Array, wanted: Array) -> None:
        from ingot.cli.peers import distance

        if self.spec.type == "bfloat16":
            found, wanted = _widen(found), _widen(wanted)
        self.error = max(self.error, distance(found, wanted))
        if found.shape == wanted.shape and found.size:
            a, b = found.astype(np.float64), wanted.astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinities of both sides; `distance` has judged them
                self.steps = max(self.steps, float(np.nanmax(np.abs(a - b), initial=0.0)))
            if a.ndim and a.shape[-1] > 1:
                classes = a.shape[-1]
                same = a.reshape(-1, classes).argmax(1) == b.reshape(-1, classes).argmax(1)
                self.agreeing += int(same.sum())
                self.rows += same.size

    def within(self, tolerance: float | None) -> bool:
        if tolerance is not None:
            return self.error <= tolerance
        if self.spec.type in ("int8", "uint8"):
            return self.steps <= 1 and self.error < float("inf")
        if self.spec.dtype.kind == "f" or self.spec.type == "bfloat16":
            return self.error <= _tolerance(self.precision)
        return self.error == 0


def _tolerance(precision: str) -> float:
    return FEW_BITS_TOLERANCE if "+" in precision else TOLERANCES.get(precision, TOLERANCES["fp32"])


def _widen(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@click.command("verify", short_help="Compare a compiled model with ONNX Runtime or LiteRT.")
@click.argument("library", metavar="MODEL.so", type=PATH)
@click.argument("model", type=PATH)
@click.option("--data", type=PATH, help="A .npz file with an array per input; rows along a batch of 1 are samples.")
@click.option(
    "--on", "place", type=click.Choice(("here", "qemu")), default="here", show_default=True, help="Where it runs."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    help="Largest max|error| / max|reference|. Default: 1e-4; 2e-2 for fp16 and for a model that came quantised, "
    "6e-2 for bf16, 0.25 for int8 and few bits; one step for outputs of 8 bits.",
)
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), default=1, show_default=True)
@seed_option
@bind_option
def command(
    library: Path,
    model: Path,
    data: Path | None,
    place: str,
    tolerance: float | None,
    threads: int,
    seed: int,
    binds: Sequence[str],
) -> int:
    """Compare the outputs of MODEL.so with those of ONNX Runtime or LiteRT on MODEL, the file it was compiled from.

    Ends with 1 if an output is outside the tolerance. A library for another architecture runs with --on qemu.
    Values that were bound when it was compiled are taken from the library; large ones have to be given again.
    A model that keeps state runs all samples in a row, from its first state. One that was compiled for several shapes
    runs random inputs of each; of many, the smallest, one in the middle and the largest.

    \b
      ingot verify model.so model.onnx
      ingot verify pi4.so model.onnx --on qemu --data samples.npz
    """
    from ingot.cli.console import clean, console, source_is_quantized
    from ingot.cli.fixed_inputs import bound_inputs, first_states
    from ingot.packager.selftest import source_inputs
    from ingot.runtime.loader import TensorSpec, read_metadata

    meta = read_metadata(str(library))
    source_format = _source_format(model, meta)
    bound, states = bound_inputs(meta, parse_binds(binds)), first_states(library, meta)
    inputs = [TensorSpec(t) for t in meta["inputs"]]
    precision = QUANTIZED if source_is_quantized(meta) else meta["precision"]
    scores = [_Score(TensorSpec(t), precision) for t in meta["outputs"]]
    out, fixed = console(), [*bound, *states]
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(_runner(library, meta, place, threads))
        buckets = [] if place == "qemu" else _few(meta["shapes"])
        count, samples = stack.enter_context(_samples(inputs, buckets, data, seed))
        judged = stack.enter_context(_part(model, meta, [*(spec.name for spec in inputs), *(n for _, n, _ in fixed)]))
        judge = stack.enter_context(_Judge(judged, source_format, quantized=source_is_quantized(meta)))
        for feeds, found in run(samples):
            every = judge.outputs(source_inputs(feeds, [*bound, *states]))
            kept = [entry["output_position"] for entry in meta["states"] if entry["in_source"]]
            if any(place >= len(every) for place in kept):
                raise ModelError("the model has other outputs", where=str(model), found=f"{len(every)} outputs")
            states = [(*state[:2], every[place]) for state, place in zip(states, kept, strict=True)]
            wanted = [array for place, array in enumerate(every) if place not in kept]
            if len(wanted) != len(scores):
                there, here = f"{len(wanted)} outputs of {judge.engine}", f"{len(scores)}, as the library has"
                raise ModelError("the model has other outputs", where=str(model), found=there, allowed=here)
            for score, a, b in zip(scores, found, wanted, strict=True):
                score.add(a, b)
    where = "here" if place == "here" else f"under qemu ({meta['target']['cpu']})"
    what = f"{count} sample{'' if count == 1 else 's'} of {clean(data)}" if data else f"random inputs (seed {seed})"
    what += f" of {count} shapes" if not data and count > 1 else ""
    out.print(f"{clean(library)} {where}, next to {judge.engine} on {clean(model)}, {what}", soft_wrap=True)
    return 0 if _show(scores, tolerance) else 1


@contextlib.contextmanager
def _part(model: Path, meta: dict[str, Any], inputs: Sequence[str]) -> Iterator[Path]:
    """The model, or if the library holds only a part of it, a file with that part."""
    from ingot.packager.source_part import write_part

    if meta["cut"] is None:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        path = Path(folder) / f"part{model.suffix}"
        write_part(model, meta["cut"]["outputs"], inputs, path)
        yield path


def _source_format(model: Path, meta: dict[str, Any]) -> str:
    """The model's format; says so if it is not the file the library was compiled from."""
    from ingot.cli.console import console
    from ingot.frontend.source import read_source

    source = read_source(model)
    if hashlib.sha256(source.data).hexdigest() != meta["source"]["sha256"]:
        console(stderr=True).print("note: the library was compiled from another file than this model", style="yellow")
    return source.format


#: Takes samples and gives each with its outputs.
_Runner = Callable[[Iterator[dict[str, Any]]], Iterator[tuple[dict[str, Any], list[Any]]]]


@contextlib.contextmanager
def _runner(library: Path, meta: dict[str, Any], place: str, threads: int) -> Iterator[_Runner]:
    """A function from samples to samples with their outputs, here or on an emulated CPU."""
    if place == "qemu":
        yield lambda samples: _emulated(library, meta, samples, threads)
        return
    import ingot

    try:
        loaded = ingot.load(str(library), threads=threads)
    except LoadError as error:
        if error.found == meta["target"]["arch"]:  # refused for its architecture
            hint = "run it in an emulator: --on qemu"
            raise LoadError(error.what, error.where, error.found, error.allowed, hint) from None
        raise
    with loaded as net:
        yield lambda samples: ((feeds, list(net.run(feeds).values())) for feeds in samples)


def _emulated(
    library: Path, meta: dict[str, Any], samples: Iterator[dict[str, Any]], threads: int
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    from ingot.emulator import stream_under_qemu

    # A model with state sees all samples in one process.
    groups = [list(samples)] if meta["states"] else ([feeds] for feeds in samples)
    for group in groups:
        runs = [_checked(feeds, meta) for feeds in group]
        yield from zip(group, stream_under_qemu(library, runs, _target_of(meta), threads=threads), strict=True)


def _checked(feeds: dict[str, Array], meta: dict[str, Any]) -> list[Array]:
    """The inputs in the model's order. Raises InputError for a missing or extra one."""
    names = [spec["name"] for spec in meta["inputs"]]
    if set(feeds) != set(names):
        raise InputError("the inputs are not the model's", found=", ".join(feeds), allowed=", ".join(names))
    return [feeds[name] for name in names]


def _target_of(meta: dict[str, Any]) -> Target:
    """The target as the library describes it: that of its name may have changed, or be another machine's `native`."""
    from ingot.target import Cache, CoreCluster, Target

    board = meta["target"]
    try:
        return Target(
            name=board["name"],
            description="as the library describes it",
            sources=("the library's metadata",),
            triple=board["triple"],
            cpu=board["cpu"],
            features=tuple(board["features"]),
            cores=(CoreCluster(count=1, name=board["cpu"], cpu=board["cpu"]),),
            cache=Cache(l1d_kib=32, l2_kib=0, l3_kib=0),
            libc=board["libc"],
            libc_version=board["libc_version"],
        )
    except (IngotError, ValueError) as error:
        found = error.what if isinstance(error, IngotError) else "fields that no target has"
        raise LoadError("the library's target is not one this ingot knows", found=found) from None


@contextlib.contextmanager
def _samples(
    inputs: Sequence[TensorSpec], buckets: Sequence[dict[str, Any]], data: Path | None, seed: int
) -> Iterator[tuple[int, Iterator[dict[str, Array]]]]:
    """How many samples there are, and these: seeded random ones, or those of a file, read one at a time."""
    from ingot.arrays import Archive, kind_of
    from ingot.cli.peers import random_feeds

    if data is None:
        sets = [*(_in_shapes(inputs, bucket["inputs"]) for bucket in buckets), inputs]
        yield len(sets), iter([random_feeds(specs, seed) for specs in sets])
        return
    if kind_of(data) != "npz":
        raise InputError("--data is not an .npz file", where=str(data), allowed="a file of np.savez")
    with Archive(data) as archive:
        missing = [repr(spec) for spec in inputs if spec.name not in archive.names]
        if missing:
            found = ", ".join(archive.names)[:200] or "no arrays"
            raise InputError("an input is missing in --data", where=str(data), found=found, allowed=", ".join(missing))
        each = {spec.name: archive.samples(spec.name, spec) for spec in inputs}
        counts = {count for count, _ in each.values()}
        if len(counts) > 1:
            found = ", ".join(f"{name}: {count}" for name, (count, _) in each.items())
            raise InputError("the inputs in --data have different numbers of samples", where=str(data), found=found)
        rows = zip(*(samples for _, samples in each.values()), strict=True)
        yield counts.pop() if counts else 1, (dict(zip(each, row, strict=True)) for row in rows)


def _few(shapes: Sequence[Any]) -> list[Any]:
    """Some of the shapes that stand for all: each would need an engine of its own."""
    return list(shapes) if len(shapes) <= 16 else [shapes[0], shapes[len(shapes) // 2]]


def _in_shapes(specs: Sequence[TensorSpec], shapes: Sequence[Sequence[int]]) -> list[TensorSpec]:
    """The inputs in the shapes of a bucket."""
    from ingot.runtime.loader import TensorSpec

    return [
        TensorSpec({"name": spec.name, "dtype": spec.type, "shape": shape, "quantization": spec.quantization})
        for spec, shape in zip(specs, shapes, strict=True)
    ]


class _Judge:
    """The best engine that is installed and takes the model, started with the first sample."""

    def __init__(self, model: Path, source_format: str, *, quantized: bool) -> None:
        self.engine = ""
        self._quantized = quantized
        self._model, self._format = model, source_format
        self._peer: Peer | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Judge:
        """Start nothing yet: the engine starts with the first sample."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the engine's process."""
        self._stack.close()

    def outputs(self, feeds: dict[str, Array]) -> list[Array]:
        """The engine's outputs. Raises what the best engine raised, where none can judge the model."""
        shapes = [array.shape for array in feeds.values()]
        if self._peer is None or shapes != self._shapes:  # an engine loads a model for one set of shapes
            self._stack.close()
            self._peer, self._shapes = self._start(feeds), shapes
        else:
            self._peer.feed(feeds)
        return self._peer.outputs()

    def _start(self, feeds: dict[str, Array]) -> Peer:
        from ingot.cli.engines import engines_for
        from ingot.cli.peers import peers

        failure: RunError | ToolchainError | None = None
        for engine in engines_for(self._format, quantized=self._quantized):
            try:
                (peer,) = self._stack.enter_context(peers([(engine, self._model)], 1, [feeds]))
            except (RunError, ToolchainError) as error:
                failure = failure or error
            else:
                self.engine = engine
                peer.turn(True)
                return peer
        raise failure or RunError("no engine can judge this model", where=str(self._model))


def _show(scores: Sequence[_Score], tolerance: float | None) -> bool:
    from ingot.cli.console import clean, console, shape, show, table, verdict

    rows: list[list[str | Text]] = []
    for score in scores:
        spec = score.spec
        agreement = f"{score.agreeing} of {score.rows}" if score.rows else "-"
        error = f"{score.error:.2g}"
        largest = f"{score.steps:.3g}"
        ok = score.within(tolerance)
        rows.append([clean(spec.name), spec.type, shape(spec.shape), error, largest, agreement, verdict(ok)])
    columns = ("output", "dtype", "shape", "max|err| / max|ref|", "max|err|", "same argmax", "within")
    out = console()
    show(out, table(columns, rows, right=("max|err| / max|ref|", "max|err|", "same argmax")))
    ok = all(score.within(tolerance) for score in scores)
    allowed = f"{tolerance:g}" if tolerance is not None else ""
    if not allowed:
        precision = scores[0].precision if scores else "fp32"
        allowed = f"{_tolerance(precision):g} for {clean(precision)}, one step for 8-bit, none for integers"
    out.print(("" if ok else "not ") + f"within the tolerance ({allowed})", style="green" if ok else "bold red")
    return ok
