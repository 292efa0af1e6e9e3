"""TFLite's LSTM on integers: 8-bit activations and weights, a 16-bit cell state, no float anywhere.

It is the form that LiteRT calls 8x8_16: gates are sums of int8 products scaled to 16 bits (3 integer bits), their
activations are fixed-point functions (`sixteen_bit`), the cell state has a power of two as its scale, and the output
is scaled to int8. The formulas are those of TFLite's integer kernel, bit for bit, with or without an input gate
(CIFG), peepholes, layer norms, projection and limits.

The input's products of all steps are one integer matrix product; the steps are one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.sixteen_bit import constant, divided, inverse_root, keep, rescale, sigmoid, tanh, within
from ingot.frontend.tvm_types import Expr, Operator, Options, TfliteConverter, Wrapper

_INT32, _INT16, _INT8 = 2, 7, 9
_INT16_LIMITS, _INT8_LIMITS = (-(1 << 15), (1 << 15) - 1), (-(1 << 7), (1 << 7) - 1)
#: Places of the gates' tensors behind the first of their kind; the scales of their sums stand in the same order.
_GATES = {"input": 0, "forget": 1, "cell": 2, "output": 3}
_PEEPHOLES = {"input": 0, "forget": 1, "output": 2}
#: In the order in which the kernel keeps them: those with a sigmoid first.
_ORDER = ("input", "forget", "output", "cell")
#: Places of the first weights, recurrent weights, peepholes, biases, norms.
_WEIGHTS, _RECURRENT, _PEEPHOLE, _BIASES, _NORMS = 1, 5, 9, 12, 20
_PROJECTION, _STATES = 16, (18, 19)
#: The scale of sums that no norm follows: 3 integer bits.
_PLAIN_SCALE = np.float32(2.0**-12)

Ratio = tuple[int, int]


@dataclass(frozen=True)
class _Gate:
    """One gate. Ratios scale int32 sums to the gate's 16 bits."""

    name: str
    weights: np.ndarray  # int8 [units, inputs]
    recurrent: np.ndarray  # int8 [units, outputs]
    bias: np.ndarray  # int32 [units]: of the sums, or behind the norm
    entry: Ratio
    again: Ratio
    peephole: np.ndarray | None  # int16 [units]
    seen: Ratio  # scales the peephole's products
    norm: np.ndarray | None  # int16 [units]
    spread: Ratio  # the norm's scale, with 12 bits more
    guard: int  # stands for a variance below 1


@dataclass(frozen=True)
class _Cell:
    """An LSTM's constants."""

    gates: tuple[_Gate, ...]
    units: int
    outputs: int
    cell_bits: int  # integer bits of the cell state
    cell_clip: int
    hidden: Ratio
    hidden_zero: int
    projection: np.ndarray | None  # int8 [outputs, units]
    projection_bias: np.ndarray  # int32 [outputs]
    projected: Ratio
    projection_clip: int
    input_zero: int
    output_zero: int

    @property
    def places(self) -> dict[str, int]:
        """The first unit of each gate among all gates' units."""
        return {gate.name: place * self.units for place, gate in enumerate(self.gates)}


def is_integer_lstm(tensors: Sequence[Wrapper]) -> bool:
    """Say whether an LSTM's input is stored in 8 bits."""
    return bool(tensors) and tensors[0].qnn_params is not None and tensors[0].tensor.Type() == _INT8


