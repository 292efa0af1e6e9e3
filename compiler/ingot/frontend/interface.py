"""What every importer hands to the passes: one frozen description of a model, the same for ONNX and TFLite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import tvm

# Tensors up to this many elements stay `relax.Constant`; larger ones are parameters of `main` ("weights").
CONSTANT_ELEMENTS = 64


@dataclass(frozen=True)
class Quantization:
    """Affine quantisation of one tensor: real = scale * (stored - zero_point).

    `scales` and `zero_points` have one entry (per tensor) or one entry per index along `axis` (per channel).
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """One input or output as the user knows it: the model's own name, dtype, layout and (static) shape.

    `dtype` is a numpy dtype name such as "float32", "int8" or "bool", or "bfloat16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Imported:
    """A model in the compiler's normal form (see `ingot.frontend.normal_form`).

    `weights` holds one array for each parameter of `module["main"]` after the inputs, in that order, by the
    parameter's name. `name` is a C identifier made from the file's stem. `source_peak_bytes` is the largest number
    of bytes live at once on the source graph, in its own order, without weights, inputs and outputs: a lower bound
    for any arena. `notices` are sentences the user should read.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str
    source_format: str
    source_sha256: str
    source_peak_bytes: int
    notices: tuple[str, ...]
