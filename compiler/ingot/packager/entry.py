"""The generated sources: entry.c, which calls the kernels in order, and weights.S, which carries the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ingot.errors import CompilerError
from ingot.packager.metadata import ALIGNMENT, COMPILER, DTYPES, INSTANCE_BYTES, aligned, tensor_bytes
from ingot.packager.shape_sets import of_items, other_shapes, with_shapes
from ingot.program import BufferRef, CopyStep, Kernel, Program, Step

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported, TensorSpec
    from ingot.packager.selftest import SelfTest
    from ingot.target import Target

_INT32_MAX, _FLOAT32_MAX = 2**31 - 1, 3.4e38
_PLACES = {"input": "inputs", "output": "outputs"}


def c_string(text: str) -> str:
    """A C string literal with the UTF-8 bytes of `text`, in plain ASCII without any trigraph.

    Octal escapes have at most three digits, so a digit that follows is never swallowed.
    """
    result = []
    for byte in text.encode("utf-8", "replace"):
        plain = 0x20 <= byte < 0x7F and byte not in b'"\\?'
        result.append(chr(byte) if plain else f"\\{byte:03o}")
    return f'"{"".join(result)}"'


def c_comment(text: str, most: int = 160) -> str:
    """`text` made safe inside a C comment: one line, no way to close it, no direction marks, no trigraphs."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() and c not in "*\\?" else "_" for c in text).encode("utf-8", "replace").decode()


def symbol_prefix(name: str) -> str:
    """What every symbol of a model starts with."""
    return f"ingot_{name}_"


def _invalid(what: str, found: str) -> CompilerError:
    return CompilerError(f"the lowered program is inconsistent: {what}", where="packager", found=found)


