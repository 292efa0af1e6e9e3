"""model.h: the one header that a program needs to use a model; it contains ingot.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingot.packager.entry import c_comment
from ingot.packager.link import runtime_source
from ingot.packager.metadata import COMPILER, memory_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingot.frontend.interface import Imported, TensorSpec
    from ingot.program import Program
    from ingot.target import Target


def _rows(kind: str, specs: Sequence[TensorSpec], counted: Mapping[int, int] | None = None) -> str:
    rows = []
    for i, spec in enumerate(specs):
        axis = (counted or {}).get(i)
        shape = ", ".join(f"<= {size}" if place == axis else str(size) for place, size in enumerate(spec.shape))
        rows.append(f" *   {kind} {i}: {c_comment(spec.name)}  {spec.dtype} [{shape}]\n")
    return "".join(rows)


def _buckets(program: Program) -> str:
    rows = []
    if program.batch is not None:
        return f" *   takes a batch of {program.batch.smallest} to {program.batch.largest} items\n"
    for bucket in program.buckets:
        shapes = ", ".join(str(list(shape)) for shape in bucket.inputs)
        rows.append(f" *   also takes inputs of the shapes {shapes}\n")
    if program.pad is not None:
        rows.append(" *   and all smaller sizes, which it fills up\n")
    return "".join(rows)


def _states(imported: Imported) -> str:
    pairs = [(imported.inputs[kept.input], imported.outputs[kept.output]) for kept in imported.states]
    return "".join(
        f" *   state: {c_comment(spec.name)}, the next value of which is {c_comment(result.name)}  {spec.dtype}"
        f" [{', '.join(map(str, spec.shape))}]\n"
        for spec, result in pairs
    )


def model_h(program: Program, imported: Imported, target: Target) -> str:
    """The text of model.h. It can stand beside the headers of other models: each contains ingot.h under its guard."""
    counted = {imported.user_output_places.index(item.output): item.axis for item in imported.counts}
    rows = _rows("input", imported.user_inputs) + _rows("output", imported.user_outputs, counted)
    rows += _states(imported) + _buckets(program)
    upper = f"INGOT_{imported.name.upper()}"
    return f"""\
/* {c_comment(imported.name)}: compiled by {COMPILER} for {c_comment(target.name)} ({c_comment(target.triple)}).
 *
{rows} */
#ifndef {upper}_H
#define {upper}_H

{runtime_source("ingot.h").decode("utf-8").strip()}

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_N_INPUTS {len(imported.user_inputs)}
#define {upper}_N_OUTPUTS {len(imported.user_outputs)}

/* Bytes that ingot_options.memory needs, aligned to INGOT_MEMORY_ALIGNMENT. */
#define {upper}_MEMORY_BYTES {memory_bytes(program)}

/* The model's functions; never null. */
const ingot_api *ingot_{imported.name}_api(void);

#ifdef __cplusplus
}}
#endif
#endif /* {upper}_H */
"""
