"""The float model as its layers will be when they are quantised."""

from __future__ import annotations

from ingot.errors import OptionError
from ingot.frontend.interface import Imported
from ingot.passes.fold_batch_norm import fold_batch_norm
from ingot.passes.fold_constants import fold_constants
from ingot.passes.rewriter import bindings_of, dtype_of, op_name
from ingot.passes.rows_as_images import rows_as_images
from ingot.passes.simplify import simplify
from ingot.passes.state import State
from ingot.target import Target


def prepare(imported: Imported, target: Target) -> State:
    """Return the model as its layers will be: rows as images, constants folded, norms in the weights.

    Raises OptionError if layers of the model are quantised already.
    """
    state = State(imported.module, dict(imported.weights), imported, target)
    for step in (simplify, rows_as_images, fold_constants, fold_batch_norm):
        state = step(state)
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) in ("relax.quantize", "relax.dequantize"):
            raise OptionError(
                "the model is quantised already",
                where=f"tensor '{binding.var.name}'",
                found=f"{op_name(binding.value).removeprefix('relax.')} of {dtype_of(binding.var)}",
                allowed="a float32 model",
                hint="compile it without --precision int8 or --weights: its integer layers stay integer",
            )
    return state
