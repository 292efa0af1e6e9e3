"""Tensors whose size along one axis depends on data: a static upper bound, and a counter that holds the actual size.

Such a tensor has its largest shape everywhere in the compiler; what lies beyond the count is of no meaning. An operator
may follow one if it computes each entry along that axis from that entry alone: then its result has the same count.
Cases, by number:
1. elementwise operators, also of several tensors: same axis, counted from the end where they broadcast;
2. Transpose, Squeeze, Unsqueeze, and a Reshape that leaves the axis what it is: the axis moves;
3. Gather and GatherND of a whole table at indices that depend on data, and Gather along another axis;
4. Slice, Split and Concat along another axis, or a Slice of all of it;
5. reductions, Softmax and norms along other axes;
6. MatMul and Gemm whose rows depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Extent:
    """The axis of a tensor whose size depends on data, and the name of the int64[1] tensor that counts it."""

    axis: int
    counter: str


@dataclass(frozen=True)
class Situation:
    """A node with what is known of its inputs: shapes (upper bounds), constants, and the output's shape."""

    node: onnx.NodeProto
    shapes: Sequence[tuple[int, ...]]
    constants: Sequence[np.ndarray | None]
    out_shape: tuple[int, ...]

    def attribute(self, name: str, default: int | list[int] | None) -> int | list[int] | None:
        """An integer attribute, or a list of them."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return list(attribute.ints) if attribute.type == 7 else int(attribute.i)
        return default

    def integers(self, name: str, index: int) -> list[int] | None:
        """Integers that are attribute `name` or constant input `index`; None if they are neither."""
        found = self.attribute(name, None)
        if found is None and index < len(self.constants):
            value = self.constants[index]
            found = None if value is None else [int(item) for item in value.reshape(-1)]
        return [found] if isinstance(found, int) else found


#: A rule gives the axis in the outputs, or None where the operator would need the count itself.
Rule = Callable[[Situation, Mapping[int, int]], "int | None"]


def follow(situation: Situation, extents: Mapping[int, Extent]) -> Extent | None:
    """The extent of all outputs of a node with such inputs (by their places); None if it cannot follow them."""
    counters = {extent.counter for extent in extents.values()}
    rule = _RULES.get(situation.node.op_type)
    if situation.node.domain not in ("", "ai.onnx") or rule is None or len(counters) != 1:
        return None
    axis = rule(situation, {place: extent.axis for place, extent in extents.items()})
    return None if axis is None else Extent(axis, counters.pop())


def _same_axis(situation: Situation, axes: Mapping[int, int]) -> int | None:
    """Case 1: one tensor in, and whatever else is no larger than an element."""
    if set(axes) != {0} or any(int(np.prod(shape)) > 1 for shape in situation.shapes[1:]):
        return None
    return axes[0]


def _broadcast(situation: Situation, axes: Mapping[int, int]) -> int | None:
    """Case 1: aligned from the end; a tensor without such an axis has one entry there."""
    rank = len(situation.out_shape)
    found = {axis + rank - len(situation.shapes[place]) for place, axis in axes.items()}
    if len(found) != 1:
        return None
    (axis,) = found
    for place, shape in enumerate(situation.shapes):
        here = axis - rank + len(shape)
        if place not in axes and here >= 0 and shape[here] != 1:
            return None
    return axis


def _transpose(situation: Situation, axes: Mapping[int, int]) -> int | None:
    order = situation.attribute("perm", None)
    rank = len(situation.shapes[0])
    permutation = order if isinstance(order, list) else list(range(rank))[::-1]
    return permutation.index(axes[0])


def _squeeze(situation: Situation, axes: Mapping[int, int]) -> int | None:
    rank = len(situation.shapes[0])
    given = situation.integers("axes", 1)
    removed = {axis % rank for axis in given} if given is not None else None
    if set(axes) != {0} or removed is None or axes[0] in removed:
        return None  # without axes, a dimension vanishes where the count happens to be 1
    return axes[0] - sum(axis < axes[0] for axis in removed)


def _unsqueeze(situation: Situation, axes: Mapping[int, int]) -> int | None:
    given = situation.integers("axes", 1)
    if set(axes) != {0} or given is None:
        return None
    rank = len(situation.out_shape)
    added = {axis % rank for axis in given}
    return [axis for axis in range(rank) if axis not in added][axes[0]]


def _reshape(situation: Situation, axes: Mapping[int, int]) -> int | None:
    """Case 2: the dimension that is worked out (-1) is the one that depends on data, at the same place in memory."""
    target = situation.constants[1] if len(situation.constants) > 1 else None
    if set(axes) != {0} or target is None or list(target.reshape(-1)).count(-1) != 1:
        return None
    source, axis = situation.shapes[0], axes[0]
    place = list(target.reshape(-1)).index(-1)
    same = situation.out_shape[place] == source[axis]
    before = np.prod(situation.out_shape[:place], dtype=np.int64) == np.prod(source[:axis], dtype=np.int64)
    # A 0 stands for the source's own dimension, which must not be the one that depends on data.
    copied = [index for index, size in enumerate(target.reshape(-1)) if size == 0]
    return place if same and before and axis not in copied else None


def _gather(situation: Situation, axes: Mapping[int, int]) -> int | None:
    rank, inner = len(situation.shapes[0]), len(situation.shapes[1])
    along = situation.attribute("axis", 0)
    along = (along if isinstance(along, int) else 0) % rank
    if set(axes) == {1}:
        return along + axes[1]
    if set(axes) != {0} or axes[0] == along:
        return None
    return axes[0] if axes[0] < along else axes[0] + inner - 1


def _gather_nd(situation: Situation, axes: Mapping[int, int]) -> int | None:
    if set(axes) != {1} or situation.attribute("batch_dims", 0) or axes[1] == len(situation.shapes[1]) - 1:
        return None
    return axes[1]


def _slice(situation: Situation, axes: Mapping[int, int]) -> int | None:
    starts, ends = situation.integers("starts", 1), situation.integers("ends", 2)
    if set(axes) != {0} or starts is None or ends is None:
        return None
    rank, axis = len(situation.shapes[0]), axes[0]
    along = situation.integers("axes", 3) or list(range(len(starts)))
    steps = situation.integers("steps", 4) or [1] * len(starts)
    for start, end, cut, step in zip(starts, ends, along, steps, strict=False):
        if cut % rank == axis and (start, step) != (0, 1):
            return None
        if cut % rank == axis and end < situation.shapes[0][axis]:
            return None
    return axis


def _other_axis(name: str, default: int) -> Rule:
    """Cases 4 and 5: along one axis, given by an attribute, which is another one."""

    def rule(situation: Situation, axes: Mapping[int, int]) -> int | None:
        along = situation.attribute(name, default)
        rank = len(situation.shapes[0])
        everywhere = set(axes) == set(range(len(situation.shapes))) or (
            situation.node.op_type != "Concat" and set(axes) == {0}
        )
        (axis,) = set(axes.values()) if len(set(axes.values())) == 1 else (None,)
        if not isinstance(along, int) or not everywhere or axis is None or along % rank == axis:
            return None
        return axis

    return rule


def _trailing(situation: Situation, axes: Mapping[int, int]) -> int | None:
    """Case 5: a norm over all axes from `axis` on."""
    along = situation.attribute("axis", -1)
    if set(axes) != {0} or not isinstance(along, int) or axes[0] >= along % len(situation.shapes[0]):
        return None
    return axes[0]


def _reduce(situation: Situation, axes: Mapping[int, int]) -> int | None:
    rank = len(situation.shapes[0])
    given = situation.integers("axes", 1)
    if situation.node.op_type in ("ArgMax", "ArgMin"):
        along = situation.attribute("axis", 0)
        given = [along] if isinstance(along, int) else None
    if set(axes) != {0} or not given or axes[0] in {axis % rank for axis in given}:
        return None
    if situation.attribute("keepdims", 1):
        return axes[0]
    return axes[0] - sum(axis % rank < axes[0] for axis in given)


def _matmul(situation: Situation, axes: Mapping[int, int]) -> int | None:
    left, right = situation.shapes[0], situation.shapes[1]
    # A matrix on the right has no batch that would have to be as large as the count.
    if set(axes) != {0} or len(left) < 2 or len(right) > 2 or axes[0] == len(left) - 1:
        return None
    return axes[0]


def _gemm(situation: Situation, axes: Mapping[int, int]) -> int | None:
    if set(axes) != {0} or axes[0] != 0 or situation.attribute("transA", 0):
        return None
    addend = situation.shapes[2] if len(situation.shapes) > 2 else ()
    return 0 if len(addend) < 2 or addend[0] == 1 else None


_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid "
    "Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"
)
_BINARY = (
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "PRelu Pow Sub Sum Where Xor"
)
_REDUCTIONS = (
    "ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _same_axis),
    **dict.fromkeys(_BINARY.split(), _broadcast),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Slice": _slice,
    "Split": _other_axis("axis", 0),
    "Concat": _other_axis("axis", 0),
    "Softmax": _other_axis("axis", -1),
    "LogSoftmax": _other_axis("axis", -1),
    "LayerNormalization": _trailing,
    "MatMul": _matmul,
    "Gemm": _gemm,
}
