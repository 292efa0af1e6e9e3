"""The frame around the verbs: loading, exit codes, and what a user sees when something goes wrong."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from onnx import helper

from cli.models import save, value
from ingot.cli.main import VERBS
from ingot.errors import CompilerError, RunError

Ingot = Callable[..., Result]


def process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    package = Path(importlib.import_module("ingot").__file__ or "").parents[1]
    command = [sys.executable, "-m", "ingot.cli.main", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control starts background jobs deaf to Ctrl-C, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )


def test_help_lists_every_verb(ingot: Ingot) -> None:
    result = ingot("--help")
    assert result.exit_code == 0
    for verb, text in VERBS.items():
        assert f"  {verb}" in result.stdout
        assert text in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_the_table_of_verbs_tells_what_the_verbs_tell(ingot: Ingot, verb: str) -> None:
    command = importlib.import_module(f"ingot.cli.{verb}").command
    assert command.name == verb
    assert command.short_help == VERBS[verb]
    result = ingot(verb, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith("    "))


def test_an_unknown_verb_is_refused_with_the_nearest(ingot: Ingot, refused: Callable[..., None]) -> None:
    refused(ingot("compil"), "did you mean compile?")
    refused(ingot("frobnicate"), "the verbs are: compile, run")


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [(["--help"], ["tvm", "rich", "onnx", "pydantic"]), (["run"], ["tvm", "onnx", "pydantic", "PIL"])],
)
def test_verbs_import_only_what_they_need(
    arguments: list[str], absent: list[str], tiny_so: Path, x: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", x)
    if arguments == ["run"]:
        arguments = ["run", str(tiny_so), "--input", str(tmp_path / "x.npy")]
    code = (
        "import sys\nfrom ingot.cli.main import cli\n"
        f"try: cli({arguments!r})\n"
        f"except SystemExit as e: print(e.code, [m for m in {absent!r} if m in sys.modules], file=sys.stderr)"
    )
    package = Path(importlib.import_module("ingot").__file__ or "").parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True
    )
    assert done.stderr.strip() == "0 []"


# ------------------------------------------------------------------------------------------- what can go wrong


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(**_arguments: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("ingot.cli.targets").command, "callback", fail)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ZeroDivisionError("a\nb"), 70, "this is a bug in ingot: ZeroDivisionError: a b"),
        (CompilerError("an invariant broke"), 70, "this is a bug in ingot"),
        (RunError("the model failed"), 1, "error: the model failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "the disk is full"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_failure_is_one_message_and_an_exit_code(
    ingot: Ingot, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    failing(monkeypatch, error)
    result = ingot("targets")
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["--debug", "targets"], ["targets", "--debug"]])
def test_debug_shows_the_traceback(ingot: Ingot, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    failing(monkeypatch, ZeroDivisionError("x"))
    result = ingot(*arguments)
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "Traceback" not in ingot("targets").stderr, "--debug must not outlive its command"


def test_the_environment_asks_for_tracebacks_too(ingot: Ingot, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("x"))
    monkeypatch.setenv("INGOT_DEBUG", "1")
    assert "Traceback" in ingot("targets").stderr
    monkeypatch.setenv("INGOT_DEBUG", "0")
    assert "Traceback" not in ingot("targets").stderr


def test_a_full_disk_behind_standard_output_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        running = process("targets", stdout=full)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 2
    assert stderr.startswith("error: the disk is full")
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        running = process("targets", stdout=pipe)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 141
    assert stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_command_leaves_no_processes(tiny_so: Path, number: signal.Signals, code: int) -> None:
    running = process("bench", tiny_so, "--seconds", "60")
    try:
        assert running.stdout is not None
        assert "tiny" in running.stdout.readline()  # from here on it measures
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        workers: list[str] = []
        while not workers and running.poll() is None:
            workers = children.read_text().split()
        assert workers
        running.send_signal(number)
        _, stderr = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == code
    assert "Traceback" not in stderr
    # A worker that was just being started sees that its parent is gone, and follows.
    end = time.monotonic() + 20
    while any(Path("/proc", pid).exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in workers if Path("/proc", pid).exists()]


def test_output_that_the_terminal_cannot_show_is_escaped(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copy(tiny_model, tmp_path / "\N{SNOWMAN}.onnx")
    package = Path(importlib.import_module("ingot").__file__ or "").parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "ingot.cli.main", "inspect", model],
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u2603.onnx" in done.stdout


def test_control_characters_of_a_model_do_not_reach_the_terminal(ingot: Ingot, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x\x1b[31m"], ["y\n"])]
    model = save(tmp_path / "m.onnx", nodes, [value("x\x1b[31m", [2])], [value("y\n", [2])], {})
    for verb in ("inspect", "check"):
        result = ingot(verb, model)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output
        assert "x\\x1b[31m" in result.output
