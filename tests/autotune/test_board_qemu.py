"""The emulated board counts instructions, exactly and the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ingot.autotune.board import open_board
from ingot.errors import BoardError, OptionError
from ingot.target import load_target

Batch = Callable[..., Path]
BOARDS = [("aarch64", "raspberry-pi-4"), ("arm", "beaglebone-black"), ("riscv64", "visionfive-2")]


@pytest.mark.qemu
@pytest.mark.parametrize(("arch", "target"), BOARDS)
def test_a_loop_is_counted(batch: Batch, qemu: Callable[[str], list[str]], arch: str, target: str) -> None:
    qemu(arch)  # skips where it is not installed
    board = open_board(f"qemu:{arch}", load_target(target))
    assert board.unit == "instructions"
    counts = []
    for _ in range(2):
        outcome = board.run(batch(target), ["count"], 10)
        assert (outcome.kind, outcome.detail) == ("ok", "")
        counts.append([int(line) for line in outcome.lines[3:5]])
    assert counts[0] == counts[1]
    short, long = counts[0]
    # A round of the loop is a load, a decrement, a store, a test and a jump, or a little more.
    assert 4 <= (long - short) / 10_000 <= 10
    assert (long - short) % 10_000 < 100
    assert short < 20_000


@pytest.mark.qemu
@pytest.mark.parametrize(("arguments", "kind", "detail"), [(["crash"], "crash", "SIGABRT"), (["hang"], "timeout", "")])
def test_faults_under_the_emulator(
    batch: Batch, qemu: Callable[[str], list[str]], arguments: list[str], kind: str, detail: str
) -> None:
    qemu("aarch64")
    outcome = open_board("qemu:aarch64", load_target("raspberry-pi-4")).run(batch("raspberry-pi-4"), arguments, 0.05)
    assert outcome.kind == kind
    assert detail in outcome.detail
    assert len(outcome.lines) == 3


def test_a_plugin_that_the_emulator_refuses_is_tried_as_the_next_version(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulator of the future, which takes version 3 and up: a script in its place."""
    emulator = tmp_path / "qemu-aarch64"
    emulator.write_text(
        '#!/bin/sh\ncase $2 in *counter[12].so) echo "plugin: API version too old" >&2; exit 1;; esac\necho "$2"\n'
    )
    emulator.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("ingot.autotune.board_qemu.emulator_for", lambda target: target.qemu)
    monkeypatch.setattr("ingot.autotune.board_qemu.build_plugin", lambda *_: b"")
    outcome = open_board("qemu:aarch64", load_target("raspberry-pi-4")).run(batch("raspberry-pi-4"), [], 1)
    assert outcome.kind == "ok"
    assert outcome.lines[0].endswith("counter3.so")


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [("qemu:", OptionError, "architecture"), ("qemu:z80", OptionError, "aarch64"), ("qemu:arm", BoardError, "kind")],
)
def test_an_emulator_of_another_architecture_is_refused(text: str, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        open_board(text, load_target("raspberry-pi-4"))
