"""Inputs smaller than a bucket: filled up with a value that the user gives, and outputs cut back.

That is only right if a model makes nothing of the filling, as with a mask of zeros. It is checked when the model is
compiled: an independent interpreter computes random inputs of sizes between the buckets, as they are and filled up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.errors import OptionError, ToolchainError, UnsupportedError
from ingot.packager.metadata import aligned, tensor_bytes
from ingot.packager.selftest import interpret, random_inputs
from ingot.packager.shape_sets import of_size
from ingot.program import Pad, Program

if TYPE_CHECKING:
    from ingot.frontend.interface import Imported

#: The largest size: each one up to it has a row in the library's tables.
MAX_PADDED = 512
#: Share of the largest output by which a filled-up run may differ: other sums, in another order.
TOLERANCE = 1e-3
_SEEDS = (1, 2)


def with_padding(program: Program, models: Sequence[Imported], values: Mapping[str, Any], path: Path) -> Program:
    """The program of several buckets with inputs filled up with `values` by their names.

    models: of the buckets, the largest last. Raises OptionError where there is nothing to pad or a value is missing,
    UnsupportedError where padding changes what the model at `path` computes, ToolchainError where nobody can say.
    """
    pad = _layout(program, models, values)
    _check(pad, models[-1], path)
    own = aligned(program.arena_bytes)
    total = own + sum(_room(models[-1], pad))
    return replace(program, pad=pad, arena_bytes=total)


def _room(imported: Imported, pad: Pad) -> list[int]:
    """Bytes of the arena for each tensor that is filled up or cut back."""
    specs = [*imported.user_inputs, *imported.user_outputs]
    return [0 if axis is None else aligned(tensor_bytes(spec)) for spec, axis in zip(specs, pad.axes, strict=True)]


def _layout(program: Program, models: Sequence[Imported], values: Mapping[str, Any]) -> Pad:
    main = models[-1]
    if len(models) < 2 or main.states or main.counts or main.bound:
        what = "padding needs several buckets of a model without state, bound inputs and outputs of varying size"
        raise OptionError(what, where="pad", hint="give sizes in braces: --shape 'ids=1x{16,64}'")
    axes: list[int | None] = []
    sizes: set[tuple[int, ...]] = set()
    for specs in zip(*((*model.user_inputs, *model.user_outputs) for model in models), strict=True):
        different = [
            axis for axis, dims in enumerate(zip(*(s.shape for s in specs), strict=True)) if len(set(dims)) > 1
        ]
        if len(different) > 1:
            raise OptionError("padding works along one axis", where=f"tensor {specs[0].name!r}", found=str(different))
        axes.append(different[0] if different else None)
        if different:
            sizes.add(tuple(spec.shape[different[0]] for spec in specs))
    if len(sizes) != 1 or max(map(max, sizes)) > MAX_PADDED:
        found = "; ".join(map(str, sorted(sizes)))
        raise OptionError(
            "padding needs one size for all tensors", where="pad", found=found, allowed=f"to {MAX_PADDED}"
        )
    names = [spec.name for spec, axis in zip(main.user_inputs, axes, strict=False) if axis is not None]
    if set(names) != set(values):
        found, allowed = ", ".join(values), f"a value for each of {', '.join(names)}"
        raise OptionError("padding needs a value for each input that differs", "pad", found, allowed)
    for spec in main.user_inputs:
        if spec.name in values and spec.dtype in ("bfloat16", "float16"):
            raise OptionError("padding of 16-bit floats is not supported", where=f"input {spec.name!r}")
        if spec.name in values and np.array(values[spec.name]).astype(spec.dtype) != values[spec.name]:
            raise OptionError("a padding value does not fit its input", f"input {spec.name!r}", str(values[spec.name]))
    pad = Pad(sizes.pop(), tuple(values.get(spec.name) for spec in main.user_inputs), tuple(axes), ())
    ends = np.cumsum([aligned(program.arena_bytes), *_room(main, pad)])
    return replace(pad, places=tuple(int(end) for end in ends[:-1]))


def fill(pad: Pad, arrays: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Inputs filled up to a size."""
    result = []
    for array, axis, value in zip(arrays, pad.axes, pad.values, strict=False):
        missing = [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)]
        result.append(array if axis is None else np.pad(array, missing, constant_values=value or 0))
    return result


def _check(pad: Pad, imported: Imported, path: Path) -> None:
    """Compare inputs as they are and filled up, for sizes between all buckets."""
    smaller = 0
    for bucket in pad.sizes:
        for size in sorted({smaller + 1, bucket - 1} - {smaller, bucket, 0}):
            for seed in _SEEDS:
                inputs, _ = of_size(pad, imported, size)
                feeds = random_inputs(inputs, seed)
                whole = dict(zip(feeds, fill(pad, list(feeds.values()), bucket), strict=True))
                plain, padded = interpret(path, inputs, feeds), interpret(path, inputs, whole)
                if plain is None or padded is None:
                    what = "nobody can say whether padding is safe: no interpreter runs this model"
                    raise ToolchainError(what, where=str(path), hint="install onnxruntime or ai-edge-litert")
                _compare(pad, imported, plain, padded, f"size {size} in {bucket}")
        smaller = bucket


def _compare(
    pad: Pad, imported: Imported, plain: Sequence[np.ndarray], padded: Sequence[np.ndarray], what: str
) -> None:
    axes = pad.axes[len(imported.user_inputs) :]
    for spec, axis, a, b in zip(imported.user_outputs, axes, plain, padded, strict=True):
        cut = b if axis is None else b[(slice(None),) * axis + (slice(a.shape[axis]),)]
        x, y = a.astype(np.float64), cut.astype(np.float64)
        scale = max(float(np.abs(x).max(initial=0)), 1e-30)
        worst = float(np.abs(x - y).max(initial=0)) / scale if x.shape == y.shape else float("inf")
        if not worst <= TOLERANCE:
            raise UnsupportedError(
                "padding changes what the model computes",
                where=f"output {spec.name!r}",
                found=f"{worst:.2g} of its largest value on random inputs of {what}",
                allowed=f"{TOLERANCE:g}",
                hint="pad a mask that the model respects, or leave --pad out",
            )
