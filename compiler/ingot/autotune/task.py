"""What there is to tune in a model: the distinct kernels of templates, each as a tiny model of its own.

A task is one `passes.picks.Choice` cut out of the program as it is before the pass that chooses: the operator, what
follows it in the same kernel, and the conversions before it. Candidates are made from it by the same passes that
compile models, so what is measured is what will run. Weights keep their shapes and types alone; their values are made
up (`weights.py`), so that a task is small enough to send anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst

from ingot.autotune.weights import WeightSpec, spec_of, synthesise
from ingot.errors import CompilerError
from ingot.frontend.interface import Imported, TensorSpec
from ingot.passes.picks import Choice, Epilogues
from ingot.passes.pipeline import PIPELINE
from ingot.passes.rewriter import bindings_of, dtype_of, op_name, rebuild, shape_of
from ingot.passes.state import State
from ingot.target import Target

#: The passes whose choices are tuned, in order.
CHOOSING = ("half_layers", "select_templates")
#: A task's kernels may use as much of an arena as they like; the model that uses a record checks its own.
_WORKSPACE_BYTES = 1 << 40


@dataclass(frozen=True)
class Work:
    """A task as plain data: its little module as JSON, what its parameters are, and the pass it was cut before."""

    step: str
    precision: str
    module: str = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...] = field(repr=False)


@dataclass(frozen=True)
class Task:
    """One kernel to tune. key: the same in every model and on every machine. runs: calls in one inference."""

    key: str
    runs: int
    default: Any
    space: tuple[Any, ...] = field(repr=False)
    work: Work = field(repr=False)


def tasks_of(state: State) -> list[Task]:
    """Return the tasks of a `prepared` program, each once, in order of first appearance."""
    choices: list[Choice] = []

    def record(choice: Choice) -> Any:  # noqa: ANN401
        choices.append(choice)
        return choice.default

    runs: Counter[str] = Counter()
    found: dict[str, Task] = {}
    for step in PIPELINE[_place(CHOOSING[0]) : _place(CHOOSING[-1]) + 1]:
        after = step.run(state.having(picks=record))
        groups = Epilogues(state)
        for choice in choices:
            runs[choice.task] += 1
            space = tuple(choice.space())
            if choice.task not in found and len(space) > 1:
                work = _cut(state, step.name, choice.call, groups[choice.call])
                found[choice.task] = Task(choice.task, 0, choice.default, space, work)
        choices.clear()
        state = after.having(picks=state.picks)
    return [replace(task, runs=runs[key]) for key, task in found.items()]


def _place(name: str) -> int:
    return [step.name for step in PIPELINE].index(name)


def prepared(state: State) -> State:
    """Run the passes before the first that chooses."""
    for step in PIPELINE[: _place(CHOOSING[0])]:
        state = step.run(state)
    return state


def planned(state: State, first: str = CHOOSING[0]) -> State:
    """Run the passes from the one named on: by default from the first that chooses."""
    for step in PIPELINE[_place(first) :]:
        state = step.run(state)
    return state


def with_made_up_weights(state: State, name: str) -> State:
    """Return a prepared program with other weights of the same kinds, and with `name` in its kernels' symbols."""
    weights = {key: synthesise(spec_of(key, value)) for key, value in state.weights.items()}
    return state.having(weights=weights, imported=replace(state.imported, name=name))


def _cut(state: State, step: str, call: Any, group: Sequence[Any]) -> Work:  # noqa: ANN401
    """Return the call with its group as a program of its own, for the passes from `step` on."""
    main, weights = state.module["main"], state.weights
    definition = {binding.var: binding.value for binding in bindings_of(main)}
    weight_vars = set(main.params[state.n_inputs :])
    anchor = next(binding for binding in bindings_of(main) if binding.value.same_as(call))
    inputs: list[Any] = []
    used: list[Any] = []
    new: dict[Any, Any] = {}
    chosen: list[Any] = []

    def take(expr: Any) -> None:  # noqa: ANN401
        if expr in new or not isinstance(expr, relax.Var):
            return
        if expr in weight_vars:
            new[expr] = relax.Var(f"w{len(used)}", relax.TensorType(shape_of(expr), dtype_of(expr)))
            used.append(expr)
        elif op_name(definition.get(expr)) == "relax.dequantize":
            for arg in definition[expr].args:
                take(arg)
            chosen.append((expr, definition[expr]))
        elif all(expr is not var for var, _ in chosen):
            new[expr] = relax.Var(f"x{len(inputs)}", relax.TensorType(shape_of(expr), dtype_of(expr)))
            inputs.append(expr)

    for binding in (anchor, *group):
        inside = {var for var, _ in chosen}
        for arg in binding.value.args:
            if arg not in inside:
                take(arg)
        chosen.append((binding.var, binding.value))
    params = [new[var] for var in (*inputs, *used)]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            for var, value in chosen:
                args = [arg if isinstance(arg, GenericConst) else new.get(arg, arg) for arg in value.args]
                new[var] = builder.emit(rebuild(value, args))
            last = new[chosen[-1][0]]
            result = builder.emit_output(relax.Tuple([last]))
        builder.emit_func_output(result)
    text = str(tvm.ir.save_json(builder.finalize()))
    specs = tuple(spec_of(f"w{i}", weights[str(var.name)]) for i, var in enumerate(used))
    out = chosen[-1][0]
    return Work(
        step,
        state.precision,
        text,
        tuple(TensorSpec(f"x{i}", dtype_of(v), shape_of(v)) for i, v in enumerate(inputs)),
        (TensorSpec("y", dtype_of(out), shape_of(out)),),
        specs,
    )


def state_of(work: Work, target: Target, name: str = "task") -> State:
    """Return the state from which a task's kernels are compiled, with made-up weights; `name` is in their symbols."""
    module: Any = tvm.ir.load_json(work.module)
    weights = {spec.name: synthesise(spec) for spec in work.weights}
    imported = Imported(
        module=module,
        weights=weights,
        inputs=work.inputs,
        outputs=work.outputs,
        name=name,
        source_format="onnx",
        source_sha256="0" * 64,
        source_peak_bytes=_WORKSPACE_BYTES,
        notices=(),
    )
    return State(module, weights, imported, target, precision=work.precision)


def lowered_with(keyed: tuple[str, Work], config: Any, target: Target, name: str = "task") -> State:  # noqa: ANN401
    """Return the planned program of (a task's key, its work) with one config.

    Raises CompilerError if nothing in the work asks for a config under that key.
    """
    key, work = keyed
    seen: list[str] = []

    def pick(choice: Choice) -> Any:  # noqa: ANN401
        seen.append(choice.task)
        return config if choice.task == key else choice.default

    state = planned(state_of(work, target, name).having(picks=pick), work.step)
    if key not in seen:
        raise CompilerError("a task is not what it was cut from", found=", ".join(seen), allowed=key)
    return state
