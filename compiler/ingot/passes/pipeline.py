"""The compiler's table of contents: every step between the frontend and the packager, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from ingot.errors import CompilerError, OptionError
from ingot.passes.fold_batch_norm import fold_batch_norm
from ingot.passes.fold_constants import fold_constants
from ingot.passes.fuse import fuse
from ingot.passes.half_storage import half_storage
from ingot.passes.invariants import INVARIANTS, check
from ingot.passes.layout import nhwc_layout
from ingot.passes.lower import lower
from ingot.passes.plan_memory import plan_memory
from ingot.passes.precision import half_layers
from ingot.passes.recognise import recognise
from ingot.passes.rows_as_images import rows_as_images
from ingot.passes.select_attention import select_attention
from ingot.passes.select_products import select_products
from ingot.passes.select_recurrent import select_recurrent
from ingot.passes.select_rows import select_rows
from ingot.passes.select_templates import select_templates
from ingot.passes.select_transposes import select_transposes
from ingot.passes.simplify import simplify
from ingot.passes.state import Pass, State
from ingot.passes.strides_to_channels import strides_to_channels
from ingot.passes.whole_numbers import whole_numbers

#: What the frontend promises.
IMPORTED = ("normal_form", "interface_kept")

#: New transposes and reshapes, also of weights, come in with a layout.
LAYOUT_BREAKS = ("no_identities", "constants_folded")

PIPELINE: tuple[Pass, ...] = (
    Pass("simplify", simplify, requires=IMPORTED, ensures=("no_identities",)),
    Pass("rows_as_images", rows_as_images, requires=("no_identities",)),
    Pass("whole_numbers", whole_numbers, requires=("no_identities",)),
    Pass("fold_constants", fold_constants, requires=("no_identities",), ensures=("constants_folded",)),
    Pass("fold_batch_norm", fold_batch_norm, requires=("constants_folded",)),
    Pass(
        "nhwc_layout",
        nhwc_layout,
        requires=("constants_folded",),
        ensures=("nhwc",),
        breaks=("no_identities", "constants_folded"),
    ),
    Pass("strides_to_channels", strides_to_channels, requires=("nhwc",)),
    Pass("clean_layout", simplify, requires=("nhwc",), ensures=("no_identities",)),
    Pass("fold_layout", fold_constants, requires=("no_identities",), ensures=("constants_folded",)),
    Pass("recognise", recognise, requires=("nhwc", "constants_folded")),
    Pass("half_layers", half_layers, requires=("nhwc", "constants_folded")),
    Pass("select_templates", select_templates, requires=("nhwc", "constants_folded"), ensures=("packed_weights",)),
    Pass("select_attention", select_attention, requires=("nhwc", "constants_folded")),
    Pass("select_products", select_products, requires=("nhwc", "constants_folded")),
    Pass("select_rows", select_rows, requires=("nhwc", "constants_folded")),
    Pass("select_recurrent", select_recurrent, requires=("nhwc", "constants_folded")),
    Pass("select_transposes", select_transposes, requires=("nhwc", "constants_folded")),
    Pass("fuse", fuse, requires=("packed_weights",), ensures=("only_kernels",)),
    Pass("half_storage", half_storage, requires=("only_kernels",)),
    Pass("lower", lower, requires=("only_kernels",), ensures=("defined_before_use", "all_outputs_written")),
    Pass("plan_memory", plan_memory, requires=("defined_before_use", "all_outputs_written"), ensures=("no_overlap",)),
)

STEPS: tuple[str, ...] = tuple(step.name for step in PIPELINE)

#: Set to 1 to check every invariant of every pass on the program itself.
CHECK_VARIABLE = "INGOT_CHECK_IR"


def validate(pipeline: tuple[Pass, ...]) -> None:
    """Raise CompilerError if a pass requires what no pass before it ensures."""
    held = set(IMPORTED)
    for step in pipeline:
        unknown = [n for n in (*step.requires, *step.ensures, *step.breaks) if n not in INVARIANTS]
        missing = [n for n in step.requires if n not in held]
        if unknown or missing:
            raise CompilerError(
                f"pass {step.name!r} cannot stand here",
                found=f"unknown {unknown}, not ensured before it {missing}",
                allowed=", ".join(sorted(held)),
            )
        held = (held - set(step.breaks)) | set(step.ensures)


def run(
    state: State,
    *,
    stop_after: str | None = None,
    print_ir_after: Collection[str] = (),
    show: Callable[[str, str], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> State:
    """Run the pipeline.

    stop_after: name of the last pass to run. print_ir_after: names of passes after which `show(name, text)` gets the
    program as text. progress: called with each pass's name before it runs. Raises OptionError for a name that is no
    pass, CompilerError for a broken invariant.
    """
    for name in (*print_ir_after, *([stop_after] if stop_after else [])):
        if name not in STEPS:
            raise OptionError("there is no such compiler step", found=name, allowed=", ".join(STEPS))
    validate(PIPELINE)
    checking = os.environ.get(CHECK_VARIABLE) == "1"
    held: set[str] = set(IMPORTED)
    for step in PIPELINE:
        if progress is not None:
            progress(step.name)
        if checking:
            check(state, tuple(sorted(held)), f"before pass {step.name}")
        state = step.run(state)
        held = (held - set(step.breaks)) | set(step.ensures)
        if checking:
            check(state, tuple(sorted(held)), f"after pass {step.name}")
        if show is not None and step.name in print_ir_after:
            show(step.name, text_of(state))
        if step.name == stop_after:
            break
    return state


def text_of(state: State) -> str:
    """Return the program as text: the steps once it is planned, the Relax module before."""
    if state.program is not None:
        lines = [f"arena {state.program.arena_bytes} bytes, weights {len(state.program.weights)} bytes"]
        for i, step in enumerate(state.program.steps):
            refs = step.args if hasattr(step, "args") else (step.source, step.destination)
            places = ", ".join(f"{r.place}{r.index if r.place in ('input', 'output') else ''}+{r.offset}" for r in refs)
            name = step.kernel.symbol if hasattr(step, "kernel") else "copy"
            lines.append(f"{i:4d} {name}({places})")
        return "\n".join(lines)
    if state.lowered is not None:
        return "\n\n".join(str(kernel.function.script(show_meta=False)) for kernel in state.lowered.kernels)
    return str(state.module.script(show_meta=False))
