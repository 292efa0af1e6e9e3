"""TFLite's recurrent layers: LSTM, RNN and SVDF. Their states are tensors of the file that live from run to run.

Weights that are stored as integers are the real numbers that they stand for. The usual form of an LSTM (four gates,
tanh, nothing clipped) over a sequence becomes the call that stands for a recurrent layer, which has a kernel of its
own; all others have their steps written out one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ingot.errors import UnsupportedError
from ingot.frontend.onnx_ops.recurrent import MAX_STEPS, RECURRENT
from ingot.frontend.tflite_integer_lstm import integer_lstm, is_integer_lstm
from ingot.frontend.tflite_integer_svdf import integer_svdf, remembered
from ingot.frontend.tflite_ops import handles
from ingot.frontend.tvm_types import Expr, Operator, TfliteConverter, Wrapper

_TANH = 4
_ACTIVATIONS = {0: "none", 1: "relu", 2: "relu1", 3: "relu6", 4: "tanh", 6: "sigmoid"}
# Gates in the order of the columns of a call's weights, by their places among an operator's inputs.
_GATES = ("input", "output", "forget", "cell")
_PLACES = {"input": 0, "forget": 1, "cell": 2, "output": 3}


def _activate(converter: TfliteConverter, kind: int, x: Expr) -> Expr:
    from tvm import relax

    if kind not in _ACTIVATIONS:
        allowed = ", ".join(_ACTIVATIONS.values())
        raise UnsupportedError("a recurrent layer has this activation", found=str(kind), allowed=allowed)
    return relax.op.sigmoid(x) if kind == 6 else converter.convert_fused_activation_function(x, kind)


@dataclass
class _Cell:
    """The constants of one LSTM; of the gates that it has, by name."""

    weights: dict[str, np.ndarray]
    recurrent: dict[str, np.ndarray]
    peepholes: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    projection: np.ndarray | None
    projection_bias: np.ndarray | None
    activation: int
    cell_clip: float
    projection_clip: float

    @property
    def plain(self) -> bool:
        """Whether it is of the form that a call stands for."""
        extras = (self.peepholes, self.norms, self.projection is not None, self.cell_clip, self.projection_clip)
        return len(self.weights) == 4 and self.activation == _TANH and not any(extras)


def _constant(converter: TfliteConverter, tensors: Sequence[Wrapper], place: int) -> np.ndarray | None:
    """The real numbers of a constant input, None if it is left out."""
    if place >= len(tensors) or tensors[place].tensor_idx < 0:
        return None
    if not tensors[place].buffer.DataLength():
        raise UnsupportedError("a recurrent layer's weights are computed", found="no constant", allowed="constants")
    return np.asarray(converter.real(tensors[place]))


def _cell(
    converter: TfliteConverter, tensors: Sequence[Wrapper], first: int, activation: int, clips: tuple[float, float]
) -> _Cell:
    """An LSTM whose weights begin at input `first`; layer norms, where there are some, are inputs 20 to 23."""

    def four(begin: int) -> dict[str, np.ndarray]:
        found = {name: _constant(converter, tensors, begin + place) for name, place in _PLACES.items()}
        return {name: value for name, value in found.items() if value is not None}

    peepholes = {
        name: value
        for name, place in (("input", 8), ("forget", 9), ("output", 10))
        if (value := _constant(converter, tensors, first + place)) is not None
    }
    norms = four(20) if len(tensors) == 24 and first == 1 else {}
    projection = _constant(converter, tensors, first + 15)
    projection_bias = _constant(converter, tensors, first + 16)
    cell = _Cell(
        four(first),
        four(first + 4),
        peepholes,
        four(first + 11),
        norms,
        projection,
        projection_bias,
        activation,
        *clips,
    )
    missing = [name for name in ("forget", "cell", "output") if name not in cell.weights or name not in cell.biases]
    if missing or set(cell.weights) != set(cell.recurrent):
        raise UnsupportedError("an LSTM lacks weights", found=f"none for {missing or 'a gate'}", allowed="all gates")
    return cell


class _Layer:
    """One direction of an LSTM over a sequence, as expressions."""

    def __init__(self, converter: TfliteConverter, cell: _Cell, name: str) -> None:
        self.converter, self.cell, self.name = converter, cell, name

    def weight(self, value: np.ndarray) -> Expr:
        """A constant of the layer."""
        array = np.ascontiguousarray(value, np.float32)
        return self.converter.exp_tab.new_const(array, dtype="float32", source_name=self.name.encode())

    def emit(self, value: Expr) -> Expr:
        """Bind an intermediate expression."""
        return self.converter.bb.emit(value)

    def run(self, x: Expr, h: Expr, c: Expr, reverse: bool) -> tuple[Expr, Expr, Expr]:
        """Outputs [steps, batch, units], and both states after the last step; x is [steps, batch, inputs]."""
        from tvm import relax

        op, cell = relax.op, self.cell
        steps, batch, width = (int(dim) for dim in x.ty.shape)
        names = [name for name in _GATES if name in cell.weights]
        units = cell.weights["cell"].shape[0]
        flat = self.emit(op.reshape(x, (steps * batch, width)))
        gates = op.matmul(flat, self.weight(np.concatenate([cell.weights[name] for name in names]).T))
        if not cell.norms:
            gates = op.add(gates, self.weight(np.concatenate([cell.biases[name] for name in names])))
        gates = self.emit(op.reshape(self.emit(gates), (steps, batch, len(names) * units)))
        recurrent = self.weight(np.concatenate([cell.recurrent[name] for name in names]).T)
        if cell.plain:
            kinds = [relax.TensorType((steps, batch, units), "float32"), relax.TensorType((batch, units), "float32")]
            way = f"{RECURRENT}LSTM.{'reverse' if reverse else 'forward'}"
            made = self.emit(op.call_dps_packed(way, relax.Tuple([gates, h, c, recurrent]), out_ty=kinds))
            outputs, c = self.emit(relax.TupleGetItem(made, 0)), self.emit(relax.TupleGetItem(made, 1))
            last = 0 if reverse else steps - 1
            h = self.emit(op.reshape(op.strided_slice(outputs, [0], [last], [last + 1], [1]), (batch, units)))
            return outputs, h, c
        if steps > MAX_STEPS:
            raise UnsupportedError("a sequence is too long", found=str(steps), allowed=f"{MAX_STEPS} steps")
        made_by_step: dict[int, Expr] = {}
        for step in range(steps - 1, -1, -1) if reverse else range(steps):
            now = op.reshape(op.strided_slice(gates, [0], [step], [step + 1], [1]), (batch, len(names) * units))
            total = self.emit(op.add(self.emit(now), op.matmul(h, recurrent)))
            parts = {
                name: self.emit(op.strided_slice(total, [1], [i * units], [(i + 1) * units], [1]))
                for i, name in enumerate(names)
            }
            h, c = self.step(parts, c)
            made_by_step[step] = h
        return self.emit(op.stack([made_by_step[step] for step in range(steps)], axis=0)), h, c

    def step(self, parts: dict[str, Expr], c: Expr) -> tuple[Expr, Expr]:
        """Both states after a step, from the sums of its gates."""
        from tvm import relax

        op, cell = relax.op, self.cell

        def gate(name: str) -> Expr:
            value = parts[name]
            if name in cell.peepholes:
                value = op.add(value, op.multiply(self.weight(cell.peepholes[name]), c))
            if name in cell.norms:
                value = self.emit(self.normal(self.emit(value), cell.norms[name], cell.biases[name]))
            return _activate(self.converter, cell.activation, value) if name == "cell" else op.sigmoid(value)

        forget = self.emit(gate("forget"))
        entry = self.emit(gate("input") if "input" in parts else op.subtract(relax.const(1.0, "float32"), forget))
        fresh = self.emit(gate("cell"))
        c = self.emit(op.add(op.multiply(forget, c), op.multiply(entry, fresh)))
        if cell.cell_clip > 0:
            c = self.emit(op.clip(c, -cell.cell_clip, cell.cell_clip))
        h = self.emit(op.multiply(gate("output"), _activate(self.converter, cell.activation, c)))
        if cell.projection is not None:
            h = op.matmul(h, self.weight(cell.projection.T))
            if cell.projection_bias is not None:
                h = op.add(h, self.weight(cell.projection_bias))
            if cell.projection_clip > 0:
                h = op.clip(self.emit(h), -cell.projection_clip, cell.projection_clip)
            h = self.emit(h)
        return h, c

    def normal(self, x: Expr, scale: np.ndarray, bias: np.ndarray) -> Expr:
        """Layer normalisation over the units."""
        from tvm import relax

        op = relax.op
        centred = self.emit(op.subtract(x, op.mean(x, -1, True)))
        spread = op.mean(op.multiply(centred, centred), -1, True)
        normed = op.multiply(centred, op.rsqrt(op.add(spread, relax.const(1e-8, "float32"))))
        return op.add(op.multiply(normed, self.weight(scale)), self.weight(bias))


def _time_first(converter: TfliteConverter, x: Expr, time_major: bool) -> Expr:
    from tvm import relax

    return x if time_major else converter.bb.emit(relax.op.permute_dims(x, [1, 0, 2]))


def _need(tensors: Sequence[Wrapper], name: str, *counts: int) -> None:
    if len(tensors) not in counts:
        allowed = " or ".join(map(str, counts))
        raise UnsupportedError(f"{name} has an unexpected number of inputs", found=str(len(tensors)), allowed=allowed)


@handles("UNIDIRECTIONAL_SEQUENCE_LSTM", "LSTM")
def _lstm(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    from tvm import relax

    tensors, name = converter.get_input_tensors(operator), converter.name_of(operator)
    single = name == "LSTM"
    if single and len(tensors) == 5:
        return _basic_lstm(converter, operator)
    _need(tensors, name, 20, 24)
    options = converter.options(operator, "LSTMOptions" if single else "UnidirectionalSequenceLSTMOptions")
    if not single and options.DiagonalRecurrentTensors():
        raise UnsupportedError("diagonal recurrent weights are not supported", found=name, allowed="full ones")
    x = converter.get_tensor_expr(tensors[0])
    time_major = single or options.TimeMajor()
    if single:
        x = converter.bb.emit(relax.op.expand_dims(x, 0))
    x = _time_first(converter, x, time_major)
    if is_integer_lstm(tensors):
        y, h, c = integer_lstm(converter, operator, x, options, time_major)
    else:
        clips = (options.CellClip(), options.ProjClip())
        cell = _cell(converter, tensors, 1, options.FusedActivationFunction(), clips)
        h, c = (converter.get_tensor_expr(tensors[place]) for place in (18, 19))
        y, h, c = _Layer(converter, cell, name.lower()).run(x, h, c, False)
    converter.next_states.update({int(tensors[18].tensor_idx): h, int(tensors[19].tensor_idx): c})
    if single:
        scratch = converter.get_output_tensors(operator)[:-1]
        return [*(converter.get_tensor_expr(item) for item in scratch), h]
    return [_time_first(converter, y, time_major)]


def _basic_lstm(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    """The first form of LSTM: one step whose states are plain inputs and outputs."""
    from tvm import relax

    op, bb = relax.op, converter.bb
    if converter.get_input_tensors(operator)[0].qnn_params is not None:
        raise UnsupportedError("an LSTM of the basic form on 8 bits is not supported", found="uint8", allowed="float32")
    x, h, weights, bias, c = (converter.get_tensor_expr(item) for item in converter.get_input_tensors(operator))
    joined = bb.emit(op.concat([x, h], axis=1))
    total = bb.emit(op.add(op.matmul(joined, op.permute_dims(weights, [1, 0])), bias))
    i, fresh, f, o = (bb.emit(item) for item in _parts(total, 4))
    after = bb.emit(op.add(op.multiply(op.sigmoid(i), op.tanh(fresh)), op.multiply(op.sigmoid(f), c)))
    return [op.multiply(op.sigmoid(o), op.tanh(after)), after, joined, total]


def _parts(x: Expr, count: int) -> list[Expr]:
    from tvm import relax

    size = int(x.ty.shape[1]) // count
    return [relax.op.strided_slice(x, [1], [i * size], [(i + 1) * size], [1]) for i in range(count)]


def _no_aux(tensors: Sequence[Wrapper], first: int, name: str) -> None:
    if any(item.tensor_idx >= 0 for item in tensors[first:]):
        raise UnsupportedError(f"{name} with a second input is not supported", found="an auxiliary input")


def _both(converter: TfliteConverter, ways: Sequence[Expr], merged: bool) -> list[Expr]:
    from tvm import relax

    return [relax.op.concat(list(ways), axis=2)] if merged else list(ways)


@handles("BIDIRECTIONAL_SEQUENCE_LSTM")
def _two_lstms(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    tensors, name = converter.get_input_tensors(operator), converter.name_of(operator)
    _need(tensors, name, 48)
    _no_aux(tensors, 39, name)
    options = converter.options(operator, "BidirectionalSequenceLSTMOptions")
    x = _time_first(converter, converter.get_tensor_expr(tensors[0]), options.TimeMajor())
    ways = []
    for first, states, reverse in ((1, (35, 36), False), (18, (37, 38), True)):
        clips = (options.CellClip(), options.ProjClip())
        cell = _cell(converter, tensors, first, options.FusedActivationFunction(), clips)
        h, c = (converter.get_tensor_expr(tensors[place]) for place in states)
        y, h, c = _Layer(converter, cell, name.lower()).run(x, h, c, reverse)
        converter.next_states.update({int(tensors[states[0]].tensor_idx): h, int(tensors[states[1]].tensor_idx): c})
        ways.append(_time_first(converter, y, options.TimeMajor()))
    return _both(converter, ways, options.MergeOutputs())


def _rnn(
    converter: TfliteConverter, tensors: Sequence[Wrapper], x: Expr, activation: int, reverse: bool
) -> tuple[Expr, Expr]:
    """One direction of an RNN: outputs [steps, batch, units] and the state after it.

    tensors: weights, recurrent weights, bias and state.
    """
    from tvm import relax

    op, bb = relax.op, converter.bb
    weights, recurrent, bias = (_constant(converter, tensors, place) for place in range(3))
    if weights is None or recurrent is None or bias is None:
        raise UnsupportedError("an RNN lacks weights", found="none", allowed="all of them")
    make = converter.exp_tab.new_const
    steps, batch, width = (int(dim) for dim in x.ty.shape)
    units, h = weights.shape[0], converter.get_tensor_expr(tensors[3])
    flat = bb.emit(op.reshape(x, (steps * batch, width)))
    total = op.add(op.matmul(flat, make(weights.T, source_name=b"rnn")), make(bias, source_name=b"rnn"))
    gates = bb.emit(op.reshape(bb.emit(total), (steps, batch, units)))
    turned = make(recurrent.T, source_name=b"rnn")
    if activation == _TANH:
        way = f"{RECURRENT}RNN.{'reverse' if reverse else 'forward'}"
        kind = [relax.TensorType((steps, batch, units), "float32")]
        y = bb.emit(op.call_dps_packed(way, relax.Tuple([gates, h, turned]), out_ty=kind))
        last = 0 if reverse else steps - 1
        return y, bb.emit(op.reshape(op.strided_slice(y, [0], [last], [last + 1], [1]), (batch, units)))
    if steps > MAX_STEPS:
        raise UnsupportedError("a sequence is too long", found=str(steps), allowed=f"{MAX_STEPS} steps")
    made: dict[int, Expr] = {}
    for step in range(steps - 1, -1, -1) if reverse else range(steps):
        now = bb.emit(op.reshape(op.strided_slice(gates, [0], [step], [step + 1], [1]), (batch, units)))
        h = bb.emit(_activate(converter, activation, bb.emit(op.add(now, op.matmul(h, turned)))))
        made[step] = h
    return bb.emit(op.stack([made[step] for step in range(steps)], axis=0)), h


@handles("UNIDIRECTIONAL_SEQUENCE_RNN", "RNN")
def _one_rnn(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    from tvm import relax

    tensors, name = converter.get_input_tensors(operator), converter.name_of(operator)
    _need(tensors, name, 5)
    options = converter.options(operator, "RNNOptions" if name == "RNN" else "SequenceRNNOptions")
    time_major = name == "RNN" or options.TimeMajor()
    x = converter.get_tensor_expr(tensors[0])
    if name == "RNN":
        x = converter.bb.emit(relax.op.expand_dims(x, 0))
    activation = options.FusedActivationFunction()
    y, h = _rnn(converter, tensors[1:5], _time_first(converter, x, time_major), activation, False)
    converter.next_states[int(tensors[4].tensor_idx)] = h
    return [h] if name == "RNN" else [_time_first(converter, y, time_major)]


@handles("BIDIRECTIONAL_SEQUENCE_RNN")
def _two_rnns(converter: TfliteConverter, operator: Operator) -> list[Expr]:
    tensors, name = converter.get_input_tensors(operator), converter.name_of(operator)
    _need(tensors, name, 12)
    _no_aux(tensors, 9, name)
    options = converter.options(operator, "BidirectionalSequenceRNNOptions")
    x = _time_first(converter, converter.get_tensor_expr(tensors[0]), options.TimeMajor())
    ways = []
    for first, reverse in ((1, False), (5, True)):
        y, h = _rnn(converter, tensors[first : first + 4], x, options.FusedActivationFunction(), reverse)
        converter.next_states[int(tensors[first + 3].tensor_idx)] = h
        ways.append(_time_first(converter, y, options.TimeMajor()))
    return _both(converter, ways, options.MergeOutputs())


@handles("SVDF")
def _svdf(converter: TfliteConverter, operator: Operator) -> Expr:
    """Filters over features and time: each keeps its last products and weighs them; `rank` of them make a unit."""
    from tvm import relax

    tensors = converter.get_input_tensors(operator)
    _need(tensors, "SVDF", 5)
    if is_integer_lstm(tensors):
        return integer_svdf(converter, operator)
    options = converter.options(operator, "SVDFOptions")
    op, bb = relax.op, converter.bb
    features, times = (_constant(converter, tensors, place) for place in (1, 2))
    bias, rank = _constant(converter, tensors, 3), options.Rank()
    if features is None or times is None or rank < 1 or features.shape[0] % rank:
        raise UnsupportedError("SVDF's weights do not fit its rank", found=str(rank), allowed="a divisor of filters")
    (filters, memory), batch = times.shape, converter.shape_of(tensors[0])[0]
    make = converter.exp_tab.new_const
    fresh = op.matmul(converter.get_tensor_expr(tensors[0]), make(features.T, source_name=b"svdf"))
    state = remembered(converter, tensors[4], bb.emit(fresh), (batch, filters, memory))
    weighed = bb.emit(op.sum(op.multiply(state, make(times, source_name=b"svdf")), 2))
    result = op.sum(op.reshape(weighed, (batch, filters // rank, rank)), 2)
    if bias is not None:
        result = op.add(result, make(bias, source_name=b"svdf"))
    return converter.convert_fused_activation_function(bb.emit(result), options.FusedActivationFunction())
