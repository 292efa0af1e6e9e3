"""The process of an engine that has a virtual environment of its own: IREE, or PyTorch's inductor.

usage: bench_worker.py ENGINE MODEL.onnx THREADS INPUTS.npz

It is run by that environment's Python, which needs no package of ingot's, and answers as `ingot.cli.worker` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from ingot.cli.worker import serve

if TYPE_CHECKING:
    from ingot.cli.engines import Array, Engine, Runner

REPO = Path(__file__).resolve().parent.parent
#: What IREE's guide to deployment on CPUs and its page of optimisation options recommend; O3 includes data tiling.
IREE_FLAGS = ("--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3")
#: IREE's importer reads ONNX from this operator set on, and converts older models to it.
IREE_OPSET = "17"


def fixed(model: Path, inputs: dict[str, Array]) -> onnx.ModelProto:
    """The model with the inputs' shapes in place of open dimensions; its outputs' shapes follow from them."""
    proto = onnx.load(str(model))
    for value in proto.graph.input:
        if value.name in inputs:
            kind = value.type.tensor_type.elem_type
            shape = inputs[value.name].shape
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def in_order(proto: onnx.ModelProto, inputs: dict[str, Array]) -> list[str]:
    """The inputs' names in the order of the graph."""
    return [value.name for value in proto.graph.input if value.name in inputs]


def _iree(model: Path, threads: int, inputs: dict[str, Array]) -> Callable[[], Runner]:
    import iree.compiler.tools
    import iree.runtime

    def create() -> Runner:
        proto = fixed(model, inputs)
        names = in_order(proto, inputs)
        with tempfile.TemporaryDirectory(prefix="ingot-") as folder:
            source, mlir = Path(folder) / "model.onnx", Path(folder) / "model.mlir"
            onnx.save(proto, str(source))
            command = [sys.executable, "-m", "iree.compiler.tools.import_onnx", str(source), "-o", str(mlir)]
            done = subprocess.run(
                [*command, "--opset-version", IREE_OPSET], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError("import: " + (done.stderr.strip().splitlines() or ["it failed"])[-1])
            binary = iree.compiler.tools.compile_file(
                str(mlir), input_type="onnx", target_backends=["llvm-cpu"], extra_args=list(IREE_FLAGS)
            )
        if not binary:
            raise RuntimeError("the compiler made no module")
        if threads > 1:
            iree.runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
        config = iree.runtime.Config("local-sync" if threads == 1 else "local-task")
        module = iree.runtime.load_vm_module(iree.runtime.VmModule.copy_buffer(config.vm_instance, binary), config)
        (function,) = (n for n in module.vm_module.function_names if not n.startswith("__") and "$" not in n)
        call = module[function]

        def run() -> list[Array]:
            results = call(*(inputs[name] for name in names))
            return [np.asarray(r) for r in (results if isinstance(results, (tuple, list)) else (results,))]

        return run

    return create


def _inductor(model: Path, threads: int, inputs: dict[str, Array]) -> Callable[[], Runner]:
    # What is measured fastest with one number of threads need not be so with another.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(REPO / "build" / "bench" / f"inductor-{threads}")
    import torch
    import torch._inductor.config

    from onnx_torch import OnnxModule

    def create() -> Runner:
        torch.set_num_threads(threads)
        # Weights become constants, packed at compile time: what PyTorch recommends for inference on CPUs.
        torch._inductor.config.freezing = True  # its public name
        proto = fixed(model, inputs)
        names = in_order(proto, inputs)
        net = torch.compile(OnnxModule(proto).eval(), mode="max-autotune-no-cudagraphs", dynamic=False)

        def run() -> list[Array]:
            with torch.inference_mode():
                return [result.numpy() for result in net(*(torch.from_numpy(inputs[name]) for name in names))]

        run()  # compiles
        return run

    return create


ENGINES: dict[str, Engine] = {"iree": _iree, "inductor": _inductor}

if __name__ == "__main__":
    sys.exit(serve(ENGINES))
