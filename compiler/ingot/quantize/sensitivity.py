"""Which tensors cost the model's outputs most in 8 bits, found with a switch at each of them in the float model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from tvm import relax

from ingot.frontend.interface import Imported, TensorSpec
from ingot.passes.rewriter import Rewriter, rebuild
from ingot.quantize.affine import Affine, Array
from ingot.quantize.graph import Expr, Graph, Placement, place
from ingot.quantize.observe import Build, Feeds, Samples
from ingot.quantize.search import relative_error

#: Multiply-adds that looking at all tensors may take, and samples on which it looks, at most.
_BUDGET, _SAMPLES = 1e12, 8
#: Share of the multiply-adds that layers kept in float for their harm may have together.
_SHARE = 0.05
#: The error's share that is left when one more tensor stays float must be below this.
_WORTH = 0.9
#: Tensors that are looked at again after the first round: those of most harm.
_AGAIN = 12


def switched(graph: Graph, placement: Placement, affine: Mapping[Expr, Affine]) -> Imported:
    """Return the float model with a further input of one element, 0 or 1, for each stored tensor.

    Readers of a tensor x see x + switch * (r - x), with r the nearest values to x that can be stored.
    """
    state = graph.state
    names = [f"switch_{number}" for number in range(len(placement.stored))]
    switches = {
        var: relax.Var(name, relax.TensorType((1,), "float32"))
        for var, name in zip(placement.stored, names, strict=True)
    }
    seen: dict[Expr, Expr] = {}

    def read(rewriter: Rewriter, old: Expr, new: Expr) -> Expr:
        old = graph.value[old] if isinstance(graph.value.get(old), relax.Tuple) else old
        if isinstance(old, relax.Tuple):
            return relax.Tuple([read(rewriter, a, b) for a, b in zip(old.fields, new.fields, strict=True)])
        if old not in switches:
            return new
        if old not in seen:
            numbers, one = affine[old], rewriter.emit
            low, high = (float(limit - numbers.zero_point) for limit in numbers.limits)
            step = relax.const(np.float32(numbers.scale), "float32")
            inside = one(relax.op.clip(one(relax.op.divide(new, step)), low, high))
            rounding = one(relax.op.subtract(one(relax.op.multiply(one(relax.op.round(inside)), step)), new))
            seen[old] = one(relax.op.add(new, one(relax.op.multiply(rounding, switches[old]))))
        return seen[old]

    def visit(rewriter: Rewriter, call: Expr, args: list[Expr]) -> Expr | None:
        return rebuild(call, [read(rewriter, old, new) for old, new in zip(call.args, args, strict=True)])

    rewriter = Rewriter(state, visit)
    specs = tuple(TensorSpec(name, "float32", (1,)) for name in names)
    rewriter.params[state.n_inputs : state.n_inputs] = switches.values()
    rewriter.state = state.having(imported=replace(state.imported, inputs=(*state.imported.inputs, *specs)))
    done = rewriter.run()
    return replace(done.imported, module=done.module, weights=dict(done.weights), states=())


class Sensitivity:
    """The outputs' error on some samples with any of the stored tensors in 8 bits; weights are float32."""

    def __init__(
        self, graph: Graph, placement: Placement, affine: Mapping[Expr, Affine], samples: Samples, build: Build
    ) -> None:
        self._stored = placement.stored
        self._run = build(switched(graph, placement, affine))
        work = _macs(graph, graph.layers) * max(1, len(placement.stored))
        count = int(np.clip(_BUDGET // max(1, work), 1, min(_SAMPLES, len(samples))))
        wanted = set(np.linspace(0, len(samples) - 1, count).round().astype(int).tolist())
        self._feeds: list[Feeds] = [feeds for number, feeds in enumerate(samples) if number in wanted]
        self._reference = self._outputs(())

    def error(self, stored: Collection[Expr]) -> float:
        """Return the error of the outputs over their size with the given tensors in 8 bits."""
        return relative_error(self._reference, self._outputs(stored))

    def _outputs(self, stored: Collection[Expr]) -> list[Sequence[Array]]:
        switches = {
            f"switch_{number}": np.full(1, var in stored, np.float32) for number, var in enumerate(self._stored)
        }
        return [list(self._run({**feeds, **switches})) for feeds in self._feeds]


def cost_most(
    graph: Graph, slow: Collection[str], error: Callable[[Collection[Expr]], float], enough: float
) -> frozenset[str]:
    """Return the few small layers whose 8-bit inputs cost the outputs most.

    slow: layers that are in float anyway. error: of the outputs with the given tensors in 8 bits. One tensor after the
    other gets all of its readers into float, the one that lowers the error most first, until the error is `enough`, no
    tensor is worth it, or the layers would have more than _SHARE of the multiply-adds.
    """
    readers: dict[Expr, set[str]] = {}
    for layer in graph.layers.values():
        if layer.name not in slow:
            readers.setdefault(layer.data, set()).add(layer.name)
    most = _SHARE * _macs(graph, graph.layers)

    def left(names: Collection[str]) -> float:
        return error(place(graph, {*slow, *names}).stored)

    chosen: set[str] = set()
    candidates, now = list(readers.values()), left(())
    while now > enough:
        candidates = [names for names in candidates if _macs(graph, chosen | names) <= most]
        found = sorted(((left(chosen | names), number) for number, names in enumerate(candidates)))
        if not found or found[0][0] > now * _WORTH:
            break
        now = found[0][0]
        chosen |= candidates[found[0][1]]
        candidates = [candidates[number] for _, number in found[1 : 1 + _AGAIN]]
    return frozenset(chosen)


def _macs(graph: Graph, names: Collection[str]) -> int:
    return sum(graph.layers[name].macs for name in names)
