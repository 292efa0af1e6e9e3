"""What the packager's tests share."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def gcc() -> str:
    """The system's C compiler: a second opinion beside the bundled one."""
    program = shutil.which("gcc")
    if program is None:
        pytest.skip("no gcc on this machine")
    return program
