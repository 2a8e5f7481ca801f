"""The checkpoint folder: commits are atomic, a rule decides what is kept, and only intact checkpoints are read."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import acquire
from dist_t2i.checkpoint.store import Retention
from dist_t2i.errors import CheckpointError
from ranks import ROOT

FILES = {"generator": {"generator.weight": torch.arange(6.0).view(2, 3)}, "ema": {"generator.bias": torch.ones(3)}}
KEEP = Retention(last=2)


def save(run, images, keep=KEEP, files=FILES):
    mine = acquire(run / "checkpoints")
    try:
        return store.save(mine, images, files, {"seed": 1}, keep=keep)
    finally:
        mine.release()


def names(run):
    return [p.name for p in store.committed(run)]


def test_what_is_saved_is_what_is_read(tmp_path):
    folder = save(tmp_path, 1280)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "images-000001280\n"
    found = store.load_latest(tmp_path)
    assert found.folder == folder and found.images == 1280 and found.state["seed"] == 1
    assert torch.equal(found.tensors("generator")["generator.weight"], FILES["generator"]["generator.weight"])
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        found.tensors("text")


def test_no_checkpoint_is_none(tmp_path):
    assert store.load_latest(tmp_path) is None


def test_views_and_non_contiguous_tensors(tmp_path):
    base = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    save(tmp_path, 8, files={"g": {"a": base, "b": base[1:].transpose(0, 1)}})
    read = store.load_latest(tmp_path).tensors("g")
    assert torch.equal(read["a"], base) and torch.equal(read["b"], base[1:].transpose(0, 1))


@pytest.mark.parametrize(
    ("last", "every", "images", "gone"),
    [
        (2, 0, [10, 20, 30, 40], [10, 20]),
        (1, 20, [10, 20, 30, 40, 50], [10, 30]),
        (1, 25, [10, 20, 30, 40, 50, 60], [10, 20, 40]),
        (5, 0, [10, 20], []),
        (0, 0, [10, 20], [10]),
    ],
)
def test_retention(last, every, images, gone):
    assert Retention(last, every).expired(images) == gone


@pytest.mark.parametrize(
    ("health", "gone"),
    [
        ({"since": None, "healthy": 25}, [10, 30]),  # 20 is the newest one at or before the last check
        ({"since": None, "healthy": 5}, [10, 20, 30]),
        ({"since": 0, "healthy": 0}, []),  # a sign of divergence holds since the start
        ({"since": 20, "healthy": 20}, []),
        (None, [10, 20, 30]),  # a checkpoint of an earlier version
    ],
)
def test_retention_keeps_a_healthy_checkpoint(health, gone):
    assert Retention(last=1).given({"health": health}).expired([10, 20, 30, 40]) == gone


def test_rewinding_skips_damaged_checkpoints_and_deletes_later_ones(tmp_path):
    for images in (100, 200, 300, 400):
        folder = save(tmp_path, images, keep=Retention(last=9))
        if images in (200, 400):
            (folder / "ema.safetensors").unlink()
    mine = acquire(tmp_path / "checkpoints")
    found = store.rewind(mine, [50, 350], {"divergences": ["a"], "seed": 2})
    assert found.images == 300 and names(tmp_path) == ["images-000000100", "images-000000200", "images-000000300"]
    assert store.load_latest(tmp_path) == found, "the state is whole, with the changes"
    assert found.state["divergences"] == ["a"] and found.state["seed"] == 2
    assert store.rewind(mine, [250], {}).images == 100 and names(tmp_path) == ["images-000000100"]
    assert store.rewind(mine, [99], {}) is None and names(tmp_path) == []
    mine.release()


def test_abandoned_checkpoints_lie_between_the_newest_and_the_divergence():
    state = {"images": 200, "divergences": [{"at": 900}, {"at": 350}]}
    assert store.abandoned([100, 200, 300, 350, 400], state) == {300, 350}
    assert store.abandoned([100, 200, 300], {"images": 200}) == set()


def test_retention_on_disk_and_latest(tmp_path):
    for images in (100, 200, 300, 400):
        save(tmp_path, images, keep=Retention(last=1, every_images=200))
    assert names(tmp_path) == ["images-000000200", "images-000000400"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["images-000000200", "images-000000400", "latest"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage):
    save(tmp_path, 100)
    folder = save(tmp_path, 200)
    file = folder / ("state.json" if damage == "state" else "ema.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    said = []
    assert store.load_latest(tmp_path, warn=said.append).images == 100
    assert file.name in said[0]
    save(tmp_path, 200)
    assert store.load_latest(tmp_path).images == 200, "a damaged one is replaced when the run comes there again"


def test_a_flipped_bit_in_the_marker_is_noticed(tmp_path):
    """Any damaged byte: the checkpoint is skipped, or its content is unchanged (white space between two words)."""
    save(tmp_path, 100)
    marker = save(tmp_path, 200) / "state.json"
    good, state = marker.read_bytes(), store.load_latest(tmp_path).state
    for position in range(len(good)):
        marker.write_bytes(good[:position] + bytes([good[position] ^ 2]) + good[position + 1 :])
        found = store.load_latest(tmp_path)
        assert found.images == 100 or found.state == state, (position, marker.read_bytes())


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 100) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.load_latest(tmp_path)


def test_latest_can_be_pointed_back_and_may_be_lost(tmp_path):
    save(tmp_path, 100)
    save(tmp_path, 200)
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text("images-000000100\n")
    assert store.load_latest(tmp_path).images == 100
    latest.unlink()
    assert store.load_latest(tmp_path).images == 200


def test_another_format_says_so(tmp_path):
    state = save(tmp_path, 100) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="none of the 1"):
        store.load_latest(tmp_path)
    with pytest.raises(CheckpointError, match="format 99, but this version reads format"):
        store.open_checkpoint(state.parent)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """A real write error: the kernel refuses to let files grow beyond a limit."""
    save(tmp_path, 100)
    big = {"generator": {"w": torch.zeros(200_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="200 images could not be written"):
            save(tmp_path, 200, files=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert names(tmp_path) == ["images-000000100"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert save(tmp_path, 200, files=big).name == "images-000000200"


KILLED = """
import json, os, signal, sys, torch
from pathlib import Path
from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import acquire

