"""Model files -> checked Relax in one normal form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ingot.frontend.interface import Imported, Quantization, TensorSpec


def import_model(path: str | os.PathLike[str], shape: Mapping[str, Sequence[int]] | None = None) -> Imported:
    """Read an ONNX or TFLite model and bring it into the compiler's normal form.

    `shape` gives static shapes by input name, for inputs whose dimensions the model leaves open. Raises ModelError
    (missing, damaged, lying or invalid file), UnsupportedError (valid, but not something this compiler takes) or
    ShapeError (a shape that does not fit the model, or one that is missing).
    """
    from ingot.frontend.source import read_source

    source = read_source(path)
    if source.format == "tflite":
        from ingot.frontend.tflite_import import import_tflite

        return import_tflite(source, shape)
    from ingot.frontend.onnx_import import import_onnx

    return import_onnx(source, shape)


__all__ = ["Imported", "Quantization", "TensorSpec", "import_model"]
