"""A real Dask cluster on loopback: a scheduler, two workers, one of them killed in the middle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autotune import calls
from autotune.test_board_local import FIRST, LAST
from ingot.autotune.cluster import ClusterBoard, DaskPool
from ingot.autotune.pool import map_unordered
from ingot.errors import BoardError, OptionError, WorkerError
from ingot.target import load_target

NATIVE = load_target("native")
REPO = Path(__file__).resolve().parents[2]


class Cluster:
    """The scheduler's and the workers' processes."""

    def __init__(self, folder: Path) -> None:
        paths = [str(REPO / "compiler"), str(REPO / "tests")]
        # A call is given up when it has taken down two workers, not Dask's four: each takes seconds to start.
        given_up = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **given_up}
        self.folder = folder
        self.workers: list[subprocess.Popen[bytes]] = []
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show"]
        self.scheduler, text = self._start("scheduler", options, r"Scheduler at:\s+(tcp://\S+)")
        self.address = text

    def add(self, *resources: str) -> subprocess.Popen[bytes]:
        options = [self.address, "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        options += ["--local-directory", str(self.folder)]
        options += ["--resources", ",".join(f"{name}=1" for name in resources)] if resources else []
        worker, _ = self._start("worker", options, r"(Registered to)")
        self.workers.append(worker)
        return worker

    def _start(self, what: str, options: list[str], ready: str) -> tuple[subprocess.Popen[bytes], str]:
        log = self.folder / f"{what}{len(self.workers)}.log"
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *options]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=self.environment, cwd=self.folder)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if match := re.search(ready, log.read_text()):
                return process, match[1]
            time.sleep(0.1)
        process.kill()
        raise RuntimeError(f"no Dask {what}: {log.read_text()[-2000:]}")

    def stop(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        started.add("native")
        started.add()
        yield started
    finally:
        started.stop()


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(cluster: Cluster, batch: Callable[..., Path]) -> None:
    """The steps share one cluster, as each of its processes takes seconds to start."""
    with DaskPool(cluster.address) as pool:
        assert pool.workers == 2
        assert dict(map_unordered(pool, calls.square, range(20))) == {i: i * i for i in range(20)}
        with pytest.raises(ValueError, match="no such tile"):
            pool.submit(calls.fail, "no such tile").result()

        board = ClusterBoard(pool, NATIVE)
        assert board.size == 1
        assert "this machine" in board.probe()
        for arguments, kind in ((["ok"], "ok"), (["crash"], "crash"), (["hang"], "timeout")):
            outcome = board.run(batch(), arguments, 0.5)
            assert outcome.kind == kind
            assert outcome.lines == ((*FIRST, LAST) if kind == "ok" else FIRST)
            assert outcome.board == f"local of {os.uname().nodename}"

        results = {}
        for place, result in map_unordered(pool, _doze, range(24)):
            results[place] = result
            if len(results) == 4:
                cluster.workers[1].kill()
        assert results == {i: i for i in range(24)}
        assert pool.workers == 1

        # The board's worker goes away in the middle of a batch, and another comes.
        def swap() -> None:
            cluster.workers[0].kill()
            cluster.add("native")

        thread = threading.Timer(1.0, swap)
        thread.start()
        outcome = board.run(batch(), ["sleep", "3"], 20)
        thread.join()
        assert (outcome.kind, outcome.lines) == ("ok", (*FIRST, LAST))

        with pytest.raises(BoardError, match="no worker of the cluster has a board"):
            ClusterBoard(pool, load_target("raspberry-pi-4")).probe()
        cluster.add()
        with pytest.raises(WorkerError, match="ended under its work"):
            pool.submit(calls.die).result()


def _doze(x: int) -> int:
    return calls.doze(0.1, x)


@pytest.mark.parametrize("address", ["", "host:8786", "http://host:1", "tcp://host", "tcp://-x:1", "tcp://h:1/x"])
def test_no_address_of_a_cluster(address: str) -> None:
    with pytest.raises(OptionError, match="no address of a cluster"):
        DaskPool(address)


@pytest.mark.slow
def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.autotune.cluster._CONNECT_S", 1)
    with pytest.raises(BoardError, match="no cluster answers"):
        DaskPool("tcp://127.0.0.1:1")
