"""The grain of a kernel: small ones stay on one thread, large ones are cut into parts worth a thread."""

from __future__ import annotations

import pytest
from tvm import relax

from ingot.passes.grain import CYCLES_PER_THREAD, cycles, grain
from passes.build import finish, normal, relax_state

op = relax.op


def kernels(shapes, body, weights=None, target="native"):
    state = finish(relax_state(shapes, weights or {}, body, target))
    raw = {kernel.symbol: kernel for kernel in state.lowered.kernels}
    return state, [(raw[kernel.symbol], kernel) for kernel in state.program.kernels]


def matmul(rows, depth, columns, target="native"):
    weights = {"w": normal((depth, columns))}
    return kernels({"x": (rows, depth)}, lambda e, x, w: [e(op.matmul(x, w))], weights, target)


def test_a_small_kernel_stays_on_one_thread():
    _, ((raw, kernel),) = kernels({"x": (64, 64)}, lambda e, x: [e(op.nn.relu(x))])
    assert raw.extent > 1
    assert kernel.grain == kernel.extent


def test_a_large_kernel_is_cut_into_parts_worth_a_thread():
    state, ((raw, kernel),) = matmul(256, 256, 256)
    assert kernel.grain < kernel.extent
    per_part = cycles(raw.function, state.target) * kernel.grain / kernel.extent
    assert CYCLES_PER_THREAD <= per_part <= CYCLES_PER_THREAD + cycles(raw.function, state.target) / kernel.extent


def test_work_worth_less_than_two_threads_is_not_halved():
    for columns in range(16, 256, 16):
        state, ((raw, kernel),) = matmul(32, 64, columns)
        if cycles(raw.function, state.target) < 2 * CYCLES_PER_THREAD:
            assert kernel.grain == kernel.extent
        else:
            assert kernel.grain <= kernel.extent // 2 + 1


@pytest.mark.parametrize(("target", "per_cycle"), [("x86-64-v4", 32), ("x86-64-v3", 16), ("raspberry-pi-4", 6)])
def test_the_count_of_a_matrix_product_is_near_what_the_core_can_do(target, per_cycle):
    state, ((raw, _),) = matmul(96, 128, 128, target)
    ideal = 96 * 128 * 128 / per_cycle
    assert 0.7 * ideal <= cycles(raw.function, state.target) <= 1.7 * ideal


def test_elementary_functions_count_more_than_additions():
    _, ((plain, _),) = kernels({"x": (64, 64)}, lambda e, x: [e(op.add(x, x))])
    state, ((costly, _),) = kernels({"x": (64, 64)}, lambda e, x: [e(op.exp(x))])
    assert cycles(costly.function, state.target) > 4 * cycles(plain.function, state.target)


def test_one_iteration_has_grain_one():
    state, ((raw, kernel),) = kernels({"x": (4,)}, lambda e, x: [e(op.nn.softmax(x, 0))])
    assert (raw.extent, kernel.grain) == (1, 1)
    assert grain(raw.function, 1, state.target) == 1
