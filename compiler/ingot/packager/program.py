"""The program's description, under the name the packager's files use."""

from ingot.program import BufferRef, CopyStep, Kernel, Param, Place, Program, Step

__all__ = ["BufferRef", "CopyStep", "Kernel", "Param", "Place", "Program", "Step"]
