"""The watchdog finds the hanging rank from the files of the ranks. Whole runs that hang: tests/slurm and the end of
this file."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest

from dist_t2i.distributed.watchdog import Watchdog, describe, diagnose
from dist_t2i.errors import ExitStatus
from runs import Run, make_set

STEP = {
    "MainThread": ["/p/dist_t2i/training/trainer.py:9 _step", "/p/torch/distributed/distributed_c10d.py:3 all_reduce"]
}
ELSEWHERE = {"MainThread": ["/p/dist_t2i/training/trainer.py:9 _step", "/p/dist_t2i/data/stream/stream.py:3 __next__"]}


def said(count: int, stacks=STEP) -> dict:
    return {"count": count, "stacks": stacks, "pid": 7, "host": "h", "node": "n1", "doing": "training step"}


def test_a_silent_rank_is_guilty_whatever_the_others_do():
    verdict = diagnose({0: said(1), 1: said(1), 2: said(1)}, {0: said(4), 1: said(1), 2: said(4, ELSEWHERE)}, 3)
    assert [one["rank"] for one in verdict["guilty"]] == [1] and verdict["waiting"] == [0]
    text = describe(verdict | {"seconds": 12.0, "images": 1234})
    assert "rank 1 (process 7 on n1) gives no sign of life; last seen in: training step" in text
    assert "12 s, at 1,234 images" in text and "trainer.py:9 _step" in text


def test_a_rank_that_never_wrote_is_silent():
    assert [one["rank"] for one in diagnose({0: said(1)}, {0: said(2)}, 2)["guilty"]] == [1]


def test_who_is_not_in_the_collective_is_guilty():
    verdict = diagnose({0: said(1), 1: said(1)}, {0: said(2), 1: said(2, ELSEWHERE)}, 2)
    assert [one["rank"] for one in verdict["guilty"]] == [1] and verdict["waiting"] == [0]
    assert "is not in the collective" in describe(verdict | {"seconds": 1.0, "images": 0})


def test_where_all_wait_nobody_is_named():
    verdict = diagnose({0: said(1), 1: said(1)}, {0: said(2), 1: said(2)}, 2)
    assert verdict["guilty"] == [] and "every rank waits" in describe(verdict | {"seconds": 1.0, "images": 0})


def test_moving_on_is_no_hang_and_standing_still_is(tmp_path):
    ended = []
    dog = Watchdog(tmp_path, 0, 1, 2.5, end=ended.append).start()
    for _ in range(4):
        dog.doing("training step", 8)
        time.sleep(1.0)
    assert ended == []
    dog.doing("checkpoint", 16, extra=3600)
    time.sleep(4.0)
    assert ended == [], "what may take long is given its time"
    dog.doing("training step", 24)
    end = time.monotonic() + 20
    while not ended and time.monotonic() < end:
        time.sleep(0.1)
    assert ended[0] == ExitStatus.HUNG == 77
    dog.stop()
    verdict = json.loads((tmp_path / "ranks" / "hang.json").read_text())
    assert verdict["images"] == 24 and verdict["guilty"][0]["doing"] == "training step"
    frames = verdict["guilty"][0]["stacks"]["MainThread"]
    assert any("test_watchdog.py" in frame for frame in frames)


def test_what_takes_long_excuses_nobody_who_is_silent(tmp_path):
    """A rank that is stopped during a save does not get the time that a save may take."""
    ended = []
    dog = Watchdog(tmp_path, 0, 2, 1.0, end=ended.append).start()
    dog.doing("writing a checkpoint", 8, extra=3600)
    end = time.monotonic() + 20
    while not ended and time.monotonic() < end:
        time.sleep(0.1)
    dog.stop()
    assert ended[0] == ExitStatus.HUNG
    assert json.loads((tmp_path / "ranks" / "hang.json").read_text())["guilty"][0]["rank"] == 1


def test_a_disk_that_takes_no_files_makes_nobody_silent(tmp_path):
    """The last checkpoint waits for disk space for minutes. The ranks' files on this disk do not change meanwhile."""
    ended = []
    (tmp_path / "ranks").write_text("in the way: no file can be written below")
    dog = Watchdog(tmp_path, 0, 2, 1.0, end=ended.append).start()
    dog.doing("writing a checkpoint", 8, extra=3600)
    time.sleep(6.0)
    assert ended == []
    dog.doing("training step", 8)
    end = time.monotonic() + 20
    while not ended and time.monotonic() < end:
        time.sleep(0.1)
    dog.stop()
    assert ended[0] == ExitStatus.HUNG, "a step that takes too long is a hang all the same"


def test_zero_seconds_watch_nothing(tmp_path):
    dog = Watchdog(tmp_path, 0, 1, 0.0).start()
    dog.doing("training step", 8)
    dog.stop()
    assert not (tmp_path / "ranks").exists()


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_and_the_same_command_goes_on(tmp_path):
    """Two ranks without a launcher; one rank gets SIGSTOP."""
    run = Run(tmp_path / "run", make_set(tmp_path), "train.total_images=240", "train.hang_seconds=5")
    processes = run.start("checkpoint.every_images=32", ranks=2)
    try:
        end = time.monotonic() + 60
        while not (run.folder / "checkpoints/images-000000032").exists():
            assert time.monotonic() < end and processes[0].poll() is None, run.output()
            time.sleep(0.1)
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert processes[0].wait(60) == ExitStatus.HUNG, run.output()
        assert f"rank 1 (process {processes[1].pid}" in run.output() and "gives no sign of life" in run.output()
    finally:
        for process in processes:
            for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                child.kill()
            process.kill()
            process.wait()
    assert run.train("checkpoint.every_images=240", ranks=2) == 0, run.output()
