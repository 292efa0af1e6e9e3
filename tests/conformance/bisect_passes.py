"""Finds the step of the compiler, or the kernel, from which on a model's outputs are wrong.

Up to the last step in Relax, the program is run by TVM's virtual machine, which uses none of this compiler's schedules.
If it is right there, each kernel's machine code is held against the same loops unscheduled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 2e-4
#: Steps whose result is still a Relax program.
_LAST_IN_RELAX = "fuse"


def interpreted(state: Any, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a state's Relax program, by TVM's virtual machine."""
    import tvm
    from tvm import relax

    # Templates' functions are all called "main" by themselves.
    functions = {
        gvar: function.with_attr("global_symbol", str(gvar.name_hint))
        for gvar, function in state.module.functions.items()
    }
    executable = tvm.compile(relax.transform.LegalizeOps()(tvm.IRModule(functions)), target="llvm")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    values = [*feeds, *state.weights.values()]
    outputs = machine["main"](*[tvm.runtime.tensor(np.ascontiguousarray(v).reshape(v.shape)) for v in values])
    return [np.asarray(value.numpy()) for value in outputs]


def distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest difference, relative to the largest value of its output; infinite for other shapes or infinities."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        left, right = (np.where(np.isfinite(b), value, 0).astype(np.float64) for value in (a, b))
        worst = max(worst, float(np.abs(left - right).max(initial=0)) / max(1.0, float(np.abs(right).max(initial=0))))
    return worst


def first_wrong_step(path: Path, feeds: dict[str, np.ndarray], wanted: Sequence[np.ndarray]) -> str:
    """The name of the step ("import" for the frontend), or empty if all of them are right."""
    from ingot.frontend import import_model
    from ingot.passes.pipeline import PIPELINE
    from ingot.passes.state import State
    from ingot.target import load_target

    imported = import_model(path)
    state = State(imported.module, imported.weights, imported, load_target("native"))
    values = [feeds[spec.name] for spec in imported.inputs]
    for name, run in (("import", None), *((step.name, step.run) for step in PIPELINE)):
        state = run(state) if run is not None else state
        worst = distance(interpreted(state, values), wanted)
        print(f"{name:18} {worst:.1e}", flush=True)
        if worst > TOLERANCE:
            return name
        if name == _LAST_IN_RELAX:
            break
    return "".join(f"kernel {name}\n" for name in wrong_kernels(state)).rstrip()


def wrong_kernels(state: Any) -> list[str]:
    """The fused functions whose machine code does not compute what their loops say, on random values."""
    import tvm

    from passes.build import finish, relax_state
    from passes.execute import Executable

    found = []
    for name, function, inputs, types in _calls(state):

        def body(emit: Any, *params: Any, function: Any = function, types: Any = types, name: str = name) -> list[Any]:
            gvar = emit.__self__.add_func(function.with_attr("global_symbol", name), name)
            return [emit(tvm.relax.call_tir(gvar, tvm.relax.Tuple(list(params)), types))]

        one = relax_state({f"p{i}": (shape, dtype) for i, (shape, dtype) in enumerate(inputs)}, {}, body)
        feeds = [
            (np.random.default_rng(i).standard_normal(shape) * (1 if dtype.startswith("float") else 0)).astype(dtype)
            for i, (shape, dtype) in enumerate(inputs)
        ]
        wanted = interpreted(one, feeds)
        with tempfile.TemporaryDirectory() as folder:
            got = Executable(finish(one, "lower"), Path(folder)).run(feeds)
        worst = distance(got, wanted)
        print(f"kernel {name:40} {worst:.1e}", flush=True)
        if worst > TOLERANCE:
            found.append(name)
    return found


def _calls(state: Any) -> list[tuple[str, Any, list[tuple[tuple[int, ...], str]], Any]]:
    """Each function that makes one tensor, once: its name, itself, its inputs' shapes and dtypes, its result's type."""
    from ingot.passes.rewriter import bindings_of, dtype_of, is_tensor, op_name, shape_of

    found = {}
    for binding in bindings_of(state.module["main"]):
        if op_name(binding.value) == "relax.call_tir" and is_tensor(binding.var):
            gvar, inputs = binding.value.args[0], binding.value.args[1].fields
            kinds = [(shape_of(item), dtype_of(item)) for item in inputs]
            found[str(gvar.name_hint)] = (str(gvar.name_hint), state.module[gvar], kinds, binding.var.ty)
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Bisect one model; see --help."""
    from conformance.random_graphs import reference
    from ingot.frontend import import_model

    parser = argparse.ArgumentParser(description="find the step at which a model's outputs go wrong")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="an .npz with the inputs by name; default: seeded values")
    options = parser.parse_args(arguments)
    if options.data:
        with np.load(options.data) as data:
            feeds = {name: data[name] for name in data}
    else:
        specs = import_model(options.model).inputs
        feeds = {s.name: np.random.default_rng(i).standard_normal(s.shape).astype(s.dtype) for i, s in enumerate(specs)}
    wrong = first_wrong_step(options.model, feeds, reference(options.model.read_bytes(), feeds))
    print(f"goes wrong at: {wrong}" if wrong else "every step and every kernel is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
