"""The local board tells how an executable ended, whatever it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.autotune.board import open_board
from ingot.errors import BoardError, OptionError
from ingot.target import load_target

Batch = Callable[..., Path]
FIRST = (
    '{"begin": 0}',
    '{"candidate": 0, "ns": [100], "error": 0, "noise": 0}',
    '{"begin": 1}',
)
LAST = '{"candidate": 1, "ns": [200], "error": 0, "noise": 0}'


@pytest.mark.parametrize(
    ("arguments", "kind", "detail"),
    [
        (["ok"], "ok", ""),
        (["sleep", "1"], "ok", ""),
        (["crash"], "crash", "SIGABRT"),
        (["illegal"], "crash", "SIGILL, an instruction that this CPU does not have"),
        (["status"], "crash", "status 3 (no memory)"),
        (["hang"], "timeout", "stopped after 2 s"),
        (["sleep"], "timeout", "stopped after 2 s"),
        (["spam"], "crash", "stopped: it wrote more than 8 MiB"),
    ],
)
def test_each_end_has_its_kind(batch: Batch, arguments: list[str], kind: str, detail: str) -> None:
    outcome = open_board("local", load_target("native")).run(batch(), arguments, 2)
    assert outcome.kind == kind
    assert detail in outcome.detail
    assert outcome.lines[:3] == FIRST
    assert (outcome.lines[-1] == LAST) == (kind == "ok")


def test_arguments_arrive_as_they_are(batch: Batch) -> None:
    arguments = ["$(reboot)", "a b", "'", "-n", ""]
    outcome = open_board("local", load_target("native")).run(batch(), ["arguments", *arguments], 2)
    assert outcome.lines == (*FIRST, *arguments, LAST)


def test_bytes_that_are_no_text_are_lines_too(batch: Batch) -> None:
    outcome = open_board("local", load_target("native")).run(batch(), ["garbage"], 2)
    assert outcome.kind == "ok"
    assert outcome.lines[3:] == ("\x1b[2J\ufffd\ufffd\0x",)


def test_an_executable_of_another_architecture_is_told(batch: Batch) -> None:
    outcome = open_board("local", load_target("native")).run(batch("armv7-a-neon"), [], 2)
    assert (outcome.kind, outcome.lines) == ("wrong_arch", ())


def test_a_file_that_is_no_executable_is_told(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_text("#!/bin/sh\necho run\n")
    path.chmod(0o755)
    outcome = open_board("local", load_target("native")).run(path, [], 2)
    assert (outcome.kind, outcome.lines) == ("wrong_arch", ())


def test_nothing_is_left_running_after_a_timeout(batch: Batch) -> None:
    path = batch()
    open_board("local", load_target("native")).run(path, ["hang"], 0.3)
    time.sleep(0.05)
    running = [p for p in Path("/proc").glob("[0-9]*/exe") if _links_to(p, path)]
    assert running == []


def _links_to(link: Path, path: Path) -> bool:
    try:
        return link.readlink() == path
    except OSError:
        return False


@pytest.mark.parametrize(("target", "word"), [("raspberry-pi-4", "kind"), ("sapphirerapids", "amx-bf16")])
def test_this_machine_is_refused_for_a_target_it_is_not(target: str, word: str) -> None:
    if not set(load_target("native").features).isdisjoint(["amx-bf16"]) and word == "amx-bf16":
        target, word = "visionfive-2", "kind"
    with pytest.raises(BoardError, match="this machine") as caught:
        open_board("local", load_target(target))
    assert word in str(caught.value)


@pytest.mark.parametrize("text", ["", "Local", "ssh:/x", "http://pi", "local ", "qemu"])
def test_a_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="no board of this form"):
        open_board(text, load_target("native"))
