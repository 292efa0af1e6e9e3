"""RNN, GRU and LSTM over a sequence whose length is known.

The forms that frameworks export become one call of an external function named RECURRENT + kind, which the compiler has
a template for; for all others the steps are written out one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ingot.frontend.onnx_ops.context import Context, converts
from ingot.frontend.tvm_types import Expr

# Each step becomes kernels of its own: beyond this the program is longer than anything a board should hold.
MAX_STEPS = 1024
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULT_ACTIVATIONS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
# Default alpha and beta of the activations that have them.
_PARAMETERS = {
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01, 0.0),
    "thresholdedrelu": (1.0, 0.0),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, 0.0),
}
_TAKES_ALPHA = frozenset(_PARAMETERS)
_TAKES_BETA = frozenset(("affine", "scaledtanh", "hardsigmoid"))

#: A direction as one call: "ingot.recurrent.LSTM.forward" (or GRU, RESET_GRU, RNN; reverse). Operands, all float32:
#: gates [steps, batch, gates * H], with every bias that is added to them; h before the first step [batch, H]; for LSTM
#: c before it, for GRU the bias [H] inside the reset gate's product (none for RESET_GRU, the GRU whose
#: linear_before_reset is 0); weights [H, gates * H]. Results: h of every step [steps, batch, H]; for LSTM c after the
#: last step [batch, H]; for RESET_GRU two of [batch, H] that the kernel alone uses.
RECURRENT = "ingot.recurrent."

Activation = Callable[[Expr], Expr]


def _activation(ctx: Context, name: str, alpha: float, beta: float) -> Activation:
    from tvm import relax

    op = relax.op

    def line(x: Expr) -> Expr:
        return op.add(op.multiply(x, ctx.const(alpha)), ctx.const(beta))

    table: dict[str, Activation] = {
        "sigmoid": op.sigmoid,
        "tanh": op.tanh,
        "relu": op.nn.relu,
        "affine": line,
        "hardsigmoid": lambda x: op.clip(line(x), 0.0, 1.0),
        "scaledtanh": lambda x: op.multiply(op.tanh(op.multiply(x, ctx.const(beta))), ctx.const(alpha)),
        "leakyrelu": lambda x: op.where(op.less(x, ctx.const(0)), op.multiply(x, ctx.const(alpha)), x),
        "thresholdedrelu": lambda x: op.where(op.greater(x, ctx.const(alpha)), x, ctx.const(0)),
        "elu": lambda x: op.where(
            op.less(x, ctx.const(0)), op.multiply(op.subtract(op.exp(x), ctx.const(1)), ctx.const(alpha)), x
        ),
        "softsign": lambda x: op.divide(x, op.add(op.abs(x), ctx.const(1))),
        "softplus": lambda x: op.log(op.add(op.exp(x), ctx.const(1))),
    }
    if name.lower() not in table:
        raise ctx.unsupported(f"activation {name!r}", ", ".join(sorted(table)))
    return table[name.lower()]


def _activations(ctx: Context, directions: int) -> list[list[Activation]]:
    """The activation functions of each direction, with the alphas and betas that belong to them."""
    defaults = _DEFAULT_ACTIVATIONS[ctx.node.op_type]
    names = ctx.attr("activations") or defaults * directions
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    if len(names) != len(defaults) * directions:
        raise ctx.unsupported(f"{len(names)} activations", f"{len(defaults) * directions}")
    alphas, betas = list(ctx.attr("activation_alpha", [])), list(ctx.attr("activation_beta", []))
    chosen = []
    for name in names:
        alpha, beta = _PARAMETERS.get(name.lower(), (0.0, 0.0))
        if name.lower() in _TAKES_ALPHA and alphas:
            alpha = alphas.pop(0)
        if name.lower() in _TAKES_BETA and betas:
            beta = betas.pop(0)
        chosen.append(_activation(ctx, name, float(alpha), float(beta)))
    return [chosen[i * len(defaults) : (i + 1) * len(defaults)] for i in range(directions)]


@dataclass
class _Layer:
    """One direction: what its steps need. Weights are [in, gates * hidden] and [hidden, gates * hidden]."""

    ctx: Context
    hidden: int
    recurrent: Expr
    recurrent_bias: Expr | None
    peepholes: list[Expr] | None
    activations: list[Activation]

    def clipped(self, x: Expr) -> Expr:
        """Apply the node's clip, which is on what the activations see."""
        from tvm import relax

        limit = float(self.ctx.attr("clip", 0.0))
        return relax.op.clip(x, -limit, limit) if limit > 0 else x

    def gate(self, gates: Expr, index: int, count: int = 1) -> Expr:
        """Columns of gate `index` (and `count` - 1 after it)."""
        from tvm import relax

        begin = index * self.hidden
        return self.ctx.emit(relax.op.strided_slice(gates, [1], [begin], [begin + count * self.hidden], [1]))


