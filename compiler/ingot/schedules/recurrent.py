"""LSTM, GRU and RNN over a sequence: one kernel, whose tasks of one step run before those of the next.

A step computes, for a block of hidden units, all gates' products with the state before it in registers, adds the part
that comes from the input (computed for all steps at once by a matrix product before), and applies the gates in place:

    for step:                                       # in order: `ROUNDS` says so to the lowering
        for block of hidden units:                  # in parallel
            acc[gate][0:b] += h[k] * R[k, gate][0:b]    for all k
            c, h[0:b] = cell(acc + gates of this step)

A GRU that resets the state before its product takes two such rounds a step: gates z and r first, of which it keeps z
and r * h; then the product of r * h.

The formulas are those of ONNX's LSTM, GRU (linear_before_reset = 1), RESET_GRU (= 0) and RNN with their default
activations. Weights are packed as [H/b][H][gates][b]; the last block is padded with zeros, of which nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import s_tir, tirx

from ingot.schedules.statements import (
    Expr,
    Stmt,
    float_buffer,
    integer,
    lanes_of,
    loop_over,
    named,
    realized,
    unrolled,
    whole,
    with_buffers,
)
from ingot.schedules.vector import ceil_div, largest_divisor, registers
from ingot.target import Target

#: Gates of each kind of cell, in the order of its weights' columns.
GATES = {"LSTM": 4, "GRU": 3, "RESET_GRU": 3, "RNN": 1}
#: The gates of each round of a step: first and count.
_PHASES = {"LSTM": ((0, 4),), "GRU": ((0, 3),), "RESET_GRU": ((0, 2), (2, 1)), "RNN": ((0, 1),)}
#: The annotation of a parallel loop whose range is that many equal parts, each to be run when the one before is done.
ROUNDS = "ingot.rounds"
#: Accumulators that hide the latency of a fused multiply-add.
_CHAINS = 8
_UNROLL = 4


@dataclass(frozen=True)
class RecurrentWorkload:
    """One direction of a recurrent layer, float32. `kind` is a key of GATES; `reverse` runs from the last step."""

    kind: str
    steps: int
    batch: int
    hidden: int
    reverse: bool

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates of the recurrent part."""
        return self.steps * self.batch * GATES[self.kind] * self.hidden * self.hidden


@dataclass(frozen=True)
class RecurrentConfig:
    """`rows` sequences x `block` hidden units a task, in vectors of `lanes`."""

    rows: int
    block: int
    lanes: int


