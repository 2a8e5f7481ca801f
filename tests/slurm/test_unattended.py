"""Jobs that are left alone: what they give up on, what they get out of by themselves, and ten random events in a row.

They take minutes in which the machine mostly waits, so they run beside the tests of the other files, one after the other,
on a Slurm of their own (the fixture `unattended` runs `SCENARIOS`); what is asked here is how they ended.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from jobs import Job
from slurm.local import LocalSlurm

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]
OFTEN = "checkpoint.every_images=40"


def _job(slurm: LocalSlurm, folder: Path, data: Path, project: Path, *overrides: str, nodes: int, images: int) -> Job:
    total = f"train.total_images={images}"
    return Job(slurm, folder / "run", data, total, *overrides, nodes=nodes, project=project)


def crash(slurm, folder, data, projects, slow) -> Job:
    """A defect that comes at the same step every time."""
    bug = projects("if self.images == 56: raise ValueError('the 7th step cannot be')")
    run = _job(slurm, folder, data, bug, OFTEN, nodes=1, images=200).submit()
    run.wait_end("FAILED")
    return run


def bad_data(slurm, folder, data, projects, slow) -> Job:
    """A set that is damaged after it was checked, beyond data.max_bad_fraction."""
    broken = folder / "broken"
    shutil.copytree(data, broken)
    run = _job(slurm, folder, data, slow, OFTEN, nodes=1, images=200)
    run.overrides = [one for one in run.overrides if not one.startswith("data.train")] + [f"data.train={broken}"]
    run.submit()
    for shard in broken.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for start in range(512, len(content) - 512, 512):
            if content[start : start + 4] == b"\x89PNG":
                content[start : start + 4] = b"\0\0\0\0"
        shard.write_bytes(content)
    run.wait_end("FAILED")
    return run


def stuck(slurm, folder, data, projects, slow) -> Job:
    """A defect in which rank 1 never comes to the collective, once."""
    mark = folder / "stuck"
    bug = projects(
        f"if self.images == 80 and dist.get_rank() == 1 and not Path({str(mark)!r}).exists():",
        f"    Path({str(mark)!r}).touch()",
        "    time.sleep(1000)",
    )
    run = _job(slurm, folder, data, bug, OFTEN, "train.hang_seconds=10", nodes=2, images=200).submit()
    run.wait_end()
    return run


def random_events(slurm, folder, data, projects, slow) -> Job:
    """Ten of them, each after a little training."""
    chance = random.Random(int(os.environ.get("DIST_T2I_SEED", "7")))
    overrides = ("checkpoint.every_images=16", "train.hang_seconds=10")
    run = _job(slurm, folder, data, slow, *overrides, nodes=2, images=480).submit()
    events = {
        "usr2": lambda: slurm.command("scancel", "--signal=USR2", run.id),
        "term": lambda: slurm.command("scancel", "--signal=TERM", run.id),
        "requeue": lambda: slurm.command("scontrol", "requeue", run.id),
        "kill": lambda: os.kill(run.rank_pid(chance.randrange(2)), signal.SIGKILL),
        "stop": lambda: os.kill(run.rank_pid(chance.randrange(2)), signal.SIGSTOP),
        "preempt": lambda: slurm.command(
            "sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true"
        ),
    }
    happened = []
    for number in range(10):
        before = run.images() if number else 0
        run.wait_images(min(before + chance.choice([8, 16, 24, 32]), 472))
        happened.append(chance.choice(list(events)))
        events[happened[-1]]()
        run.wait_restart(number + 1)
    run.wait_end()
    assert len(set(happened)) >= 4, happened
    return run


SCENARIOS = (crash, bad_data, stuck, random_events)


def test_the_same_failure_three_times(unattended):
    run = unattended["crash"].result(timeout=1000)
    ends = run.attempts("end")
    assert [end["verdict"] for end in ends] == ["requeued", "requeued", "given up"], run.story()
    said = run.tool("status", str(run.folder), status=1)
    assert "failed" in said and "3 times in a row" in said and "ValueError: the 7th step cannot be" in said
    assert "last committed checkpoint: 40 images" in said


def test_bad_data_three_times(unattended):
    run = unattended["bad_data"].result(timeout=1000)
    assert "Traceback" not in run.log(), run.log()
    said = run.tool("status", str(run.folder), status=1)
    assert "3 times in a row" in said and "DataError" in said, said


def test_a_rank_that_never_comes_to_the_collective(unattended, whole2):
    """Named with its stack; the next attempt finds the defect gone and goes on."""
    run = unattended["stuck"].result(timeout=1000)
    assert len(run.attempts("begin")) == 2, run.story()
    run.assert_equals(whole2)
    verdict = json.loads((run.folder / "ranks" / "hang.json").read_text())
    (guilty,) = verdict["guilty"]
    assert guilty["rank"] == 1 and verdict["waiting"] == [0]
    assert any("trainer.py" in frame and frame.endswith(" _step") for frame in guilty["stacks"]["MainThread"])
    assert "is not in a collective" in run.log(0) + run.log(1)


def test_ten_random_events(unattended, whole2):
    """Whatever comes, in whatever order: the weights are those of the run that nothing disturbed."""
    run = unattended["random_events"].result(timeout=1000)
    assert len(run.attempts("begin")) == 11, run.story()
    run.assert_equals(whole2)
