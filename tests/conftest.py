"""Fixtures and options that all rooms' tests share. A room's own fixtures live in tests/<room>/conftest.py."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["strict_skips", "pytester"]

REPO = Path(__file__).resolve().parent.parent
# Where Debian's cross packages put each architecture's C library.
SYSROOTS = {
    "aarch64": Path("/usr/aarch64-linux-gnu"),
    "arm": Path("/usr/arm-linux-gnueabihf"),
    "riscv64": Path("/usr/riscv64-linux-gnu"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --update-golden."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code does now")


def pytest_configure() -> None:
    """Make the run independent of the terminal: xdist workers are told a width of 80 columns."""
    os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run fast tests first: a broken build shows in seconds, not after the emulator's minutes."""
    items.sort(
        key=lambda item: (item.get_closest_marker("slow") is not None, item.get_closest_marker("qemu") is not None)
    )


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root folder."""
    return REPO


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real models with reference outputs: $INGOT_MODELS, or ../shared/models next to the repository.

    Absent, the test is skipped; under CI it fails, because a run without real models proves too little.
    """
    from strict_skips import in_ci  # here, as pytest must be the first to import its plugins

    folder = Path(os.environ.get("INGOT_MODELS") or REPO.parent / "shared" / "models")
    if not (folder / "MANIFEST.json").is_file():
        message = f"no models: {folder} holds no MANIFEST.json; set INGOT_MODELS to the folder that does"
        if in_ci():
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def qemu() -> Callable[[str], list[str]]:
    """A function from an architecture (x86_64, aarch64, arm, riscv64) to the command prefix that runs its programs.

    Empty for this machine's own architecture. Skips the test where the emulator or the C library is not installed.
    """

    def prefix(arch: str) -> list[str]:
        if arch == platform.machine():
            return []
        program = shutil.which(f"qemu-{arch}")
        sysroot = SYSROOTS.get(arch)
        if program is None or sysroot is None or not sysroot.is_dir():
            found = "no emulator" if program is None else f"no C library in {sysroot}"
            pytest.skip(f"cannot run {arch} programs here: {found}; Debian has qemu-user and libc6-*-cross")
        return [program, "-L", str(sysroot)]

    return prefix


@pytest.fixture(scope="session")
def fuzz() -> Callable[[int, int], tuple[int, int]]:
    """A function `fuzz(rounds, seed)` that gives the rounds and the seed a test of random damage uses.

    They are its own, so that every run of the suite is the same, unless scripts/fuzz asks for more rounds and for
    another seed by INGOT_FUZZ_ROUNDS and INGOT_FUZZ_SEED.
    """

    def choose(rounds: int, seed: int) -> tuple[int, int]:
        return int(os.environ.get("INGOT_FUZZ_ROUNDS", rounds)), int(os.environ.get("INGOT_FUZZ_SEED", seed))

    return choose


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether --update-golden was given: tests then rewrite their golden files instead of comparing."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def golden(request: pytest.FixtureRequest, update_golden: bool) -> Callable[..., None]:
    """A function `golden(text, suffix)` that compares text with tests/golden/<file>/<test><suffix>.

    With --update-golden it writes the file instead. A missing golden file is a failure.
    """

    def check(text: str, suffix: str = ".txt") -> None:
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in request.node.name)
        path = REPO / "tests" / "golden" / Path(str(request.node.path)).stem / f"{name}{suffix}"
        if update_golden:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"no golden file {path.relative_to(REPO)}; write it with --update-golden and review it")
        assert text == path.read_text(encoding="utf-8"), f"differs from {path.relative_to(REPO)}"

    return check