def default_config(workload: RecurrentWorkload, target: Target) -> RecurrentConfig:
    """Return the smallest tile that hides the latency of a multiply-add and fits the registers."""
    regs, gates = registers(target), _PHASES[workload.kind][0][1]
    lanes = regs.lanes
    while lanes > 1 and lanes > workload.hidden:
        lanes //= 2
    vectors = min(max(1, _CHAINS // gates), ceil_div(workload.hidden, lanes))
    most = max(1, (regs.count - vectors) // (gates * vectors + 1))
    return RecurrentConfig(largest_divisor(workload.batch, most), vectors * lanes, lanes)


def pack_weight(weight: np.ndarray, workload: RecurrentWorkload, config: RecurrentConfig) -> np.ndarray:
    """Pack [H, gates * H] to [H/block][H][gates][block], the last block padded with zeros."""
    hidden, gates = workload.hidden, GATES[workload.kind]
    blocks = ceil_div(hidden, config.block)
    padded = np.zeros((hidden, gates, blocks * config.block), weight.dtype)
    padded[:, :, :hidden] = weight.reshape(hidden, gates, hidden)
    return np.ascontiguousarray(padded.reshape(hidden, gates, blocks, config.block).transpose(2, 0, 1, 3))


def primitive(workload: RecurrentWorkload, config: RecurrentConfig) -> Expr:
    """Return the PrimFunc of one direction.

    Its parameters are float32: gates [steps, batch, gates * H] (the input's part and all biases that are added to it),
    h before the first step [batch, H]; for LSTM also c before it [batch, H], for GRU the bias [H] inside the reset
    gate's product; the packed weights; and then what it writes: h of every step [steps, batch, H], for LSTM c after
    the last step [batch, H], for RESET_GRU gate z and the reset state of the last step it worked on, [batch, H] each.
    """
    w, gates, phases = workload, GATES[workload.kind], _PHASES[workload.kind]
    blocks, row_tiles = ceil_div(w.hidden, config.block), w.batch // config.rows
    given = float_buffer((w.steps, w.batch, gates * w.hidden), "gates")
    first = float_buffer((w.batch, w.hidden), "h_first")
    extra = []
    if w.kind == "LSTM":
        extra = [float_buffer((w.batch, w.hidden), "c_first")]
    elif w.kind == "GRU":
        extra = [float_buffer((w.hidden,), "bias")]
    weights = float_buffer((blocks, w.hidden, gates, config.block), "weight")
    hs = float_buffer((w.steps, w.batch, w.hidden), "h")
    kept = {"LSTM": ("c",), "RESET_GRU": ("z", "reset")}.get(w.kind, ())
    cs = [float_buffer((w.batch, w.hidden), name) for name in kept]
    memory = (extra[0], cs[0]) if w.kind == "LSTM" else (None, None)
    cell = _Cell(w, config, given, weights, hs, extra, cs)

    def task(index: Expr) -> Stmt:
        turn, rest = index // (row_tiles * blocks), index % (row_tiles * blocks)
        step, phase = (turn, integer(0)) if len(phases) == 1 else (turn // len(phases), turn % len(phases))
        names = {
            "time": integer(w.steps - 1) - step if w.reverse else step,
            "row": rest // blocks * config.rows,
            "block": rest % blocks,
        }

        def body(time: Expr, row: Expr, block: Expr) -> Stmt:
            before = time + 1 if w.reverse else time - 1

            def part(gates: tuple[int, int]) -> Stmt:
                start = cell.tile((time, row, block), gates, lambda r, k: first[r, k], memory[0])
                later = cell.tile((time, row, block), gates, lambda r, k: hs[before, r, k], memory[1])
                return tirx.IfThenElse(tirx.EQ(step, integer(0)), start, later)

            parts = [part(gates) for gates in phases]
            return parts[0] if len(parts) == 1 else tirx.IfThenElse(tirx.EQ(phase, integer(0)), *parts)

        statement = named(names, body)
        reads = [whole(b) for b in (given, first, *extra, weights)]
        return realized(s_tir.SBlock([], reads, [whole(b) for b in (hs, *cs)], "recurrent", statement))

    rounds = w.steps * len(phases)
    nest = loop_over(rounds * row_tiles * blocks, task, "task", tirx.ForKind.PARALLEL)
    nest = tirx.For(nest.loop_var, nest.min, nest.extent, nest.kind, nest.body, annotations={ROUNDS: rounds})
    root = s_tir.SBlock([], [], [], "root", nest)
    return tirx.PrimFunc([given, first, *extra, weights, hs, *cs], realized(root)).with_attr("s_tir", True)


@dataclass(frozen=True)
class _Cell:
    """What a task works on."""

    workload: RecurrentWorkload
    config: RecurrentConfig
    gates: Expr
    weights: Expr
    hs: Expr
    extra: list[Expr]
    cs: list[Expr]

    def tile(
        self,
        at: tuple[Expr, Expr, Expr],
        phase: tuple[int, int],
        before: Callable[[Expr, Expr], Expr],
        cell_before: Expr | None,
    ) -> Stmt:
        """Return a phase of one step of `rows` sequences and one block of units, from the states before it.

        at: time, first row, block; phase: its first gate, and their number.
        """
        w, config, (_, row, block), (first, gates) = self.workload, self.config, at, phase
        vectors = config.block // config.lanes
        acc = float_buffer((config.rows, gates, vectors, config.lanes), "acc")
        state = float_buffer((config.rows,), "state")

        def each(body: Callable[[Expr, Expr, Expr, Expr], Stmt]) -> Stmt:
            def vector(r: Expr, g: Expr, v: Expr) -> Stmt:
                return lanes_of(config.lanes, lambda lane: body(r, g, v, lane))

            def gate(r: Expr, g: Expr) -> Stmt:
                return unrolled(vectors, lambda v: vector(r, g, v), "v")

            return unrolled(config.rows, lambda r: unrolled(gates, lambda g: gate(r, g), "g"), "r")

        zero = each(lambda r, g, v, lane: tirx.BufferStore(acc, tirx.const(0.0, "float32"), [r, g, v, lane]))
        unroll = largest_divisor(w.hidden, _UNROLL)

        def multiplied(seq: Expr, k: Expr) -> Expr:
            return self.cs[1][seq, k] if w.kind == "RESET_GRU" and first else before(seq, k)

        def multiply(k: Expr) -> Stmt:
            def add(r: Expr, g: Expr, v: Expr, lane: Expr) -> Stmt:
                product = state[r] * self.weights[block, k, first + g, v * config.lanes + lane]
                return tirx.BufferStore(acc, acc[r, g, v, lane] + product, [r, g, v, lane])

            load = unrolled(config.rows, lambda r: tirx.BufferStore(state, multiplied(row + r, k), [r]), "r")
            return tirx.SeqStmt([load, each(add)])

        sums = loop_over(
            w.hidden // unroll, lambda outer: unrolled(unroll, lambda k: multiply(outer * unroll + k), "ki"), "k"
        )

        def finish(count: int) -> Stmt:
            pieces: list[Stmt] = []
            offset = 0
            while offset < count:
                lanes = min(config.lanes, 1 << ((count - offset).bit_length() - 1))
                pieces.append(self._piece(acc, at, first, offset, lanes, before, cell_before))
                offset += lanes
            return tirx.SeqStmt(pieces) if len(pieces) > 1 else pieces[0]

        tail = w.hidden % config.block
        last = finish(config.block)
        if tail:
            last = tirx.IfThenElse(tirx.LT(block, integer(w.hidden // config.block)), last, finish(tail))
        return with_buffers([acc, state], tirx.SeqStmt([zero, sums, last]), "step")

    def _piece(
        self,
        acc: Expr,
        at: tuple[Expr, Expr, Expr],
        first: int,
        offset: int,
        lanes: int,
        before: Callable[[Expr, Expr], Expr],
        cell_before: Expr | None,
    ) -> Stmt:
        """Return the cell of the block's units [offset, offset + lanes)."""
        w, config = self.workload, self.config
        time, row, block = at

        def element(r: Expr, lane: Expr) -> Stmt:
            unit, seq = block * config.block + offset + lane, row + r

            def product(g: int) -> Expr:
                return acc[r, g, integer(offset // config.lanes), integer(offset % config.lanes) + lane]

            def given(g: int) -> Expr:
                return self.gates[time, seq, integer(g * w.hidden) + unit]

            if cell_before is not None:  # LSTM: gates i, o, f, c
                i, o, f, g = (product(k) + given(k) for k in range(4))
                cell = tirx.sigmoid(f) * cell_before[seq, unit] + tirx.sigmoid(i) * tirx.tanh(g)
                state = tirx.BufferStore(self.cs[0], cell, [seq, unit])
                h = tirx.sigmoid(o) * tirx.tanh(self.cs[0][seq, unit])
                return tirx.SeqStmt([state, tirx.BufferStore(self.hs, h, [time, seq, unit])])
            if w.kind == "GRU":  # gates z, r, h; each replaces its sum, for long expressions compile slowly
                place = [integer(offset // config.lanes), integer(offset % config.lanes) + lane]
                values = [tirx.sigmoid(product(0) + given(0)), tirx.sigmoid(product(1) + given(1))]
                values.append(tirx.tanh(given(2) + product(1) * (product(2) + self.extra[0][unit])))
                gates = [tirx.BufferStore(acc, value, [r, integer(k), *place]) for k, value in enumerate(values)]
                h = (tirx.const(1.0, "float32") - product(0)) * product(2) + product(0) * before(seq, unit)
                return tirx.SeqStmt([*gates, tirx.BufferStore(self.hs, h, [time, seq, unit])])
            if w.kind == "RESET_GRU" and not first:
                z, reset = tirx.sigmoid(product(0) + given(0)), tirx.sigmoid(product(1) + given(1))
                kept = tirx.BufferStore(self.cs[0], z, [seq, unit])
                return tirx.SeqStmt([kept, tirx.BufferStore(self.cs[1], reset * before(seq, unit), [seq, unit])])
            if w.kind == "RESET_GRU":
                z, fresh = self.cs[0][seq, unit], tirx.tanh(product(0) + given(2))
                h = (tirx.const(1.0, "float32") - z) * fresh + z * before(seq, unit)
                return tirx.BufferStore(self.hs, h, [time, seq, unit])
            h = tirx.tanh(product(0) + given(0))
            return tirx.BufferStore(self.hs, h, [time, seq, unit])

        return unrolled(config.rows, lambda r: lanes_of(lanes, lambda lane: element(r, lane)), "r")
