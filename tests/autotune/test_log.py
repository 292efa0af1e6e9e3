"""Tuning logs keep what was acknowledged, skip what is not theirs, and name the best config whatever the order."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.autotune import log
from ingot.autotune.log import Counts, Record
from ingot.errors import LogError, OptionError, OutputError
from log_faults import corrupted_rounds, kill_rounds

ONE = Record("raspberry-pi-4", "conv2d(1,56,56,64)", 1, {"m": 4, "order": "nhwc"}, "ok", 1234.5, 0.02, "local")


def sealed(body: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(body), body)


# ------------------------------------------------------------------------------------------------------ lines

records = st.builds(
    Record,
    target=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    task=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=300),
    threads=st.integers(1, 1024),
    config=st.dictionaries(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,9}", fullmatch=True),
        st.integers(-(2**53), 2**53) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=50),
        max_size=8,
    ),
    status=st.just("ok"),
    ns=st.floats(1e-3, 1e15),
    noise=st.floats(0, 10),
    board=st.sampled_from(["local", "ssh://pi@10.0.0.7", "ssh://board:2222"]),
) | st.builds(replace, st.just(ONE), status=st.sampled_from(["timeout", "crash", "wrong_answer"]), ns=st.none())


@given(records)
def test_a_line_reads_back_as_the_record(record: Record) -> None:
    line = log.encode(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert log.decode(line[:-1]) == record


def test_the_format_of_a_line_stays() -> None:
    """Logs outlive the compiler: this line must be readable for ever."""
    line = (
        b'6da22741 {"board":"local","config":{"m":4,"order":"nhwc"},"noise":0.02,"ns":1234.5,"schema":1,'
        b'"status":"ok","target":"raspberry-pi-4","task":"conv2d(1,56,56,64)","threads":1}\n'
    )
    assert log.encode(ONE) == line
    assert log.decode(line[:-1]) == ONE


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": True},
        {"target": "../x"},
        {"target": ""},
        {"task": ""},
        {"task": "a\nb"},
        {"task": "\x1b[2J"},
        {"task": "x" * 5000},
        {"threads": 0},
        {"threads": True},
        {"threads": 1.0},
        {"config": {"a b": 1}},
        {"config": {"a": None}},
        {"config": {"a": 1 << 60}},
        {"config": {str(i): 1 for i in range(3)}},
        {"config": {f"k{i}": 1 for i in range(65)}},
        {"status": "OK"},
        {"status": "crash"},
        {"ns": None},
        {"ns": 0},
        {"ns": -1.0},
        {"ns": 1e300},
        {"ns": "1"},
        {"noise": -1},
        {"noise": None},
        {"board": ""},
        {"board": "a\x00"},
    ],
)
def test_values_that_no_record_may_hold(change: dict[str, object]) -> None:
    content = json.loads(log.encode(ONE)[9:]) | change
    assert log.decode(sealed(json.dumps(content).encode())[:-1]) == "foreign"
    with pytest.raises(LogError, match="no record"):
        log.encode(replace(ONE, **change))  # type: ignore[arg-type] # wrong on purpose


# ------------------------------------------------------------------------------------------------------ files


def test_every_kind_of_line_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = log.encode(ONE)
    damaged = good.replace(b"1234", b"1235")
    foreign = b"hello\n" + sealed(b"[1]") + sealed(b'{"a": NaN}') + log.encode(replace(ONE, board="qemu:arm"))
    oversized = b"x" * 20_000 + b"\n" + good[:-1] + b" " * 70_000 + b"\n"
    path.write_bytes(good + b"\n  \n" + damaged + foreign + oversized + good + good[:30])
    assert log.read(path) == ([ONE, ONE], Counts(records=2, blank=2, damaged=2, foreign=4, oversized=2))


def test_an_intact_last_line_without_its_end_counts_and_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(log.encode(ONE)[:-1])
    assert log.read(path)[0] == [ONE]
    log.append(path, [ONE])
    assert log.read(path) == ([ONE, ONE], Counts(records=2))


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(log.encode(ONE) + log.encode(ONE)[:50])
    log.append(path, [replace(ONE, ns=7.0)])
    assert log.read(path) == ([ONE, replace(ONE, ns=7.0)], Counts(records=2, damaged=1))


def test_no_file_is_an_empty_log(tmp_path: Path) -> None:
    assert log.read(tmp_path / "none" / "t.jsonl") == ([], Counts())


def test_the_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "t.jsonl"
    log.append(path, [ONE])
    assert log.read(path)[0] == [ONE]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "device"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "t.jsonl", tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        other.write_bytes(b"")
        path.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    for act in (lambda: log.read(path), lambda: log.append(path, [ONE])):
        with pytest.raises(LogError, match="cannot open the tuning log"):
            act()
    assert not other.exists() or other.read_bytes() == b""


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "A", "a\0", "x+instructions", "/etc/passwd", "a" * 65])
def test_a_path_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="no target's name"):
        log.log_path(tmp_path, name)


def test_times_and_instructions_never_mix(tmp_path: Path) -> None:
    counted = replace(ONE, board="qemu:aarch64")
    times = log.log_path(tmp_path, ONE.target)
    counts = log.log_path(tmp_path, ONE.target, instructions=True)
    assert times != counts
    for path, record in ((times, counted), (counts, ONE)):
        with pytest.raises(LogError, match="does not belong"):
            log.append(path, [record])
        assert not path.exists()
        path.write_bytes(log.encode(record))
        assert log.read(path) == ([], Counts(foreign=1))
        path.unlink()
    log.append(counts, [counted])
    assert log.read(counts)[0] == [counted]


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: the write stops in the middle."""
    path = tmp_path / "t.jsonl"
    log.append(path, [ONE])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write the tuning log") as caught:
            log.append(path, [ONE, ONE])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "--log DIR" in str(caught.value)
    assert path.read_bytes() == before


