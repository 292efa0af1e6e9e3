"""The rewriter that all passes are written with."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

from ingot.errors import CompilerError
from ingot.passes.rewriter import Rewriter, bindings_of, op_name, outputs_of, prune, rewrite, shape_of, uses_of
from passes.build import close, normal, numbers, ops, relax_state

op = relax.op


def chain(e, x, w):
    y = e(op.add(x, w))
    e(op.exp(y))  # nobody reads it
    return [e(op.nn.relu(y)), e(op.negative(y))]


def state():
    return relax_state({"x": (2, 3)}, {"w": normal((2, 3), 1)}, chain)


def test_a_visitor_that_keeps_everything_drops_only_what_nobody_reads(tmp_path):
    new = rewrite(state(), lambda rewriter, call, args: None)
    assert ops(new) == ["add", "nn.relu", "negative"]
    x = normal((2, 3))
    total = x + normal((2, 3), 1)
    for got, want in zip(numbers(new, [x], tmp_path), [np.maximum(total, 0), -total], strict=True):
        close(got, want)


def test_a_visitor_by_name_sees_only_its_operator(tmp_path):
    seen = []

    def visit(rewriter, call, args):
        seen.append(op_name(call))
        return op.abs(args[0])

    new = rewrite(state(), {"relax.negative": visit})
    assert seen == ["relax.negative"]
    assert ops(new) == ["add", "nn.relu", "abs"]
    x = normal((2, 3))
    close(numbers(new, [x], tmp_path)[1], np.abs(x + normal((2, 3), 1)))


def test_the_state_given_stays_as_it_was():
    old = state()
    text = str(old.module.script())
    rewrite(old, {"relax.add": lambda rewriter, call, args: args[0]})
    assert str(old.module.script()) == text
    assert list(old.weights) == ["w"]


def test_weights_nobody_reads_are_dropped():
    new = rewrite(state(), {"relax.add": lambda rewriter, call, args: args[0]})
    assert not new.weights
    assert len(new.module["main"].params) == 1


def test_weight_knows_parameters_and_constants_but_not_inputs():
    found = []

    def visit(rewriter, call, args):
        found.append([rewriter.weight(arg) is not None for arg in args])

    rewrite(
        relax_state(
            {"x": (2,)}, {"w": normal((2,))}, lambda e, x, w: [e(op.add(x, w)), e(op.add(x, relax.const([1.0, 2.0])))]
        ),
        visit,
    )
    assert found == [[False, True], [False, True]]


def test_an_input_named_like_a_new_weight_is_not_taken_for_it(tmp_path):
    def visit(rewriter, call, args):
        return op.add(args[0], rewriter.add_weight("x", normal((99,), 5)))

    new = rewrite(relax_state({"x": (99,)}, {}, lambda e, x: [e(op.nn.relu(x))]), visit)
    x = normal((99,))
    close(numbers(new, [x], tmp_path)[0], x + normal((99,), 5))


def test_add_weight_reuses_an_equal_one_and_renames_another():
    names = []

    def visit(rewriter, call, args):
        for value in (normal((99,), 1), normal((99,), 1), normal((99,), 2), normal((99,), 1).view(np.int32)):
            names.append(str(rewriter.add_weight("k", value).name))

    rewrite(relax_state({"x": (99,)}, {}, lambda e, x: [e(op.nn.relu(x))]), visit)
    assert names == ["k", "k", "k_1", "k_2"]


@pytest.mark.parametrize(("size", "kept"), [(64, 0), (65, 1)])
def test_small_values_are_constants_larger_ones_weights(size, kept):
    def visit(rewriter, call, args):
        return op.add(args[0], rewriter.constant(normal((size,), 1), "k"))

    assert len(rewrite(relax_state({"x": (size,)}, {}, lambda e, x: [e(op.nn.relu(x))]), visit).weights) == kept


def test_tuples_are_followed_item_by_item(tmp_path):
    def body(e, x):
        parts = e(op.split(x, 2, 0))
        return [e(op.negative(e(relax.TupleGetItem(parts, 1))))]

    def visit(rewriter, call, args):
        if op_name(call) == "relax.split":
            return relax.Tuple([args[0], args[0]])
        return None

    tuple_state = relax_state({"x": (4, 3)}, {}, body)
    x = normal((4, 3))
    close(numbers(tuple_state, [x], tmp_path)[0], -x[2:])
    assert shape_of(outputs_of(rewrite(tuple_state, visit).module["main"])[0]) == (4, 3)


def test_finish_is_applied_to_each_output(tmp_path):
    rewriter = Rewriter(state(), lambda rewriter, call, args: None)
    rewriter.finish = lambda expr: rewriter.emit(op.abs(expr))
    new = rewriter.run()
    assert ops(new)[-2:] == ["abs", "abs"]
    x = normal((2, 3))
    close(numbers(new, [x], tmp_path)[1], np.abs(x + normal((2, 3), 1)))


def test_uses_are_counted_with_outputs():
    built = relax_state({"x": (2,)}, {}, lambda e, x: (lambda y: [y, y, e(op.add(y, y))])(e(op.nn.relu(x))))
    main = built.module["main"]
    (relu,) = [b.var for b in bindings_of(main) if op_name(b.value) == "relax.nn.relu"]
    # Two reads of the add. The outputs stand in one tuple that is bound to a variable.
    assert uses_of(main)[relu] == 4


def test_prune_drops_functions_nobody_calls():
    from passes.build import finish

    full = relax_state({"x": (8,)}, {"w": normal((8, 8))}, lambda e, x, w: [e(op.matmul(x, w)), e(op.exp(x))])
    fused = finish(full)
    before = len(fused.module.functions)
    main = fused.module["main"]
    block = main.body.blocks[0]
    short = relax.Function(
        main.params,
        relax.SeqExpr([relax.DataflowBlock(list(block.bindings)[:1])], relax.Tuple([block.bindings[0].var])),
        relax.TupleType([block.bindings[0].var.ty]),
    )
    module = tvm.IRModule({gv: f for gv, f in fused.module.functions.items() if gv.name_hint != "main"})
    module["main"] = short
    assert len(prune(fused.having(module=module)).module.functions) == before - 1


def test_main_with_two_blocks_is_refused():
    broken = state()
    main = broken.module["main"]
    block = main.body.blocks[0]
    two = relax.Function(main.params, relax.SeqExpr([block, relax.BindingBlock([])], main.body.body), main.ret_ty)
    with pytest.raises(CompilerError, match="more than one block"):
        bindings_of(two)


def test_main_that_returns_no_tuple_is_refused():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(op.nn.relu(x))
        builder.emit_func_output(y)
    with pytest.raises(CompilerError, match="does not return a tuple"):
        outputs_of(builder.finalize()["main"])


def test_rewriting_with_nothing_to_do_is_stable():
    once = rewrite(state(), lambda rewriter, call, args: None)
    assert tvm_ffi.structural_equal(once.module, rewrite(once, lambda rewriter, call, args: None).module)
