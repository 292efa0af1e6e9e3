"""Where the config of a template comes from: the cost formula, or a tuning log, or the tuner that tries one.

A pass that chooses a template describes its choice as a `Choice` and asks the state's `picks`. The description of the
work, `task`, is the key of tuning logs: it names the operator, its shapes, its types and what is computed on its
result in the same kernel, and nothing of the model around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ingot.passes.rewriter import bindings_of, is_tensor, op_name, outputs_of, shape_of
from ingot.passes.state import State
from ingot.schedules.conv2d import Conv2DWorkload, MatmulWorkload
from ingot.schedules.depthwise import DepthwiseWorkload

Expr = Any  # TVM ships no types; a Relax expression

#: Operators that `fuse` computes in the kernel whose result they read: one result element from one element of it.
ELEMENTWISE = frozenset(
    (
        "relax.abs",
        "relax.add",
        "relax.astype",
        "relax.ceil",
        "relax.clip",
        "relax.cos",
        "relax.divide",
        "relax.erf",
        "relax.exp",
        "relax.floor",
        "relax.log",
        "relax.maximum",
        "relax.minimum",
        "relax.multiply",
        "relax.negative",
        "relax.nn.gelu",
        "relax.nn.gelu_tanh",
        "relax.nn.leakyrelu",
        "relax.nn.relu",
        "relax.nn.relu6",
        "relax.nn.silu",
        "relax.power",
        "relax.quantize",
        "relax.round",
        "relax.rsqrt",
        "relax.sigmoid",
        "relax.sin",
        "relax.sqrt",
        "relax.square",
        "relax.subtract",
        "relax.tanh",
    )
)


@dataclass(frozen=True)
class Choice:
    """One call for which a pass can choose among configs.

    call: the operator's call in the module the pass began with. task: what is computed, see `task_of`.
    space: makes the list of configs that are valid here, those of several templates where several apply.
    default: the one of least estimated cost.
    """

    call: Expr
    task: str
    space: Callable[[], Sequence[Any]]
    default: Any


Picks = Callable[[Choice], Any]


def formula(choice: Choice) -> Any:  # noqa: ANN401 - a config
    """Pick by the cost formula alone."""
    return choice.default


class Chooser:
    """Asks for configs on behalf of one pass over `state`."""

    def __init__(self, state: State) -> None:
        self.picks: Picks = state.picks or formula
        self.epilogues = Epilogues(state)
        self.variables = {binding.value: binding.var for binding in bindings_of(state.module["main"])}

    def __call__(self, call: Expr, workload: str, space: Callable[[], Sequence[Any]], default: Any) -> Any:  # noqa: ANN401
        """Return the config to use for `call`; `workload` is its description without what follows it."""
        after = epilogue_text(self.variables.get(call), self.epilogues[call])
        return self.picks(Choice(call, f"{workload} | {after}".rstrip(" |"), space, default))


class Epilogues:
    """For each call of `main`, the bindings that `fuse` computes in its kernel, in order; found when asked for.

    Those are elementwise operators of its result's shape such that one tensor alone leaves the group.
    """

    def __init__(self, state: State) -> None:
        main = state.module["main"]
        self._bindings = bindings_of(main)
        self._places = {b.value: place for place, b in enumerate(self._bindings) if op_name(b.value)}
        self._readers: dict[Expr, set[int]] = {}
        for index, binding in enumerate(self._bindings):
            for var in read_by(binding.value):
                self._readers.setdefault(var, set()).add(index)
        for out in outputs_of(main):
            self._readers.setdefault(out, set()).add(len(self._bindings))

    def __getitem__(self, call: Expr) -> tuple[Any, ...]:
        """Return the bindings that join the kernel of `call`, none if it is not a call of `main`."""
        place = self._places.get(call)
        return () if place is None else _group(self._bindings, place, self._readers)


def read_by(value: Expr) -> list[Expr]:
    """Return the expressions a binding's value reads, those inside tuples too."""
    parts = getattr(value, "args", None)
    parts = parts if parts is not None else getattr(value, "fields", None)
    if parts is None:
        source = getattr(value, "tuple_value", None)
        return [source if source is not None else value]
    return [var for part in parts for var in (read_by(part) if hasattr(part, "fields") else [part])]


def _group(bindings: list[Any], start: int, readers: dict[Expr, set[int]]) -> tuple[Any, ...]:
    """Return the longest run of elementwise readers from which one tensor leaves, the last one's."""
    first = bindings[start].var
    if not is_tensor(first):
        return ()
    shape, members, taken, best = shape_of(first), {first}, {start}, 0
    group: list[Any] = []
    frontier = set(readers.get(first, ()))
    while frontier:
        index = min(frontier)
        frontier.discard(index)
        if index >= len(bindings) or index in taken:
            continue
        binding = bindings[index]
        if op_name(binding.value) not in ELEMENTWISE or shape_of(binding.var) != shape:
            continue
        group.append(binding)
        members.add(binding.var)
        taken.add(index)
        frontier |= readers.get(binding.var, set())
        leaving = [var for var in members if readers.get(var, set()) - taken]
        if leaving == [binding.var]:
            best = len(group)
    return tuple(group[:best])


def epilogue_text(result: Expr, group: Sequence[Any]) -> str:
    """Return the operators on `result` in a canonical form, like "add.v clip".

    Behind the dot are the operands from elsewhere: a tensor of the result's shape (t), another one (v), a scalar (s).
    """
    if not group:
        return ""
    shape, inside, words = shape_of(group[0].var), {b.var for b in group}, []
    for binding in group:
        kinds = ""
        for arg in binding.value.args:
            if arg in inside or arg.same_as(result) or not is_tensor(arg):
                continue
            other = shape_of(arg)
            size = 1
            for dim in other:
                size *= dim
            kinds += "s" if size == 1 else "t" if other == shape else "v"
        name = op_name(binding.value).removeprefix("relax.").removeprefix("nn.")
        words.append(f"{name}.{kinds}" if kinds else name)
    return " ".join(words)


def integer_text(w: Conv2DWorkload | DepthwiseWorkload | MatmulWorkload, stored: str, kind: str) -> str:
    """Return the description of a layer of whole numbers, whose weights are of a `microkernels.weight_kind`."""
    if isinstance(w, MatmulWorkload):
        text = matmul_text(w, stored)
    else:
        text = conv2d_text(w, stored) if isinstance(w, Conv2DWorkload) else depthwise_text(w, stored)
    return f"{text.replace(' ', '_int8 ', 1)} {kind}"


def conv2d_text(w: Conv2DWorkload, stored: str) -> str:
    """Return the description of a convolution of one group; `stored` is the type of its input in memory."""
    return f"conv2d {stored} n{w.batch} h{w.height} w{w.width} i{w.in_channels} o{w.out_channels} {_window(w)}"


def depthwise_text(w: DepthwiseWorkload, stored: str) -> str:
    """Return the description of a depthwise convolution."""
    return f"depthwise {stored} n{w.batch} h{w.height} w{w.width} c{w.channels} {_window(w)}"


def matmul_text(w: MatmulWorkload, stored: str) -> str:
    """Return the description of a matrix product with constant right-hand side."""
    return f"matmul {stored} m{'x'.join(map(str, w.lead))} k{w.k} n{w.n}"


def _window(w: Conv2DWorkload | DepthwiseWorkload) -> str:
    def join(values: Sequence[int], by: str) -> str:
        return by.join(map(str, values))

    padding, dilation = join(w.padding, "."), join(w.dilation, "x")
    return f"k{join(w.kernel, 'x')} s{join(w.strides, 'x')} p{padding} d{dilation}"
