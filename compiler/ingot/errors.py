"""Every error ingot raises on purpose, in one family.

An error says what went wrong, where, the value found, the values allowed and what to do. The base class and the
run-time errors are defined in `ingot.runtime.loader`, because that file also travels alone next to an artifact;
this module gives the compiler's side of the same family.
"""

from __future__ import annotations

from ingot.runtime.loader import IngotError, InputError, LoadError, RunError


class ModelError(IngotError):
    """The model file is missing, unreadable, corrupt, or contradicts itself."""


class UnsupportedError(IngotError):
    """The model is valid but holds something the compiler does not support (operators, dtypes, dynamic shapes)."""


class ShapeError(IngotError):
    """A shape given by the user names no input, has the wrong rank, or contradicts the model."""


class TargetError(IngotError):
    """The target is unknown, or its TOML file is not valid."""


class ToolchainError(IngotError):
    """A tool the compiler needs (LLVM target, linker) is missing or failed."""


class OutputError(IngotError):
    """The output cannot be written: missing or read-only folder, full disk."""


class OptionError(IngotError):
    """An option's value is not one of those allowed."""


class BoardError(IngotError):
    """A board or a cluster to measure on cannot be reached, or is not of the target's kind."""


class LogError(IngotError):
    """A tuning log cannot be read, or is given something that is no record."""


class WorkerError(IngotError):
    """A process or machine that builds candidates was lost with its work, or took too long."""

    exit_code = 1


class CompilerError(IngotError):
    """The compiler broke one of its own invariants: a bug in ingot, never the user's fault."""

    exit_code = 70


__all__ = [
    "BoardError",
    "CompilerError",
    "IngotError",
    "InputError",
    "LoadError",
    "LogError",
    "ModelError",
    "OptionError",
    "OutputError",
    "RunError",
    "ShapeError",
    "TargetError",
    "ToolchainError",
    "UnsupportedError",
    "WorkerError",
]
