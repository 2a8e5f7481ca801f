"""A real job whose checkpoint folder is full or read-only for a while, on real file systems."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_full_disk_and_a_read_only_one(job, whole2):
    """Training continues, prints a warning, and saves when it can."""
    run = job("checkpoint.every_images=40", images=480)
    checkpoints = run.folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(checkpoints)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root and a kernel that allows it")
    try:
        run.submit()
        run.wait_for(lambda: "images-000000040" in run.checkpoints(), "the first checkpoint")
        filler = checkpoints / "filler"
        with filler.open("wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        run.wait_for(lambda: "No space left on device" in run.log(), "the warning")
        assert "Training continues; the next try is at" in run.log()
        filler.unlink()
        run.wait_for(lambda: "images saved, after" in run.log(), "the next one")
        run.wait_for(lambda: remount("ro", checkpoints), "a moment in which nothing is being written")
        run.wait_for(lambda: "Read-only file system" in run.log(), "the warning")
        assert remount("rw", checkpoints)
        run.wait_for(lambda: run.log().count("images saved, after") == 2, "the one after that")
        run.wait_end()
        assert len(run.attempts("begin")) == 1
        run.assert_equals(whole2)
    finally:
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)


def remount(how: str, folder: Path) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], capture_output=True).returncode == 0
