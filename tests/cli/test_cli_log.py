"""`ingot log`: lists, merges, prunes, verifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from ingot.autotune.log import Record, append, encode, log_path, read
from ingot.target import native_target

Ingot = Callable[..., Result]
ONE = Record("raspberry-pi-4", "conv2d(1,56,56,64)", 1, {"m": 4, "n": 8}, "ok", 1_234_500.0, 0.02, "ssh://pi")
FASTER = replace(ONE, config={"m": 6, "n": 8}, ns=1_000_000.0)
FAILED = replace(ONE, config={"m": 9, "n": 9}, status="timeout", ns=None)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    append(tmp_path / "logs" / "raspberry-pi-4.jsonl", [ONE, FASTER, FAILED])
    append(tmp_path / "logs" / "raspberry-pi-4+instructions.jsonl", [replace(ONE, board="qemu:aarch64", ns=5e6)])
    return tmp_path / "logs"


def test_list_shows_the_files(ingot: Ingot, logs: Path) -> None:
    (logs / "raspberry-pi-4.jsonl").open("ab").write(b"hello\n")
    result = ingot("log", "list", "--log", logs)
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if line.startswith("raspberry-pi-4 "))
    assert line.split() == ["raspberry-pi-4", "yours", "1", "3", "1", "1"]
    assert "2 yours" in result.stdout


def test_list_shows_the_best_of_a_target(ingot: Ingot, logs: Path) -> None:
    result = ingot("log", "list", "raspberry-pi-4", "--log", logs)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("conv2d")]
    assert [line.split()[2:5] for line in lines] == [["3", "1.000", "ms"], ["1", "5", "million"]]
    assert "m=6 n=8" in lines[0]


def test_native_is_the_log_of_machines_like_this_one(ingot: Ingot, tmp_path: Path) -> None:
    here, logs = native_target(), tmp_path / "logs"
    elsewhere = here.model_copy(update={"features": here.features[1:]})
    assert here.log_name == native_target().log_name != elsewhere.log_name
    append(log_path(logs, here.log_name), [replace(ONE, target=here.log_name)])
    append(log_path(logs, elsewhere.log_name), [replace(FASTER, target=elsewhere.log_name)])
    found = ingot("log", "list", "native", "--log", logs)
    lines = [line for line in found.stdout.splitlines() if line.startswith("conv2d")]
    assert [line.split()[3:5] for line in lines] == [["1.234", "ms"]]


def test_list_of_what_was_never_measured(ingot: Ingot, logs: Path) -> None:
    result = ingot("log", "list", "znver5", "--log", logs)
    assert (result.exit_code, result.stdout) == (0, "nothing was measured for znver5\n")


@pytest.mark.parametrize("name", ["../raspberry-pi-4", "/etc/passwd", "a/b"])
def test_a_target_is_no_path(ingot: Ingot, logs: Path, refused: Callable[..., None], name: str) -> None:
    refused(ingot("log", "list", name, "--log", logs), "no target's name")
    refused(ingot("log", "prune", name, "--log", logs), "no target's name")


def test_merge_sorts_records_to_their_targets_once(ingot: Ingot, logs: Path, tmp_path: Path) -> None:
    other = tmp_path / "from-a-colleague.jsonl"
    board = replace(ONE, target="raspberry-pi-5", ns=1.0)
    other.write_bytes(encode(ONE) + encode(board) + b"garbage\n" + encode(replace(ONE, ns=7.0)))
    for added in (2, 0):
        result = ingot("log", "merge", other, "--log", logs)
        assert result.exit_code == 0
        assert f"{added} of 3 records added" in result.stdout
        assert "skipped: 1 foreign" in result.stderr
    assert read(logs / "raspberry-pi-5.jsonl")[0] == [board]
    assert read(logs / "raspberry-pi-4.jsonl")[0] == [ONE, FASTER, FAILED, replace(ONE, ns=7.0)]


def test_prune_keeps_the_best(ingot: Ingot, logs: Path) -> None:
    result = ingot("log", "prune", "raspberry-pi-4", "--log", logs, "--keep", 1)
    assert result.exit_code == 0
    assert "2 of 3 records kept" in result.stdout
    assert read(logs / "raspberry-pi-4.jsonl")[0] == [FASTER, FAILED]


def test_verify_tells_what_is_no_record(ingot: Ingot, logs: Path) -> None:
    assert ingot("log", "verify", "--log", logs).exit_code == 0
    path = logs / "raspberry-pi-4.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"m":6', b'"m":7'))
    for arguments in (["--log", logs], [path]):
        result = ingot("log", "verify", *arguments)
        assert result.exit_code == 1
        assert "2 records; skipped: 1 damaged" in result.stdout


def test_verify_finds_a_record_in_the_log_of_another_target(ingot: Ingot, logs: Path) -> None:
    append(logs / "znver5.jsonl", [ONE])
    result = ingot("log", "verify", "--log", logs)
    assert result.exit_code == 1
    assert "1 of another target" in result.stdout


def test_the_shipped_logs_are_whole(ingot: Ingot) -> None:
    result = ingot("log", "verify")
    assert result.exit_code == 0, result.output
    assert ingot("log", "list").exit_code == 0


def test_what_is_not_there_is_told(ingot: Ingot, logs: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(ingot("log", "list", "--log", tmp_path / "none"), "not a folder")
    refused(ingot("log", "merge", tmp_path / "none.jsonl", "--log", logs), "no such tuning log")
    refused(ingot("log", "prune", "znver5", "--log", logs), "no such tuning log")
    refused(ingot("log", "verify", tmp_path), "cannot open the tuning log")


def test_hostile_text_does_not_reach_the_terminal(ingot: Ingot, tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J.jsonl").write_bytes(b"\x1b[2J\n")
    for verb in ("list", "verify"):
        result = ingot("log", verb, "--log", tmp_path)
        assert "\x1b" not in result.output
