"""Output files: refused before the long work if they cannot be written, and never half written."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ingot.errors import OutputError


def check_output(path: Path, *, inputs: tuple[Path, ...] = ()) -> None:
    """Raise OutputError if a file cannot be written at `path`, or if that would replace one of `inputs`.

    Leaves nothing behind. What can still fail later is a disk that fills up.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        check_folder(path.parent)
        return
    except OSError as error:  # the name is too long, or a loop of links
        raise OutputError("cannot write the output", where=str(path), found=error.strerror or str(error)) from None
    if stat.S_ISDIR(mode):
        raise OutputError("cannot write the output", where=str(path), found="it is a folder", hint="name a file in it")
    if not stat.S_ISREG(mode):
        # A rename over a device would replace the device itself.
        raise OutputError("the output is not a regular file", where=str(path), hint="name a file")
    for source in inputs:
        with contextlib.suppress(OSError):
            if path.samefile(source):
                raise OutputError("the output would replace the input", where=str(path), hint="choose another name")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise OutputError unless files can be made in this existing folder."""
    try:
        # Asking the system by trying: permissions alone do not tell of read-only mounts, quotas and full disks.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        hints = {errno.ENOENT: "create the folder first", errno.ENOTDIR: "name a folder, not a file"}
        for number in (errno.EACCES, errno.EPERM, errno.EROFS):
            hints[number] = "choose a folder you may write to"
        for number in (errno.ENOSPC, errno.EDQUOT):
            hints[number] = "free some space, or choose another disk"
        found, hint = error.strerror or str(error), hints.get(error.errno or 0)
        raise OutputError("cannot write to the output folder", where=str(folder), found=found, hint=hint) from None


def is_elf(path: Path) -> bool:
    """Whether the file is an ELF file, like a compiled model; False for what cannot be read."""
    with contextlib.suppress(OSError):
        # Not blocking: a FIFO that nobody writes to must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(descriptor, 4) == b"\x7fELF"
        finally:
            os.close(descriptor)
    return False


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """A folder for outputs, made if it is not there and removed again if what follows fails before filling it."""
    made = False
    if not path.is_dir():
        if path.exists():
            raise OutputError("the output folder is a file", where=str(path), hint="choose another name")
        check_folder(path.parent)
        try:
            path.mkdir()
        except OSError as error:
            found = error.strerror or str(error)
            raise OutputError("cannot make the output folder", where=str(path), found=found) from None
        made = True
    try:
        check_folder(path)
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
