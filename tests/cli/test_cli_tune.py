"""`ingot tune` from the command line: a run, a kill in the middle, another run, and what it refuses."""

from __future__ import annotations

import os
import shutil
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
        (["--target", "raspberry-pi-4", "--board", "qemu:arm"], ["not of the target's kind", "qemu:aarch64"]),
        (["--board", "ssh://-oProxyCommand=reboot"], ["no board of this form"]),
        (["--board", "local", "--board", "local"], ["given twice"]),
        (["--cluster", "host:8786"], ["no address of a cluster", "tcp://host:port"]),
        (["--cluster", "tcp://127.0.0.1:1", "--builders", "2"], ["do not go together"]),
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


def test_a_board_that_does_not_answer_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, ingot: Ingot, refused: Callable[..., None]
) -> None:
    if shutil.which("ssh") is None:
        words = ["ssh is not installed", "openssh-client"]
    else:
        words = ["refuses the connection", "ssh -p 1 127.0.0.1"]
    refused(ingot("tune", tiny_model, "--log", tmp_path / "logs", "--board", "ssh://127.0.0.1:1"), *words)
    assert not (tmp_path / "logs").exists()


def test_without_ssh_one_is_told_what_to_install(
    tiny_model: Path, tmp_path: Path, ingot: Ingot, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = ingot("tune", tiny_model, "--log", tmp_path / "logs", "--board", "ssh://pi@10.0.0.7")
    refused(result, "ssh is not installed", "openssh-client")


@pytest.mark.slow
@pytest.mark.qemu
def test_an_emulated_board_counts_into_a_log_of_its_own(
    tiny_model: Path, tmp_path: Path, ingot: Ingot, qemu: Callable[[str], list[str]]
) -> None:
    qemu("aarch64")
    board = ["--target", "raspberry-pi-4", "--board", "qemu:aarch64"]
    logs = tmp_path / "logs"
    for _ in range(2):  # the second run finds what the first counted, and counts the same
        done = ingot("tune", tiny_model, *board, "--log", logs, "--trials", 4)
        assert done.exit_code == 0, done.output
    assert "million instructions" in done.stdout
    assert [path.name for path in logs.iterdir()] == ["raspberry-pi-4+instructions.jsonl"]
    records, counts = read(log_path(logs, "raspberry-pi-4", instructions=True))
    assert counts.skipped == 0
    assert all(r.ok and r.board == "qemu:aarch64" for r in records)
    assert len({(r.task, r.config_key) for r in records}) >= 6
    times: dict[tuple[str, str], set[float | None]] = {}
    for r in records:
        times.setdefault((r.task, r.config_key), set()).add(r.ns)
    assert all(len(found) == 1 for found in times.values()), "counts differ from run to run"
    # They are no times: no compile uses them.
    with_log, without = tmp_path / "with.so", tmp_path / "without.so"
    for so, options in ((with_log, ["--log", logs]), (without, [])):
        assert ingot("compile", tiny_model, "--target", "raspberry-pi-4", *options, "-o", so).exit_code == 0
    assert with_log.read_bytes() == without.read_bytes()
