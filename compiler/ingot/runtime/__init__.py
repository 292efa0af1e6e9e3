"""The C runtime compiled into every artifact, and the loaders."""