def integer_lstm(
    converter: TfliteConverter, operator: Operator, x: Expr, options: Options, time_major: bool
) -> tuple[Expr, Expr, Expr]:
    """Return the outputs [steps, batch, outputs] (int8), and both states after the last step, of `x` [steps, batch, n].

    Raises UnsupportedError for forms that LiteRT's integer kernel does not compute either.
    """
    from tvm import relax

    op, bb = relax.op, converter.bb
    tensors = converter.get_input_tensors(operator)
    cell = _Reader(converter, operator).cell(options)
    steps, batch, width = (int(dim) for dim in x.ty.shape)
    h, c = (converter.get_tensor_expr(tensors[place]) for place in _STATES)
    sizes = [math.prod(converter.shape_of(tensors[place])) for place in _STATES]
    if sizes != [batch * cell.outputs, batch * cell.units] or cell.gates[0].weights.shape[1] != width:
        raise UnsupportedError("an LSTM's states do not fit its weights", found=str(sizes))
    shapes = [converter.shape_of(tensors[place]) for place in _STATES]
    entries = _entries(converter, bb.emit(op.reshape(x, (steps * batch, width))), cell)
    entries = bb.emit(op.reshape(entries, (steps, batch, len(cell.gates) * cell.units)))
    h, c = bb.emit(op.reshape(h, (batch, cell.outputs))), bb.emit(op.reshape(c, (batch, cell.units)))
    y, h, c = _steps(converter, cell, (entries, h, c), time_major)
    return y, bb.emit(op.reshape(h, shapes[0])), bb.emit(op.reshape(c, shapes[1]))


