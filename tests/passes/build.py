"""Tiny models for the tests of the passes: written in Relax, or in ONNX and read by the frontend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from tvm import relax

from ingot.frontend import import_model
from ingot.frontend.interface import Imported, TensorSpec
from ingot.passes.pipeline import PIPELINE
from ingot.passes.rewriter import bindings_of, dtype_of, op_name, outputs_of, shape_of
from ingot.passes.state import State
from ingot.target import load_target
from passes.execute import execute

Array = np.ndarray
Body = Callable[..., Sequence[Any]]


def relax_state(
    inputs: Mapping[str, tuple[tuple[int, ...], str] | tuple[int, ...]],
    weights: Mapping[str, Array],
    body: Body,
    target: str = "native",
) -> State:
    """A state whose `main` is written by `body(emit, *inputs, *weights)`, which returns the outputs.

    inputs: shapes by name (float32), or (shape, dtype).
    """
    specs = []
    for name, given in inputs.items():
        shape, dtype = given if isinstance(given[-1], str) else (given, "float32")
        specs.append(TensorSpec(name, dtype, tuple(shape)))
    params = [relax.Var(s.name, relax.TensorType(s.shape, s.dtype)) for s in specs]
    params += [relax.Var(name, relax.TensorType(v.shape, str(v.dtype))) for name, v in weights.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(list(body(builder.emit, *params))))
        builder.emit_func_output(result)
    module = builder.finalize()
    outputs = [TensorSpec(f"out{i}", dtype_of(out), shape_of(out)) for i, out in enumerate(outputs_of(module["main"]))]
    imported = Imported(
        module=module,
        weights=dict(weights),
        inputs=tuple(specs),
        outputs=tuple(outputs),
        name="tiny",
        source_format="onnx",
        source_sha256="0" * 64,
        source_peak_bytes=0,
        notices=(),
    )
    return State(module, dict(weights), imported, load_target(target))


def onnx_bytes(
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Sequence[str],
    weights: Mapping[str, Array],
    opset: int = 17,
) -> bytes:
    """A checked ONNX model; inputs are float32."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    inferred = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    for i, name in enumerate(outputs):
        model.graph.output[i].CopyFrom(inferred[name])
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnx_state(model: bytes, folder: Path, target: str = "native") -> State:
    """The state the frontend makes of an ONNX model."""
    path = folder / "tiny.onnx"
    path.write_bytes(model)
    imported = import_model(path)
    return State(imported.module, imported.weights, imported, load_target(target))


def onnxruntime_outputs(model: bytes, feeds: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime computes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(out) for out in session.run(None, dict(feeds))]


def run_steps(state: State, *names: str) -> State:
    """Run the named steps of the pipeline, in the order given."""
    table = {step.name: step for step in PIPELINE}
    for name in names:
        state = table[name].run(state)
    return state


def finish(state: State, start: str = "simplify") -> State:
    """Run the pipeline from the step `start` to its end."""
    names = [step.name for step in PIPELINE]
    return run_steps(state, *names[names.index(start) :])


def numbers(
    state: State, feeds: Sequence[Array], folder: Path, start: str = "simplify", pieces: int = 1
) -> list[Array]:
    """Run the rest of the pipeline from `start` on and compute the outputs."""
    return execute(finish(state, start), list(feeds), folder, pieces)


def ops(state: State) -> list[str]:
    """The operators of `main`, in order, without "relax."; a kernel call is "call_tir"."""
    values = [binding.value for binding in bindings_of(state.module["main"])]
    return [op_name(v).removeprefix("relax.") for v in values if isinstance(v, relax.Call)]


def calls(state: State, name: str) -> list[Any]:
    """The calls of one operator in `main`."""
    values = [binding.value for binding in bindings_of(state.module["main"])]
    return [v for v in values if op_name(v) == "relax." + name]


def kernel_functions(state: State) -> dict[str, Any]:
    """The PrimFuncs of the module, by name."""
    return {str(gv.name_hint): f for gv, f in state.module.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}


def normal(shape: Sequence[int], seed: int = 0) -> Array:
    """Seeded float32 values."""
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)


def close(got: Array, want: Array, tolerance: float = 1e-5) -> None:
    """Fail unless shapes and dtypes agree and max|error| / max|want| is small."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    assert np.isfinite(got).all()
    scale = float(np.abs(want).max()) if want.size else 0.0
    assert float(np.abs(got.astype(np.float64) - want).max()) <= tolerance * max(scale, 1e-6)