class _Checker:
    """Every reference of a program lies inside its buffer, is aligned, and is written only where that is allowed."""

    def __init__(
        self, program: Program, imported: Imported, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self.program = program
        self.sizes: dict[str, Sequence[int]] = {
            "input": [tensor_bytes(s) for s in inputs],
            "output": [tensor_bytes(s) for s in outputs],
            "weight": [len(program.weights)],
            "arena": [program.arena_bytes],
            "state": [program.state_bytes] * 2,
        }
        self.prefix = symbol_prefix(imported.name)

    def run(self) -> None:
        known: dict[str, Kernel] = {}
        for step in self.program.steps:
            if isinstance(step, CopyStep):
                self.reference(step.source, step.bytes, 1, written=False, label=step.label)
                self.reference(step.destination, step.bytes, 1, written=True, label=step.label)
                continue
            kernel = step.kernel
            if known.setdefault(kernel.symbol, kernel) != kernel:
                raise _invalid("two different kernels share a symbol", kernel.symbol)
            if not kernel.symbol.startswith(self.prefix) or not kernel.symbol.isidentifier():
                raise _invalid(f"a kernel's symbol must start with '{self.prefix}'", kernel.symbol)
            if not 0 <= kernel.extent <= _INT32_MAX or not 1 <= kernel.grain <= _INT32_MAX:
                raise _invalid("extent or grain out of range", f"{kernel.symbol}: {kernel.extent}, {kernel.grain}")
            if kernel.rounds < 1 or kernel.extent % kernel.rounds:
                raise _invalid("rounds do not divide the extent", f"{kernel.symbol}: {kernel.extent}, {kernel.rounds}")
            if len(kernel.params) != len(step.args):
                raise _invalid("wrong number of arguments", f"{step.label}: {len(step.args)} of {len(kernel.params)}")
            for param, argument in zip(kernel.params, step.args, strict=True):
                if param.dtype not in DTYPES:
                    raise _invalid("unknown dtype of a kernel's parameter", f"{kernel.symbol}: {param.dtype}")
                alignment = DTYPES[param.dtype][1]
                self.reference(argument, argument.bytes, alignment, written=not param.readonly, label=step.label)

    def reference(self, ref: BufferRef, size: int, alignment: int, *, written: bool, label: str) -> None:
        sizes = self.sizes[ref.place]
        if not 0 <= ref.index < len(sizes):
            raise _invalid(f"no such {ref.place}", f"{label}: {ref}")
        if ref.offset < 0 or size < 0 or ref.offset + size > sizes[ref.index]:
            raise _invalid(f"an argument reaches beyond its {ref.place} of {sizes[ref.index]} bytes", f"{label}: {ref}")
        if ref.offset % alignment:
            raise _invalid(f"an argument is not aligned to {alignment} bytes", f"{label}: {ref}")
        if written and (ref.place in ("input", "weight") or (ref.place == "state" and ref.index == 0)):
            raise _invalid(f"a kernel writes to a read-only {ref.place}", f"{label}: {ref}")


def check_program(program: Program, imported: Imported) -> None:
    """Raise CompilerError unless every step's arguments fit their buffers."""
    for spec in (*imported.inputs, *imported.outputs):
        if spec.dtype not in DTYPES or len(spec.shape) > 8 or any(d < 0 for d in spec.shape):
            raise _invalid("a tensor the ABI cannot describe", f"{spec.name}: {spec.dtype} {spec.shape}")
        q = spec.quantization
        if q is not None and not (
            len(q.scales) == len(q.zero_points) >= 1
            and (len(q.scales) == 1 or 0 <= q.axis < len(spec.shape))
            and all(abs(s) < _FLOAT32_MAX for s in q.scales)
            and all(abs(z) <= _INT32_MAX for z in q.zero_points)
        ):
            raise _invalid("a quantisation the ABI cannot describe", spec.name)
    if not imported.user_outputs:
        raise _invalid("a model without outputs", imported.name)
    initial = program.initial_state or 0
    if program.state_bytes % ALIGNMENT or (initial and initial + program.state_bytes > len(program.weights)):
        raise _invalid("a state that lies outside its memory", f"{program.state_bytes} bytes, {initial}")
    own = program.batch.counts[-1] if program.batch is not None else 0
    inputs, outputs = of_items(program, imported, own)
    _Checker(program, imported, inputs, outputs).run()
    for bucket in program.buckets:
        here = with_shapes(inputs, bucket.inputs), with_shapes(outputs, bucket.outputs)
        _Checker(replace(program, steps=bucket.steps), imported, *here).run()


def _pointer(ref: BufferRef, dtype: str, *, readonly: bool) -> str:
    ctype = f"{'const ' if readonly else ''}{DTYPES[dtype][2]} *"
    if ref.place in _PLACES:
        base = f"frame->{_PLACES[ref.place]}[{ref.index}].data"
        # A tensor without elements may have a null pointer, to which nothing may be added, not even 0.
        return f"({ctype}){base}" if not ref.offset else f"({ctype})((uint8_t *){base} + {ref.offset})"
    base = {"weight": "frame->weights", "arena": "frame->arena"}.get(ref.place, f"frame->state[{ref.index}]")
    return f"({ctype})({base} + {ref.offset})"


def step_source(name: str, step: Step) -> str:
    """The C function `name` of one kernel call, on the frame's tensors."""
    arguments = [
        _pointer(ref, param.dtype, readonly=param.readonly)
        for ref, param in zip(step.args, step.kernel.params, strict=True)
    ]
    unused = "" if arguments else "    (void)frame;\n"
    body = ",\n        ".join([*arguments, "begin, end"])
    return (
        f"/* {c_comment(step.label)} */\n"
        f"static void {name}(const rt_frame *frame, int32_t begin, int32_t end) {{\n{unused}"
        f"    {step.kernel.symbol}(\n        {body});\n}}\n"
    )


def forward_source(program: Program, name: str = "rt_forward", steps: str = "step_") -> str:
    """The C function `name` of one inference; the functions of its steps are named `steps` and their index."""
    lines = []
    for index, step in enumerate(program.steps):
        if isinstance(step, Step):
            extent, grain, rounds = step.kernel.extent, step.kernel.grain, step.kernel.rounds
            if rounds == 1:
                lines.append(f"    ingot_parallel(frame, {steps}{index}, 0, {extent}, {grain});")
            else:
                part = extent // rounds
                lines.append(f"    for (int32_t begin = 0; begin < {extent}; begin += {part})")
                lines.append(f"        ingot_parallel(frame, {steps}{index}, begin, begin + {part}, {grain});")
        elif step.bytes:
            destination = _pointer(step.destination, "uint8", readonly=False)
            source = _pointer(step.source, "uint8", readonly=True)
            lines.append(f"    /* {c_comment(step.label)} */")
            lines.append(f"    memcpy({destination}, {source}, {step.bytes});")
    if not any(isinstance(step, Step) for step in program.steps):
        lines.append("    (void)ingot_parallel;")
    if not lines or all("frame" not in line for line in lines):
        lines.append("    (void)frame;")
    return f"static void {name}(const rt_frame *frame) {{\n" + "\n".join(lines) + "\n}\n"


def prototype(kernel: Kernel) -> str:
    """The C declaration of a kernel."""
    params = [f"{'const ' if p.readonly else ''}{DTYPES[p.dtype][2]} *" for p in kernel.params]
    return f"void {kernel.symbol}({', '.join([*params, 'int32_t begin', 'int32_t end'])});\n"


def _array(ctype: str, name: str, values: Iterable[object]) -> str:
    return f"static const {ctype} {name}[] = {{{', '.join(map(str, values))}}};\n"


def _float_literal(value: float) -> str:
    """Hexadecimal: exact, and the same on every machine."""
    return float(np.float32(value)).hex() + "f"


def _tensor_table(table: str, specs: Sequence[TensorSpec]) -> str:
    if not specs:
        return ""
    arrays, rows = [], []
    for i, spec in enumerate(specs):
        shape = scales = zero_points = "NULL"
        count = axis = 0
        if spec.shape:
            shape = f"{table}_shape_{i}"
            arrays.append(_array("int64_t", shape, spec.shape))
        if spec.quantization is not None:
            count, axis = len(spec.quantization.scales), spec.quantization.axis
            scales, zero_points = f"{table}_scales_{i}", f"{table}_zero_points_{i}"
            arrays.append(_array("float", scales, (_float_literal(s) for s in spec.quantization.scales)))
            arrays.append(_array("int32_t", zero_points, spec.quantization.zero_points))
        rows.append(
            f"    {{{c_string(spec.name)}, {DTYPES[spec.dtype][0]}, {len(spec.shape)}, {shape}, {tensor_bytes(spec)},"
            f" {count}, {axis}, {scales}, {zero_points}}},\n"
        )
    return "".join(arrays) + f"static const ingot_tensor_info {table}[] = {{\n{''.join(rows)}}};\n"


def _bucket(program: Program, number: int) -> str:
    """The steps of a bucket and the function that calls them."""
    steps = program.buckets[number].steps
    name = f"bucket_{number}"
    functions = [step_source(f"{name}_step_{i}", step) for i, step in enumerate(steps) if isinstance(step, Step)]
    forward = forward_source(replace(program, steps=steps), f"{name}_forward", f"{name}_step_")
    return "\n" + "\n".join([*functions, forward])


def _choice(program: Program, imported: Imported) -> str:
    """The table of input shapes, and the function that finds the one that the caller's inputs have."""
    inputs, batch = imported.user_inputs, program.batch
    names = "input_infos" if inputs else "NULL"
    others = other_shapes(program, imported)
    if not others and batch is None:
        return f"""\
#define RT_SIZES ""
static const rt_bucket rt_buckets[] = {{{{{names}, output_infos, rt_forward}}}};
#define rt_choose(inputs, count) (&rt_buckets[0])
"""
    tables, rows, sizes = [], [], []
    for number, specs in enumerate(others):
        name = f"shapes_{number}"
        for side, infos in zip(("inputs", "outputs"), specs, strict=True):
            tables.append(_tensor_table(f"{name}_{side}", infos))
        rows.append(f"    {{{name}_inputs, {name}_outputs, {_forward_name(program, number)}}},\n")
        sizes.append(_shapes_text(specs[0]))
    sizes.append(_shapes_text(inputs))
    if batch is not None:
        span = f"{batch.smallest}..{batch.largest}"
        sizes = [_shapes_text(inputs, [None if same else span for same in batch.shared])]
    if program.pad is not None:
        sizes = ["fill them up to these, or to fewer along the same axis: " + sizes[-1]]
    text = "; ".join(sizes)
    rows.append(f"    {{{names}, output_infos, {_forward_name(program, None)}}},\n")
    return f"""\
{"".join(tables)}{_batch(program, imported)}{_pad(program, imported)}
#define RT_SIZES {c_string(f"the inputs have none of the compiled shapes: {text}")}
static const rt_bucket rt_buckets[] = {{
{"".join(rows)}}};

/* The bucket of the inputs' shapes; null if there is none. What else is wrong with them is found later. */
static const rt_bucket *rt_choose(const ingot_tensor *inputs, int32_t count) {{
    enum {{ BUCKETS = sizeof rt_buckets / sizeof rt_buckets[0] }};
    if (count != RT_INPUTS || !inputs) return &rt_buckets[BUCKETS - 1];
    for (int32_t b = 0; b < BUCKETS; b++) {{
        bool same = true;
        for (int32_t i = 0; i < count && same; i++) {{
            const ingot_tensor_info *info = &rt_buckets[b].inputs[i];
            same = inputs[i].ndim == info->ndim && (inputs[i].shape || !info->ndim);
            for (int32_t d = 0; d < info->ndim && same; d++) same = inputs[i].shape[d] == info->shape[d];
        }}
        if (same) return &rt_buckets[b];
    }}
    return NULL;
}}
"""


def _shapes_text(specs: Sequence[TensorSpec], spans: Sequence[str | None] | None = None) -> str:
    """Shapes in words; `spans` stand for first dimensions."""
    texts = []
    for spec, span in zip(specs, spans or [None] * len(specs), strict=True):
        dims = list(map(str, spec.shape)) if span is None else [span, *map(str, spec.shape[1:])]
        texts.append(f"{spec.name} [{','.join(dims)}]")
    return ", ".join(texts)


def _forward_name(program: Program, number: int | None) -> str:
    """The function that runs one of the sets of shapes; None stands for the largest."""
    if program.batch is not None:
        return "batch_forward"
    if program.pad is not None:
        return "pad_forward"
    return "rt_forward" if number is None else f"bucket_{number}_forward"


def _pad(program: Program, imported: Imported) -> str:
    """The function that runs inputs of any size in the smallest bucket they fit into, filled up in the arena."""
    pad = program.pad
    if pad is None:
        return ""
    names = [*(f"bucket_{number}_forward" for number in range(len(program.buckets))), "rt_forward"]
    values = [*pad.values, *[None] * len(imported.user_outputs)]
    rows = []
    for spec, axis, value, place in zip(
        (*imported.user_inputs, *imported.user_outputs), pad.axes, values, pad.places, strict=True
    ):
        width = DTYPES[spec.dtype][1]
        shape = spec.shape if axis is not None else ()
        outer, inner = prod(shape[:axis]), prod(shape[(axis or 0) + 1 :]) * width if axis is not None else 0
        data = np.array(value or 0).astype(spec.dtype if spec.dtype != "bfloat16" else "uint16").tobytes()
        octets = ", ".join(map(str, data))
        rows.append(f"        {{{outer}, {inner}, {place}, {width}, {{{octets}}}}},\n")
    first = next(i for i, axis in enumerate(pad.axes) if axis is not None)
    return f"""
/* Runs inputs of any size: filled up in the arena to that of a bucket, and outputs cut back. */
static void pad_forward(const rt_frame *frame) {{
    static const struct {{ int64_t size; void (*forward)(const rt_frame *); }} parts[] = {{
        {", ".join(f"{{{size}, {name}}}" for size, name in zip(pad.sizes, names, strict=True))},
    }};
    /* rows, bytes of one index of a row (0: the tensor is the same for all sizes), place, the element to fill with */
    static const struct {{ size_t rows, bytes, place, width; uint8_t value[8]; }} pads[] = {{
{"".join(rows)}    }};
    const size_t size = (size_t)frame->inputs[{first}].shape[{pad.axes[first]}];
    ingot_tensor tensors[RT_INPUTS + RT_OUTPUTS];
    rt_frame here = *frame;
    int32_t p = 0;
    while ((size_t)parts[p].size < size) p++;
    const size_t whole = (size_t)parts[p].size;
    if (whole == size) {{
        parts[p].forward(frame);
        return;
    }}
    memcpy(tensors, frame->inputs, RT_INPUTS * sizeof *tensors);
    memcpy(tensors + RT_INPUTS, frame->outputs, RT_OUTPUTS * sizeof *tensors);
    here.inputs = tensors, here.outputs = tensors + RT_INPUTS;
    for (int32_t i = 0; i < RT_INPUTS + RT_OUTPUTS; i++) {{
        const size_t bytes = pads[i].bytes;
        if (!bytes) continue;
        uint8_t *to = frame->arena + pads[i].place;
        const uint8_t *from = tensors[i].data;
        tensors[i].data = to;
        for (size_t row = 0; i < RT_INPUTS && row < pads[i].rows; row++, from += size * bytes) {{
            memcpy(to, from, size * bytes);
            to += size * bytes;
            for (size_t left = (whole - size) * bytes; left; left -= pads[i].width, to += pads[i].width)
                memcpy(to, pads[i].value, pads[i].width);
        }}
    }}
    parts[p].forward(&here);
    for (int32_t i = RT_INPUTS; i < RT_INPUTS + RT_OUTPUTS; i++)
        for (size_t row = 0; pads[i].bytes && row < pads[i].rows; row++)
            memcpy((uint8_t *)frame->outputs[i - RT_INPUTS].data + row * size * pads[i].bytes,
                   frame->arena + pads[i].place + row * whole * pads[i].bytes, size * pads[i].bytes);
}}
"""


def _batch(program: Program, imported: Imported) -> str:
    """The function that puts a run on any size of the batch together from programs for some of its items."""
    batch = program.batch
    if batch is None:
        return ""
    names = [*(f"bucket_{number}_forward" for number in range(len(program.buckets))), "rt_forward"]
    parts = sorted(zip(batch.counts, names, strict=True), reverse=True)
    first = batch.shared.index(False)
    inputs, outputs = of_items(program, imported, 1)
    sizes = [
        *(0 if same else tensor_bytes(spec) for spec, same in zip(inputs, batch.shared, strict=True)),
        *map(tensor_bytes, outputs),
    ]
    return f"""
/* Runs the items of a batch, as many at a time as a program takes. */
static void batch_forward(const rt_frame *frame) {{
    static const struct {{ int64_t items; void (*forward)(const rt_frame *); }} parts[] = {{
        {", ".join(f"{{{count}, {name}}}" for count, name in parts)},
    }};
    static const uint64_t item_bytes[] = {{{", ".join(map(str, sizes))}}}; /* 0: the same for all items */
    ingot_tensor tensors[RT_INPUTS + RT_OUTPUTS];
    rt_frame here = *frame;
    memcpy(tensors, frame->inputs, RT_INPUTS * sizeof *tensors);
    memcpy(tensors + RT_INPUTS, frame->outputs, RT_OUTPUTS * sizeof *tensors);
    here.inputs = tensors, here.outputs = tensors + RT_INPUTS;
    int64_t left = frame->inputs[{first}].shape[0] / {inputs[first].shape[0]};
    for (int32_t p = 0; left > 0;) {{
        if (parts[p].items > left) {{
            p++;
            continue;
        }}
        parts[p].forward(&here);
        for (int32_t i = 0; i < RT_INPUTS + RT_OUTPUTS; i++)
            tensors[i].data = (uint8_t *)tensors[i].data + (uint64_t)parts[p].items * item_bytes[i];
        left -= parts[p].items;
    }}
}}
"""


def entry_c(program: Program, imported: Imported, target: Target, precision: str, selftest: SelfTest | None) -> str:
    """The C source of one model. It includes the runtime, so that this file is the artifact's one translation unit."""
    prefix = symbol_prefix(imported.name)
    counts = len(imported.user_inputs), len(imported.user_outputs)
    state_macro = "" if program.initial_state is None else f"#define RT_INITIAL_STATE {program.initial_state}\n"
    selftest_macros, selftest_tables = "#define RT_HAS_SELFTEST 0\n", ""
    if selftest is not None:
        selftest_macros = (
            "#define RT_HAS_SELFTEST 1\n"
            f"#define RT_SELFTEST_SEED UINT64_C({selftest.seed:#x})\n"
            f"#define RT_SELFTEST_RUNS {selftest.runs}\n"
            f"#define rt_expected_data {prefix}expected\n"
        )
        rows = "".join(
            f"    {{{offset}, {output.values.size}, {output.stride}, {float(output.tolerance).hex()}}},\n"
            for offset, output in zip(selftest.offsets(), selftest.outputs, strict=True)
        )
        selftest_tables = (
            "static const rt_expected_output rt_expected[RT_OUTPUTS] = { /* offset, count, stride, tolerance */\n"
            f"{rows}}};\n"
        )
    counts_table = "".join(
        f"{{{imported.user_output_places.index(item.output)}, {item.axis}, {program.counters[item.counter]}}}, "
        for item in imported.counts
    )
    steps = "\n".join(step_source(f"step_{i}", step) for i, step in enumerate(program.steps) if isinstance(step, Step))
    buckets = "".join(_bucket(program, number) for number in range(len(program.buckets)))
    return f"""\
/* {c_comment(imported.name)}: generated by {COMPILER} for {c_comment(target.name)} ({c_comment(target.triple)}, \
{c_comment(target.cpu)}).
 *
 * From top to bottom: the kernels, one function per step that gives a kernel its pointers, the steps in order, the
 * tables that describe() shows, and the runtime.
 */
#define RT_INSTANCE_BYTES {INSTANCE_BYTES}
#define RT_ARENA_BYTES {aligned(program.arena_bytes)}
#define RT_STATE_BYTES {program.state_bytes}
{state_macro}#define RT_INPUTS {counts[0]}
#define RT_OUTPUTS {counts[1]}
#define rt_weights {prefix}weights
{selftest_macros}
#include "rt.h"

/* ---- kernels, each computing the parallel iterations [begin, end) ---- */

#pragma GCC visibility push(hidden)
extern const uint8_t *const {prefix}weights;
{f"extern const uint8_t *const {prefix}expected;" if selftest is not None else ""}
{"".join(prototype(k) for k in program.kernels)}#pragma GCC visibility pop

/* ---- steps ---- */

{steps}
{forward_source(program)}{buckets}
/* ---- what the model expects and gives ---- */

{_tensor_table("input_infos", imported.user_inputs)}{_tensor_table("output_infos", imported.user_outputs)}
{_choice(program, imported)}
static const rt_count rt_counts[] = {{{counts_table}{{-1, 0, 0}}}}; /* output, axis, offset in the state */

static const ingot_model_info rt_info = {{
    .struct_size = sizeof(ingot_model_info),
    .abi_version = INGOT_ABI_VERSION,
    .name = {c_string(imported.name)},
    .compiler = {c_string(COMPILER)},
    .target = {c_string(target.name)},
    .triple = {c_string(target.triple)},
    .features = {c_string(" ".join(target.features))},
    .source_sha256 = {c_string(imported.source_sha256)},
    .precision = {c_string(precision)},
    .n_inputs = {counts[0]},
    .n_outputs = {counts[1]},
    .inputs = {"input_infos" if counts[0] else "NULL"},
    .outputs = {"output_infos" if counts[1] else "NULL"},
    .arena_bytes = {program.arena_bytes},
    .memory_bytes = RT_INSTANCE_BYTES + RT_ARENA_BYTES + 2 * RT_STATE_BYTES,
    .weights_bytes = {len(program.weights)},
    .state_bytes = RT_STATE_BYTES,
}};

{selftest_tables}
#include "cpu.c"
#include "pool.c"
#include "model.c"
#include "selftest.c"

__attribute__((visibility("default"))) const ingot_api *{prefix}api(void);

const ingot_api *{prefix}api(void) {{
    static const ingot_api api = {{
        INGOT_ABI_VERSION, sizeof(ingot_api), rt_create, rt_run, rt_destroy, rt_describe, rt_last_error, rt_version,
        rt_selftest, rt_reset, rt_output_shape,
    }};
    return &api;
}}
"""


def weights_s(imported: Imported, target: Target, weights: bytes, metadata: bytes, selftest: SelfTest | None) -> str:
    """The assembler source that carries weights.bin, expected.bin and metadata.json into the artifact.

    The weights start at a page, of whatever size the target's kernels have. They are reached through a pointer that
    the dynamic loader fills in: an instruction cannot reach beyond 2 GiB. The hashes are no decoration: the
    toolchain's cache does not notice that an included binary has changed.
    """
    prefix = symbol_prefix(imported.name)
    blobs = [("weights", ".ingot.weights", target.page_bytes, weights)]
    if selftest is not None:
        blobs.append(("expected", ".rodata.ingot_expected", ALIGNMENT, selftest.data()))
    text = []
    for name, section, alignment, data in blobs:
        # Without any data there is no section, and the pointer shows itself.
        address = f".L{name}" if data else f"{prefix}{name}"
        if data:
            text.append(f"""\
/* {name}.bin: sha256 {hashlib.sha256(data).hexdigest()} */
    .section {section},"a",%progbits
    .balign {alignment}
.L{name}:
    .incbin "{name}.bin"
""")
        text.append(f"""\
    .section .data.rel.ro.ingot_{name},"aw",%progbits
    .balign 8
    .hidden {prefix}{name}
    .globl {prefix}{name}
    .type {prefix}{name}, %object
{prefix}{name}:
    .dc.a {address}
    .size {prefix}{name}, . - {prefix}{name}
""")
    text.append(f"""\
/* metadata.json: sha256 {hashlib.sha256(metadata).hexdigest()} */
    .section .note.ingot,"",%note
    .balign 4
    .long 6, .Lnote_end - .Lnote, 1
    .asciz "ingot"
    .balign 4
.Lnote:
    .incbin "metadata.json"
.Lnote_end:
    .balign 4
    .section .note.GNU-stack,"",%progbits
""")
    return "".join(text)
