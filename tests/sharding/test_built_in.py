"""The set and the configuration of a command line that names neither."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_t2i.config import files as config_files
from dist_t2i.data.shard_set import open_set
from dist_t2i.sharding import built_in
from dist_t2i.sharding.sources.scenes import ABOUT, scene_items
from dist_t2i.sharding.write_set import write_set
from dist_t2i.sharding.writing.prepare import Options
from ranks import ROOT


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A current folder in which a set that is written on first use has 60 scenes."""
    monkeypatch.setattr(built_in, "SCENES", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("gpu", [False, True])
def test_the_default_configurations_train_on_the_set_that_is_written(few, gpu):
    config = config_files.load(built_in.default_config(gpu))
    assert config.data.image_size == (64 if gpu else 32)
    assert not config.data.flip  # captions say left and right
    built_in.write_missing(config.data.train, config.data.image_size)
    written = open_set(few / config.data.train)
    assert sum(part["samples"] for part in written.manifest["splits"].values()) == 60
    assert written.manifest["image_size"] == config.data.image_size


def test_processes_that_start_together_write_the_set_once(few):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: built_in.write_missing("data/scenes32", 32), range(4)))
    before = {path: path.stat().st_mtime_ns for path in (few / "data/scenes32").iterdir()}
    built_in.write_missing("data/scenes32", 32)
    assert before == {path: path.stat().st_mtime_ns for path in (few / "data/scenes32").iterdir()}


def test_no_set_is_written_for_other_names(few):
    for name in ("data/scenes64", "data/mine", "", ("data/scenes32", "data/mine")):
        built_in.write_missing(name, 32)
    assert not (few / "data").exists()


@pytest.mark.slow
def test_train_without_arguments_says_what_it_trains(tmp_path):
    write_set(tmp_path / "data/scenes32", scene_items(60, 32, seed=0), [], Options(shard_samples=1_000, about=ABOUT))
    command = [sys.executable, ROOT / "dist_t2i/train.py", "train.total_images=16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "config" in line)
    assert "scenes32.yaml on data/scenes32" in first and "--config FILE" in first
    assert (tmp_path / "runs/scenes32/checkpoints").is_dir()


def test_submit_without_a_configuration_says_what_it_submits(tmp_path):
    command = [sys.executable, ROOT / "tools/submit.py", "--nodes", "4", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "scenes32.yaml on data/scenes32" in done.stdout and "--nodes=4" in done.stdout
    assert not (tmp_path / "data").exists()  # a dry run writes nothing