def _slice0(ctx: Context, index: int, where: int) -> Expr:
    """Entry `where` of the first axis of input `index`, without that axis."""
    from tvm import relax

    shape = ctx.shape(index)
    value = ctx.value(index)
    if value is not None:
        return ctx.array(f"in{index}_{where}", np.ascontiguousarray(value[where]))
    part = relax.op.strided_slice(ctx.inputs[index], [0], [where], [where + 1], [1])
    return ctx.emit(relax.op.reshape(part, shape[1:]))


def _matrix(ctx: Context, index: int, where: int) -> Expr:
    """Weights of one direction, transposed for a product from the left."""
    from tvm import relax

    value = ctx.value(index)
    if value is not None:
        return ctx.array(f"in{index}_{where}", np.ascontiguousarray(value[where].T))
    return ctx.emit(relax.op.permute_dims(_slice0(ctx, index, where), [1, 0]))


def _columns(ctx: Context, vector: Expr, begin: int, end: int) -> Expr:
    from tvm import relax

    return ctx.emit(relax.op.strided_slice(vector, [0], [begin], [end], [1]))


def _lstm_step(layer: _Layer, gates: Expr, h: Expr, c: Expr) -> tuple[Expr, Expr]:
    from tvm import relax

    op, ctx = relax.op, layer.ctx
    gates = ctx.emit(op.add(gates, op.matmul(h, layer.recurrent)))
    if layer.recurrent_bias is not None:
        gates = ctx.emit(op.add(gates, layer.recurrent_bias))
    i, o, f, g = (layer.gate(gates, index) for index in range(4))
    first, second, third = layer.activations
    if layer.peepholes is not None:
        i = op.add(i, op.multiply(layer.peepholes[0], c))
        f = op.add(f, op.multiply(layer.peepholes[2], c))
    i = ctx.emit(first(layer.clipped(i)))
    if layer.ctx.attr("input_forget", 0):
        f = ctx.emit(op.subtract(ctx.const(1), i))
    else:
        f = ctx.emit(first(layer.clipped(f)))
    g = second(layer.clipped(g))
    c = ctx.emit(op.add(op.multiply(f, c), op.multiply(i, g)))
    if layer.peepholes is not None:
        o = op.add(o, op.multiply(layer.peepholes[1], c))
    h = ctx.emit(op.multiply(first(layer.clipped(o)), third(c)))
    return h, c


def _gru_step(layer: _Layer, gates: Expr, h: Expr, _: Expr) -> tuple[Expr, Expr]:
    from tvm import relax

    op, ctx, size = relax.op, layer.ctx, layer.hidden
    first, second = layer.activations
    bias = layer.recurrent_bias
    if ctx.attr("linear_before_reset", 0):
        inner = op.matmul(h, layer.recurrent)
        inner = ctx.emit(inner if bias is None else op.add(inner, bias))
        both = ctx.emit(first(layer.clipped(op.add(layer.gate(gates, 0, 2), layer.gate(inner, 0, 2)))))
        z, r = layer.gate(both, 0), layer.gate(both, 1)
        fresh = second(layer.clipped(op.add(layer.gate(gates, 2), op.multiply(r, layer.gate(inner, 2)))))
    else:
        if bias is not None:
            gates = ctx.emit(op.add(gates, bias))
        for_both = ctx.emit(op.strided_slice(layer.recurrent, [1], [0], [2 * size], [1]))
        for_fresh = ctx.emit(op.strided_slice(layer.recurrent, [1], [2 * size], [3 * size], [1]))
        both = ctx.emit(first(layer.clipped(op.add(layer.gate(gates, 0, 2), op.matmul(h, for_both)))))
        z, r = layer.gate(both, 0), layer.gate(both, 1)
        reset = ctx.emit(op.multiply(r, h))
        fresh = second(layer.clipped(op.add(layer.gate(gates, 2), op.matmul(reset, for_fresh))))
    fresh = ctx.emit(fresh)
    h = ctx.emit(op.add(op.multiply(op.subtract(ctx.const(1), z), fresh), op.multiply(z, h)))
    return h, h