class _Reader:
    """Reads an operator's constants and checks that they fit together."""

    def __init__(self, converter: TfliteConverter, operator: Operator) -> None:
        self.converter = converter
        self.tensors = converter.get_input_tensors(operator)
        self.output = converter.get_output_tensors(operator)[-1]
        count = operator.IntermediatesLength()
        if count != 5:
            raise UnsupportedError(
                "an integer LSTM of this form is not supported",
                found=f"{count} intermediate tensors",
                allowed="5: sums of 16 bits (8x8_16)",
            )
        self.between = converter.get_tensors([operator.Intermediates(place) for place in range(count)])

    def has(self, place: int) -> bool:
        """Say whether an input is there."""
        return place < len(self.tensors) and self.tensors[place].tensor_idx >= 0

    def constant(self, place: int, kind: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return a constant input as it is stored."""
        tensor = self.tensors[place] if self.has(place) else None
        if tensor is None or not tensor.buffer.DataLength():
            raise UnsupportedError("an LSTM lacks weights", found=f"none at input {place}", allowed="constants")
        found = self.converter.shape_of(tensor)
        if tensor.tensor.Type() != kind or found != shape:
            dtype, wanted = (self.converter.get_tensor_type_str(item) for item in (tensor.tensor.Type(), kind))
            raise UnsupportedError(
                "an integer LSTM's constant is of another type",
                where=f"input {place}",
                found=f"{dtype}{list(found)}",
                allowed=f"{wanted}{list(shape)}",
            )
        return np.asarray(self.converter.get_tensor_value(tensor))

    def scale(self, tensor: Wrapper, what: str) -> np.float32:
        """Return the one scale of a tensor."""
        scales = None if tensor.qnn_params is None else tensor.qnn_params["scale"].value.numpy().reshape(-1)
        if scales is None or scales.size != 1 or not scales[0] > 0:
            raise UnsupportedError("an integer LSTM's tensor has not one scale", where=what, allowed="one scale")
        scale: np.float32 = scales[0]
        return scale

    def cell(self, options: Options) -> _Cell:
        """Return all constants."""
        x, h, c = self.tensors[0], self.tensors[_STATES[0]], self.tensors[_STATES[1]]
        for tensor, kind, what in ((x, _INT8, "input"), (h, _INT8, "output state"), (c, _INT16, "cell state")):
            if tensor.tensor.Type() != kind:
                found = self.converter.get_tensor_type_str(tensor.tensor.Type())
                raise UnsupportedError("an integer LSTM's tensor is of another type", where=what, found=found)
        if not self.has(_WEIGHTS + 3) or not self.has(_RECURRENT + 3):
            raise UnsupportedError("an LSTM lacks weights", found="none for the output gate", allowed="all gates")
        units, outputs = (*self.converter.shape_of(self.tensors[_RECURRENT + 3]), 0, 0)[:2]
        width = self.converter.shape_of(x)[-1]
        if not self.has(_PROJECTION) and units != outputs:
            raise UnsupportedError("an LSTM without projection has other outputs than units", found=str(outputs))
        cell_scale = self.scale(c, "cell state")
        exponent = round(math.log2(cell_scale))
        if abs(math.log2(cell_scale) - exponent) >= 1e-3 or not -15 <= exponent <= -9:
            found, allowed = f"scale {cell_scale}", "a power of two, 2^-15 to 2^-9"
            raise UnsupportedError("an integer LSTM's cell state has this scale", found=found, allowed=allowed)
        names = [name for name in _ORDER if name != "input" or self.has(_WEIGHTS)]
        state_scale, hidden_scale = self.scale(h, "output state"), self.scale(self.between[4], "hidden state")
        projection, projected = None, (0, 0)
        bias = np.zeros(outputs, np.int32)
        if self.has(_PROJECTION):
            projection = self.constant(_PROJECTION, _INT8, (outputs, units))
            scale = self.scale(self.tensors[_PROJECTION], "projection")
            projected = _ratio(scale * hidden_scale / state_scale)
            if self.has(_PROJECTION + 1):
                bias = self.constant(_PROJECTION + 1, _INT32, (outputs,))
        # Where there is a projection, LiteRT stores the hidden state with the zero point's sign turned.
        zero = int(self.between[4].qnn_params["zero_point"].value.numpy().reshape(-1)[0])
        output_zero = int(h.qnn_params["zero_point"].value.numpy().reshape(-1)[0])
        if projection is not None:
            bias = bias + zero * projection.astype(np.int32).sum(1, dtype=np.int32)
        return _Cell(
            gates=tuple(self._gate(name, (units, outputs, width), exponent) for name in names),
            units=units,
            outputs=outputs,
            cell_bits=15 + exponent,
            cell_clip=_clip(options.CellClip(), cell_scale, _INT16_LIMITS[1]),
            hidden=_ratio(np.float32(2.0**-15 / np.float64(hidden_scale) * 2.0**-15)),
            hidden_zero=-zero if projection is not None else zero,
            projection=projection,
            projection_bias=bias,
            projected=projected,
            projection_clip=_clip(options.ProjClip(), self.scale(self.output, "output"), _INT8_LIMITS[1]),
            input_zero=int(x.qnn_params["zero_point"].value.numpy().reshape(-1)[0]),
            output_zero=output_zero,
        )

    def _gate(self, name: str, sizes: tuple[int, int, int], exponent: int) -> _Gate:
        units, outputs, width = sizes
        place = _GATES[name]
        normed = self.has(_NORMS + 1)
        scale = self.scale(self.between[place], f"sums of the {name} gate") if normed else _PLAIN_SCALE
        entry = self.scale(self.tensors[_WEIGHTS + place], f"weights of the {name} gate")
        peephole, seen = None, (0, 0)
        # All gates but the cell's have one, or none.
        if name in _PEEPHOLES and self.has(_PEEPHOLE + _PEEPHOLES["output"]):
            at = _PEEPHOLE + _PEEPHOLES[name]
            peephole = self.constant(at, _INT16, (units,))
            if outputs > units:
                raise UnsupportedError("an LSTM with peepholes projects to more outputs than units", found=str(outputs))
            weight = np.float64(self.scale(self.tensors[at], f"peephole of the {name} gate"))
            seen = _ratio(np.float32(2.0**exponent * weight / np.float64(scale)))
        norm, spread, guard = None, (0, 0), 1
        if normed:
            norm = self.constant(_NORMS + place, _INT16, (units,))
            own = self.scale(self.tensors[_NORMS + place], f"norm of the {name} gate")
            multiplier, power = _ratio(own)
            spread, guard = (multiplier, power + 12), max(1, int(np.float32(10000) * own))
        again = self.scale(self.tensors[_RECURRENT + place], f"recurrent weights of the {name} gate")
        return _Gate(
            name=name,
            weights=self.constant(_WEIGHTS + place, _INT8, (units, width)),
            recurrent=self.constant(_RECURRENT + place, _INT8, (units, outputs)),
            bias=self.constant(_BIASES + place, _INT32, (units,)),
            entry=_ratio(entry * self.scale(self.tensors[0], "input") / scale),
            again=_ratio(again * self.scale(self.tensors[_STATES[0]], "output state") / scale),
            peephole=peephole,
            seen=seen,
            norm=norm,
            spread=spread,
            guard=guard,
        )


def _ratio(value: np.float32) -> Ratio:
    """Return m and e with value = m * 2^(e - 31), m from 2^30 to 2^31; what is below 2^-32 is 0."""
    from ingot.frontend.tflite_rounding import multiplier_of

    multipliers, exponents = multiplier_of(np.atleast_1d(np.float64(value)))
    multiplier, exponent = int(multipliers[0]), int(exponents[0])
    if exponent > 15:
        raise UnsupportedError("an LSTM's scales are not usable", found=str(value), allowed="ratios below 2^15")
    return (0, 0) if exponent < -31 else (multiplier, exponent)


def _clip(limit: float, scale: np.float32, most: int) -> int:
    """Return a limit as it is stored, 0 for none."""
    if not limit >= 0:
        raise UnsupportedError("an LSTM has this limit", found=str(limit), allowed="0 for none, or a positive number")
    return int(min(np.float32(limit) / scale, np.float32(most)))


def _entries(converter: TfliteConverter, x: Expr, cell: _Cell) -> Expr:
    """Return the input's part of all gates, int16 [steps * batch, gates * units]."""
    from tvm import relax

    from ingot.frontend.tflite_rounding import scaled

    op, make = relax.op, converter.exp_tab.new_const
    weights = np.concatenate([gate.weights for gate in cell.gates]).T
    normed = cell.gates[0].norm is not None
    bias = np.concatenate([np.zeros_like(gate.bias) if normed else gate.bias for gate in cell.gates])
    one, none = relax.const(1.0, "float32"), relax.const(0, "int32")
    stored = make(np.ascontiguousarray(weights), dtype="int8", source_name=b"lstm")
    value = op.dequantize(x, one, relax.const(cell.input_zero, "int32"), axis=0)
    sums = op.matmul(value, op.dequantize(stored, one, none, axis=1))
    if np.any(bias):
        sums = op.add(sums, op.dequantize(make(bias, dtype="int32", source_name=b"lstm"), one, none, axis=0))
    multipliers, exponents = (np.repeat([gate.entry[part] for gate in cell.gates], cell.units) for part in range(2))
    return converter.bb.emit(scaled(converter, sums, (multipliers, exponents), 0, _INT16_LIMITS, "int16"))


def _steps(
    converter: TfliteConverter, cell: _Cell, given: tuple[Expr, Expr, Expr], time_major: bool
) -> tuple[Expr, Expr, Expr]:
    """Emit the kernel of all steps; return its outputs and last states."""
    from ingot.frontend.loops import call_loops

    entries, h, c = given
    steps, batch, _ = (int(dim) for dim in entries.ty.shape)
    kernel = _Kernel(cell, steps, batch, time_major)
    inputs = {"entries": entries, "first_h": h, "first_c": c}
    inputs |= {name: converter.constant_weight(value) for name, value in kernel.constants().items()}
    count = len(cell.gates) * cell.units
    outputs: dict[str, tuple[tuple[int, ...], str]] = {
        "y": ((steps, batch, cell.outputs), "int8"),
        "h": ((batch, cell.outputs), "int8"),
        "c": ((batch, cell.units), "int16"),
        "gates": ((count,), "int16"),  # of one row, before and after their activations
    }
    if cell.projection is not None:
        outputs["hidden"] = ((cell.units,), "int8")

    def body(ins: Any, outs: Any) -> None:  # noqa: ANN401
        kernel.write({**dict(zip(inputs, ins, strict=True)), **dict(zip(outputs, outs, strict=True))})

    y, h, c, *_ = call_loops(converter.bb, "integer_lstm", list(inputs.values()), list(outputs.values()), body)
    return y, h, c


@dataclass(frozen=True)
class _Kernel:
    """Writes the steps of an LSTM as loops on one thread."""

    cell: _Cell
    steps: int
    batch: int
    time_major: bool

    def constants(self) -> dict[str, np.ndarray]:
        """Return the kernel's constants, by the names of its buffers."""
        cell = self.cell
        recurrent = np.stack([gate.recurrent for gate in cell.gates])
        # The state's zero point, taken out of the sums.
        offset = -cell.output_zero * recurrent.astype(np.int32).sum(2, dtype=np.int32)
        found = {"recurrent": recurrent.reshape(-1, cell.outputs), "offset": offset.astype(np.int32).reshape(-1)}
        for gate in cell.gates:
            if gate.peephole is not None:
                found[f"{gate.name} peephole"] = gate.peephole
            if gate.norm is not None:
                found |= {f"{gate.name} norm": gate.norm, f"{gate.name} bias": gate.bias}
        if cell.projection is not None:
            found |= {"projection": cell.projection, "projection bias": cell.projection_bias}
        return found

    def write(self, at: dict[str, Any]) -> None:
        """Write the kernel's statements; `at` are its buffers by name."""
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        cell = self.cell
        with T.serial(0, self.batch) as row:
            with T.serial(0, cell.outputs) as k:
                at["h"][row, k] = at["first_h"][row, k]
            with T.serial(0, cell.units) as u:
                at["c"][row, u] = at["first_c"][row, u]
        with T.serial(0, self.steps) as step, T.serial(0, self.batch) as row:
            for gate in cell.gates:
                self._sums(at, step, row, gate)
            # The output gate sees the cell state of this step.
            late = cell.gates[-2].peephole is not None
            for gate in cell.gates:
                if not (late and gate.name == "output"):
                    self._prepare(at, row, gate)
            self._activate(at, 0, cell.places["output" if late else "cell"], 0)
            self._activate(at, cell.places["cell"], cell.units, 3)
            self._update(at, row)
            if late:
                self._prepare(at, row, cell.gates[-2])
                self._activate(at, cell.places["output"], cell.units, 0)
            self._output(at, row)
            with T.serial(0, cell.outputs) as k:
                at["y"][step, row, k] = at["h"][row, k]

    def _sums(self, at: dict[str, Any], step: Expr, row: Expr, gate: _Gate) -> None:
        """Write a gate's sums: the input's part, plus the state's, each scaled and held to 16 bits."""
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        first = self.cell.places[gate.name]
        with T.serial(0, self.cell.units) as u:
            total = _product(at["offset"][first + u], at["h"], row, at["recurrent"], first + u, self.cell.outputs)
            whole = rescale(total, gate.again) + _wide(at["entries"][step, row, first + u])
            at["gates"][first + u] = _narrow(within(whole, *_INT16_LIMITS))

    def _activate(self, at: dict[str, Any], first: int, count: int, bits: int) -> None:
        """Write the activation of some gates: tanh for a number of integer bits, sigmoid for 0."""
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        with T.serial(0, count) as u:
            value = at["gates"][first + u]
            at["gates"][first + u] = tanh(value, bits) if bits else sigmoid(value)

    def _prepare(self, at: dict[str, Any], row: Expr, gate: _Gate) -> None:
        """Write what comes between a gate's sums and its activation: peephole and norm."""
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        first, values = self.cell.places[gate.name], at["gates"]
        if gate.peephole is not None:
            # LiteRT takes as many weights as there are outputs: the units beyond see nothing.
            shared = self.time_major and self.batch > 1 and self.cell.outputs < self.cell.units
            with T.serial(0, self.cell.units if shared else self.cell.outputs) as u:
                flat = row * self.cell.units + u if shared else u
                weight = at[f"{gate.name} peephole"][flat % self.cell.outputs if shared else u]
                seen = rescale(keep(_wide(weight) * _wide(at["c"][row, u]), "int32"), gate.seen)
                whole = within(seen + _wide(values[first + u]), *_INT16_LIMITS)
                if shared:
                    whole = T.Select(flat < self.batch * self.cell.outputs, whole, _wide(values[first + u]))
                values[first + u] = _narrow(whole)
        if gate.norm is not None:
            self._normalise(at, gate)

    def _normalise(self, at: dict[str, Any], gate: _Gate) -> None:
        """Write a gate's layer norm; the mean has 10 bits more, and so has what is divided by the deviation."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        from ingot.frontend.fixed_point import high_multiply
        from ingot.frontend.loops import scalar

        first, values, units = self.cell.places[gate.name], at["gates"], self.cell.units

        def long(value: int) -> Expr:
            return constant(value, "int64")

        total, squares = scalar("int64"), scalar("int64")
        total[0], squares[0] = T.int64(0), T.int64(0)
        with T.serial(0, units) as u:
            value = values[first + u].astype("int64")
            total[0] = total[0] + value
            squares[0] = squares[0] + value * value
        mean = keep(tirx.truncdiv(total[0] * long(1024), long(units)), "int32")
        spread = squares[0] * long((1 << 20) // units) - mean.astype("int64") * mean.astype("int64")
        variance = keep(tirx.truncdiv(spread, long(1 << 20)), "int32")
        variance = keep(tirx.Select(variance < constant(1), constant(gate.guard), variance), "int32")
        root, shift = inverse_root(variance)
        half = keep(tirx.shift_right(tirx.shift_left(constant(1), shift), constant(1)), "int32")
        with T.serial(0, units) as u:
            high = keep(high_multiply(constant(1024) * _wide(values[first + u]) - mean, root), "int32")
            sign = tirx.Select(shift > constant(0), tirx.shift_right(high, constant(31)), constant(0))
            normed = keep(tirx.shift_right(high + half + sign, shift), "int32")
            whole = normed * _wide(at[f"{gate.name} norm"][u]) + at[f"{gate.name} bias"][u]
            long_ = keep(whole, "int64")
            away = tirx.Select(long_ > long(0), long_ + long(512), long_ - long(512))
            scaled = rescale(keep(tirx.truncdiv(away, long(1024)), "int32"), gate.spread)
            values[first + u] = _narrow(within(scaled, *_INT16_LIMITS))

    def _update(self, at: dict[str, Any], row: Expr) -> None:
        """Write the new cell state: forget * c + input * fresh."""
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        cell, places, gates = self.cell, self.cell.places, at["gates"]
        with T.serial(0, cell.units) as u:
            forget = _wide(gates[places["forget"] + u])
            entry = _wide(gates[places["input"] + u]) if "input" in places else constant((1 << 15) - 1) - forget
            kept = divided(keep(forget * _wide(at["c"][row, u]), "int32"), 15)
            fresh = divided(keep(entry * _wide(gates[places["cell"] + u]), "int32"), 15 + cell.cell_bits)
            limits = (-cell.cell_clip, cell.cell_clip) if cell.cell_clip > 0 else _INT16_LIMITS
            at["c"][row, u] = _narrow(within(kept + fresh, *limits))

    def _output(self, at: dict[str, Any], row: Expr) -> None:
        """Write the new output state: output * tanh(c), and its projection."""
        from tvm.script.ir_builder import tirx as T  # noqa: N812

        cell = self.cell
        first = cell.places["output"]
        with T.serial(0, cell.units) as u:
            bent = tanh(at["c"][row, u], cell.cell_bits)
            product = keep(_wide(at["gates"][first + u]) * _wide(bent), "int32")
            whole = rescale(product, cell.hidden) + constant(cell.hidden_zero)
            stored = within(whole, *_INT8_LIMITS).astype("int8")
            if cell.projection is None:
                at["h"][row, u] = stored
            else:
                at["hidden"][u] = stored
        if cell.projection is None:
            return
        limits = (-cell.projection_clip, cell.projection_clip) if cell.projection_clip > 0 else _INT8_LIMITS
        with T.serial(0, cell.outputs) as k:
            total = _product(at["projection bias"][k], at["hidden"], None, at["projection"], k, cell.units)
            whole = within(rescale(total, cell.projected) + constant(cell.output_zero), *_INT8_LIMITS)
            at["h"][row, k] = within(whole, *limits).astype("int8")


def _product(start: Expr, left: Any, row: Expr | None, right: Any, column: Expr, count: int) -> Expr:  # noqa: ANN401
    """Write the sum of products of left[row] (or `left`) and right[column], from `start`: int32."""
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    from ingot.frontend.loops import scalar

    total = scalar("int32")
    total[0] = start
    with T.serial(0, count) as k:
        value = left[k] if row is None else left[row, k]
        total[0] = total[0] + _wide(value) * _wide(right[column, k])
    return total[0]


def _wide(value: Expr) -> Expr:
    return value.astype("int32")


def _narrow(value: Expr) -> Expr:
    return value.astype("int16")