def save(lease):
    store.save(lease, 300, {"generator": {"w": torch.full((1000,), 3.0)}}, {}, keep=store.Retention(last=1))

def rewind(lease):
    store.rewind(lease, [150, 120], {"divergences": [{"at": 200}]})

def die_at(moment, run, action):
    count = 0
    def trace(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.listdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"):
            if str(run) in str(arguments[0]):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(trace)
    action(acquire(run / "checkpoints"))
    return count

ended = []
for moment, folder in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()  # a process for each, without importing torch for each
    if not child:
        os.write(writing, str(die_at(moment, Path(folder), globals()[sys.argv[2]])).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    ended.append([os.waitstatus_to_exitcode(status), os.read(reading, 20).decode()])
print(json.dumps(ended))
"""


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        ("save", {(200, False), (300, False)}),
        # Killed in the middle of a rewind, a run diverges in the same way again: the order of the steps sees to that.
        ("rewind", {(200, False), (100, False), (100, True)}),
    ],
)
def test_killed_before_every_single_file_operation(tmp_path, action, wanted):
    """SIGKILL before the n-th open, rename, mkdir or remove, for every n: the folder is in the old or the new state."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*moments):
        folders = [tmp_path / str(moment) for moment in moments]
        for folder in folders:
            save(folder, 100)
            save(folder, 200)
        tasks = json.dumps([[moment, str(folder)] for moment, folder in zip(moments, folders, strict=True)])
        done = subprocess.run([sys.executable, "-c", KILLED, tasks, action], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    ((status, operations),) = run(-1)
    assert status == 0 and int(operations) > 10
    moments = range(1, int(operations) + 1)
    assert [status for status, _ in run(*moments)] == [-signal.SIGKILL] * len(moments)
    outcomes = set()
    for moment in moments:
        folder = tmp_path / str(moment)
        for committed in store.committed(folder):
            store.open_checkpoint(committed)
        found = store.load_latest(folder)
        outcomes.add((found.images, "divergences" in found.state))
        save(folder, 400)
        assert not list((folder / "checkpoints").glob(".*")), "leftovers of killed saves are swept"
    assert outcomes == wanted
