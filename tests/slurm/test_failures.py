"""What a job survives that nobody announced: killed ranks and nodes, orphans, hangs, full disks; and what it gives up on.

Real kills in a real Slurm of four nodes, ZeRO-2 on gloo; compared with the run that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from jobs import Job

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
OFTEN = "checkpoint.every_images=40"
HANG = "train.hang_seconds=8"


@pytest.fixture(scope="session")
def whole2(cluster, data, tmp_path_factory):
    """Nothing disturbs it: two nodes."""
    folder = tmp_path_factory.mktemp("whole2") / "run"
    run = Job(cluster, folder, data, "train.total_images=480", OFTEN, nodes=2).submit()
    run.wait_end()
    return run


@pytest.fixture(scope="session")
def whole1(cluster, data, tmp_path_factory):
    """Nothing disturbs it: one node."""
    folder = tmp_path_factory.mktemp("whole1") / "run"
    run = Job(cluster, folder, data, "train.total_images=240", OFTEN, nodes=1).submit()
    run.wait_end()
    return run


@pytest.fixture
def job(cluster, data, slow, tmp_path):
    """Makes a job of this test."""

    def make(*overrides: str, nodes: int = 2, images: int = 240, project: Path = slow) -> Job:
        total = f"train.total_images={images}"
        return Job(cluster, tmp_path / "run", data, total, *overrides, nodes=nodes, project=project)

    return make


def came_back(run: Job, whole: Job, *, attempts: int = 2) -> None:
    """It ended by itself, in so many attempts, with the numbers of the whole run."""
    run.wait_end()
    assert len(run.attempts("begin")) == attempts, run.story()
    run.assert_equals(whole)


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_a_killed_rank(job, whole2):
    run = job(OFTEN).submit()
    run.wait_images(48)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    run.wait_restart(1)
    came_back(run, whole2)
    ended = run.attempts("end")[0]
    assert ended["verdict"] == "requeued" and "task 1: Killed" in ended["reason"], ended
    assert ended["images"] >= 40 and run.attempts("begin")[1]["images"] == ended["images"]


def test_a_lost_node(cluster, job, whole2):
    """slurmd, slurmstepd and rank gone at once: the job goes on on other nodes."""
    run = job(OFTEN).submit()
    run.wait_images(48)
    lost = cluster.command("squeue", "-h", "-j", run.id, "-o", "%N").strip()  # n[1-2]
    node = cluster.command("scontrol", "show", "hostnames", lost).split()[1]
    for pids in cluster.node_processes(node).values():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    try:
        run.wait_restart(1)
        came_back(run, whole2)
        assert node not in cluster.command("scontrol", "show", "hostnames", nodes_of(run)).split()
    finally:
        cluster.start_node(node)


def nodes_of(run: Job) -> str:
    said = run.cluster.command("scontrol", "-o", "show", "job", run.id)
    return said.split(" NodeList=")[1].split()[0]


def test_an_orphan_can_never_commit(cluster, job, whole1):
    """slurmd is killed and the ranks live on: Slurm starts the job elsewhere; the orphan, late, changes nothing."""
    run = job(OFTEN, nodes=1).submit()
    run.wait_images(48)
    node, orphan = nodes_of(run), run.rank_pid(0)
    os.kill(cluster.node_processes(node)["slurmd"][0], signal.SIGKILL)
    os.kill(orphan, signal.SIGSTOP)  # busy elsewhere, until the new attempt has begun
    try:
        run.wait_restart(1)
        run.wait_for(lambda: len(claims(run)) == 1 and claims(run)[0].split(".")[3] != str(orphan), "the new claim")
        os.kill(orphan, signal.SIGCONT)
        run.wait_for(lambda: not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == "zombie", "its end")
        assert f"this process, process {orphan}" in run.log() and "was taken over by" in run.log()
        came_back(run, whole1)
        verdicts = {(end["restart"], end["verdict"]) for end in run.attempts("end")}
        assert verdicts == {(0, "superseded"), (1, "finished")}, verdicts
    finally:
        cluster.start_node(node)


def claims(run: Job) -> list[str]:
    return [folder.name for folder in (run.folder / "checkpoints").glob(".claim-*")]


# ---- hung ------------------------------------------------------------------------------------------------------------


def test_a_stopped_rank(job, whole2):
    """SIGSTOP: no handler, no exit, no word. The other rank's watchdog names it within hang_seconds and a few more."""
    run = job(OFTEN, HANG).submit()
    run.wait_images(48)
    stopped, begin = run.rank_pid(1), time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    run.wait_for(lambda: bool(run.attempts("end")), "the watchdog", seconds=60)
    seconds = time.monotonic() - begin
    came_back(run, whole2)
    (ended,) = run.attempts("end")[:-1]
    assert ended["reason"].startswith("hung: rank 1 on n") and ended["status"] == 77, ended
    assert f"rank 1 (process {stopped}" in run.log() and "gives no sign of life" in run.log()
    assert seconds < 8 + 3 + 12 + 10, "hang_seconds, a look at the others, KillWait, and a loaded machine"


