"""`ingot tune` from the command line: a run, a kill in the middle, another run, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import ingot as package
import loopback_sshd
from autotune.small import small_model
from ingot.autotune.log import log_path, read
from ingot.autotune.lookup import load
from ingot.frontend import import_model
from ingot.target import load_target, native_target
from loopback_sshd import Sshd
from schedules.common import Branches
from strict_skips import in_ci

Ingot = Callable[..., Result]


def tuning(model: Path, logs: Path, trials: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ingot.cli.main", "tune", str(model), "--log", str(logs), "--trials", str(trials)]
    command += options
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    # A shell without job control starts background jobs deaf to Ctrl-C, and children inherit that.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hearing
    )


@pytest.fixture
def fresh_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sshd]]:
    """Two boards behind ssh, which one user's config knows."""
    if loopback_sshd.MISSING:
        (pytest.fail if in_ci() else pytest.skip)(loopback_sshd.MISSING)
    with loopback_sshd.sshd(tmp_path / "one") as one, loopback_sshd.sshd(tmp_path / "two") as two:
        hosts = "".join(
            f"Host {name}\n  HostName 127.0.0.1\n  Port {s.port}\n  User {s.user}\n"
            f"  IdentityFile {s.folder / 'user_key'}\n  UserKnownHostsFile {s.known_hosts}\n"
            for name, s in (("one", one), ("two", two))
        )
        (one.folder / "config").write_text(hosts + "Host *\n  IdentitiesOnly yes\n  IdentityAgent none\n")
        monkeypatch.setenv("PATH", str(one.bin), prepend=":")
        yield [one, two]


@pytest.mark.slow
def test_runs_killed_and_interrupted_in_the_middle_lose_nothing(tiny_model: Path, tmp_path: Path, ingot: Ingot) -> None:
    logs = tmp_path / "logs"
    path = log_path(logs, native_target().log_name)
    first = tuning(tiny_model, logs, 200)
    limit = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size) and time.monotonic() < limit and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before, counts = read(path)
    assert before
    assert counts.skipped == 0
    size = path.stat().st_size
    second = tuning(tiny_model, logs, 200)
    limit = time.monotonic() + 120
    while path.stat().st_size == size and time.monotonic() < limit and second.poll() is None:
        time.sleep(0.05)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=300)
    # Python dies by the signal itself, which a shell calls 130 too, where it interrupts the import of a module.
    assert second.returncode in (130, -signal.SIGINT), err
    assert "known before" in out
    assert "Traceback" not in err
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
        (["--precision", "half"], ["unknown precision", "bf16"]),
        (["--precision", "int8"], ["int8 needs calibration samples"]),
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
    tmp_path: Path, ingot: Ingot, qemu: Callable[[str], list[str]]
) -> None:
    """In half precision, whose kernels get made-up weights by the runner."""
    qemu("aarch64")
    board = ["--target", "graviton-3", "--board", "qemu:aarch64", "--precision", "bf16"]
    logs, model, layers = tmp_path / "logs", tmp_path / "half.onnx", Branches()
    layers.conv(1, 64, 48, (7, 9), (3, 3), (1, 1), (1, 1, 1, 1), epilogue="relu")
    model.write_bytes(layers.bytes())
    done = ingot("tune", model, *board, "--log", logs, "--trials", 3)
    assert done.exit_code == 0, done.output
    assert "million instructions" in done.stdout
    assert [path.name for path in logs.iterdir()] == ["graviton-3+instructions.jsonl"]
    records, counts = read(log_path(logs, "graviton-3", instructions=True))
    assert counts.skipped == 0
    assert all(r.board == "qemu:aarch64" and r.task.startswith("conv2d bf16 ") for r in records)
    assert sum(r.ok for r in records) >= 4
    # They are no times: no compile uses them.
    assert not load(load_target("graviton-3"), logs, shipped=False).sources


@pytest.mark.slow
def test_a_model_that_is_quantised_while_compiling_is_tuned_as_such(
    tiny_model: Path, tmp_path: Path, ingot: Ingot
) -> None:
    logs, how = tmp_path / "logs", ["--precision", "int8", "--calibrate", tmp_path / "samples.npz"]
    shape = import_model(tiny_model).inputs[0].shape
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).standard_normal((8, *shape[1:])).astype(np.float32))
    done = ingot("tune", tiny_model, *how, "--log", logs, "--trials", 2)
    assert done.exit_code == 0, done.output
    records, _ = read(log_path(logs, native_target().log_name))
    assert any("_int8 " in r.task for r in records if r.ok)
    done = ingot("compile", tiny_model, *how, "--log", logs, "-o", tmp_path / "tiny.so", "--no-selftest")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_tuning_goes_on_when_a_board_reboots(tmp_path: Path, fresh_boards: list[Sshd]) -> None:
    """Two boards share the work; one reboots in the middle of a batch, and what is recorded is right."""
    one, two = fresh_boards
    logs = tmp_path / "logs"
    model = tmp_path / "small.onnx"
    model.write_bytes(small_model())
    tuner = tuning(model, logs, 6, "--board", "ssh://one", "--board", "ssh://two")
    one.wait_for_run(120)
    one.reboot()
    out, err = tuner.communicate(timeout=300)
    assert tuner.returncode == 0, err
    assert "6 configs measured" in out
    records, counts = read(log_path(logs, native_target().log_name))
    assert counts.skipped == 0
    assert {r.status for r in records} <= {"ok", "rejected"}
    assert "ssh://two" in {r.board for r in records if r.ok} <= {"ssh://one", "ssh://two"}
    assert one.left_over() == two.left_over() == []
