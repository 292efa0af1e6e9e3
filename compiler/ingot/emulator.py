"""Running an artifact of another architecture here: qemu-user, and a small C program that calls the model.

The emulated CPU has the target's features and as few others as qemu offers, so an instruction the board does not have
ends the run instead of passing unnoticed.
"""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingot.architectures import BASELINES, OLDEST_GLIBC
from ingot.errors import InputError, RunError, ToolchainError
from ingot.packager.link import build_program
from ingot.runtime.loader import read_metadata

if TYPE_CHECKING:
    import os

    from ingot.architectures import Architecture
    from ingot.target import Qemu, Target

    Array = np.ndarray[Any, Any]

_PACKAGES = {"aarch64": "libc6-arm64-cross", "arm": "libc6-armhf-cross", "riscv64": "libc6-riscv64-cross"}
_SUFFIX = {"arm": "eabihf"}


def emulator_for(target: Target) -> Qemu:
    """The qemu command that stands in for a target.

    Raises ToolchainError where qemu has no such CPU, or the emulator or its C library is not installed.
    """
    where = f"target {target.name}"
    if target.libc != "gnu":
        raise ToolchainError("no emulator: its C library is not glibc", where=where, found=target.libc, allowed="gnu")
    qemu = target.qemu
    if qemu is None:
        features = " ".join(target.features)
        raise ToolchainError("no emulator has all features of this CPU", where=where, found=features)
    if shutil.which(qemu.binary) is None:
        hint = "install it, on Debian and Ubuntu: apt install qemu-user"
        raise ToolchainError("the emulator is not installed", where=where, found=f"no {qemu.binary}", hint=hint)
    if not Path(qemu.sysroot).is_dir():
        package = _PACKAGES.get(target.arch, "its C library")
        hint = f"install it, on Debian and Ubuntu: apt install {package}"
        found = f"no {qemu.sysroot}"
        raise ToolchainError("the emulator's C library is not installed", where=where, found=found, hint=hint)
    return qemu


@functools.cache
def _program(arch: Architecture) -> bytes:
    """The C program, for the oldest CPU and glibc of the architecture: one for all of its targets."""
    major, minor = OLDEST_GLIBC[arch]
    triple = f"{arch}-linux-gnu{_SUFFIX.get(arch, '')}.{major}.{minor}"
    return build_program("run_main.c", triple, BASELINES[arch])


def run_under_qemu(
    so_path: str | os.PathLike[str],
    feeds: Sequence[Array],
    target: Target,
    *,
    threads: int = 1,
    timeout_s: float = 900,
) -> list[Array]:
    """Run an artifact once on an emulated CPU of `target`: the outputs of `stream_under_qemu` for a single run."""
    return stream_under_qemu(so_path, [feeds], target, threads=threads, timeout_s=timeout_s)[0]


def stream_under_qemu(
    so_path: str | os.PathLike[str],
    runs: Sequence[Sequence[Array]],
    target: Target,
    *,
    threads: int = 1,
    timeout_s: float = 900,
) -> list[list[Array]]:
    """Run one instance of an artifact several times in a row on an emulated CPU of `target`.

    runs: for each run one array per input, in the model's order, of its dtype and shape (bfloat16 as uint16 bits).
    threads: 0 to 64, as in `ingot.load`, 0 for as many as the CPU affinity allows.
    Returns for each run the outputs in the model's order, each of its dtype and shape.
    Raises LoadError for a file that is no artifact, InputError for feeds that do not fit, ToolchainError where the
    emulator is missing, RunError where the model or the emulated CPU fails.
    """
    metadata = read_metadata(so_path)
    qemu = emulator_for(target)
    where = f"model {metadata['name']} under {qemu.binary} -cpu {qemu.cpu}"
    steps = [[_fit(spec, array) for spec, array in _pairs(metadata["inputs"], feeds)] for feeds in runs]
    with tempfile.TemporaryDirectory(prefix="ingot-") as name:
        folder = Path(name)
        program = folder / "run_main"
        program.write_bytes(_program(target.arch))
        program.chmod(0o755)
        for i in range(len(metadata["inputs"])):
            (folder / f"in{i}").write_bytes(b"".join(arrays[i].tobytes() for arrays in steps))
        symbol = f"ingot_{metadata['name']}_api"
        command = [
            *qemu.command(),
            str(program),
            str(Path(so_path).absolute()),
            symbol,
            str(threads),
            name,
            str(len(steps)),
        ]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RunError("the emulated model took too long", where=where, allowed=f"{timeout_s:g} s") from None
        except OSError as error:
            raise ToolchainError("the emulator cannot be started", where=qemu.binary, found=str(error)) from None
        if done.returncode != 0:
            raise RunError("the emulated model failed", where=where, found=_reason(done))
        found = [_read(folder / f"out{i}", spec, len(steps)) for i, spec in enumerate(metadata["outputs"])]
        shapes = np.fromfile(folder / "shapes", dtype=np.int64).reshape(len(steps), len(found), -1)
        return [
            [array[run][tuple(map(slice, shapes[run, i, : array.ndim - 1]))] for i, array in enumerate(found)]
            for run in range(len(steps))
        ]


def _pairs(specs: Sequence[dict[str, Any]], feeds: Sequence[Array]) -> list[tuple[dict[str, Any], Array]]:
    if len(specs) != len(feeds):
        raise InputError("wrong number of inputs", found=str(len(feeds)), allowed=str(len(specs)))
    return list(zip(specs, feeds, strict=True))


def _dtype(spec: dict[str, Any]) -> np.dtype[Any]:
    return np.dtype("uint16" if spec["dtype"] == "bfloat16" else spec["dtype"])


def _fit(spec: dict[str, Any], array: Array) -> Array:
    if array.dtype != _dtype(spec) or list(array.shape) != spec["shape"]:
        raise InputError(
            f"input {spec['name']!r} does not fit the model",
            found=f"{array.dtype} {list(array.shape)}",
            allowed=f"{_dtype(spec)} {spec['shape']}",
        )
    return array


def _read(path: Path, spec: dict[str, Any], runs: int) -> Array:
    """The outputs of all runs, stacked."""
    array: Array = np.fromfile(path, dtype=_dtype(spec)).reshape([runs, *spec["shape"]])
    return array


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why the emulated program ended: its own sentence, or the signal."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    text = lines[-1][:300] if lines else ""
    # qemu-user ends by the signal of its program, or tells it as a shell does.
    number = -done.returncode if done.returncode < 0 else done.returncode - 128
    if number in (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL):
        hint = ", an instruction that this CPU does not have" if number == signal.SIGILL else ""
        return f"{signal.Signals(number).name}{hint}{f' ({text})' if text else ''}"
    return text or f"status {done.returncode}"
