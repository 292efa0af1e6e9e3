"""Pools of builders give every call's result back, whatever becomes of the workers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from autotune import calls
from ingot.autotune.pool import LocalPool, in_parallel, map_unordered
from ingot.errors import WorkerError


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(2, timeout_s=20) as made:
        yield made


def test_every_result_comes_with_its_place(pool: LocalPool) -> None:
    assert dict(map_unordered(pool, calls.square, range(20))) == {i: i * i for i in range(20)}


def test_an_exception_comes_back_as_it_was(pool: LocalPool) -> None:
    with pytest.raises(ValueError, match="no such tile"):
        pool.submit(calls.fail, "no such tile").result()
    results = dict(map_unordered(pool, calls.fail, ["a", "b"]))
    assert {i: str(e) for i, e in results.items()} == {0: "a", 1: "b"}


def test_an_exception_that_does_not_pickle_is_told(pool: LocalPool) -> None:
    with pytest.raises(WorkerError, match="UnpicklableError: 1 2"):
        pool.submit(calls.fail_oddly).result()


def test_a_call_survives_its_worker(pool: LocalPool, tmp_path: Path) -> None:
    lost = [pool.submit(calls.die_once, str(tmp_path / f"flag{i}"), i) for i in range(3)]
    others = [pool.submit(calls.square, i) for i in range(10)]
    assert [f.result() for f in lost] == [0, 1, 2]
    assert [f.result() for f in others] == [i * i for i in range(10)]


def test_a_call_that_kills_every_worker_is_given_up(pool: LocalPool) -> None:
    with pytest.raises(WorkerError, match="signal 11"):
        pool.submit(calls.die).result()
    assert pool.submit(calls.square, 3).result() == 9


def test_a_call_that_does_not_end_is_given_up() -> None:
    with LocalPool(1, timeout_s=5) as pool:
        assert pool.submit(calls.square, 2).result() == 4
        endless = pool.submit(calls.doze, 1000, 1)
        after = pool.submit(calls.square, 3)
        with pytest.raises(WorkerError, match="took too long"):
            endless.result()
        assert after.result() == 9


def test_what_a_library_prints_is_not_taken_for_an_answer(pool: LocalPool) -> None:
    assert pool.submit(calls.chatter, 5).result() == 5


def test_leaving_the_loop_cancels_the_rest(pool: LocalPool) -> None:
    start = time.monotonic()
    for _ in map_unordered(pool, _doze, [0.0, *[2.0] * 100]):
        break
    assert pool.submit(calls.square, 2).result() == 4  # behind at most two that had begun
    assert time.monotonic() - start < 60


def _doze(seconds: float) -> int:
    return calls.doze(seconds, 0)


def test_threads_give_results_in_order_and_the_first_error() -> None:
    barrier = threading.Barrier(3)

    def wait(x: int) -> int:
        barrier.wait(10)  # all at once, or none
        return x

    assert in_parallel([partial(wait, x) for x in range(3)]) == [0, 1, 2]
    assert in_parallel([threading.get_ident]) == [threading.get_ident()]
    with pytest.raises(ValueError, match="a"):
        in_parallel([partial(calls.square, 1), partial(calls.fail, "a"), partial(calls.fail, "b")])
    assert in_parallel([]) == []


def test_a_closed_pool_says_so() -> None:
    pool = LocalPool(1)
    waiting = [pool.submit(calls.doze, 100, i) for i in range(3)]
    pool.close()
    assert all(f.cancelled() or isinstance(f.exception(), WorkerError) for f in waiting)
    with pytest.raises(WorkerError, match="closed"):
        pool.submit(calls.square, 1)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """However it ends: here by SIGKILL, while a call runs."""
    code = (
        "import os, sys, time; from autotune import calls; from ingot.autotune.pool import LocalPool\n"
        "pool = LocalPool(1); print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.submit(calls.doze, 1000, 1); time.sleep(1000)"
    )
    tests = str(Path(__file__).resolve().parents[1])
    import ingot

    compiler = str(Path(ingot.__file__).resolve().parents[1])
    environment = {"PYTHONPATH": f"{tests}:{compiler}", "PATH": "/usr/bin:/bin"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    worker = Path("/proc", parent.stdout.readline().strip())
    assert worker.is_dir()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while worker.is_dir() and _state(worker) != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not worker.is_dir() or _state(worker) == "Z"


def _state(process: Path) -> str:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