def _rnn_step(layer: _Layer, gates: Expr, h: Expr, _: Expr) -> tuple[Expr, Expr]:
    from tvm import relax

    total = relax.op.add(gates, relax.op.matmul(h, layer.recurrent))
    if layer.recurrent_bias is not None:
        total = relax.op.add(total, layer.recurrent_bias)
    h = layer.ctx.emit(layer.activations[0](layer.clipped(total)))
    return h, h


_STEPS = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN": _rnn_step}


@converts("LSTM", "GRU", "RNN")
def _recurrent(ctx: Context) -> Expr:
    from tvm import relax

    op, kind = relax.op, ctx.node.op_type
    batchwise = bool(ctx.attr("layout", 0))
    x = ctx.inputs[0]
    shape = ctx.shape()
    if batchwise:
        x = ctx.emit(op.permute_dims(x, [1, 0, 2]))
        shape = (shape[1], shape[0], shape[2])
    steps, batch, width = shape
    directions, columns, _ = ctx.shape(1)
    hidden = columns // _GATES[kind]
    way = ctx.attr("direction", "forward")
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(way)
    if backwards is None or len(backwards) != directions:
        raise ctx.unsupported(f"direction {way!r} of {directions}", "forward, reverse or bidirectional")
    flat = ctx.emit(op.reshape(x, (steps * batch, width)))
    activations = _activations(ctx, directions)
    lengths = ctx.value(4)
    masked = ctx.has(4) and (lengths is None or bool(np.any(lengths != steps)))
    as_loop = not masked and steps > 0 and _is_plain(ctx)
    if steps > MAX_STEPS and not as_loop:
        raise ctx.unsupported(
            f"a sequence of {steps}", f"at most {MAX_STEPS} steps of this form", "run the model on shorter pieces"
        )
    ys, hs, cs = [], [], []
    for where in range(directions):
        layer, gates = _layer(ctx, where, hidden, flat, activations[where])
        gates = ctx.emit(op.reshape(gates, (steps, batch, columns)))
        h, c = _initial(ctx, 5, where, batch, hidden, batchwise), _initial(ctx, 6, where, batch, hidden, batchwise)
        if as_loop:
            y, c = _loop(ctx, where, gates, h, c, reverse=backwards[where])
            ys.append(y)
            last = 0 if backwards[where] else steps - 1
            h = op.strided_slice(y, [0], [last], [last + 1], [1])
            hs.append(ctx.emit(op.reshape(ctx.emit(h), (batch, hidden))))
            cs.append(c if kind == "LSTM" else hs[-1])
            continue
        outputs: dict[int, Expr] = {}
        for step in range(steps - 1, -1, -1) if backwards[where] else range(steps):
            now = ctx.emit(op.reshape(op.strided_slice(gates, [0], [step], [step + 1], [1]), (batch, columns)))
            new_h, new_c = _STEPS[kind](layer, now, h, c)
            outputs[step] = new_h
            if masked:
                inside = ctx.emit(op.reshape(op.greater(ctx.inputs[4], ctx.const(step, "int32")), (batch, 1)))
                outputs[step] = ctx.emit(op.where(inside, new_h, ctx.const(0)))
                new_h = ctx.emit(op.where(inside, new_h, h))
                new_c = ctx.emit(op.where(inside, new_c, c)) if kind == "LSTM" else new_h
            h, c = new_h, new_c
        ys.append(ctx.emit(op.stack([outputs[step] for step in range(steps)], axis=0)))
        hs.append(h)
        cs.append(c)
    y = op.stack(ys, axis=2 if batchwise else 1)
    if batchwise:
        y = op.permute_dims(ctx.emit(y), [1, 0, 2, 3]) if directions else y
        y = ctx.emit(y)
    results = [y, op.stack(hs, axis=1 if batchwise else 0), op.stack(cs, axis=1 if batchwise else 0)]
    return results[: len(ctx.node.output)]


