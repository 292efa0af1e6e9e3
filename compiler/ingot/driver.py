"""The compiler from end to end: a model file and a board's name in, an artifact out."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ingot.errors import OptionError, UnsupportedError
from ingot.target import load_target

if TYPE_CHECKING:
    from ingot.diagnosis import Diagnosis
    from ingot.frontend.bind import Bindable
    from ingot.frontend.interface import Imported
    from ingot.frontend.keep_state import Kept
    from ingot.frontend.shapes import Size
    from ingot.packager.artifact import Artifact
    from ingot.packager.half_error import HalfSummary, WeightSummary
    from ingot.packager.selftest import SelfTest
    from ingot.passes.state import State
    from ingot.program import Program
    from ingot.quantize.report import Report
    from ingot.quantize.samples import ArraySamples, FileSamples
    from ingot.target import Target

#: Arithmetic the compiler can generate.
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
HALF_PRECISIONS = ("bf16", "fp16")

#: Where calibration samples are: a file or folder, or arrays by input name.
Calibration = Union[str, "os.PathLike[str]", Mapping[str, Any]]
Progress = Callable[[str, int, int], None]


def stages() -> tuple[str, ...]:
    """Return the names `progress` is called with, in order."""
    from ingot.passes.pipeline import STEPS

    return ("import", *STEPS, "generate_code", "selftest", "measure_error", "link")


def compile(
    path: str | os.PathLike[str],
    *,
    target: str = "native",
    shape: Mapping[str, Sequence[Size]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
    state: Mapping[str, Kept] | None = None,
    precision: str = "fp32",
    weights: str | None = None,
    calibrate: Calibration | None = None,
    calibrator: str = "auto",
    max_drop: float | None = None,
    selftest: bool = True,
    log: str | os.PathLike[str] | None = None,
    threads: int = 1,
    keep_going: bool = False,
    pad: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    print_ir_after: Collection[str] = (),
    show_ir: Callable[[str, str], None] | None = None,
) -> Artifact:
    """Compile an ONNX or TFLite model to one self-contained shared library.

    path:      the model file.
    target:    a name from `ingot targets`, the path of a target's TOML file, or "native" for this machine.
    shape:     static shapes by input name, for dimensions the model leaves open. A dimension may be a list of sizes,
               one for each bucket: the library takes inputs of each of these shapes, on one copy of the weights. The
               first may be a range: the library takes any of these batch sizes, if the batch's items are independent.
    bind:      values by input name (arrays, numbers or lists of them): these inputs become constants of the model.
    state:     an output by input name, or (output, first value): the model keeps them from one run to the next.
    precision: arithmetic of float layers; layers that are quantised in the model stay so. "int8" quantises them.
               "bf16" and "fp16" multiply and store in half precision, with float32 sums, in the layers that gain by it
               on the target; the artifact's notices and metadata say which did and what it costs in accuracy.
    weights:   how to store the weights of float32 layers in few bits, a name of `ingot.schedules.stored.FORMATS`:
               "int8", "int4", "codebook4" to "codebook8" or "pow2". All arithmetic stays float32.
    calibrate: samples for precision="int8", or for rounding `weights` so that the outputs change least: a .npz file, a
               folder of .npy, .npz, .png or .jpg files, or arrays by input name, with the samples along a first
               dimension (see `ingot.quantize.samples`).
    calibrator: how ranges follow from samples: "auto", or a name in `ingot.quantize.calibrators`.
    max_drop:  keep so few layers in float that at most this share of the accuracy on the samples is lost (they need an
               array "labels" then), or, without labels, that the outputs' error is at most this share of their size.
    selftest:  store a seeded input's expected outputs, from ONNX Runtime or LiteRT, in the artifact.
    log:       a folder of tuning logs to use before those that come with ingot, see `ingot tune`.
    threads:   how many threads the model will mostly run on; of use only to choose among measured configs.
    keep_going: of a model with nodes that cannot be compiled, compile the largest part without them: its outputs are
               those that need none of them, and the tensors they would have read. The metadata's "cut" names them.
    pad:       values by input name: inputs smaller than a bucket are filled up with them to the smallest bucket they
               fit into, and outputs are cut back; refused if that changes what the model computes.
    progress:  called with (stage, number done, number of stages).
    print_ir_after, show_ir: `show_ir(step, text)` gets the program after each named step.

    Raises ModelError, UnsupportedError, ShapeError, TargetError, OptionError, InputError, LogError or ToolchainError.
    """
    from ingot.autotune.lookup import load as load_logs
    from ingot.frontend.shapes import batch_range
    from ingot.packager.artifact import package
    from ingot.packager.buckets import join, spread
    from ingot.packager.pad import with_padding
    from ingot.packager.selftest import Reference, build_selftest
    from ingot.passes.pipeline import run
    from ingot.passes.state import State

    report = _Reporter(progress)
    board = load_target(target)
    check_precision(precision, board, weights, calibrate, max_drop)
    measured = load_logs(board, None if log is None else Path(log), threads)
    report("import")
    sizes = batch_range(shape)
    counts: list[int] = []
    shared: tuple[bool, ...] = ()
    if sizes is not None:
        if precision != "fp32" or weights is not None or keep_going:
            allowed = "float32, or layers that are quantised in the model, of whole models"
            raise OptionError("a range of batches does not go together with this", where="shape", allowed=allowed)
        models, counts, shared = _batch(path, shape or {}, bind, state, sizes, board)
    elif keep_going:
        models = _by_size(diagnose_model(path, target=target, shape=shape, bind=bind, state=state, code=True).models)
        if not models:
            raise UnsupportedError("nothing of the model can be compiled", hint="`ingot check MODEL` lists why")
    else:
        models = _buckets(path, shape, bind, state)
    quantised = None
    if calibrate is not None and len(models) > 1:
        raise OptionError("calibration and buckets do not go together", where="shape", hint="give one shape")
    if weights is not None:
        stored_models = [_store_weights(model, board, weights, calibrate, progress) for model in models]
        models, quantised = [model for model, _ in stored_models], stored_models[-1][1]
    elif calibrate is not None:
        models[0], quantised = _quantize(models[0], board, calibrate, calibrator, max_drop, progress)
    imported = models[-1]
    notices: list[str] = []
    programs: list[Program] = []
    with ExitStack() as beside:
        reference = None
        if selftest and sizes is None:  # the interpreter works while this process compiles
            reference = beside.enter_context(closing(Reference(Path(path), imported)))
        for number, model in enumerate(models):
            # Kernels of the smaller buckets need names of their own.
            mine = replace(model, name=f"{model.name}_bucket{number}") if model is not imported else model
            last = _Reporter(None) if mine is not model else report
            planned = State(mine.module, mine.weights, mine, board, picks=measured, precision=precision)
            planned = run(planned, print_ir_after=print_ir_after, show=show_ir, progress=last)
            last("generate_code")
            programs.append(_generate(planned))
            notices += (notice for notice in (*model.notices, *planned.notices) if notice not in notices)
        program = join(programs, models)
        if pad:
            if sizes is not None or keep_going:
                raise OptionError(
                    "padding does not go together with a range of batches or a part of a model", where="pad"
                )
            program = with_padding(program, models, pad, Path(path))
        if sizes is not None:
            program, imported = spread(program, imported, sizes, counts, shared)
        if measured.counts.skipped:
            notices.append(
                f"{measured.counts.skipped} lines of the tuning logs are damaged or foreign, and were skipped"
            )
        report("selftest")
        stored = None
        named = precision if weights is None else f"{precision}+{weights}"
        if selftest:
            if reference is None:
                reference = beside.enter_context(closing(Reference(Path(path), imported)))
            stored, notice = build_selftest(reference, imported, precision=named)
            if notice:
                notices.append(notice)
    half = None
    report("measure_error")
    if precision in HALF_PRECISIONS:
        half, stored = _measure(planned, programs[-1], imported, stored)
        notices += _half_notices(planned, half)
    few_bits = None
    if weights is not None and quantised is not None:
        few_bits, stored = _measure_weights(planned, programs[-1], imported, stored, named, quantised)
        if few_bits.why_not:
            notices.append(f"the error of {weights} weights was not measured: {few_bits.why_not}")
    report("link")
    imported = replace(imported, notices=tuple(notices))
    artifact = package(program, imported, board, precision=named, selftest=stored, half=half, few_bits=few_bits)
    artifact = replace(artifact, quantization=quantised)
    report.done()
    return artifact


def diagnose_model(
    path: str | os.PathLike[str],
    *,
    target: str = "native",
    shape: Mapping[str, Sequence[Size]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
    state: Mapping[str, Kept] | None = None,
    code: bool = False,
) -> Diagnosis:
    """Find every node that `compile` fails on, up to the memory plan, and with `code` up to the machine code.

    The options are those of `compile`. Raises what it raises, but for single nodes.
    """
    from ingot.diagnosis import diagnose
    from ingot.frontend.shapes import batch_range, expand_buckets, of_batch
    from ingot.passes.pipeline import run
    from ingot.passes.state import State

    board = load_target(target)

    def build(imported: Imported) -> None:
        planned = run(State(imported.module, imported.weights, imported, board))
        if code:
            _generate(planned)

    sizes = batch_range(shape)
    if sizes is None:
        return diagnose(path, expand_buckets(shape), bind, state, build)
    found = diagnose(path, [of_batch(shape or {}, 1)], bind, state, build)
    if not found.failures:
        _batch(path, shape or {}, bind, state, sizes, board)
    return found


def relax_after(
    path: str | os.PathLike[str],
    step: str,
    *,
    target: str = "native",
    shape: Mapping[str, Sequence[Size]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
    state: Mapping[str, Kept] | None = None,
    precision: str = "fp32",
    weights: str | None = None,
    calibrate: Calibration | None = None,
    calibrator: str = "auto",
    max_drop: float | None = None,
) -> str:
    """Return the program as text after the named compiler step, and stop there. The options are those of `compile`.

    Raises OptionError for an unknown step, else what `compile` raises.
    """
    from ingot.passes.pipeline import run, text_of

    board = load_target(target)
    first = program_before(
        path, board, shape=shape, bind=bind, state=state, precision=precision, weights=weights, calibrate=calibrate,
        calibrator=calibrator, max_drop=max_drop,
    )  # fmt: skip
    return text_of(run(first, stop_after=step))


def program_before(
    path: str | os.PathLike[str],
    board: Target,
    *,
    shape: Mapping[str, Sequence[Size]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
    state: Mapping[str, Kept] | None = None,
    precision: str = "fp32",
    weights: str | None = None,
    calibrate: Calibration | None = None,
    calibrator: str = "auto",
    max_drop: float | None = None,
) -> State:
    """Return a model's program before the first pass, quantised if that is asked for.

    The options are those of `compile`; of several buckets it is the largest one's. Raises what `compile` raises for its
    options and for the model.
    """
    from ingot.passes.state import State

    check_precision(precision, board, weights, calibrate, max_drop)
    imported = _buckets(path, shape, bind, state)[-1]
    if weights is not None:
        imported, _ = _store_weights(imported, board, weights, calibrate, None)
    elif calibrate is not None:
        imported, _ = _quantize(imported, board, calibrate, calibrator, max_drop, None)
    return State(imported.module, imported.weights, imported, board, precision=precision)


class _Reporter:
    """Counts stages for the caller's progress display."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.names = stages() if progress is not None else ()
        self.count = 0

    def __call__(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(stage, self.count, len(self.names))
            self.count += 1

    def done(self) -> None:
        """Report that every stage is complete."""
        if self.progress is not None:
            self.progress("done", len(self.names), len(self.names))


def _buckets(
    path: str | os.PathLike[str],
    shape: Mapping[str, Sequence[Size]] | None,
    bind: Mapping[str, Bindable] | None,
    state: Mapping[str, Kept] | None,
) -> list[Imported]:
    """Return the model for each bucket of shapes, the one with the largest inputs last."""
    from ingot.frontend import import_model
    from ingot.frontend.shapes import batch_range, expand_buckets, of_batch

    if batch_range(shape) is not None:
        return [import_model(path, of_batch(shape or {}, 1), bind, state)]
    return _by_size([import_model(path, shapes, bind, state) for shapes in expand_buckets(shape)])


#: Two batches at which a proof looks, and the most items that one program takes.
_PROOF_BATCHES = (2, 3)
_MOST_ITEMS = 8


def _batch(
    path: str | os.PathLike[str],
    shape: Mapping[str, Sequence[Size]],
    bind: Mapping[str, Bindable] | None,
    state: Mapping[str, Kept] | None,
    sizes: range,
    board: Target,
) -> tuple[list[Imported], list[int], tuple[bool, ...]]:
    """Return the model for parts of a batch, how many items these are, and which inputs all items share.

    One part is a single item. A larger one pays where the weights are more than what lies in the caches anyway: it is
    as large as its tensors fit into the second-level cache. Raises UnsupportedError if the items depend on one another.
    """
    from ingot.frontend import import_model
    from ingot.frontend.shapes import of_batch
    from ingot.passes.batch_items import check_items

    def for_items(count: int) -> Imported:
        return import_model(path, of_batch(shape, count), bind, state)

    along = check_items([for_items(count) for count in _PROOF_BATCHES], _PROOF_BATCHES)
    models, counts = [for_items(1)], [1]
    cache = 1024 * (board.cache.l2_kib or board.cache.l1d_kib)
    most = 1
    while 2 * most <= min(_MOST_ITEMS, sizes[-1]) and 2 * most * models[0].source_peak_bytes <= cache:
        most *= 2
    if most > 1:
        models.append(for_items(most))
        counts.append(most)
    return models, counts, tuple(not item for item in along)


def _by_size(models: Sequence[Imported]) -> list[Imported]:
    """Models of different buckets, the one with the largest inputs last."""
    from math import prod

    return sorted(models, key=lambda model: sum(prod(spec.shape) for spec in model.inputs))


def _quantize(
    imported: Imported,
    board: Target,
    calibrate: Calibration,
    calibrator: str,
    max_drop: float | None,
    progress: Progress | None,
) -> tuple[Imported, Report]:
    """Return the model with its layers quantised after training, and what was decided for each."""
    from ingot.quantize.prepare import prepare
    from ingot.quantize.ptq import Options, check, quantize

    check(Options(calibrator, max_drop))
    prepared = prepare(imported, board)  # a model that cannot be quantised is said to be so before its samples are read
    samples = _samples(imported, calibrate)
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        quantized, report = quantize(
            prepared,
            samples,
            Options(calibrator, max_drop, samples.labels),
            build=lambda model: _build_here(model, Path(folder)),
            tick=progress or (lambda *_: None),
        )
    return replace(quantized, notices=(*quantized.notices, *samples.notices)), report


def _store_weights(
    imported: Imported, board: Target, weights: str, calibrate: Calibration | None, progress: Progress | None
) -> tuple[Imported, Report]:
    """Return the model with its layers' weights in few bits, and what that did to each."""
    from ingot.quantize.prepare import prepare
    from ingot.quantize.weight_only import format_named, store_weights

    prepared = prepare(imported, board)
    samples = _samples(imported, calibrate) if calibrate is not None else None
    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        done, report = store_weights(
            prepared,
            format_named(weights),
            samples,
            build=lambda model: _build_here(model, Path(folder)),
            tick=progress or (lambda *_: None),
        )
    notices = samples.notices if samples is not None else ()
    return replace(done, notices=(*done.notices, *notices)), report


def _samples(imported: Imported, calibrate: Calibration) -> ArraySamples | FileSamples:
    """Return the calibration samples, checked against the model's inputs."""
    from ingot.quantize.samples import ArraySamples, FileSamples

    if isinstance(calibrate, Mapping):
        return ArraySamples(calibrate, imported.inputs)
    return FileSamples(Path(calibrate), imported.inputs)


def _build_here(imported: Imported, folder: Path) -> Callable[[Mapping[str, Any]], list[Any]]:
    """Compile a model for this machine and load it: arrays by input name in, the outputs in order out."""
    from ingot.packager.artifact import package
    from ingot.passes.pipeline import run as run_passes
    from ingot.passes.state import State
    from ingot.runtime.loader import load

    here = load_target("native")
    state = run_passes(State(imported.module, imported.weights, imported, here))
    artifact = package(_generate(state), imported, here, precision="fp32", selftest=None)
    model = load(str(artifact.save(folder / f"{secrets.token_hex(8)}.so")))

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        outputs = model.run(dict(feeds))
        return [outputs[spec.name] for spec in imported.outputs]

    return run


def check_precision(
    precision: str, board: Target, weights: str | None, calibrate: Calibration | None, max_drop: float | None
) -> None:
    """Raise OptionError for a precision that does not exist, lacks its samples or that the target cannot convert.

    Weights in few bits are multiplied in float32; they may have samples too.
    """
    if precision not in PRECISIONS:
        raise OptionError("unknown precision", where="precision", found=precision, allowed=", ".join(PRECISIONS))
    if max_drop is not None and precision != "int8":
        wrong = "--max-drop limits what --precision int8 loses"
        raise OptionError(wrong, where="--max-drop", found=f"precision {precision}", allowed="int8")
    if weights is not None:
        from ingot.quantize.weight_only import format_named

        format_named(weights)
        if precision != "fp32":
            wrong, hint = "weights in few bits are multiplied in float32", "leave --precision or --weights out"
            raise OptionError(wrong, where="weights", found=f"precision {precision}", allowed="fp32", hint=hint)
    elif (precision == "int8") != (calibrate is not None):
        wrong = "int8 needs calibration samples" if precision == "int8" else "only int8 needs calibration samples"
        raise OptionError(wrong, where="precision", found=precision, hint="--precision int8 --calibrate samples.npz")
    from ingot.schedules.half import converts, half_of

    half = half_of(precision)
    if half is not None and not converts(board, half):
        raise OptionError(
            f"this target cannot convert {precision} in hardware",
            where="precision",
            found=f"{precision} on {board.name}",
            allowed=", ".join(p for p in PRECISIONS if (h := half_of(p)) is None or converts(board, h)),
        )


def _measure(
    state: State, program: Program, imported: Imported, stored: SelfTest | None
) -> tuple[HalfSummary, SelfTest | None]:
    """Return what half precision did, and the selftest with tolerances for its error."""
    from ingot.frontend.custom import c_sources
    from ingot.packager.half_error import HalfSummary, measure, widened

    kinds = [layer.arithmetic for layer in state.layers]
    multiplied, kept = kinds.count(state.precision), kinds.count("stored")
    if multiplied or kept:
        functions = {raw.symbol: raw.function for raw in state.lowered.kernels}
        custom = bool(c_sources(state.imported.module))
        errors, why_not = measure(program, functions, imported, state.precision, stored, custom=custom)
    else:
        errors, why_not = (), ""
    if stored is not None and errors:
        stored = widened(stored, imported, errors)
    return HalfSummary(len(kinds), multiplied, kept, state.half_tensors, errors, why_not), stored


def _measure_weights(
    state: State, program: Program, imported: Imported, stored: SelfTest | None, precision: str, report: Report
) -> tuple[WeightSummary, SelfTest | None]:
    """Return what storing weights in few bits did, and the selftest with tolerances for its error."""
    from ingot.frontend.custom import c_sources
    from ingot.packager.half_error import WeightSummary, measure, widened

    functions = {raw.symbol: raw.function for raw in state.lowered.kernels}
    custom = bool(c_sources(state.imported.module))
    errors, why_not = measure(program, functions, imported, precision, stored, custom=custom)
    if stored is not None and errors:
        stored = widened(stored, imported, errors)
    layers = sum(layer.decision != "float32" for layer in report.layers)
    return WeightSummary(report.format, len(report.layers), layers, errors, why_not), stored


def _half_notices(state: State, half: HalfSummary) -> list[str]:
    """Return what the user should know of half precision: what stays float32 and why, and the error."""
    name, notices = state.precision, []
    reasons: dict[str, int] = {}
    for layer in state.layers:
        if layer.arithmetic == "fp32":
            reasons[layer.why] = reasons.get(layer.why, 0) + 1
    if not half.multiplied and not half.stored:
        notices.append(f"no layer gains by {name} on this target: all arithmetic and storage stays float32")
    for why, count in reasons.items():
        notices.append(f"{count} of {half.layers} layers multipl{'ies' if count == 1 else 'y'} in float32: {why}")
    if half.why_not:
        notices.append(f"the error of {name} was not measured: {half.why_not}")
    for error in half.errors:
        if error.max_error is None:
            notices.append(f"output '{error.name}' is not finite in {name} on a random input: use fp32 or bf16")
    return notices


def _generate(state: State) -> Program:
    """Return the planned program with its machine code."""
    from ingot.errors import CompilerError
    from ingot.frontend.custom import c_sources
    from ingot.packager.codegen import generate_objects
    from ingot.packager.link import build_object

    program = state.program
    if program is None:
        raise CompilerError("the pipeline ended without a program")
    if not state.lowered.kernels:
        return program
    functions = {raw.symbol: raw.function for raw in state.lowered.kernels}
    objects, llvm_ir = generate_objects(functions, state.target)
    users = [build_object(source, state.target) for source in c_sources(state.imported.module)]
    return replace(program, objects=(*objects, *users), llvm_ir=llvm_ir)
