"""Tuning logs under kill -9 and under damage: how many acknowledged records are lost, how many readings fail.

usage: python scripts/log_faults.py [--kills 200] [--corrupted 2000] [--seed 1]

Kills: 1 and 4 writers append to one log and tell each batch that was acknowledged; at a random moment all are killed
with SIGKILL, then the log is read and written on. Damage: a log with lines torn, flipped, blank, oversized, foreign
and hostile; every intact record must be read, nothing else may be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ingot.autotune import log

#: Records of a batch: what a run appends, and far more than the kernel copies between two looks for a signal.
BATCHES = (1, 1, 3, 3, 12, 12, 100)


def record(writer: int, number: int) -> log.Record:
    """A record that is told apart from every other by `writer` and `number`."""
    config: dict[str, int | str] = {"writer": writer, "number": number, "order": "nhwc"}
    task = "conv2d(x=f32[1,56,56,64],w=f32[64,3,3,64],stride=1)+relu"
    return log.Record("x86-64-v3", task, 1 + writer % 2, config, "ok", 1000.0 + number, 0.01)


@dataclass
class Kills:
    """What happened in all rounds of one number of writers."""

    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    failures: int = 0
    torn: int = 0


def _write_for_ever(path: Path, writer: int, first: int, pipe: int) -> None:
    """Append batch after batch; tell the number of records acknowledged so far."""
    rng = random.Random((writer << 32) + first)  # noqa: S311 - no secret
    number = first
    while True:
        count = rng.choice(BATCHES)
        log.append(path, [record(writer, number + i) for i in range(count)])
        number += count
        os.write(pipe, b"%d\n" % number)


def _start(path: Path, writer: int, first: int) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            _write_for_ever(path, writer, first, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    return child, read_end


def _read_told(pipes: list[int], enough: int, patience_s: float) -> list[bytes]:
    """What writers told, until they told `enough` batches together, or all pipes ended, or the time is over."""
    told = dict.fromkeys(pipes, b"")
    left = set(pipes)
    deadline = time.monotonic() + patience_s
    while left and sum(text.count(b"\n") for text in told.values()) < enough:
        ready, _, _ = select.select(list(left), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            data = os.read(pipe, 1 << 16)
            told[pipe] += data
            if not data:
                left.remove(pipe)
    return [told[pipe] for pipe in pipes]


def kill_rounds(folder: Path, rounds: int, writers: int, seed: int) -> Kills:
    """Kill `writers` writers of one log `rounds` times; each round resumes the log of the one before."""
    rng, result = random.Random(seed), Kills()  # noqa: S311 - no secret
    path = folder / f"killed-{writers}.jsonl"
    acknowledged = [0] * writers
    for _ in range(rounds):
        started = [_start(path, w, acknowledged[w]) for w in range(writers)]
        pipes = [pipe for _, pipe in started]
        before = _read_told(pipes, rng.randrange(12), 5.0)
        time.sleep(rng.uniform(0, 0.02))
        for child, _ in started:
            os.kill(child, signal.SIGKILL)
        after = _read_told(pipes, sys.maxsize, 5.0)
        for w, (child, pipe) in enumerate(started):
            os.waitpid(child, 0)
            os.close(pipe)
            numbers = (before[w] + after[w]).split(b"\n")[:-1]
            acknowledged[w] = int(numbers[-1]) if numbers else acknowledged[w]
        result.kills += 1
        try:
            log.append(path, [record(writers, result.kills)])  # what resuming does first
            records, counts = log.read(path)
        except Exception as error:
            print(f"failed on resume: {error}", file=sys.stderr)
            result.failures += 1
            continue
        found = {(r.config["writer"], r.config["number"]) for r in records}
        wanted = {(w, n) for w in range(writers) for n in range(acknowledged[w])}
        wanted |= {(writers, n + 1) for n in range(result.kills)}
        result.lost = max(result.lost, len(wanted - found))
        result.acknowledged, result.torn = len(wanted), counts.damaged + counts.foreign
    return result


def _sealed(body: bytes) -> bytes:
    """A line with the right CRC around any content."""
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _hostile(rng: random.Random, line: bytes) -> bytes:
    """Something that is no record of a log: random damage of a line, or what an attacker would write."""

    def changed(**fields: object) -> bytes:
        return _sealed(json.dumps(json.loads(line[9:]) | fields).encode())

    choices: list[Callable[[], bytes]] = [
        lambda: b"\n",
        lambda: b"   \t\n",
        lambda: line[: rng.randrange(1, len(line) - 1)] + b"\n",
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(400))) + b"\n",
        lambda: _flip(rng, line),
        lambda: b"\0" * rng.randrange(1, 5000) + b"\n",
        lambda: line[:-1] + b"x" * rng.randrange(1, 300_000) + b"\n",
        lambda: b"[" * 200_000 + b"\n",
        lambda: _sealed(b"[" * 15_000),
        lambda: _sealed(b'{"a":' * 3000),
        lambda: _sealed(b"9" * 15_000),
        lambda: changed(ns=float(rng.choice(["nan", "inf", "-1", "0"]))),
        lambda: changed(schema=rng.choice([0, 2, True, "1", None])),
        lambda: changed(target=rng.choice(["../../etc/passwd", "", "A", "a" * 99, 7])),
        lambda: changed(config=rng.choice([[], {"a": 1.5}, {"a": 1 << 90}, {"../x": 1}])),
        lambda: changed(board="qemu:aarch64"),
        lambda: changed(task="\x1b[2J"),
        lambda: changed(more=1),
        lambda: b'[["TVM\'s own", "record"], {"i": [[1, 2]]}]\n',
        lambda: b"\xef\xbb\xbf" + line[:4] + b"\r\n",
    ]
    return rng.choice(choices)()


def _flip(rng: random.Random, line: bytes) -> bytes:
    data = bytearray(line[:-1])
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    return bytes(data) + b"\n"


@dataclass
class Damage:
    """What happened with all corrupted logs. `invented` are records read that nobody had written."""

    logs: int = 0
    failures: int = 0
    intact: int = 0
    missed: int = 0
    invented: int = 0


def corrupted_rounds(folder: Path, rounds: int, seed: int) -> Damage:
    """Read `rounds` corrupted logs, then append to each and read it again."""
    rng, result = random.Random(seed), Damage()  # noqa: S311 - no secret
    path = folder / "corrupted.jsonl"
    for _ in range(rounds):
        intact, parts = [], []
        for number in range(rng.randrange(1, 25)):
            one = record(0, number)
            if rng.random() < 0.5:
                one = replace(one, status="timeout", ns=None)
            line = log.encode(one)
            damaged = rng.random() < 0.5
            parts.append(_hostile(rng, line) if damaged else line)
            intact += [] if damaged else [one]
        data = b"".join(parts)
        if rng.random() < 0.3:  # torn at the end: half of another record
            data += log.encode(record(0, 999))[: rng.randrange(1, 40)]
        path.write_bytes(data)
        added = record(1, 0)
        try:
            before, _ = log.read(path)
            log.append(path, [added])
            after, _ = log.read(path)
            log.best(after)
        except Exception as error:
            print(f"failed on a corrupted log: {error!r}", file=sys.stderr)
            result.failures += 1
            continue
        result.logs += 1
        result.intact += len(intact)
        result.missed += sum(r not in before for r in intact) + sum(r not in after for r in [*intact, added])
        result.invented += sum(r not in intact for r in before) + sum(r not in [*intact, added] for r in after)
    return result


def main() -> int:
    """Run both, print the counts, and end with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Tuning logs under kill -9 and under damage.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corrupted", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="ingot-logs-") as name:
        for writers in (1, 4):
            kills = kill_rounds(Path(name), options.kills, writers, options.seed)
            print(f"{writers} writers: {kills}", flush=True)
            bad += kills.lost + kills.failures
        damage = corrupted_rounds(Path(name), options.corrupted, options.seed)
        print(damage)
        bad += damage.failures + damage.missed + damage.invented
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
