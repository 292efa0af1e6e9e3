"""What an artifact says about itself: the JSON of its ELF note, and the sizes that other files need too."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ingot import __version__

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported, TensorSpec
    from ingot.program import Program
    from ingot.target import Target

FORMAT = 1
ABI_VERSION = 1
COMPILER = f"ingot {__version__}"

#: Room for the state of one instance (the C side checks that `struct ingot_model` fits); the arena follows.
INSTANCE_BYTES = 10240
ALIGNMENT = 64

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


def memory_bytes(program: Program) -> int:
    """What `create` needs for one instance: state, pool and arena."""
    return INSTANCE_BYTES + -(-program.arena_bytes // ALIGNMENT) * ALIGNMENT


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    quantization = None
    if spec.quantization is not None:
        quantization = {
            "scales": [float(s) for s in spec.quantization.scales],
            "zero_points": [int(z) for z in spec.quantization.zero_points],
            "axis": spec.quantization.axis,
        }
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "quantization": quantization}


def build_metadata(
    program: Program, imported: Imported, target: Target, *, precision: str, has_selftest: bool
) -> dict[str, Any]:
    """Everything `inspect`, `check` and the loaders want to know; plain JSON types only."""
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
        "inputs": [_tensor(spec) for spec in imported.inputs],
        "outputs": [_tensor(spec) for spec in imported.outputs],
        "arena_bytes": program.arena_bytes,
        "memory_bytes": memory_bytes(program),
        "weights_bytes": len(program.weights),
        "weights_sha256": hashlib.sha256(program.weights).hexdigest(),
        "source": {
            "format": imported.source_format,
            "sha256": imported.source_sha256,
            "peak_bytes": imported.source_peak_bytes,
        },
        "kernels": len(program.kernels),
        "steps": len(program.steps),
        "macs": program.macs,
        "selftest": has_selftest,
    }


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    """Canonical UTF-8 JSON: sorted keys, no spaces; a name that is no valid Unicode stays escaped."""
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
