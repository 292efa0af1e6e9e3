"""Tuning logs: what was measured, one record a line, in a file per target that any number of writers may share.

A line is the CRC-32 of the rest as eight hexadecimal digits, a space, and a JSON object with sorted keys. Whoever
appends holds the file's lock, writes a batch at once and waits until the disk has it: a record is *acknowledged* when
`append` returns, and from then on neither a kill nor a crash of the machine loses it. A line that a kill left half
written is closed by the next writer and skipped by every reader, as is any line that is not ours. So two logs are
merged by putting one behind the other, in either order.

A record says which workload, with which config, on which target took how long. Nothing in it depends on the version
of the compiler or on the time of day.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import stat
import statistics
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from ingot.errors import LogError, OptionError, OutputError

SCHEMA: Final = 1
#: A longer line is none of ours. It is skipped without being held in memory.
MAX_LINE_BYTES = 16 << 10
#: What is read of one file at most: some hundred thousand records.
MAX_FILE_BYTES = 256 << 20
_CHUNK = 1 << 16

_TARGET = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_WORD = re.compile(r"[a-z][a-z_]{0,31}")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")
_TEXT = re.compile(r"[\x20-\x7e]*")
_MAX_TASK, _MAX_CONFIG, _MAX_VALUE, _MAX_BOARD = 4000, 64, 200, 300
_MAX_INT = 1 << 53
_MAX_NS = 1e15
#: Boards whose numbers are executed instructions, not time: their records have files of their own.
_COUNTING = "qemu:"
_COUNTS_SUFFIX = "+instructions"  # no target's name can hold a plus


@dataclass(frozen=True)
class Record:
    """One measured candidate.

    target: the target's name. task: the canonical key of the workload. threads: how many it ran on.
    config: what the template was given. status: "ok" or a kind of failure (a word of a-z and _).
    ns: median nanoseconds of one run, where status is "ok" (instructions, where `board` starts with "qemu:").
    noise: relative spread of the repeats, 0 for none. board: where it ran, as `Board.name`.
    """

    target: str
    task: str
    threads: int
    config: Mapping[str, int | str]
    status: str
    ns: float | None
    noise: float = 0.0
    board: str = "local"
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        """Whether it ran and its answer was right."""
        return self.status == "ok"

    @property
    def config_key(self) -> str:
        """The config as text: equal for equal configs."""
        return json.dumps(dict(self.config), sort_keys=True, separators=(",", ":"))


@dataclass
class Counts:
    """How many lines of a file were what.

    records: read. blank: nothing but spaces. damaged: the CRC is not that of the line (torn by a kill, a bad disk).
    foreign: whole, but no record of this schema, or one that holds a value no record may hold, or instructions among
    times. oversized: longer than MAX_LINE_BYTES. unread_bytes: behind MAX_FILE_BYTES.
    """

    records: int = 0
    blank: int = 0
    damaged: int = 0
    foreign: int = 0
    oversized: int = 0
    unread_bytes: int = 0

    @property
    def skipped(self) -> int:
        """Lines that were skipped, blank ones aside."""
        return self.damaged + self.foreign + self.oversized

    def __add__(self, other: Counts) -> Counts:
        """The counts of two files together."""
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


# --------------------------------------------------------------------------------------------------------- one line


def encode(record: Record) -> bytes:
    """The record's line. Raises LogError for a record that no reader would take."""
    reason = _complaint(asdict(record))
    if reason:
        raise LogError("this is no record", where="tuning log", found=reason)
    body = json.dumps(asdict(record), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    line = b"%08x %s\n" % (zlib.crc32(body), body)
    if len(line) > MAX_LINE_BYTES:
        raise LogError("this record is too long", where="tuning log", found=f"{len(line)} bytes")
    return line


def decode(line: bytes) -> Record | str:
    """The record of a line (without its end), or why there is none: "blank", "damaged", "foreign" or "oversized"."""
    if len(line) >= MAX_LINE_BYTES:
        return "oversized"
    if not line.strip():
        return "blank"
    head, space, body = line[:8], line[8:9], line[9:]
    if space != b" " or not re.fullmatch(rb"[0-9a-f]{8}", head):
        return "foreign"
    if int(head, 16) != zlib.crc32(body):
        return "damaged"
    try:
        content = json.loads(body.decode("ascii"))
    except (ValueError, RecursionError):
        return "foreign"
    return "foreign" if _complaint(content) else Record(**content)


_NAMES = frozenset(f.name for f in fields(Record))


def _complaint(content: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    """What is wrong with the fields of a record; "" if nothing is."""
    if not isinstance(content, dict) or content.keys() != _NAMES:
        return "other fields"
    if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
        return "another schema"
    checks = (
        ("target", _is_text(content["target"], 64) and _TARGET.fullmatch(content["target"])),
        ("task", _is_text(content["task"], _MAX_TASK) and content["task"]),
        ("threads", _is_int(content["threads"]) and 1 <= content["threads"] <= 1024),
        ("config", _is_config(content["config"])),
        ("status", isinstance(content["status"], str) and _WORD.fullmatch(content["status"])),
        ("ns", _is_time(content["ns"]) if content["status"] == "ok" else content["ns"] is None),
        ("noise", _is_number(content["noise"]) and 0 <= content["noise"] <= _MAX_NS),
        ("board", _is_text(content["board"], _MAX_BOARD) and content["board"]),
    )
    return next((f"{name}: {content[name]!r}"[:200] for name, fits in checks if not fits), "")


def _is_text(value: object, limit: int) -> bool:
    return isinstance(value, str) and len(value) <= limit and _TEXT.fullmatch(value) is not None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_MAX_INT <= value <= _MAX_INT


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_time(value: Any) -> bool:  # noqa: ANN401 - whatever JSON holds
    return _is_number(value) and 0 < value <= _MAX_NS


def _is_config(value: object) -> bool:
    if not isinstance(value, Mapping) or len(value) > _MAX_CONFIG:
        return False
    return all(
        isinstance(key, str) and _KEY.fullmatch(key) and (_is_int(item) or _is_text(item, _MAX_VALUE))
        for key, item in value.items()
    )


# --------------------------------------------------------------------------------------------------------- the files


def log_path(folder: Path, target: str, *, instructions: bool = False) -> Path:
    """The file of a target in a folder of logs; for counted instructions another one than for times.

    Raises OptionError for a name that no target can have, so that the path cannot leave the folder.
    """
    if not _TARGET.fullmatch(target):
        allowed = "a-z, 0-9, '.' and '-', starting with a letter or digit, at most 64"
        raise OptionError("this is no target's name", where="tuning log", found=repr(target[:80]), allowed=allowed)
    return folder / f"{target}{_COUNTS_SUFFIX if instructions else ''}.jsonl"


def shipped_folder() -> Path:
    """The folder of the logs that come with ingot."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "tuning_logs"
    # A wheel carries the folder inside the package; a working copy has it at the top.
    return shipped if shipped.is_dir() else package.parents[1] / "tuning_logs"


def _counts_instructions(path: Path) -> bool:
    return path.stem.endswith(_COUNTS_SUFFIX)


def _open(path: Path, flags: int, mode: int = 0) -> int:
    """Open a regular file; neither a link, which could lead anywhere, nor a pipe, which would never end."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        link = getattr(error, "errno", None) == errno.ELOOP
        found = "a link" if link else getattr(error, "strerror", None) or str(error)
        raise LogError("cannot open the tuning log", where=str(path), found=found, allowed="a file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LogError("cannot open the tuning log", str(path), "a folder or device", allowed="a file")
    return descriptor


def _lines(file: Any, counts: Counts) -> Iterator[bytes]:  # noqa: ANN401 - a raw binary file
    """The lines of a file without their ends, in memory one at a time; those too long are counted instead."""
    rest, skipping, total = b"", False, 0
    while total < MAX_FILE_BYTES and (chunk := file.read(min(_CHUNK, MAX_FILE_BYTES - total))):
        total += len(chunk)
        *lines, last = chunk.split(b"\n")
        for line in lines:
            if skipping:
                skipping = False
            else:
                yield rest + line
            rest = b""
        if skipping:
            continue
        rest += last
        if len(rest) > MAX_LINE_BYTES:
            counts.oversized += 1
            rest, skipping = b"", True
    if rest:
        yield rest
    counts.unread_bytes = max(0, os.fstat(file.fileno()).st_size - total)


def read(path: Path) -> tuple[list[Record], Counts]:
    """The records of a file in its order, and what its lines were. A file that does not exist has none.

    Raises LogError only where the path is no readable file; no content of a file is an error.
    """
    counts = Counts()
    records: list[Record] = []
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return records, counts
    counting = _counts_instructions(path)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        for line in _lines(file, counts):
            found = decode(line)
            if isinstance(found, Record) and found.board.startswith(_COUNTING) != counting:
                found = "foreign"
            if isinstance(found, Record):
                records.append(found)
            else:
                setattr(counts, found, getattr(counts, found) + 1)
    counts.records = len(records)
    return records, counts


def append(path: Path, records: Sequence[Record]) -> None:
    """Add records at the end of a file, all of them or none. When this returns, they are on the disk.

    The file and its folder are made where they do not exist. Raises LogError for a record that is none or that does
    not belong into this file (instructions among times), OutputError where the disk does not take it.
    """
    for record in records:
        if record.board.startswith(_COUNTING) != _counts_instructions(path):
            kind = "times" if record.board.startswith(_COUNTING) else "instructions"
            raise LogError(f"this record does not belong into a log of {kind}", where=str(path), found=record.board)
    data = b"".join(map(encode, records))
    if not data:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
        try:
            _write(descriptor, data)
        finally:
            os.close(descriptor)  # gives the lock back too
        _sync_folder(path.parent)
    except OSError as error:
        raise _output_error(path, error) from None


def _output_error(path: Path, error: OSError) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some space, or name another folder: --log DIR" if full else None
    return OutputError("cannot write the tuning log", str(path), error.strerror or str(error), hint=hint)


def _open_locked(path: Path) -> int:
    """A descriptor with the file's lock, of the file that lies at `path` while the lock is held."""
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            ours, there = os.fstat(descriptor), path.stat(follow_symlinks=False)
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # `prune` put another file there while we waited


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it behind what is there, or leave the file as it was. The caller holds the lock."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data  # a writer was killed in the middle of a line
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, size)
        raise


def _sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries: without, a new file is on the disk and its name is not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------- what to make of it


def best(records: Iterable[Record]) -> dict[tuple[str, int], Record]:
    """The best record of each (task, threads), for records of one target and one unit.

    A config measured more than once counts with the median of its times, so that one lucky moment does not make it
    the best; one that ever failed does not count at all. The order of the records is irrelevant.
    """
    groups: dict[tuple[str, int], dict[str, _Config]] = {}
    for record in records:
        configs = groups.setdefault((record.task, record.threads), {})
        configs.setdefault(record.config_key, _Config()).add(record)
    winners: dict[tuple[str, int], Record] = {}
    for key, configs in groups.items():
        able = [(config.median, text, config) for text, config in configs.items() if config.usable]
        if able:
            winners[key] = min(able, key=lambda c: c[:2])[2].typical
    return winners


@dataclass
class _Config:
    """All records of one config."""

    measured: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        (self.measured if record.ok else self.failed).append(record)

    @property
    def usable(self) -> bool:
        return bool(self.measured) and not self.failed

    @property
    def median(self) -> float:
        return statistics.median_low(r.ns or 0.0 for r in self.measured)

    @property
    def typical(self) -> Record:
        """A record with the median time; among several, always the same one."""
        median = self.median
        return min((r for r in self.measured if r.ns == median), key=encode)


def prune(records: Iterable[Record], keep: int) -> list[Record]:
    """The records worth keeping: of each task, one of each of the `keep` fastest configs, and one of each that failed.

    Sorted, so that equal logs become equal files.
    """
    groups: dict[tuple[str, str, int], dict[str, _Config]] = {}
    for record in records:
        configs = groups.setdefault((record.target, record.task, record.threads), {})
        configs.setdefault(record.config_key, _Config()).add(record)
    kept: list[Record] = []
    for configs in groups.values():
        able = sorted((c for c in configs.values() if c.usable), key=lambda c: (c.median, encode(c.typical)))
        kept += [c.typical for c in able[:keep]]
        kept += [min(c.failed, key=encode) for c in configs.values() if c.failed]
    return sorted(kept, key=lambda r: (r.task, r.threads, not r.ok, r.ns or 0.0, encode(r)))


def rewrite(path: Path, keep: int) -> tuple[int, int, Counts]:
    """Prune a file in place: (records before, records after, what its lines were). No reader sees a half.

    Raises as `append` and `read` do, and LogError where there is no such file.
    """
    if not path.exists():
        raise LogError("there is no such tuning log", where=str(path))
    try:
        descriptor = _open_locked(path)  # writers wait until the new file is in place
        try:
            records, counts = read(path)
            if counts.unread_bytes:
                raise LogError("this tuning log is too large", str(path), allowed=f"{MAX_FILE_BYTES >> 20} MiB")
            kept = prune(records, keep)
            _replace(path, b"".join(map(encode, kept)), os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _output_error(path, error) from None
    return len(records), len(kept), counts


def _replace(path: Path, data: bytes, mode: int) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
