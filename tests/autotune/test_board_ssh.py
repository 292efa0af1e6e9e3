"""A board behind ssh, on a real OpenSSH server: every fault is told as what it is, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from autotune.test_board_local import FIRST, LAST
from board_faults import FAULTS, Bench, board_of, provoke
from ingot.autotune.board import open_board
from ingot.errors import BoardError, OptionError, ToolchainError
from ingot.target import load_target
from loopback_sshd import Sshd

NATIVE = load_target("native")
Batch = Callable[..., Path]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_kind_and_leaves_nothing(openssh: None, fault: str, bench: Bench) -> None:
    """One round of scripts/board_faults.py, which makes 20 of each."""
    assert provoke(fault, 1, bench) == []


def test_a_board_runs_what_it_is_sent(board: Sshd, batch: Batch) -> None:
    arguments = ["$(touch pwned)", "a b", "'\"", "-n", "", "`id`", "%h", "line\nline"]
    outcome = board_of(board).run(batch(), ["arguments", *arguments], 5)
    assert (outcome.kind, outcome.detail) == ("ok", "")
    assert outcome.lines == (*FIRST, *arguments[:-1], "line", "line", LAST)
    assert board.left_over() == []


def test_the_users_config_is_respected(board: Sshd, batch: Batch) -> None:
    known = open_board("ssh://board", NATIVE)
    assert known.name == "ssh://board"
    assert f"{os.cpu_count()} cores" in known.probe()
    assert known.run(batch(), [], 5).kind == "ok"


@pytest.mark.parametrize(("arguments", "detail"), [(["illegal"], "SIGILL"), (["status"], "status 3 (no memory)")])
def test_a_crash_is_told_as_here(board: Sshd, batch: Batch, arguments: list[str], detail: str) -> None:
    outcome = board_of(board).run(batch(), arguments, 5)
    assert outcome.kind == "crash"
    assert detail in outcome.detail
    assert outcome.lines == FIRST


def test_endless_output_is_cut_off(board: Sshd, batch: Batch) -> None:
    outcome = board_of(board).run(batch(), ["spam"], 30)
    assert (outcome.kind, outcome.detail) == ("crash", "stopped: it wrote more than 8 MiB")
    assert board.left_over() == []


def test_a_large_executable_arrives_whole(board: Sshd, batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(batch().read_bytes() + os.urandom(9_000_001))
    outcome = board_of(board).run(path, [], 5)
    assert (outcome.kind, outcome.lines[-1]) == ("ok", LAST)


# ------------------------------------------------------------------------------------------------------ ends of ours


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_tuner_ends_the_run(board: Sshd, batch: Batch, end: signal.Signals) -> None:
    """Ctrl-C, and kill -9 which no program can answer: the board cleans up by itself."""
    code = f"""
        import sys
        from pathlib import Path
        from ingot.autotune.board import open_board
        from ingot.target import load_target
        open_board({board.url!r}, load_target("native")).run(Path(sys.argv[1]), ["hang"], 60)
    """
    tuner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(batch())],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A run in the background of a script ignores Ctrl-C, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    board.wait_for_run()
    start = time.monotonic()
    os.kill(tuner.pid, end)
    tuner.wait()
    assert time.monotonic() - start < 45
    assert board.left_over() == []


# ------------------------------------------------------------------------------------------------------ probing


def test_a_board_of_another_architecture_is_told_before_any_work(board: Sshd) -> None:
    other = "raspberry-pi-4" if NATIVE.arch != "aarch64" else "visionfive-2"
    with pytest.raises(BoardError, match="not of the target's kind") as caught:
        board_of(board, other).probe()
    assert NATIVE.arch in str(caught.value)


def test_a_board_without_the_targets_features_is_told_before_any_work(board: Sshd) -> None:
    """No machine has all of these."""
    target = next(
        t for t in map(load_target, ("znver5", "sapphirerapids", "graviton-4", "jetson-orin-nano")) if _beyond(t)
    )
    with pytest.raises(BoardError, match="CPU lacks features"):
        open_board(board.url, target).probe()


def _beyond(target: object) -> bool:
    return target.arch == NATIVE.arch and not set(target.features) <= set(NATIVE.features)  # type: ignore[attr-defined]


def test_an_unknown_host_is_refused_with_what_to_do(board: Sshd) -> None:
    known = board.known_hosts.read_text()
    board.known_hosts.write_text("")
    try:
        with pytest.raises(BoardError, match="refuses the connection") as caught:
            board_of(board).probe()
    finally:
        board.known_hosts.write_text(known)
    assert "Host key verification failed" in str(caught.value)
    assert f"ssh -l {board.user} -p {board.port} 127.0.0.1" in str(caught.value)


def test_a_board_that_does_not_answer_is_told(board: Sshd) -> None:
    with pytest.raises(BoardError, match="refuses the connection") as caught:
        open_board("ssh://127.0.0.1:1", NATIVE).probe()
    assert "refused" in str(caught.value)


def test_without_ssh_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="ssh is not installed"):
        open_board("ssh://pi@10.0.0.7", NATIVE)


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "text",
    [
        "ssh://-oProxyCommand=reboot",
        "ssh://pi@-oProxyCommand=reboot",
        "ssh://-lroot@pi",
        "ssh://",
        "ssh://@pi",
        "ssh://pi@",
        "ssh://pi;reboot",
        "ssh://$(reboot)",
        "ssh://pi`id`",
        "ssh://pi pi",
        "ssh://pi\n",
        "ssh://pi:22:22",
        "ssh://pi:-22",
        "ssh://pi:ssh",
        "ssh://pi:0",
        "ssh://pi:65536",
        "ssh://%h",
        "ssh://pi/path",
        "ssh://[pi]",
        "ssh://user:password@pi",
        "ssh://" + "a" * 300,
        "ssh://pï",
    ],
)
def test_names_that_ssh_or_a_shell_could_misread_are_refused(openssh: None, text: str) -> None:
    with pytest.raises(OptionError):
        open_board(text, NATIVE)


@pytest.mark.parametrize(
    "text", ["ssh://pi", "ssh://pi@10.0.0.7", "ssh://a.b-c_d:2222", "ssh://pi@[fe80::1]:22", "ssh://[::1]"]
)
def test_names_of_boards(openssh: None, text: str) -> None:
    assert open_board(text, NATIVE).name == text
