"""Model files -> checked Relax in one normal form."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

from ingot.errors import IngotError, ModelError
from ingot.frontend.bind import Bindable
from ingot.frontend.interface import Bound, Cut, Imported, Quantization, TensorSpec
from ingot.frontend.keep_state import Kept, initial_shapes, keep_states
from ingot.frontend.survey import Failure, NothingLeftError, Survey


def import_model(
    path: str | os.PathLike[str],
    shape: Mapping[str, Sequence[int]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
    state: Mapping[str, Kept] | None = None,
    without: Collection[int] = (),
) -> Imported:
    """Read an ONNX or TFLite model and bring it into the compiler's normal form.

    `shape` gives static shapes by input name, for inputs whose dimensions the model leaves open. `bind` gives values
    by input name (arrays, numbers or lists): these inputs become constants and vanish from the interface. `state`
    gives an output by input name, or (output, first value): the compiled model keeps them for itself. `without` are
    numbers of nodes (see `survey_model`): they are left out with all that need them, and the tensors they would have
    read become outputs. Raises ModelError (missing, damaged, lying or invalid file), UnsupportedError (valid, but not
    something this compiler takes), ShapeError (a shape that does not fit the model, or one that is missing) or
    OptionError (a value that does not fit its input).
    """
    from ingot.frontend.source import read_source

    source = read_source(path)
    if source.format == "tflite":
        from ingot.frontend.tflite_import import import_tflite as import_source
    else:
        from ingot.frontend.onnx_import import import_onnx as import_source
    with _damaged(str(source.path)):
        return keep_states(import_source(source, {**initial_shapes(state), **(shape or {})}, bind, without), state)


def survey_model(
    path: str | os.PathLike[str],
    shape: Mapping[str, Sequence[int]] | None = None,
    bind: Mapping[str, Bindable] | None = None,
) -> Survey:
    """Find all nodes of a model that cannot be imported, not the first one alone.

    Raises what `import_model` raises for a file or an input that is wrong as a whole.
    """
    from ingot.frontend.source import read_source

    source, survey = read_source(path), Survey()
    if source.format == "tflite":
        from ingot.frontend.tflite_import import survey_tflite as survey_source
    else:
        from ingot.frontend.onnx_import import survey_onnx as survey_source
    # Where nothing is left, there is nothing to look at further.
    with _damaged(str(source.path)), contextlib.suppress(NothingLeftError):
        survey_source(source, shape, bind, survey)
    return survey


@contextlib.contextmanager
def _damaged(where: str) -> Iterator[None]:
    """The libraries that read models raise anything on hostile files: the user gets one sentence all the same."""
    try:
        yield
    except IngotError:
        raise
    except Exception as error:
        raise ModelError(
            "the model cannot be imported",
            where=where,
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            hint="the file is damaged; if other tools do load it, please report it",
        ) from error


__all__ = [
    "Bindable",
    "Bound",
    "Cut",
    "Failure",
    "Imported",
    "Kept",
    "Quantization",
    "Survey",
    "TensorSpec",
    "import_model",
    "survey_model",
]