def test_a_batch_with_one_bad_record_is_not_written_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(LogError):
        log.append(path, [ONE, replace(ONE, ns=float("nan"))])
    assert not path.exists()


def test_an_endless_line_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("wb") as file:
        file.truncate(64 << 20)  # 64 MiB of zeros, no end of line
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + log.encode(ONE))
    tracemalloc.start()
    found = log.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == ([ONE], Counts(records=1, oversized=1))
    assert peak < 1 << 20


def test_a_log_beyond_the_limit_is_read_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    line = log.encode(ONE)
    path.write_bytes(line * 10)
    monkeypatch.setattr(log, "MAX_FILE_BYTES", 3 * len(line) + 5)
    found, counts = log.read(path)
    assert found == [ONE] * 3
    assert counts.unread_bytes == 7 * len(line) - 5
    with pytest.raises(LogError, match="too large"):
        log.rewrite(path, 1)
    assert path.read_bytes() == line * 10


# ------------------------------------------------------------------------------------------------------ kills, damage


@pytest.mark.parametrize("writers", [1, 4])
def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path, writers: int) -> None:
    """Ten of the kills of scripts/log_faults.py, which makes 200."""
    result = kill_rounds(tmp_path, 10, writers, seed=1)
    assert (result.kills, result.lost, result.failures) == (10, 0, 0)
    assert result.acknowledged > 10


def test_corrupted_logs(tmp_path: Path, fuzz: Callable[[int, int], tuple[int, int]]) -> None:
    """The corrupted logs of scripts/log_faults.py, which makes 2,000."""
    rounds, seed = fuzz(100, 1)
    result = corrupted_rounds(tmp_path, rounds, seed)
    assert (result.logs, result.failures, result.missed, result.invented) == (rounds, 0, 0, 0)
    assert result.intact > rounds


# ------------------------------------------------------------------------------------------------------ best, prune


def timed(ns: float, tile: int, **changes: object) -> Record:
    return replace(ONE, ns=ns, config={"tile": tile}, **changes)  # type: ignore[arg-type]


def test_the_best_is_that_of_the_medians(tmp_path: Path) -> None:
    lucky = [timed(ns, 1) for ns in (50.0, 120.0, 130.0)]
    steady = [timed(ns, 2) for ns in (100.0, 101.0)]
    assert log.best([*lucky, *steady]) == {(ONE.task, 1): steady[0]}


@pytest.mark.parametrize("status", ["wrong_answer", "crash", "timeout", "rejected"])
def test_a_config_that_failed_once_is_out(status: str) -> None:
    failed = replace(timed(1.0, 1), status=status, ns=None)
    assert log.best([timed(1.0, 1), failed, timed(9.0, 2)]) == {(ONE.task, 1): timed(9.0, 2)}
    assert log.best([failed]) == {}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 2)), max_size=20), st.randoms())
def test_the_order_of_records_is_irrelevant(rows: list[tuple[int, int, int]], random) -> None:  # type: ignore[no-untyped-def]
    log_ = [timed(float(ns), tile, threads=threads) for ns, tile, threads in rows]
    shuffled = random.sample(log_, len(log_))
    assert log.best(log_) == log.best(shuffled)
    assert log.prune(log_, 2) == log.prune(shuffled, 2)


def test_merging_is_concatenation(tmp_path: Path) -> None:
    a, b, both = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "both.jsonl"
    log.append(a, [timed(3.0, 1), timed(2.0, 2)])
    log.append(b, [timed(1.0, 3)])
    both.write_bytes(b.read_bytes() + a.read_bytes())
    assert log.best(log.read(both)[0]) == {(ONE.task, 1): timed(1.0, 3)}


def test_pruning_keeps_the_best_and_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    wrong = replace(timed(1.0, 0), status="wrong_answer", ns=None)
    all_records = [timed(float(tile), tile) for tile in range(1, 30)] + [wrong, timed(0.5, 0)]
    log.append(path, all_records)
    path.chmod(0o640)
    with path.open("ab") as file:
        file.write(b"torn")
    before, after, counts = log.rewrite(path, keep=3)
    assert (before, after, counts.foreign) == (31, 4, 1)
    kept, counts = log.read(path)
    assert kept == [timed(1.0, 1), timed(2.0, 2), timed(3.0, 3), wrong]
    assert counts == Counts(records=4)
    assert log.best(kept) == log.best(all_records)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_pruning_while_others_write_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    log.append(path, [ONE])
    stop = threading.Event()

    def prune_on() -> None:
        while not stop.is_set():
            log.rewrite(path, keep=1000)

    thread = threading.Thread(target=prune_on)
    thread.start()
    try:
        for i in range(15):  # each waits for the disk
            log.append(path, [timed(5.0 + i, i)])
    finally:
        stop.set()
        thread.join()
    found = {r.config.get("tile") for r in log.read(path)[0]}
    assert found == {None, *range(15)}


def test_shipped_logs_are_whole() -> None:
    """What is in tuning_logs/: every line a record of the file's own target, measured on a real board."""
    folder = log.shipped_folder()
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.jsonl"):
        found, counts = log.read(path)
        assert counts == Counts(records=len(found)), path.name
        assert {r.target for r in found} <= {path.stem}
