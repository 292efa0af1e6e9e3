"""ingot: an ONNX or TFLite model in, one self-contained shared library for a named board out.

`import ingot` costs no more than numpy: the compiler is imported on its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ingot.errors import IngotError
from ingot.runtime.loader import Model, load

if TYPE_CHECKING:
    from ingot.driver import compile
    from ingot.frontend.custom import OpNode, register_op
    from ingot.packager.artifact import Artifact

__version__ = "0.1.0"

_LAZY = {
    "compile": "ingot.driver",
    "Artifact": "ingot.packager.artifact",
    "OpNode": "ingot.frontend.custom",
    "register_op": "ingot.frontend.custom",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute can be anything
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ingot' has no attribute {name!r}")


__all__ = ["Artifact", "IngotError", "Model", "OpNode", "__version__", "compile", "load", "register_op"]
