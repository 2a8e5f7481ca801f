"""Only one of several live attempts may commit to a run. The tests use real processes and folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import Owner, Superseded, acquire
from dist_t2i.checkpoint.store import Retention
from dist_t2i.errors import ExitStatus, UserError
from ranks import ROOT

FILES = {"generator": {"w": torch.ones(4)}}


def save(mine, images):
    return store.save(mine, images, FILES, {}, keep=Retention(last=1))


def attempt(monkeypatch, restart: int, job: str = "12") -> None:
    """Makes this process an attempt of a Slurm job, by its environment."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def test_the_last_to_acquire_the_lease_may_commit(tmp_path, monkeypatch):
    attempt(monkeypatch, 0)
    old = acquire(tmp_path / "checkpoints")
    save(old, 100)
    attempt(monkeypatch, 1)
    new = acquire(tmp_path / "checkpoints")
    with pytest.raises(Superseded, match="attempt 2"):
        save(old, 200)
    assert old.lost() and not new.lost()
    assert [folder.name for folder in store.committed(tmp_path)] == ["images-000000100"]
    save(new, 200)
    assert Superseded.status == ExitStatus.SUPERSEDED == 76


@pytest.mark.parametrize("moment", ["_write", "fsync", "_point_latest"])
def test_overtaken_in_the_midst_of_a_save(tmp_path, monkeypatch, moment):
    """The new attempt takes the lease and commits between any two steps of the old attempt's save. The newest
    checkpoint stays the newest."""
    attempt(monkeypatch, 0)
    old = acquire(tmp_path / "checkpoints")
    save(old, 100)
    real, overtaken = getattr(store, moment), []

    def pause(*arguments):
        if not overtaken:
            overtaken.append(True)
            attempt(monkeypatch, 1)
            new = acquire(tmp_path / "checkpoints")
            for images in (300, 400):
                save(new, images)
        return real(*arguments)

    monkeypatch.setattr(store, moment, pause)
    with pytest.raises(Superseded):
        save(old, 200)
    monkeypatch.undo()
    assert overtaken and store.load_latest(tmp_path).images == 400
    assert (tmp_path / "checkpoints" / "latest").read_text() == "images-000000400\n"


def test_an_earlier_attempt_cannot_take_the_lease_of_a_later_one(tmp_path, monkeypatch):
    attempt(monkeypatch, 3)
    new = acquire(tmp_path / "checkpoints")
    attempt(monkeypatch, 2)
    with pytest.raises(Superseded, match=r"attempt 4\) is a later attempt"):
        acquire(tmp_path / "checkpoints")
    assert not new.broken()
    save(new, 100)


def test_nothing_is_left_of_leases(tmp_path, monkeypatch):
    attempt(monkeypatch, 0)
    acquire(tmp_path / "checkpoints").staging()
    attempt(monkeypatch, 1)
    mine = acquire(tmp_path / "checkpoints")
    save(mine, 100)
    mine.release()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["images-000000100", "latest"]


def test_a_deleted_folder_is_a_lost_lease(tmp_path):
    import shutil

    mine = acquire(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints")
    assert mine.broken()
    with pytest.raises(Superseded, match="was deleted"):
        save(mine, 100)


def test_names_of_leases(tmp_path):
    for owner in (Owner("n1.example", 5, 1700000000), Owner("n-2", 7, 3, job="99", restart=4)):
        assert Owner.of(tmp_path / owner.folder_name()) == owner
    assert Owner.of(tmp_path / ".claim-x") is None


HOLD = """
import sys, time
from pathlib import Path
from dist_t2i.checkpoint.lease import acquire
acquire(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(root: Path, seconds: float) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), str(seconds)], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    return process


def test_a_running_training_is_not_taken_over_by_accident(tmp_path, monkeypatch):
    process = holder(tmp_path / "checkpoints", 60)
    try:
        monkeypatch.setattr("dist_t2i.checkpoint.lease._PATIENCE", 0.5)
        said = []
        with pytest.raises(UserError, match=f"is being trained by process {process.pid}") as caught:
            acquire(tmp_path / "checkpoints", say=said.append)
        assert not isinstance(caught.value, Superseded) and f"kill -USR2 {process.pid}" in str(caught.value)
        assert said == [
            f"waiting for {Owner.of(next((tmp_path / 'checkpoints').glob('.claim-*')))}, which holds this run's lease, to end"
        ]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    acquire(tmp_path / "checkpoints")  # ended processes hold no lease


def test_one_that_is_about_to_end_is_waited_for(tmp_path):
    process = holder(tmp_path / "checkpoints", 1.0)
    try:
        save(acquire(tmp_path / "checkpoints"), 100)
        assert process.wait(240) == 0
    finally:
        process.kill()
