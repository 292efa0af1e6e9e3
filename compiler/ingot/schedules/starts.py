"""Sums that start from a constant of each output channel, where adding it afterwards would be one more instruction."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx


def start_from_constant(function: Any, name: str) -> Any:  # noqa: ANN401 - a scheduled PrimFunc
    """Return the function with the sums of the block `name` started from what its readers add to them.

    That is one parameter, indexed by the last index of the sums and as long as that dimension. Where readers add
    nothing, or not all of them the same, the function stays as it is.
    """
    sums, constants, loads = None, [], 0

    def find(node: Any) -> None:  # noqa: ANN401
        nonlocal sums
        if str(node.name_hint) == f"{name}_init":
            sums = node.body.buffer if isinstance(node.body, tirx.BufferStore) else None

    tvm_ffi.structural_walk(function, [(s_tir.SBlock, find)])
    if sums is None:
        return function

    def is_sum(load: Any) -> bool:  # noqa: ANN401
        return isinstance(load, ir.TensorLoad) and bool(load.source.same_as(sums))

    def is_start(added: Any) -> bool:  # noqa: ANN401
        """Say whether an addition is that of a constant of the sum's channel."""
        if not (is_sum(added.a) and isinstance(added.b, ir.TensorLoad)):
            return False
        constant = added.b.source
        fits = len(constant.shape) == 1 and int(constant.shape[0]) == int(sums.shape[-1])
        return fits and any(constant.same_as(param) for param in function.params)

    def count(node: Any) -> None:  # noqa: ANN401
        nonlocal loads
        if str(node.name_hint) in ("root", f"{name}_init") or str(node.name_hint).startswith(f"{name}_update"):
            return
        found: list[Any] = []
        tvm_ffi.structural_walk(node.body, [(ir.TensorLoad, lambda load: found.append(load) if is_sum(load) else None)])
        loads += len(found)
        tvm_ffi.structural_walk(
            node.body, [(tirx.Add, lambda added: constants.append(added.b.source) if is_start(added) else None)]
        )

    tvm_ffi.structural_walk(function, [(s_tir.SBlock, count)])
    if not constants or len(constants) != loads or not all(constants[0].same_as(other) for other in constants):
        return function
    constant = constants[0]

    def started(node: Any) -> Any:  # noqa: ANN401
        if str(node.name_hint) == f"{name}_init":
            store = node.body
            body = tirx.BufferStore(store.buffer, tirx.BufferLoad(constant, [store.indices[-1]]), store.indices)
            channel = ir.Range.from_min_extent(store.indices[-1], tirx.IntImm("int64", 1))
            reads = [tirx.BufferRegion(constant, [channel])]
        elif str(node.name_hint) == "root":
            return node
        else:
            body = tvm_ffi.structural_map(node.body, [(tirx.Add, lambda added: added.a if is_start(added) else added)])
            reads = [region for region in node.reads if not region.source.same_as(constant)]
        return s_tir.SBlock(
            node.iter_vars, reads, node.writes, node.name_hint, body, node.init, node.alloc_buffers,
            node.match_buffers, node.annotations,
        )  # fmt: skip

    return tvm_ffi.structural_map(function, [(s_tir.SBlock, started)])
