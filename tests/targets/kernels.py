"""Small kernels that tempt LLVM to every vector extension a CPU may have, compiled for one target."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, te, tirx, topi
from tvm.ir.transform import Sequential

from ingot.target import Target

N = 256
_T, _X = s_tir.transform, tirx.transform


def _vectorized(inputs: list[Any], output: Any, lanes: int) -> Any:
    schedule = s_tir.Schedule(te.create_prim_func([*inputs, output]))
    for block in schedule.get_child_blocks(schedule.get_sblock("root"))[:-1]:
        schedule.compute_inline(block)
    (loop,) = schedule.get_loops(schedule.get_sblock(output.op.name))
    schedule.vectorize(schedule.split(loop, [None, lanes])[1])
    return schedule.mod["main"]


def _elementwise(dtype: str, lanes: int, compute: Any) -> Any:
    x, y = (te.placeholder((N,), dtype, name=name) for name in "xy")
    return _vectorized([x, y], te.compute((N,), lambda i: compute(x[i], y[i]), name="o"), lanes)


def _matmul(a_type: str, b_type: str, o_type: str, lanes: int) -> Any:
    """o[4, N] = sum over 32 of a[4, 32] * b[32, N], accumulators in registers."""
    a, b = te.placeholder((4, 32), a_type, name="a"), te.placeholder((32, N), b_type, name="b")
    k = te.reduce_axis((0, 32), name="k")
    o = te.compute((4, N), lambda i, j: te.sum(a[i, k].astype(o_type) * b[k, j].astype(o_type), axis=k), name="o")
    schedule = s_tir.Schedule(te.create_prim_func([a, b, o]))
    block = schedule.get_sblock("o")
    i, j, r = schedule.get_loops(block)
    outer, inner = schedule.split(j, [None, lanes])
    schedule.reorder(outer, r, i, inner)
    schedule.vectorize(inner)
    schedule.unroll(i)
    schedule.decompose_reduction(block, r)
    return schedule.mod["main"]


def _dot(a_type: str, b_type: str, o_type: str) -> Any:
    """o[N] = sum over 64 of a[64] * b[N, 64], left to LLVM's own vectorizer (dot products, widening adds)."""
    a, b = te.placeholder((64,), a_type, name="a"), te.placeholder((N, 64), b_type, name="b")
    k = te.reduce_axis((0, 64), name="k")
    o = te.compute((N,), lambda i: te.sum(a[k].astype(o_type) * b[i, k].astype(o_type), axis=k), name="o")
    return te.create_prim_func([a, b, o])


def _plain() -> Any:
    """o[i] = x[i] * y[i] + x[i], left to LLVM's own vectorizer."""
    x, y = (te.placeholder((4096,), "float32", name=name) for name in "xy")
    return te.create_prim_func([x, y, te.compute((4096,), lambda i: x[i] * y[i] + x[i], name="o")])


def _exp(lanes: int) -> Any:
    x = te.placeholder((N,), "float32", name="x")
    return _vectorized([x], topi.fast_exp(x), lanes)


def _raw(function: Any, name: str) -> Any:
    """Give the function the kernel ABI: bare pointers, no argument checks."""
    pointers = [tirx.Var(f"p_{buffer.name}", buffer.data.ty) for buffer in function.params]
    declared = [tirx.DeclBuffer(buffer, data=p) for buffer, p in zip(function.params, pointers, strict=True)]
    raw = tirx.PrimFunc(pointers, tirx.SeqStmt([*declared, function.body]))
    attributes = {"global_symbol": name, "calling_conv": 1, "tirx.noalias": True, "s_tir": True}
    for key, value in attributes.items():
        raw = raw.with_attr(key, value)
    return raw


@lru_cache
def _module(lanes: int) -> Any:
    functions = {
        "fma_f32": _matmul("float32", "float32", "float32", lanes),
        "fma_f64": _matmul("float64", "float64", "float64", lanes // 2),
        "dot_s8": _dot("int8", "int8", "int32"),
        "dot_u8s8": _dot("uint8", "int8", "int32"),
        "dot_s16": _dot("int16", "int16", "int32"),
        "mac_s8": _matmul("int8", "int8", "int32", lanes),
        "add_f16": _elementwise("float16", 2 * lanes, lambda x, y: x * y + x),
        "convert_f16": _elementwise("float16", lanes, lambda x, y: (x.astype("float32") * 2.0).astype("float16")),
        "plain_f32": _plain(),
        "exp_f32": _exp(lanes),
        "round_f32": _elementwise("float32", lanes, lambda x, y: tirx.floor(x) + tirx.nearbyint(y) + tirx.sqrt(x)),
        "minmax_f32": _elementwise("float32", lanes, lambda x, y: te.max(te.min(x, y), tirx.abs(x)) / y),
        "requantize": _elementwise(
            "int32", lanes, lambda x, y: te.max(te.min((x * y + 64) >> tirx.const(7, "int32"), 127), -128)
        ),
        "high_mul_s32": _elementwise(
            "int32", lanes, lambda x, y: ((x.astype("int64") * y.astype("int64") + (1 << 30)) >> 31).astype("int32")
        ),
        "saturate_s8": _elementwise("int8", 2 * lanes, lambda x, y: te.max(x, y) - te.min(x, y)),
        "popcount_s32": _elementwise("int32", lanes, lambda x, y: tirx.popcount(x) + tirx.clz(y) + (x & ~y)),
        "popcount_scalar": _elementwise("int32", 1, lambda x, y: tirx.popcount(x) + tirx.clz(y) + ((x * y) >> 3)),
        "divide_s32": _elementwise("int32", 1, lambda x, y: tirx.truncdiv(x, te.max(y, 1))),
        "shift_s64": _elementwise("int64", lanes // 2, lambda x, y: te.max(x * y, x << (y & 31))),
    }
    return tvm.IRModule({name: _raw(function, name) for name, function in functions.items()})


def lower(module: Any, target: Target) -> Any:
    """Return LLVM's module (one object) of raw-pointer functions for the target."""
    llvm = tvm.target.Target(target.llvm())
    before = (_T.CanonicalizeLoop, _T.LowerInitBlock, _T.PlanAndUpdateBufferAllocationLocation)
    blocks = (_T.ConvertBlocksToOpaque, _T.CompactBufferAllocation, _T.LowerMatchBuffer, _T.StmtSimplify)
    after = (_T.RenormalizeSplitPattern, _X.StmtSimplify, _X.RemoveNoOp, _T.RewriteUnsafeSelect, _X.CommonSubexprElim)
    passes = [
        _X.BindTarget(llvm.with_host(llvm)),
        *(step() for step in (*before, *blocks, _T.LowerOpaqueBlock, _X.FlattenBuffer, _X.BF16ComputeLegalize)),
        _X.NarrowDataType(32),
        _T.LoopPartition(),
        _X.VectorizeLoop(True),
        *(step() for step in (_X.StorageRewrite, _X.UnrollLoop, *after, _X.BF16StorageLegalize, _X.LowerIntrin)),
    ]
    return tvm.get_global_func("target.build.llvm")(Sequential(passes)(module), llvm)


def object_for(target: Target) -> bytes:
    """Return the bytes of an object that holds all kernels, with vectors as wide as the target's (and 16 lanes)."""
    built = lower(_module(max(4, target.vector_bits // 32)), target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        built.write_to_file(str(path))
        return path.read_bytes()
