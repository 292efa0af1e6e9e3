"""Executables that stand in for batches of candidates, and a board behind ssh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import loopback_sshd
from board_faults import Bench
from loopback_sshd import Sshd
from strict_skips import in_ci


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """tests/autotune/faults.c, built for any target."""
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def batch(bench: Bench) -> Callable[..., Path]:
    """A function from a target's name to tests/autotune/faults.c, built for it."""
    return bench.batch


@pytest.fixture(scope="session")
def openssh() -> None:
    """OpenSSH's client and server. Absent, the test is skipped; under CI it fails: it must be installed there."""
    if loopback_sshd.MISSING:
        (pytest.fail if in_ci() else pytest.skip)(loopback_sshd.MISSING)


@pytest.fixture(scope="session")
def server(openssh: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A board behind ssh, on loopback."""
    with loopback_sshd.sshd(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@pytest.fixture
def board(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """The same, with an `ssh` in PATH that knows its keys."""
    monkeypatch.setenv("PATH", str(server.bin), prepend=":")
    return server
