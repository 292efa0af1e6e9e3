"""Executables that stand in for batches of candidates."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.packager.link import zig_path
from ingot.target import load_target


@pytest.fixture(scope="session")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a target's name to tests/autotune/faults.c, built for it."""
    built: dict[str, Path] = {}

    def build(target_name: str = "native") -> Path:
        if target_name not in built:
            target = load_target(target_name)
            out = tmp_path_factory.mktemp("batch") / "batch"
            source = Path(__file__).with_name("faults.c")
            machine = ["-target", target.zig_triple, f"-mcpu={target.baseline()}"]
            command = [str(zig_path()), "cc", *machine, "-O1", "-s", "-o", str(out), str(source)]
            subprocess.run(command, check=True, capture_output=True)
            built[target_name] = out
        return built[target_name]

    return build