def _is_plain(ctx: Context) -> bool:
    """Whether the node is of the form that RECURRENT stands for: what PyTorch and Keras export."""
    kind, directions = ctx.node.op_type, ctx.shape(1)[0]
    names = ctx.attr("activations") or _DEFAULT_ACTIVATIONS[kind] * directions
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    return (
        ctx.dtype() == "float32"
        and [name.lower() for name in names] == [name.lower() for name in _DEFAULT_ACTIVATIONS[kind]] * directions
        and not ctx.attr("clip")
        and not ctx.attr("input_forget", 0)
        and not (kind == "LSTM" and ctx.has(7))
        and ctx.value(2) is not None
        and (not ctx.has(3) or ctx.value(3) is not None)
    )


def _loop(ctx: Context, where: int, gates: Expr, h: Expr, c: Expr, *, reverse: bool) -> tuple[Expr, Expr]:
    """One direction as one call: h of every step and, for LSTM, c after the last."""
    from tvm import relax

    kind, recurrent = str(ctx.node.op_type), ctx.need(2, "R")[where]
    steps, batch, columns = (int(d) for d in gates.ty.shape)
    hidden = columns // _GATES[kind]
    bias = ctx.need(3, "B")[where][columns:] if ctx.has(3) else np.zeros(columns, np.float32)
    more = []
    if kind == "GRU" and not ctx.attr("linear_before_reset", 0):
        kind = "RESET_GRU"
    if kind == "LSTM":
        more = [c]
    elif kind == "GRU":
        more = [ctx.array(f"in3_{where}_reset", np.ascontiguousarray(bias[2 * hidden :]))]
        bias = np.concatenate([bias[: 2 * hidden], np.zeros(hidden, np.float32)])
    if np.any(bias):
        gates = ctx.emit(relax.op.add(gates, ctx.array(f"in3_{where}_recurrent", bias)))
    weights = ctx.array(f"in2_{where}", np.ascontiguousarray(recurrent.T))
    results = [relax.TensorType((steps, batch, hidden), "float32")]
    results += [relax.TensorType((batch, hidden), "float32")] * {"LSTM": 1, "RESET_GRU": 2}.get(kind, 0)
    name = f"{RECURRENT}{kind}.{'reverse' if reverse else 'forward'}"
    made = ctx.emit(relax.op.call_dps_packed(name, relax.Tuple([gates, h, *more, weights]), out_ty=results))
    if len(results) == 1:
        return made, made
    return ctx.emit(relax.TupleGetItem(made, 0)), ctx.emit(relax.TupleGetItem(made, 1))


def _layer(ctx: Context, where: int, hidden: int, flat: Expr, activations: list[Activation]) -> tuple[_Layer, Expr]:
    """A direction's constants, and its gates' part that comes from the input, for all steps at once."""
    from tvm import relax

    op = relax.op
    count = _GATES[ctx.node.op_type] * hidden
    gates = op.matmul(flat, _matrix(ctx, 1, where))
    recurrent_bias = None
    if ctx.has(3):
        bias = _slice0(ctx, 3, where)
        gates = op.add(gates, _columns(ctx, bias, 0, count))
        recurrent_bias = _columns(ctx, bias, count, 2 * count)
    peepholes = None
    if ctx.node.op_type == "LSTM" and ctx.has(7):
        vector = _slice0(ctx, 7, where)
        peepholes = [_columns(ctx, vector, i * hidden, (i + 1) * hidden) for i in range(3)]
    layer = _Layer(ctx, hidden, _matrix(ctx, 2, where), recurrent_bias, peepholes, activations)
    return layer, ctx.emit(gates)


def _initial(ctx: Context, index: int, where: int, batch: int, hidden: int, batchwise: bool) -> Expr:
    from tvm import relax

    if not ctx.has(index):
        return ctx.emit(relax.op.zeros((batch, hidden), ctx.dtype()))
    axis = 1 if batchwise else 0
    part = relax.op.strided_slice(ctx.inputs[index], [axis], [where], [where + 1], [1])
    return ctx.emit(relax.op.reshape(part, (batch, hidden)))