def test_a_rank_that_never_comes_to_the_collective(job, projects, whole2):
    """A defect in the code: rank 1 sleeps. Named with its stack; the next attempt finds it gone and goes on."""
    bug = projects(
        "dist_t2i/trainer.py",
        "        self.images += self.batch\n",
        "        self.images += self.batch\n"
        "        if self.images == 80 and dist.get_rank() == 1 and not Path('STUCK').exists():\n"
        "            Path('STUCK').touch()\n"
        "            time.sleep(1000)\n",
    )
    run = job(OFTEN, HANG, project=bug).submit()
    came_back(run, whole2)
    verdict = json.loads((run.folder / "ranks" / "hang.json").read_text())
    (guilty,) = verdict["guilty"]
    assert guilty["rank"] == 1 and verdict["waiting"] == [0]
    assert any("trainer.py" in frame and frame.endswith(" _step") for frame in guilty["stacks"]["MainThread"])
    assert "is not in a collective" in run.log(0) + run.log(1)


# ---- given up --------------------------------------------------------------------------------------------------------


def test_the_same_failure_three_times(job, projects):
    bug = projects(
        "dist_t2i/trainer.py",
        "        self.images += self.batch\n",
        "        self.images += self.batch\n        if self.images == 56: raise ValueError('the 7th step cannot be')\n",
    )
    run = job(OFTEN, nodes=1, project=bug).submit()
    run.wait_end("FAILED")
    ends = run.attempts("end")
    assert [end["verdict"] for end in ends] == ["requeued", "requeued", "given up"], run.story()
    said = run.tool("status", str(run.folder), status=1)
    assert "failed" in said and "3 times in a row" in said and "ValueError: the 7th step cannot be" in said
    assert "last committed checkpoint: 40 images" in said


def test_bad_data_three_times(job, data, tmp_path):
    """More samples that do not decode than data.max_bad_fraction allows: said once, given up on, no traceback."""
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    run = job(OFTEN, nodes=1)
    run.overrides = [one for one in run.overrides if not one.startswith("data.train")] + [f"data.train={broken}"]
    run.submit("--dependency", "singleton")
    for shard in broken.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for start in range(512, len(content) - 512, 512):
            if content[start : start + 4] == b"\x89PNG":
                content[start : start + 4] = b"\0\0\0\0"
        shard.write_bytes(content)
    run.wait_end("FAILED")
    assert "Traceback" not in run.log(), run.log()
    said = run.tool("status", str(run.folder), status=1)
    assert "3 times in a row" in said and "DataError" in said, said


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_and_a_read_only_one(job, whole2):
    """Training goes on, says so, and saves when it can."""
    run = job(OFTEN, images=480)
    checkpoints = run.folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(checkpoints)], check=True)
    try:
        run.submit()
        run.wait_for(lambda: "images-000000040" in run.checkpoints(), "the first checkpoint")
        filler = checkpoints / "filler"
        with filler.open("wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        run.wait_for(lambda: "No space left on device" in run.log(), "the warning")
        assert "Training goes on; the next try is at" in run.log()
        filler.unlink()
        run.wait_for(lambda: "images saved, after" in run.log(), "the next one")
        subprocess.run(["mount", "-o", "remount,ro", str(checkpoints)], check=True)
        run.wait_for(lambda: "Read-only file system" in run.log(), "the warning")
        subprocess.run(["mount", "-o", "remount,rw", str(checkpoints)], check=True)
        run.wait_for(lambda: run.log().count("images saved, after") == 2, "the one after that")
        came_back(run, whole2, attempts=1)
    finally:
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)


# ---- everything ------------------------------------------------------------------------------------------------------


def test_ten_random_events(cluster, job, whole2):
    """Whatever comes, in whatever order: the weights are those of the run that nothing disturbed."""
    chance = random.Random(int(os.environ.get("DIST_T2I_SEED", "7")))
    run = job("checkpoint.every_images=16", HANG, images=480).submit()
    events = {
        "usr2": lambda: cluster.command("scancel", "--signal=USR2", run.id),
        "term": lambda: cluster.command("scancel", "--signal=TERM", run.id),
        "requeue": lambda: cluster.command("scontrol", "requeue", run.id),
        "kill": lambda: os.kill(run.rank_pid(chance.randrange(2)), signal.SIGKILL),
        "stop": lambda: os.kill(run.rank_pid(chance.randrange(2)), signal.SIGSTOP),
        "preempt": lambda: cluster.command(
            "sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true"
        ),
    }
    happened = []
    for number in range(10):
        before = run.images() if number else 0
        run.wait_images(min(before + chance.choice([8, 16, 24, 32]), 472))
        event = chance.choice(list(events))
        happened.append((event, run.images()))
        events[event]()
        run.wait_restart(number + 1)
    came_back(run, whole2, attempts=11)
    assert len({event for event, _ in happened}) >= 4, happened
