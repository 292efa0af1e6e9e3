"""Everything without a template: elementwise, pooling, reductions, softmax, moves of data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.build import normal
from schedules.common import CHANNELS, TARGETS, WIDTHS, Branches, check, property_settings

PIECES = (1, 2, 3, 7)
UNARY = ("Relu", "Exp", "Tanh", "Sigmoid", "Erf", "Abs", "Neg", "Floor", "Softplus", "HardSwish", "Elu", "LeakyRelu")


def unary(shapes, kinds=UNARY):
    branches = Branches()
    for shape in shapes:
        for kind in kinds:
            branches.output(branches.node(kind, [branches.input(shape)]))
    return branches


@pytest.mark.parametrize("target", TARGETS)
def test_elementwise(tmp_path, target):
    check(unary([(5, 17)]), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_elementwise_sizes(tmp_path, target):
    shapes = [(c,) for c in CHANNELS] + [(3, c) for c in CHANNELS] + [(1,), (1, 1, 1), (2, 3, 5, 7), (1009,)]
    check(unary(shapes, ["Sigmoid"]), tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["Add", "Mul", "Sub", "Div", "Max"])
def test_broadcasts(tmp_path, target, kind):
    branches = Branches()
    for left, right in (
        ((5, 17), (17,)),
        ((5, 1), (1, 17)),
        ((2, 3, 8), (3, 1)),
        ((7,), (1,)),
        ((2, 1, 4, 1), (1, 3, 1, 5)),
        ((16,), (4, 16)),
        ((3, 33), (3, 33)),
    ):
        a, b = branches.input(left), branches.input(right)
        if kind == "Div":  # away from zero
            b = branches.node("Add", [branches.node("Abs", [b]), branches.weight(np.float32(0.5))])
        branches.output(branches.node(kind, [a, b]))
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_and_normalisation(tmp_path, target):
    branches = Branches()
    for shape in ((1, 10), (3, 17), (2, 5, 33), (64, 64), (1, 1001)):
        branches.output(branches.node("Softmax", [branches.input(shape)], axis=-1))
        ones, zeros = branches.weight(np.ones(shape[-1], np.float32)), branches.weight(normal((shape[-1],), 4))
        branches.output(branches.node("LayerNormalization", [branches.input(shape), ones, zeros], axis=-1))
    branches.output(branches.node("Softmax", [branches.input((3, 17, 5))], axis=1))
    branches.output(branches.node("LogSoftmax", [branches.input((3, 17))], axis=0))
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["ReduceSum", "ReduceMax", "ReduceMean", "ReduceProd", "ReduceL2"])
def test_reductions(tmp_path, target, kind):
    branches = Branches()
    for shape in ((3, 17), (2, 5, 16), (1, 33, 7, 9), (65,), (3, 4, 33)):
        for axes in ([0], [len(shape) - 1], list(range(len(shape))), [len(shape) - 2])[: len(shape) + 1]:
            for keep in (0, 1):
                x = branches.input(shape)
                if kind == "ReduceSum":
                    axis = branches.weight(np.array(axes, np.int64))
                    branches.output(branches.node(kind, [x, axis], keepdims=keep))
                else:
                    branches.output(branches.node(kind, [x], axes=axes, keepdims=keep))
    check(branches, tmp_path, target, (2, 7))


@pytest.mark.parametrize("target", TARGETS)
def test_pooling(tmp_path, target):
    branches = Branches()
    for channels in (1, 3, 8, 17, 64):
        for kind, options in (
            ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 2]}),
            ("AveragePool", {"kernel_shape": [3, 2], "strides": [1, 2], "pads": [1, 1, 0, 0]}),
            ("GlobalAveragePool", {}),
            ("GlobalMaxPool", {}),
        ):
            branches.output(branches.node(kind, [branches.input((1, channels, 7, 15))], **options))
    branches.output(branches.node("MaxPool", [branches.input((3, 5, 13, 14))], kernel_shape=[5, 5], strides=[3, 3]))
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_moves(tmp_path, target):
    branches = Branches()
    for perm in ([0, 2, 3, 1], [0, 3, 1, 2], [3, 2, 1, 0], [1, 0, 2, 3]):
        branches.output(branches.node("Transpose", [branches.input((2, 3, 5, 17))], perm=perm))
    for axis in range(3):
        parts = [branches.input(tuple(7 if i != axis else n for i in range(3))) for n in (1, 16, 33)]
        branches.output(branches.node("Concat", parts, axis=axis))
    for starts, ends, axes, steps in (([1], [6], [1], [2]), ([0, 2], [3, 17], [0, 2], [1, 3]), ([-5], [-1], [2], [1])):
        operands = [branches.weight(np.array(v, np.int64)) for v in (starts, ends, axes, steps)]
        branches.output(branches.node("Slice", [branches.input((3, 7, 17)), *operands]))
    rows = branches.weight(np.arange(40, dtype=np.int64) % 5)
    for length in (31, 33, 64):  # rows that LLVM copies
        branches.output(branches.node("Gather", [branches.input((5, length)), rows], axis=0))
    index = branches.weight(np.array([4, 0, 2, 2], np.int64))
    for axis in (0, 1, 2):
        branches.output(branches.node("Gather", [branches.input((5, 7, 9)), index], axis=axis))
    check(branches, tmp_path, target, PIECES)


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_with_readers_of_different_kinds(tmp_path, target):
    branches = Branches()
    x = branches.input((4, 33))
    shared = branches.node("Exp", [branches.node("Neg", [x])])
    total = branches.node("ReduceSum", [shared, branches.weight(np.array([1], np.int64))], keepdims=1)
    branches.output(branches.node("Div", [shared, total]))
    branches.output(branches.node("Transpose", [shared], perm=[1, 0]))
    branches.output(shared)
    check(branches, tmp_path, target, PIECES)


@property_settings
@given(
    st.lists(st.sampled_from(WIDTHS[:8]), min_size=1, max_size=4),
    st.lists(st.sampled_from([*UNARY, "scale", "row", "softmax", "sum"]), min_size=1, max_size=5),
    st.sampled_from(TARGETS),
    st.sampled_from(PIECES),
)
def test_any_chain(tmp_path_factory, shape, kinds, target, pieces):
    while np.prod(shape) > 100_000:
        shape = shape[:-1]
    branches = Branches()
    value = branches.input(shape)
    for kind in kinds:
        if kind == "scale":
            value = branches.node("Mul", [value, branches.weight(np.float32(0.3))])
        elif kind == "row":
            value = branches.node("Add", [value, branches.input(shape[-1:])])
        elif kind == "softmax":
            value = branches.node("Softmax", [value], axis=-1)
        elif kind == "sum":
            mean = branches.node("ReduceMean", [value], axes=[len(shape) - 1], keepdims=1)
            value = branches.node("Sub", [value, mean])
        elif kind == "Floor":
            continue  # a rounding difference before it is a step after it
        elif kind == "Exp":  # of numbers that stay small
            value = branches.node("Exp", [branches.node("Tanh", [value])])
        else:
            value = branches.node(kind, [value])
    branches.output(branches.node("Abs", [value]))
    check(branches, tmp_path_factory.mktemp("chain"), target, (pieces,))
