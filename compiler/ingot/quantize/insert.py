"""Writing the decisions into the program: quantize and dequantize around what computes on integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from ingot.frontend.interface import Imported
from ingot.passes.rewriter import Rewriter, op_name, outputs_of, rebuild, shape_of
from ingot.quantize.affine import Affine
from ingot.quantize.graph import Expr, Graph, Placement
from ingot.quantize.tables import looked_up
from ingot.quantize.weights import QuantizedWeights
from ingot.schedules.stored import StoredWeight

Array = np.ndarray[Any, Any]


def insert(
    graph: Graph,
    placement: Placement,
    affine: Mapping[Expr, Affine],
    weights: Mapping[str, QuantizedWeights],
    tables: Mapping[Expr, StoredWeight],
) -> Imported:
    """Return the model in the form an imported model with quantize and dequantize has.

    Case 1: an operator that computes on integers reads dequantize(quantize(x)) of each stored tensor x.
    Case 2: the weights of a layer are the dequantize of int8 values, with a scale per output channel.
    Case 3: the shift of a layer goes into the constant that is added to its result, if there is one, else into a new
            one; the sum is rounded to what int32 can add to the layer's sums.
    Case 4: the variables of `tables` are rows of a table, which are decoded as they are read.
    Other readers of a stored tensor read the stored values too, so that it is in memory once; the model's own outputs
    are what was computed.
    """
    state = graph.state
    stored: dict[Expr, Expr] = {}
    shifts: dict[Expr, tuple[Array, Array]] = {}  # new variable of a layer -> shift, step of its sums
    outputs = {out for out in outputs_of(graph.main) if isinstance(out, relax.Var)}

    def read(rewriter: Rewriter, old: Expr, new: Expr) -> Expr:
        """Case 1: the argument `old`, which has become `new`."""
        old = graph.value[old] if isinstance(graph.value.get(old), relax.Tuple) else old
        if isinstance(old, relax.Tuple):
            return relax.Tuple([read(rewriter, a, b) for a, b in zip(old.fields, new.fields, strict=True)])
        if old not in placement.group:
            return new
        if old not in stored:
            numbers = affine[old]
            scale = relax.const(np.float32(numbers.scale), "float32")
            zero = relax.const(np.array(numbers.zero_point, numbers.dtype), numbers.dtype)
            q = rewriter.emit(relax.op.quantize(new, scale, zero, axis=0, out_dtype=numbers.dtype))
            stored[old] = rewriter.emit(relax.op.dequantize(q, scale, zero, axis=0, out_dtype="float32"))
        return stored[old]

    def visit(rewriter: Rewriter, call: Expr, args: list[Expr]) -> Expr | None:
        args = [read(rewriter, old, new) for old, new in zip(call.args, args, strict=True)]
        var = graph.variable[call]
        if var in tables:
            return looked_up(rewriter, call, args, tables[var])
        layer = graph.layer_of.get(var)
        if layer is not None and var in placement.integer:
            quantized = weights[layer.name]
            values = _weights(rewriter, args[1], quantized, layer.out_axis)
            result = rewriter.emit(rebuild(call, [args[0], values]))
            shape = [1] * len(shape_of(call))
            shape[layer.channel_axis] = layer.channels
            step = quantized.scales.astype(np.float64) * affine[layer.data].scale
            parts = quantized.shift.reshape(shape), step.reshape(shape)
            readers = graph.readers.get(var, [])
            if len(readers) == 1 and var not in outputs and graph.adds_constant(readers[0]):
                shifts[result] = parts
                return result
            if not quantized.shift.any():
                return result
            return relax.op.add(result, rewriter.constant(_on_grid(*parts), "shift"))
        if op_name(call) == "relax.add" and any(arg in shifts for arg in args):
            position = 0 if args[0] in shifts else 1
            bias = rewriter.weight(args[1 - position])
            if bias is not None:
                shift, step = shifts.pop(args[position])
                total = _on_grid(bias.astype(np.float64) + shift, step)
                name = str(getattr(args[1 - position], "name", "shift"))
                return relax.op.add(args[position], rewriter.constant(total, name))
        return rebuild(call, args)

    done = Rewriter(state, visit).run()
    return replace(state.imported, module=done.module, weights=dict(done.weights))


def _weights(rewriter: Rewriter, old: Expr, quantized: QuantizedWeights, axis: int) -> Expr:
    """Case 2."""
    name = str(getattr(old, "name", "weight"))
    values = rewriter.add_weight(f"{name}_int8", quantized.stored)
    scales = rewriter.constant(quantized.scales, f"{name}_scale")
    zero = relax.const(np.array(0, np.int8), "int8")
    return rewriter.emit(relax.op.dequantize(values, scales, zero, axis=axis, out_dtype="float32"))


def _on_grid(total: Array, step: Array) -> Array:
    """Return the nearest float32 to the multiples of `step` that are nearest to `total`."""
    limit = np.iinfo(np.int32).max / 2  # the other half is for the sums
    whole = np.rint(total / step)
    return np.where(np.abs(whole) < limit, whole * step, total).astype(np.float32)
