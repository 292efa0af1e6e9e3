"""Builds the C driver and the hand-made model it tests, once per target."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from handmade import COLUMNS, KERNELS_C, handmade
from ingot.packager.artifact import package
from ingot.packager.link import zig_path
from ingot.target import load_target

HERE = Path(__file__).resolve().parent
RUNTIME = HERE.parent.parent / "compiler" / "ingot" / "runtime"
STRICT = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a target's name to the path of the hand-made model built for it."""
    built: dict[str, Path] = {}

    def build(target: str) -> Path:
        if target not in built:
            built[target] = tmp_path_factory.mktemp("demo") / f"{target}.so"
            program, imported, board, selftest = handmade(target)
            package(program, imported, board, precision="fp32", selftest=selftest).save(built[target])
        return built[target]

    return build


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a target's name to the driver program built for it."""
    built: dict[str, Path] = {}

    def build(target: str) -> Path:
        triple = load_target(target).zig_triple
        if triple not in built:
            built[triple] = tmp_path_factory.mktemp("driver") / "driver"
            command = [zig_path(), "cc", "-target", triple, *STRICT, "-fno-sanitize=undefined", "-DCOUNT_ALLOCATIONS"]
            command += [f"-I{RUNTIME}", HERE / "driver.c", "-o", built[triple], "-lm", "-lpthread", "-ldl"]
            subprocess.run(command, check=True)
        return built[triple]

    return build


@pytest.fixture(scope="session")
def native_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with entry.c, weights.S and its data, and the kernels as C: what another compiler can build."""
    folder = tmp_path_factory.mktemp("sources")
    program, imported, board, selftest = handmade()
    sources = package(program, imported, board, precision="fp32", selftest=selftest).sources
    for name, data in sources.files.items():
        (folder / name).write_bytes(data)
    (folder / "entry.c").write_text(sources.entry_c, encoding="utf-8")
    (folder / "weights.S").write_text(sources.weights_s, encoding="utf-8")
    (folder / "kernels.c").write_text(KERNELS_C % {"name": "demo", "columns": COLUMNS})
    return folder


@pytest.fixture(scope="session")
def gcc() -> str:
    """The system's C compiler, for sanitizers and for a second opinion on warnings."""
    program = shutil.which("gcc")
    if program is None:
        pytest.skip("no gcc on this machine")
    return program
