"""Scheduled kernels to machine code: TVM's TIR passes, then LLVM, to one relocatable object.

TVM's own `build` makes functions of its packed ABI, which check arguments at run time and allocate on the heap. Here
the same passes run without the packing: a kernel is `void f(T *..., int32_t begin, int32_t end)`.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, tirx
from tvm.ir.transform import Sequential

from ingot.errors import CompilerError, ToolchainError
from ingot.schedules import amx, fixed_point, llvm_forms, quotients
from ingot.schedules.lanes import lower_lanes
from ingot.schedules.vector import ceil_div
from ingot.schedules.vector_math import name_calls
from ingot.target import Target

# Stack memory of one kernel: a thread's stack is at least 128 KiB (musl's default).
MAX_STACK_BYTES = 64 * 1024
#: Kernels of one object, about: enough objects for a few cores, few enough that none is made for a kernel or two.
_KERNELS = 8


def _range_of_task(loop: Any, begin: Any, end: Any) -> Any:  # noqa: ANN401 - TIR statements
    """Return the parallel loop as a serial one over [begin, end)."""
    dtype = str(loop.loop_var.ty.dtype)
    lower, upper = begin.astype(dtype), end.astype(dtype)
    return tirx.For(loop.loop_var, lower, upper - lower, tirx.ForKind.SERIAL, loop.body)


def _take_range(statement: Any, begin: Any, end: Any) -> Any:  # noqa: ANN401 - TIR statements
    """Replace the outermost parallel loop; there is at most one in a kernel."""
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        return _range_of_task(statement, begin, end)
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_take_range(item, begin, end) for item in statement.seq])
    if isinstance(statement, tirx.AttrStmt):
        body = _take_range(statement.body, begin, end)
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, body)
    return statement


@tvm.transform.module_pass(opt_level=0, name="ingot.TaskRange")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
def _task_range(module: Any, _: Any) -> Any:  # noqa: ANN401
    functions = {}
    for gvar, function in module.functions.items():
        begin, end = function.params[-2], function.params[-1]
        functions[gvar] = function.with_body(amx.configured(_take_range(function.body, begin, end)))
    return tvm.IRModule(functions)


@tvm.transform.module_pass(opt_level=0, name="ingot.NameCalls")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
def _name_calls(module: Any, _: Any) -> Any:  # noqa: ANN401
    return tvm.IRModule({gvar: name_calls(function) for gvar, function in module.functions.items()})


@tvm.transform.module_pass(opt_level=0, name="ingot.LowerLanes")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
def _lower_lanes(module: Any, _: Any) -> Any:  # noqa: ANN401
    return tvm.IRModule({gvar: lower_lanes(function) for gvar, function in module.functions.items()})


@tvm.transform.module_pass(opt_level=0, name="ingot.StackLimit")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
def _stack_limit(module: Any, _: Any) -> Any:  # noqa: ANN401
    for gvar, function in module.functions.items():
        total = _stack_bytes(function.body)
        if total > MAX_STACK_BYTES:
            raise CompilerError(
                "a kernel needs too much stack",
                where=str(gvar.name_hint),
                found=f"{total} bytes",
                allowed=f"at most {MAX_STACK_BYTES}",
            )
    return module


def _stack_bytes(statement: Any) -> int:  # noqa: ANN401
    if isinstance(statement, tirx.AllocBuffer):
        dtype = statement.buffer.dtype
        bits = int(dtype.bits) * int(getattr(dtype, "lanes", 1))
        return int(np.prod([int(d) for d in statement.buffer.shape], dtype=np.int64)) * bits // 8
    if isinstance(statement, tirx.SeqStmt):
        return sum(_stack_bytes(item) for item in statement.seq)
    if isinstance(statement, tirx.For | tirx.AttrStmt):
        return _stack_bytes(statement.body)
    if isinstance(statement, tirx.IfThenElse):
        return _stack_bytes(statement.then_case)
    return 0


def _lower_fixed_point(target: Target) -> Any:  # noqa: ANN401
    @tvm.transform.module_pass(opt_level=0, name="ingot.LowerFixedPoint")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def run(module: Any, _: Any) -> Any:  # noqa: ANN401
        functions = {gvar: fixed_point.lower(function, target) for gvar, function in module.functions.items()}
        return tvm.IRModule(functions)

    return run


def _lower_quotients(target: Target) -> Any:  # noqa: ANN401
    @tvm.transform.module_pass(opt_level=0, name="ingot.LowerQuotients")  # type: ignore[untyped-decorator, unused-ignore]  # TVM is untyped
    def run(module: Any, _: Any) -> Any:  # noqa: ANN401
        return tvm.IRModule({gvar: quotients.lower(function, target) for gvar, function in module.functions.items()})

    return run


def _passes(llvm_target: Any, target: Target) -> Any:  # noqa: ANN401
    # 64-bit loop counters cost a 32-bit core two registers and an add with carry each; no index needs them there.
    narrow = (
        tirx.transform.ForceNarrowIndexToInt32() if target.pointer_bytes == 4 else tirx.transform.NarrowDataType(32)
    )
    return Sequential(
        [
            tirx.transform.BindTarget(llvm_target.with_host(llvm_target)),
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            s_tir.transform.CompactBufferAllocation(),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.StmtSimplify(),
            s_tir.transform.LowerOpaqueBlock(),
            _task_range,
            tirx.transform.FlattenBuffer(),
            tirx.transform.BF16ComputeLegalize(),
            _name_calls,
            narrow,
            s_tir.transform.LoopPartition(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.StorageRewrite(),
            _stack_limit,
            s_tir.transform.HoistIfThenElse(),
            tirx.transform.UnrollLoop(),
            s_tir.transform.RenormalizeSplitPattern(),
            tirx.transform.StmtSimplify(),
            _lower_lanes,
            _lower_fixed_point(target),
            _lower_quotients(target),
            tirx.transform.RemoveNoOp(),
            s_tir.transform.RewriteUnsafeSelect(),
            tirx.transform.CommonSubexprElim(),
            tirx.transform.BF16StorageLegalize(),
            tirx.transform.LowerIntrin(),
        ]
    )


def generate_objects(functions: dict[str, Any], target: Target) -> tuple[tuple[bytes, ...], str]:
    """As `generate_object`, for many kernels: several objects, made on all cores; they do not depend on how many."""
    symbols = sorted(functions)
    count = ceil_div(len(symbols), _KERNELS)
    parts = [{symbol: functions[symbol] for symbol in symbols[i::count]} for i in range(count)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(partial(generate_object, target=target), parts))
    return tuple(code for code, _ in made), "\n".join(text for _, text in made)


def generate_object(functions: dict[str, Any], target: Target) -> tuple[bytes, str]:
    """Compile raw-pointer PrimFuncs (by symbol) to one relocatable ELF object; return it and its LLVM IR.

    Raises ToolchainError if this TVM was built without LLVM for the target's architecture.
    """
    built = _build(functions, target)
    return _object_of(built), _stable_names(str(built.inspect_source("ll")))


def generate_code(functions: dict[str, Any], target: Target) -> bytes:
    """As `generate_object`, without the LLVM IR."""
    return _object_of(_build(functions, target))


def _build(functions: dict[str, Any], target: Target) -> Any:  # noqa: ANN401 - TVM's module
    build = tvm.get_global_func("target.build.llvm", allow_missing=True)
    if build is None:
        raise ToolchainError(
            "this apache-tvm has no LLVM code generator",
            hint="reinstall the pinned apache-tvm wheel: pip install --force-reinstall ingot",
        )
    llvm_target = tvm.target.Target(target.llvm())
    module = tvm.IRModule({symbol: functions[symbol] for symbol in sorted(functions)})
    with tvm.transform.PassContext(opt_level=3):
        module = _passes(llvm_target, target)(module)
        module = tvm.IRModule(llvm_forms.link(dict(module.functions.items()), target))
        return build(module, llvm_target)


def _object_of(built: Any) -> bytes:  # noqa: ANN401 - TVM's module
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
        path = Path(folder) / "kernels.o"
        built.write_to_file(str(path))
        return path.read_bytes()


def _stable_names(text: str) -> str:
    """Return LLVM text with buffers numbered: TVM names their alias classes by addresses of this process."""
    numbers: dict[str, str] = {}
    return re.sub(r'(?<=!")0x[0-9a-f]+', lambda name: numbers.setdefault(name[0], f"buffer{len(numbers)}"), text)
