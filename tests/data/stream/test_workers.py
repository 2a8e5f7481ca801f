"""Workers survive the signals that stop a run, end with their parent, and are restarted when one is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pictures import config_for, make_set, stream_of
from ranks import ROOT

PROGRAM = """
import os, sys, time
from dist_t2i.data.shard_set import open_set
from pictures import config_for, stream_of
import signal
for name in ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"):
    signal.signal(getattr(signal, name), lambda *_: None)
data_set = open_set(sys.argv[1])
stream = stream_of(config_for(data_set, workers=2), data_set.tokenizer)
next(stream)
print(*[worker.pid for worker in stream._pool._iterator.workers], flush=True)
while True:
    batch = next(stream)
    print(int(batch.positions[0]), flush=True)
    time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("small"), 37)


def running(pid: int) -> bool:
    """Whether a process runs. A zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def program(small):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(small.folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    yield process, [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
def test_signals_to_the_group_do_not_end_workers_and_death_of_the_parent_does(program):
    process, workers = program
    assert len(workers) == 2 and all(map(running, workers))
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP"):
        if name != "SIGHUP":
            os.killpg(process.pid, getattr(signal, name))
        else:
            for worker in workers:
                os.kill(worker, signal.SIGHUP)
        before = int(process.stdout.readline())
        assert int(process.stdout.readline()) == before + 8
    assert all(map(running, workers))
    process.kill()
    wait_until(lambda: not any(map(running, workers)))


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
@pytest.mark.parametrize("delay", [0, 0.0003, 0.001, 0.003, 0.01])
def test_a_killed_worker_costs_nothing(small, delay):
    """Workers are killed at several moments, also while they send a batch."""
    config = config_for(small, workers=2)
    stream = stream_of(config, small.tokenizer)
    positions = []
    for step in range(30):
        positions.extend(next(stream).positions.tolist())
        if step == 5:
            time.sleep(delay)
            os.kill(stream._pool._iterator.workers[0].pid, signal.SIGKILL)
    stream.close()
    assert positions == list(range(240))


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
def test_close_ends_the_workers_quickly(small):
    handler = signal.getsignal(signal.SIGCHLD)
    stream = stream_of(config_for(small, workers=2), small.tokenizer)
    next(stream)
    assert signal.getsignal(signal.SIGCHLD) == handler
    workers = [worker.pid for worker in stream._pool._iterator.workers]
    start = time.monotonic()
    stream.close()
    stream.close()
    wait_until(lambda: not any(map(running, workers)), 2)
    assert time.monotonic() - start < 5, "less than torch waits for a worker that does not end"


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
def test_a_forgotten_stream_ends_its_workers(small):
    stream = stream_of(config_for(small, workers=1), small.tokenizer)
    next(stream)
    worker = stream._pool._iterator.workers[0].pid
    assert running(worker)
    del stream
    wait_until(lambda: not running(worker))
