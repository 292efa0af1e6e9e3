"""What an artifact says about itself: the JSON of its ELF note, and the sizes that other files need too."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot import __version__
from ingot.packager.shape_sets import other_shapes

if TYPE_CHECKING:
    from ingot.frontend.interface import Bound, Imported, StateTensor, TensorSpec
    from ingot.program import Program
    from ingot.target import Target

FORMAT = 2
ABI_VERSION = 1
COMPILER = f"ingot {__version__}"

#: Room for the state of one instance (the C side checks that `struct ingot_model` fits); the arena follows.
INSTANCE_BYTES = 10240
ALIGNMENT = 64
#: Bound values of up to this many elements are written out in the metadata.
STATED_ELEMENTS = 64

#: numpy dtype name -> (ingot_dtype in ingot.h, element bytes, C type of a kernel's pointer).
DTYPES: dict[str, tuple[str, int, str]] = {
    "bool": ("INGOT_BOOL", 1, "uint8_t"),
    "int8": ("INGOT_INT8", 1, "int8_t"),
    "uint8": ("INGOT_UINT8", 1, "uint8_t"),
    "int16": ("INGOT_INT16", 2, "int16_t"),
    "uint16": ("INGOT_UINT16", 2, "uint16_t"),
    "int32": ("INGOT_INT32", 4, "int32_t"),
    "uint32": ("INGOT_UINT32", 4, "uint32_t"),
    "int64": ("INGOT_INT64", 8, "int64_t"),
    "uint64": ("INGOT_UINT64", 8, "uint64_t"),
    "float16": ("INGOT_FLOAT16", 2, "uint16_t"),
    "bfloat16": ("INGOT_BFLOAT16", 2, "uint16_t"),
    "float32": ("INGOT_FLOAT32", 4, "float"),
    "float64": ("INGOT_FLOAT64", 8, "double"),
}


def tensor_bytes(spec: TensorSpec) -> int:
    """Size of a dense tensor in bytes."""
    count = DTYPES[spec.dtype][1]
    for extent in spec.shape:
        count *= extent
    return count


def aligned(size: int) -> int:
    """The size rounded up to the alignment of an instance's parts."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def memory_bytes(program: Program) -> int:
    """What `create` needs for one instance: pool, arena, and both halves of its state."""
    return INSTANCE_BYTES + aligned(program.arena_bytes) + 2 * program.state_bytes


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    quantization = None
    if spec.quantization is not None:
        quantization = {
            "scales": [float(s) for s in spec.quantization.scales],
            "zero_points": [int(z) for z in spec.quantization.zero_points],
            "axis": spec.quantization.axis,
        }
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "quantization": quantization}


def _bound(bound: Bound) -> dict[str, Any]:
    """A bound input: small values can be read, of all others there is the hash of their bytes."""
    value = bound.value
    small = value.size <= STATED_ELEMENTS and bool(np.isfinite(value.astype(np.float64)).all())
    return {
        "name": bound.spec.name,
        "dtype": bound.spec.dtype,
        "shape": list(bound.spec.shape),
        "position": bound.position,
        "values": _plain(value) if small else None,
        "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
    }


def _state(kept: StateTensor, imported: Imported, program: Program) -> dict[str, Any]:
    """A pair of the source's input and output that the instance keeps."""
    spec = imported.inputs[kept.input]
    before = sum(tensor_stride(imported.inputs[k.input]) for k in imported.states if k.input < kept.input)
    return {
        "input": spec.name,
        "output": imported.outputs[kept.output].name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "input_position": imported.source_position(kept.input),
        "output_position": kept.output,
        "in_source": kept.in_source,
        "initial": None if program.initial_state is None else program.initial_state + before,
    }


def _cut(imported: Imported) -> dict[str, Any] | None:
    """Where the model was cut, if only a part of it is here."""
    cut = imported.cut
    if cut is None:
        return None
    failed = [{"node": node, "reason": reason} for node, reason in cut.failed]
    names = {"outputs": list(cut.outputs), "opened": list(cut.opened)}
    return {"nodes": cut.nodes, "left_out": cut.left_out, **names, "failed": failed}


def _batch(program: Program) -> dict[str, Any] | None:
    """The sizes a batch may have, if they are a range."""
    batch = program.batch
    if batch is None:
        return None
    return {"smallest": batch.smallest, "largest": batch.largest, "programs": list(batch.counts)}


def tensor_stride(spec: TensorSpec) -> int:
    """Bytes from one tensor of the state to the next."""
    return aligned(tensor_bytes(spec))


def _plain(value: np.ndarray[Any, Any]) -> list[Any]:
    """The elements in order, as Python numbers that give the same elements again."""
    flat = value.reshape(-1)
    return [bool(x) if x.dtype == np.bool_ else int(x) if x.dtype.kind in "iu" else float(x) for x in flat]


def bound_array(entry: dict[str, Any], given: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any] | None:
    """The value of a bound input of the metadata, or of `given` if that has its bytes; else None."""
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if entry["dtype"] == "bfloat16" else entry["dtype"])
    array = given
    if array is None and entry["values"] is not None:
        try:
            array = np.array(entry["values"], dtype)
        except (ValueError, OverflowError):
            return None
    if array is None or array.size != math.prod(entry["shape"]):
        return None
    array = np.ascontiguousarray(array.reshape(entry["shape"]))
    if array.dtype.itemsize != dtype.itemsize or hashlib.sha256(array.tobytes()).hexdigest() != entry["sha256"]:
        return None
    typed: np.ndarray[Any, Any] = array.view(dtype)
    return typed


def build_metadata(
    program: Program, imported: Imported, target: Target, *, precision: str, has_selftest: bool
) -> dict[str, Any]:
    """Everything `inspect`, `check` and the loaders want to know; plain JSON types only."""
    axes = {imported.user_output_places.index(item.output): item.axis for item in imported.counts}
    return {
        "format": FORMAT,
        "abi": ABI_VERSION,
        "name": imported.name,
        "compiler": COMPILER,
        "precision": precision,
        "target": {
            "name": target.name,
            "arch": target.arch,
            "triple": target.triple,
            "cpu": target.cpu,
            "features": list(target.features),
            "libc": target.libc,
            "libc_version": target.libc_version,
        },
        "inputs": [_tensor(spec) for spec in imported.user_inputs],
        "outputs": [_tensor(spec) | {"counted": axes.get(i)} for i, spec in enumerate(imported.user_outputs)],
        "shapes": [
            {
                side: [list(spec.shape) for spec in specs]
                for side, specs in zip(("inputs", "outputs"), pair, strict=True)
            }
            for pair in other_shapes(program, imported)
        ],
        "batch": _batch(program),
        "bound": [_bound(bound) for bound in imported.bound],
        "states": [_state(kept, imported, program) for kept in imported.states],
        "state_bytes": program.state_bytes,
        "arena_bytes": program.arena_bytes,
        "memory_bytes": memory_bytes(program),
        "weights_bytes": len(program.weights),
        "weights_sha256": hashlib.sha256(program.weights).hexdigest(),
        "source": {
            "format": imported.source_format,
            "sha256": imported.source_sha256,
            "peak_bytes": imported.source_peak_bytes,
        },
        "cut": _cut(imported),
        "kernels": len(program.kernels),
        "steps": len(program.steps),
        "macs": program.macs,
        "integer_macs": program.integer_macs,
        "selftest": has_selftest,
    }


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    """Canonical UTF-8 JSON: sorted keys, no spaces; a name that is no valid Unicode stays escaped."""
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
