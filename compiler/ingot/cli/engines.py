"""The interpreters that a compiled model is compared with, and the compiled model itself, behind one small face."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
#: Runs once on what the dictionary of inputs holds at that time, and gives the outputs in the model's order.
Runner = Callable[[], list[Array]]
#: Imports an engine for a model, threads and inputs, and gives a function that loads the model.
Engine = Callable[[Path, int, dict[str, Array]], Callable[[], Runner]]


def _ingot(model: Path, threads: int, inputs: dict[str, Array]) -> Callable[[], Runner]:
    from ingot.runtime import loader

    def create() -> Runner:
        net = loader.load(model, threads=threads)

        def run() -> list[Array]:
            # By place: another library of the same model may have other names.
            outputs = net(*inputs.values())
            return list(outputs) if isinstance(outputs, tuple) else [outputs]

        return run

    return create


def _onnxruntime(model: Path, threads: int, inputs: dict[str, Array], exact: bool = False) -> Callable[[], Runner]:
    import onnxruntime

    def create() -> Runner:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        return lambda: [np.asarray(v) for v in session.run(None, inputs)]

    return create


def _litert(model: Path, threads: int, inputs: dict[str, Array], kernels: str = "AUTO") -> Callable[[], Runner]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def create() -> Runner:
        kind = getattr(OpResolverType, kernels)
        net = Interpreter(model_path=str(model), num_threads=threads, experimental_op_resolver_type=kind)
        # By place: LiteRT lists tensors in the model's order, and two of them may have one name.
        slots = net.get_input_details()
        for slot, array in zip(slots, inputs.values(), strict=True):
            if tuple(slot["shape"]) != array.shape:
                net.resize_tensor_input(slot["index"], array.shape, strict=True)
        net.allocate_tensors()
        results = [slot["index"] for slot in net.get_output_details()]

        def run() -> list[Array]:
            for slot, array in zip(slots, inputs.values(), strict=True):
                net.set_tensor(slot["index"], array)
            net.invoke()
            return [np.asarray(net.get_tensor(index)) for index in results]

        return run

    return create


def _openvino(precision: str) -> Engine:
    """OpenVINO's CPU plugin: "f32", or "" for what it chooses itself (bfloat16 where the CPU has it)."""

    def load(model: Path, threads: int, inputs: dict[str, Array]) -> Callable[[], Runner]:
        import openvino

        def create() -> Runner:
            options: dict[str, Any] = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
            }
            if precision:
                options["INFERENCE_PRECISION_HINT"] = precision
            core = openvino.Core()
            net = core.read_model(str(model))
            net.reshape({port: inputs[port.get_any_name()].shape for port in net.inputs})
            request = core.compile_model(net, "CPU", options).create_infer_request()

            def run() -> list[Array]:
                results = request.infer(inputs)
                return [np.asarray(results[i]) for i in range(len(net.outputs))]

            return run

        return create

    return load


def _reference(model: Path, _threads: int, inputs: dict[str, Array]) -> Callable[[], Runner]:
    from onnx.reference import ReferenceEvaluator

    def create() -> Runner:
        net = ReferenceEvaluator(str(model))
        return lambda: [np.asarray(v) for v in net.run(None, inputs)]

    return create


ENGINES: dict[str, Engine] = {
    "ingot": _ingot,
    "onnxruntime": _onnxruntime,
    "onnxruntime-exact": functools.partial(_onnxruntime, exact=True),
    "litert": _litert,
    "litert-reference": functools.partial(_litert, kernels="BUILTIN_REF"),
    "reference": _reference,
    "openvino": _openvino("f32"),
    "openvino-default": _openvino(""),
}
#: Engine -> the package to install for it.
PACKAGES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-exact": "onnxruntime",
    "litert": "ai-edge-litert",
    "litert-reference": "ai-edge-litert",
    "reference": "onnx",
    "openvino": "openvino",
    "openvino-default": "openvino",
}


def engines_for(source_format: str, *, quantized: bool = False) -> Sequence[str]:
    """Engines that can judge a model of a format, the best first.

    A quantised TFLite model is judged by LiteRT's reference kernels: its default ones round otherwise. ONNX Runtime's
    exact ones differ from its default on x86 without VNNI, where sums of two 8-bit products saturate in 16 bits.
    """
    if source_format == "tflite" and quantized:
        return ("litert-reference", "litert")
    return ("litert",) if source_format == "tflite" else ("onnxruntime-exact", "reference")
