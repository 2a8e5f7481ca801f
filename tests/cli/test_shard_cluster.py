"""Shards written by the tasks of a submitit array, which run on this machine."""

import pytest

from pictures import make_folder
from shard_tool import contents, shard


@pytest.mark.slow
def test_an_array_writes_the_same_set_and_its_failures_are_reported(tmp_path):
    captions = make_folder(tmp_path / "pictures", 60)
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", 9]
    array = ["--slurm", "--slurm-cluster", "local", "--slurm-tasks", 2, "--slurm-folder", tmp_path / "logs"]
    shard(*base, "--out", tmp_path / "plain")
    done = shard(*base, "--out", tmp_path / "array", *array, "--processes", 1)
    assert contents(tmp_path / "array") == contents(tmp_path / "plain") and "submitted 2 tasks" in done.stdout
    (tmp_path / "array" / "train-00003.tar").unlink()
    done = shard(*base, "--out", tmp_path / "array", *array)
    assert "submitted 1 tasks" in done.stdout and contents(tmp_path / "array") == contents(tmp_path / "plain")


@pytest.mark.slow
def test_a_task_that_cannot_write_is_reported_and_the_command_goes_on(tmp_path):
    captions = make_folder(tmp_path / "pictures", 20)
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", 9, "--holdout", 0]
    base += ["--slurm", "--slurm-cluster", "local", "--slurm-tasks", 3, "--slurm-folder", tmp_path / "logs"]
    (tmp_path / "set" / ".shard").mkdir(parents=True)
    shard(*base, "--out", tmp_path / "first")
    (tmp_path / "set" / ".shard" / "plan.json").write_bytes((tmp_path / "first" / ".shard" / "plan.json").read_bytes())
    (tmp_path / "set" / "train-00001.tar").mkdir()
    done = shard(*base, "--out", tmp_path / "set", check=False)
    assert done.returncode == 2 and "1 shards were not written (train-00001)" in done.stderr
    assert "Run the same command again" in done.stderr and not (tmp_path / "set" / "manifest.json").exists()
    (tmp_path / "set" / "train-00001.tar").rmdir()
    shard(*base, "--out", tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "first")


def test_without_slurm_it_says_so(tmp_path):
    captions = make_folder(tmp_path / "pictures", 4)
    done = shard(
        *("folder", "--images", tmp_path / "pictures", "--captions", captions, "--out", tmp_path / "set", "--slurm"),
        check=False,
        PATH="/nowhere",
    )
    assert done.returncode == 2 and "this machine has no sbatch" in done.stderr
