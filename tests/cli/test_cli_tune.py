"""`ingot tune` from the command line: a run, a kill in the middle, another run, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import ingot as package
from ingot.autotune.log import log_path, read

Ingot = Callable[..., Result]


def tuning(model: Path, logs: Path, trials: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ingot.cli.main", "tune", str(model), "--log", str(logs), "--trials", str(trials)]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on(tiny_model: Path, tmp_path: Path, ingot: Ingot) -> None:
    logs = tmp_path / "logs"
    path = log_path(logs, "native")
    first = tuning(tiny_model, logs, 200)
    limit = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size) and time.monotonic() < limit and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before, counts = read(path)
    assert before
    assert counts.skipped == 0
    second = tuning(tiny_model, logs, 3)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "known before" in out
    after, _ = read(path)
    assert after[: len(before)] == before
    assert len(after) > len(before)
    done = ingot("compile", tiny_model, "--log", logs, "-o", tmp_path / "tiny.so", "--no-selftest")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "1", "--trials", "5"], ["do not go together"]),
        (["--board", "tcp://pi"], ["--board", "ssh://"]),
        (["--target", "no-such-board"], ["no-such-board"]),
        (["--target", "raspberry-pi-4"], ["--board ssh://"]),
    ],
)
def test_what_tune_refuses(
    options: list[str], words: list[str], tiny_model: Path, tmp_path: Path, ingot: Ingot, refused: Callable[..., None]
) -> None:
    refused(ingot("tune", tiny_model, "--log", tmp_path / "logs", *options), *words)
    assert not (tmp_path / "logs").exists()


def test_a_log_that_is_a_file_is_refused(
    tiny_model: Path, tmp_path: Path, ingot: Ingot, refused: Callable[..., None]
) -> None:
    (tmp_path / "logs").write_text("not a folder")
    refused(ingot("tune", tiny_model, "--log", tmp_path / "logs"), "--log", "folder")
    refused(ingot("compile", tiny_model, "--log", tmp_path / "logs", "-o", tmp_path / "a.so"), "--log", "folder")


def test_a_missing_model_is_refused(tmp_path: Path, ingot: Ingot, refused: Callable[..., None]) -> None:
    result = ingot("tune", tmp_path / "none.onnx", "--log", tmp_path / "logs")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
