"""Kernels written as plain loops: for operators that write where an index points, or decide step by step.

Such a kernel is one loop nest, on one thread unless its body says what its tasks are, never fused with its neighbours.
Its body must keep every index inside its tensor: nothing later checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ingot.frontend.tvm_types import Builder, Expr

Buffers = Sequence[Any]  # TIR buffers: indexed with TIR expressions, assigned to with `b[i] = value`
#: FuseOps' pattern kind of an operator that takes no neighbours into its kernel.
_OPAQUE = 8


def call_loops(
    builder: Builder,
    name: str,
    inputs: Sequence[Expr],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    body: Callable[..., None],
    attributes: Mapping[str, str] | None = None,
    tasks: int | None = None,
) -> list[Expr]:
    """Emit one kernel; return its outputs, one for each (shape, dtype) of `outputs`.

    body(inputs, outputs) writes the statements with `tvm.script.ir_builder.tirx`. `attributes` go to the PrimFunc.
    tasks: body(inputs, outputs, task) writes those of one task, an int64; tasks run in any order, or at once.
    """
    from tvm import relax, s_tir, tirx
    from tvm.ir import Range
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T  # noqa: N812 - its name everywhere

    def buffer(name: str, shape: Sequence[int], dtype: str) -> Any:  # noqa: ANN401
        return tirx.decl_buffer([tirx.IntImm("int64", dim) for dim in shape], dtype, name, layout=None)

    def whole(buffers: Buffers) -> list[Any]:
        zero = tirx.IntImm("int64", 0)
        return [tirx.BufferRegion(b, [Range.from_min_extent(zero, dim) for dim in b.shape]) for b in buffers]

    sources = [buffer(f"in{i}", _shape(x), str(x.ty.dtype.dtype)) for i, x in enumerate(inputs)]
    results = [buffer(f"out{i}", shape, dtype) for i, (shape, dtype) in enumerate(outputs)]
    task = tirx.Var("task", "int64")
    with IRBuilder() as ib:
        with T.seq_scope():
            whose = [] if tasks is None else [task]
            body([T.buffer_proxy(item) for item in sources], [T.buffer_proxy(item) for item in results], *whose)
        statement = ib.get().body  # without the mark that seq_scope leaves
    yes = tirx.const(True, "bool")
    zero, number, loop = tirx.IntImm("int64", 0), tirx.IntImm("int64", tasks or 1), tirx.Var("i", "int64")
    axes = [] if tasks is None else [tirx.IterVar(Range.from_min_extent(zero, number), task, tirx.IterVar.DataPar)]
    inner = s_tir.SBlock(axes, whole(sources), whole(results), name, statement)
    nest: Any = s_tir.SBlockRealize([loop for _ in axes], yes, inner)
    if tasks is not None:
        nest = tirx.For(loop, zero, number, tirx.ForKind.PARALLEL, nest)
    root = s_tir.SBlock([], [], [], "root", nest)
    function = tirx.PrimFunc([*sources, *results], s_tir.SBlockRealize([], yes, root))
    for key, value in (("op_pattern", _OPAQUE), ("tirx.noalias", True), ("s_tir", True), *(attributes or {}).items()):
        function = function.with_attr(key, value)
    types = [relax.TensorType(shape, dtype) for shape, dtype in outputs]
    gvar = builder.add_func(function, name)
    call = builder.emit(relax.call_tir(gvar, relax.Tuple(list(inputs)), types if len(types) > 1 else types[0]))
    if len(outputs) == 1:
        return [call]
    return [builder.emit(relax.TupleGetItem(call, index)) for index in range(len(outputs))]


def scalar(dtype: str) -> Any:  # noqa: ANN401 - a buffer of one element
    """A variable of the kernel that is being written: read and written as `v[0]`."""
    from tvm.script.ir_builder import tirx as T  # noqa: N812

    return T.buffer_proxy(T.alloc_buffer([1], dtype, scope="global"))


def _shape(tensor: Expr) -> tuple[int, ...]:
    return tuple(int(dim) for dim in tensor.ty.shape)
