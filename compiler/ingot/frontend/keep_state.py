"""Inputs and outputs that are one tensor kept from run to run: the pairs a user names, held against the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ingot.errors import OptionError
from ingot.frontend.bind import Bindable, typed_value
from ingot.frontend.interface import Imported, StateTensor, TensorSpec
from ingot.frontend.shapes import DeclaredInput

#: What a state's input may be paired with: an output, or an output and the first value (an array, number or list).
Kept = str | tuple[str, Bindable]


def initial_shapes(states: Mapping[str, Kept] | None) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs that are known from their first values."""
    pairs = {name: kept[1] for name, kept in (states or {}).items() if not isinstance(kept, str)}
    return {name: tuple(value.shape) for name, value in pairs.items() if isinstance(value, np.ndarray) and value.ndim}


def keep_states(imported: Imported, states: Mapping[str, Kept] | None) -> Imported:
    """The model with pairs of an input and an output as state, `states[input] = output` or `(output, first value)`.

    Without a first value it is zeros, or the zero point of a quantised tensor. Raises OptionError for a name that is no
    input or output, a pair of different dtypes, shapes or scales, an output given twice, or if no output is left.
    """
    if not states:
        return imported
    found = list(imported.states)
    for name, kept in states.items():
        output_name, initial = (kept, None) if isinstance(kept, str) else kept
        i = _index(name, imported.inputs, "input", name)
        o = _index(output_name, imported.outputs, "output", name)
        source, result = imported.inputs[i], imported.outputs[o]
        if any(other.input == i for other in found):
            raise OptionError("the model keeps this state itself", where=f"state {name!r}")
        if any(other.output == o for other in found):
            raise OptionError("an output is the next value of two states", where=f"output {output_name!r}")
        if any(item.output == o for item in imported.counts):
            what = "a state needs a fixed size, and that of its output depends on data"
            raise OptionError(what, where=f"state {name}={output_name}")
        if (source.dtype, source.shape, source.quantization) != (result.dtype, result.shape, result.quantization):
            raise OptionError(
                "the input and the output of a state differ",
                where=f"state {name}={output_name}",
                found=f"output {_text(result)}",
                allowed=f"{_text(source)}, as the input",
                hint="give --shape for dimensions that the model leaves open",
            )
        found.append(StateTensor(i, o, _initial(source, initial)))
    if len(found) + len({item.counter for item in imported.counts}) == len(imported.outputs):
        raise OptionError("no output is left", found="every output is a state", allowed="at least one other output")
    return replace(imported, states=tuple(sorted(found, key=lambda item: item.input)))


def _index(name: str, specs: Sequence[TensorSpec], side: str, state: str) -> int:
    names = [spec.name for spec in specs]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else None
        allowed = ", ".join(map(repr, names)) or f"none: the model has no {side}s"
        raise OptionError(
            f"a state names an {side} the model does not have", f"state {state!r}", repr(name), allowed, hint
        )
    return names.index(name)


def _initial(spec: TensorSpec, value: Bindable | None) -> np.ndarray:
    if value is None:
        value = spec.quantization.zero_points[0] if spec.quantization is not None else 0
    array = typed_value(DeclaredInput(spec.name, spec.shape), value, spec.dtype, what="first value of state")
    if array.size != 1 and array.shape != spec.shape:
        found, allowed = str(list(array.shape)), f"{list(spec.shape)}, or one number"
        raise OptionError("a first value has the wrong shape", f"state {spec.name!r}", found, allowed)
    return np.ascontiguousarray(np.broadcast_to(array.reshape(array.shape if array.size != 1 else ()), spec.shape))


def _text(spec: TensorSpec) -> str:
    q = spec.quantization
    return f"{spec.dtype}{list(spec.shape)}" + (f" with scale {q.scales[0]:.6g}" if q is not None else "")
