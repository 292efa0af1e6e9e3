"""Every entry of the invariant table: a state that holds it, and at least one that breaks it and is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from ingot.errors import CompilerError
from ingot.frontend.interface import TensorSpec
from ingot.passes.invariants import INVARIANTS, check
from ingot.passes.lower import Call, Copy, Lowered
from ingot.passes.state import State
from ingot.program import BufferRef, Step
from passes.build import finish, normal, relax_state, run_steps

op = relax.op
W = normal((16, 3, 3, 16), 1)
NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}


def simple() -> State:
    return relax_state({"x": (2, 3)}, {"w": normal((2, 3))}, lambda e, x, w: [e(op.add(x, w))])


def convolutions() -> State:
    def body(e, x, w):
        y = e(op.nn.relu(e(op.nn.conv2d(x, w, **NHWC))))
        return [e(op.nn.max_pool2d(e(op.nn.conv2d(y, w, **NHWC)), layout="NHWC"))]

    return relax_state({"x": (1, 8, 8, 16)}, {"w": W}, body)


def planned() -> State:
    def body(e, x, w):
        y = e(op.tanh(e(op.matmul(x, w))))
        z = e(op.tanh(e(op.matmul(y, w))))
        return [e(op.add(e(op.matmul(z, w)), y))]

    return finish(relax_state({"x": (16, 16)}, {"w": normal((16, 16), 1)}, body))


def written(inputs, weights, body) -> State:
    return relax_state(inputs, weights, body)


def with_main(state: State, function) -> State:
    module = tvm.IRModule({gv: f for gv, f in state.module.functions.items() if gv.name_hint != "main"})
    module["main"] = function
    return state.having(module=module)


def change_calls(state: State, change: Callable[[tuple], tuple]) -> State:
    return state.having(lowered=Lowered(change(state.lowered.calls), state.lowered.kernels))


def change_specs(state: State, **changes) -> State:
    return state.having(imported=replace(state.imported, **changes))


# -- the ways to break them ----------------------------------------------------------------------------------------


def two_blocks() -> State:
    state = simple()
    main = state.module["main"]
    return with_main(
        state,
        relax.Function(
            main.params, relax.SeqExpr([*main.body.blocks, relax.BindingBlock([])], main.body.body), main.ret_ty
        ),
    )


def missing_weight() -> State:
    return simple().having(weights={})


def weights_in_another_order() -> State:
    state = written(
        {"x": (3,)}, {"a": normal((3,)), "b": normal((3,))}, lambda e, x, a, b: [e(op.add(x, e(op.add(a, b))))]
    )
    return state.having(weights=dict(reversed(list(state.weights.items()))))


def weight_of_another_shape() -> State:
    return simple().having(weights={"w": normal((3, 2))})


def an_output_too_few() -> State:
    state = simple()
    return change_specs(state, outputs=(*state.imported.outputs, TensorSpec("more", "float32", (1,))))


def open_shape() -> State:
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 3), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.relu(x))
            out = builder.emit_output(relax.Tuple([y]))
        builder.emit_func_output(out)
    state = written({"x": (2, 3)}, {}, lambda e, x: [e(op.nn.relu(x))])
    return state.having(module=builder.finalize())


def input_of_another_shape() -> State:
    return change_specs(simple(), inputs=(TensorSpec("x", "float32", (3, 2)),))


def output_of_another_dtype() -> State:
    return change_specs(simple(), outputs=(TensorSpec("out0", "int8", (2, 3)),))


def with_op(make) -> Callable[[], State]:
    return lambda: written({"x": (1, 6)}, {}, lambda e, x: [e(op.nn.relu(e(make(e, x))))])


def dropout() -> State:
    return written({"x": (1, 6)}, {}, lambda e, x: [e(op.nn.relu(e(relax.TupleGetItem(e(op.nn.dropout(x)), 0))))])


def on_weight(make) -> Callable[[], State]:
    def body(e, x, w):
        return [e(op.add(x, e(op.astype(e(make(w)), "float32"))))]

    return lambda: written({"x": (6, 6)}, {"w": normal((6, 6))}, body)


def dequantized_weight() -> State:
    def body(e, x, w):
        scale, zero = relax.const(0.5, "float32"), relax.const(0, "int8")
        return [e(op.add(x, e(op.dequantize(w, scale, zero))))]

    return written({"x": (6, 6)}, {"w": np.ones((6, 6), np.int8)}, body)


def reshaped_constant() -> State:
    return written({"x": (6,)}, {}, lambda e, x: [e(op.add(x, e(op.reshape(relax.const(normal((2, 3))), (6,)))))])


def in_nchw(make) -> Callable[[], State]:
    return lambda: written({"x": (1, 6, 6, 6)}, {"w": normal((6, 6, 3, 3))}, lambda e, x, w: [e(make(x, w))])


def depthwise_left() -> State:
    return written(
        {"x": (1, 6, 6, 9)}, {"w": normal((9, 3, 3, 1))}, lambda e, x, w: [e(op.nn.conv2d(x, w, groups=9, **NHWC))]
    )


def operator_left() -> State:
    state = run_steps(convolutions(), "select_templates")
    return state  # relu has no template


def reads_before_it_is_made() -> State:
    return change_calls(planned(), lambda calls: tuple(reversed(calls)))


def copies_what_nobody_made() -> State:
    state = planned()
    value = next(v for call in state.lowered.calls for v in call.writes if v.kind == "temp")
    out = replace(value, id=10_000, kind="output")
    return change_calls(state, lambda calls: (Copy(value, out, ""), *calls))


def drops_the_last_call() -> State:
    return change_calls(planned(), lambda calls: calls[:-1])


def writes_another_output() -> State:
    def change(calls):
        last = calls[-1]
        moved = tuple(replace(v, index=7) if v.kind == "output" else v for v in last.args)
        return (*calls[:-1], Call(last.kernel, moved, tuple(v for v in moved if v.kind == "output"), ""))

    return change_calls(planned(), change)


def all_at_offset_zero() -> State:
    state = planned()
    assert state.program is not None
    steps = tuple(
        Step(
            step.kernel,
            tuple(BufferRef("arena", 0, 0, r.bytes) if r.place == "arena" else r for r in step.args),
            step.label,
        )
        for step in state.program.steps
    )
    return state.having(program=replace(state.program, steps=steps))


def arena_too_small() -> State:
    state = planned()
    assert state.program is not None
    return state.having(program=replace(state.program, arena_bytes=state.program.arena_bytes - 1))


def no_program() -> State:
    return planned().having(program=None)


HOLDS: dict[str, Callable[[], State]] = {
    "normal_form": simple,
    "interface_kept": simple,
    "no_identities": simple,
    "constants_folded": convolutions,
    "nhwc": convolutions,
    "packed_weights": lambda: run_steps(convolutions(), "select_templates"),
    "only_kernels": lambda: run_steps(convolutions(), "select_templates", "fuse"),
    "defined_before_use": planned,
    "all_outputs_written": planned,
    "no_overlap": planned,
}

#: invariant: the states that break it, and a word of what the error must say.
BREAKS: dict[str, list[tuple[Callable[[], State], str]]] = {
    "normal_form": [
        (two_blocks, "2 blocks"),
        (missing_weight, "weights"),
        (weights_in_another_order, "differ from weights"),
        (weight_of_another_shape, "weight w has shape"),
        (an_output_too_few, "outputs"),
        (open_shape, "static shape"),
    ],
    "interface_kept": [(input_of_another_shape, "'x'"), (output_of_another_dtype, "int8")],
    "no_identities": [
        (dropout, "dropout"),
        (with_op(lambda e, x: op.squeeze(x, [0])), "squeeze"),
        (with_op(lambda e, x: op.expand_dims(x, [0])), "expand_dims"),
        (with_op(lambda e, x: op.flatten(x)), "flatten"),
        (with_op(lambda e, x: op.reshape(e(op.reshape(x, (2, 3))), (3, 2))), "reshape of a reshape"),
    ],
    "constants_folded": [
        (on_weight(lambda w: op.permute_dims(w)), "permute_dims of a weight"),
        (on_weight(lambda w: op.reshape(w, (6, 6))), "reshape of a weight"),
        (on_weight(lambda w: op.astype(w, "float16")), "astype of a weight"),
        (dequantized_weight, "dequantize of a weight"),
        (reshaped_constant, "reshape of a weight"),
    ],
    "nhwc": [
        (in_nchw(lambda x, w: op.nn.conv2d(x, w)), "conv2d in NCHW"),
        (in_nchw(lambda x, w: op.nn.conv2d_transpose(x, w)), "conv2d_transpose in NCHW"),
        (in_nchw(lambda x, w: op.nn.max_pool2d(op.permute_dims(x, [0, 3, 1, 2]))), "max_pool2d in NCHW"),
        (in_nchw(lambda x, w: op.nn.avg_pool2d(x, (70, 1), padding=(69, 0))), "avg_pool2d in NCHW"),
        (in_nchw(lambda x, w: op.image.resize2d(op.permute_dims(x, [0, 3, 1, 2]), (3, 3))), "resize2d in NCHW"),
    ],
    "packed_weights": [(convolutions, "conv2d operator"), (depthwise_left, "conv2d operator")],
    "only_kernels": [(operator_left, "relax.nn.relu")],
    "defined_before_use": [
        (reads_before_it_is_made, "step 0 reads"),
        (copies_what_nobody_made, "step 0 reads"),
    ],
    "all_outputs_written": [(drops_the_last_call, "never written"), (writes_another_output, "[0]")],
    "no_overlap": [(all_at_offset_zero, "overlap"), (arena_too_small, "the arena"), (no_program, "no program")],
}


def test_every_invariant_has_a_state_that_holds_it_and_one_that_breaks_it():
    assert set(HOLDS) == set(INVARIANTS) == set(BREAKS)
    assert all(BREAKS.values())


@pytest.mark.parametrize("name", INVARIANTS)
def test_holds(name):
    check(HOLDS[name](), (name,), "in this test")


@pytest.mark.parametrize(("name", "i"), [(n, i) for n, cases in BREAKS.items() for i in range(len(cases))])
def test_breaks(name, i):
    make, words = BREAKS[name][i]
    with pytest.raises(CompilerError) as error:
        check(make(), (name,), "after pass 'some pass'")
    text = str(error.value)
    assert f"invariant '{name}' does not hold" in text
    assert "after pass 'some pass'" in text
    assert words in text


def test_the_first_broken_one_is_named():
    with pytest.raises(CompilerError, match="no_overlap"):
        check(no_program(), ("defined_before_use", "no_overlap"), "here")
