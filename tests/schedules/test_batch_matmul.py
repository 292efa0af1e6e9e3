"""Products of two computed matrices: odd sizes, transposed and broadcast operands, epilogues."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from ingot.schedules.batch_matmul import BatchMatmulWorkload, default_config
from ingot.schedules.vector import registers
from ingot.target import load_target
from passes.build import close, finish, normal, relax_state
from passes.execute import execute

op = relax.op
TARGETS = ("native", "x86-64-v3", "x86-64-v2")
#: m, k, n
SIZES = ((1, 8, 16), (1, 5, 17), (2, 7, 33), (3, 1, 5), (4, 9, 8), (5, 16, 4), (7, 8, 31), (16, 3, 65), (13, 32, 100))


def run(feeds, body, folder, target="native", kernels=None):
    inputs = {f"x{i}": x.shape for i, x in enumerate(feeds)}
    state = finish(relax_state(inputs, {}, body, target))
    if kernels is not None:
        assert len(state.program.steps) == kernels
    return execute(state, feeds, folder, 3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transposed", [False, True], ids=["b", "b-transposed"])
def test_sizes(tmp_path, target, transposed):
    feeds = []
    for i, (m, k, n) in enumerate(SIZES):
        feeds += [normal((2, m, k), i), normal((2, n, k) if transposed else (2, k, n), i + 50)]

    def body(e, *xs):
        rights = [e(op.permute_dims(x, [0, 2, 1])) if transposed else x for x in xs[1::2]]
        return [e(op.matmul(a, b)) for a, b in zip(xs[::2], rights, strict=True)]

    for got, a, b in zip(run(feeds, body, tmp_path, target), feeds[::2], feeds[1::2], strict=True):
        close(got, a @ (b.transpose(0, 2, 1) if transposed else b))


def test_two_dimensions_and_a_transposed_left_side(tmp_path):
    a, b = normal((20, 12), 1), normal((20, 48), 2)
    (got,) = run([a, b], lambda e, a, b: [e(op.matmul(e(op.permute_dims(a)), b))], tmp_path, kernels=1)
    close(got, a.T @ b)


def test_batches_broadcast(tmp_path):
    a, b, c = normal((3, 1, 6, 8), 1), normal((2, 8, 16), 2), normal((8, 32), 3)

    def body(e, a, b, c):
        return [e(op.matmul(a, b)), e(op.matmul(a, c))]

    first, second = run([a, b, c], body, tmp_path, kernels=2)
    close(first, a @ b)
    close(second, a @ c)


def test_what_follows_joins_the_kernel(tmp_path):
    a, b, c = normal((2, 9, 8), 1), normal((2, 8, 33), 2), normal((2, 9, 33), 3)

    def body(e, a, b, c):
        return [e(op.nn.relu(e(op.add(e(op.divide(e(op.matmul(a, b)), relax.const(3.0, "float32"))), c))))]

    (got,) = run([a, b, c], body, tmp_path, kernels=2)
    close(got, np.maximum(a @ b / 3 + c, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_rows_times_one_column_are_dot_products(tmp_path, target):
    sizes = ((37, 19), (8, 64), (1, 24), (5, 1), (6, 3))
    feeds = [normal(shape, i) for i, (m, k) in enumerate(sizes) for shape in ((2, m, k), (k, 1), (m, 1))]

    def body(e, *xs):
        trios = zip(xs[::3], xs[1::3], xs[2::3], strict=True)
        return [e(op.nn.relu(e(op.add(e(op.matmul(a, b)), c)))) for a, b, c in trios]

    found = run(feeds, body, tmp_path, target, kernels=len(sizes))
    for got, a, b, c in zip(found, feeds[::3], feeds[1::3], feeds[2::3], strict=True):
        close(got, np.maximum(a @ b + c, 0))


def test_a_left_side_of_weights(tmp_path):
    weight, x = normal((5, 12), 1), normal((12, 32), 2)
    state = finish(relax_state({"x": x.shape}, {"w": weight}, lambda e, x, w: [e(op.matmul(w, x))]))
    (got,) = execute(state, [x], tmp_path)
    close(got, weight @ x)


def test_tiles_fit_the_registers():
    for name in (*TARGETS, "raspberry-pi-4"):
        target = load_target(name)
        for m in (1, 2, 3, 4, 7, 64, 197):
            for n in (4, 8, 12, 16, 80, 197, 512):
                for contiguous in (False, True):
                    config = default_config(BatchMatmulWorkload((2,), m, 64, n, contiguous), target)
                    if config is None:
                        assert m < 4 or n < 4
                        continue
                    weights = config.vectors if config.rows > 1 else 1
                    assert config.rows * config.vectors + weights + 1 <= registers(target).count
                    assert config.packed or n % (config.vectors * config.lanes) == 0
                    assert config.packed or contiguous
