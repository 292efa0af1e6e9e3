"""Model files -> checked Relax in one normal form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ingot.errors import IngotError, ModelError
from ingot.frontend.bind import Bindable
from ingot.frontend.interface import Bound, Imported, Quantization, TensorSpec
from ingot.frontend.keep_state import Kept, initial_shapes, keep_states


def import_model(
    path: str | os.PathLike[str],
    shape: Mapping[str, Sequence[int]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
    state: Mapping[str, Kept] | None = None,
) -> Imported:
    """Read an ONNX or TFLite model and bring it into the compiler's normal form.

    `shape` gives static shapes by input name, for inputs whose dimensions the model leaves open. `bind` gives values
    by input name (arrays, numbers or lists): these inputs become constants and vanish from the interface. `state`
    gives an output by input name, or (output, first value): the compiled model keeps them for itself. Raises
    ModelError (missing, damaged, lying or invalid file), UnsupportedError (valid, but not something this compiler
    takes), ShapeError (a shape that does not fit the model, or one that is missing) or OptionError (a value that does
    not fit its input).
    """
    from ingot.frontend.source import read_source

    source = read_source(path)
    if source.format == "tflite":
        from ingot.frontend.tflite_import import import_tflite as import_source
    else:
        from ingot.frontend.onnx_import import import_onnx as import_source
    try:
        imported = import_source(source, {**initial_shapes(state), **(shape or {})}, bind)
        return keep_states(imported, state)
    except IngotError:
        raise
    except Exception as error:
        # The libraries that read models raise anything on hostile files: the user gets one sentence all the same.
        raise ModelError(
            "the model cannot be imported",
            where=str(source.path),
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            hint="the file is damaged; if other tools do load it, please report it",
        ) from error


__all__ = ["Bindable", "Bound", "Imported", "Kept", "Quantization", "TensorSpec", "import_model"]
