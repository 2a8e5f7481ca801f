"""What a job survives: real signals, kills and lost nodes in a real Slurm of four nodes, ZeRO-2 on gloo.

Every row is compared with the run that nothing disturbed.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobs import LOCAL, Job

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
TOTAL = 240
ONLY_AT_THE_END = f"checkpoint.every_images={TOTAL}"


@pytest.fixture(scope="session")
def whole(cluster, data, tmp_path_factory):
    """Nothing disturbs it: four nodes."""
    job = Job(
        cluster, tmp_path_factory.mktemp("whole4") / "run", data, *total(720), "checkpoint.every_images=80"
    ).submit()
    job.wait_end()
    return job


def total(images: int = TOTAL) -> tuple[str]:
    return (f"train.total_images={images}",)


@pytest.fixture
def job(cluster, data, slow, tmp_path):
    """Makes a job of this test."""

    def make(*overrides: str, nodes: int = 4, images: int = TOTAL, project: Path = slow) -> Job:
        return Job(cluster, tmp_path / "run", data, *total(images), *overrides, nodes=nodes, project=project)

    return make


def undisturbed(job: Job, whole: Job, *, attempts: int) -> None:
    """It came to its end in so many attempts, no step done twice, with the numbers of the whole run."""
    job.wait_end()
    assert len(job.attempts("begin")) == attempts, job.story()
    assert job.steps_lost() == 0, job.story()
    job.assert_equals(whole)


# ---- asked to stop ---------------------------------------------------------------------------------------------------


def test_usr2_by_the_user(cluster, job, whole):
    run = job(ONLY_AT_THE_END).submit()
    run.wait_images(40)
    cluster.command("scancel", "--signal=USR2", run.id)
    run.wait_restart(1)
    undisturbed(run, whole, attempts=2)
    first = run.attempts("end")[0]
    assert first["status"] == 75 and first["verdict"] == "requeued"
    assert 40 <= first["images"] == run.attempts("begin")[1]["images"] < TOTAL


def test_the_time_limit(cluster, job, whole, tmp_path):
    """Slurm tells of it in time, when it looks at its clock: every half minute."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(LOCAL.read_text().replace("signal_seconds: 60", "signal_seconds: 50"))
    run = job("checkpoint.every_images=720", images=720).submit("--profile", str(profile))
    run.wait_images(16)
    cluster.command("scontrol", "update", f"JobId={run.id}", "TimeLimit=1")
    run.wait_for(lambda: run.restarts() == 1, "the end of the minute")
    cluster.command("scontrol", "update", f"JobId={run.id}", "TimeLimit=60")
    undisturbed(run, whole, attempts=2)
    assert "SIGUSR2: saving" in run.log()


def test_preemption_by_term_with_grace(cluster, job, whole):
    run = job(ONLY_AT_THE_END).submit()
    run.wait_images(40)
    push_out(cluster)
    undisturbed(run, whole, attempts=2)
    assert run.restarts() == 1


def test_preemption_by_the_user_signal(cluster, job, whole):
    cluster.settings["SlurmctldParameters"] = "preempt_send_user_signal"
    cluster.conf.write_text(cluster.configuration())
    cluster.command("scontrol", "reconfigure")
    try:
        run = job(ONLY_AT_THE_END).submit()
        run.wait_images(40)
        push_out(cluster)
        undisturbed(run, whole, attempts=2)
        assert "SIGUSR2: saving" in run.log() and run.restarts() == 1
    finally:
        del cluster.settings["SlurmctldParameters"]
        cluster.conf.write_text(cluster.configuration())
        cluster.command("scontrol", "reconfigure")


def push_out(cluster) -> None:
    """A job of a higher partition that wants all nodes for a moment."""
    cluster.command("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


def test_requeued_by_hand(cluster, job, whole):
    run = job().submit()
    run.wait_images(40)
    cluster.command("scontrol", "requeue", run.id)
    run.wait_restart(1)
    undisturbed(run, whole, attempts=2)


def test_cancelled_stays_cancelled_and_can_be_resumed(cluster, job, whole):
    """... with two nodes, and then with four again: the same losses within round-off."""
    run = job(ONLY_AT_THE_END).submit()
    run.wait_images(40)
    assert "saves a checkpoint" in run.tool("cancel", str(run.folder))
    run.wait_end("CANCELLED")
    (saved,) = run.checkpoints()
    time.sleep(12)  # longer than a requeued job waits
    assert run.slurm_state() == "CANCELLED" and run.status()["state"] == "cancelled"
    run.resume("--nodes", "2")
    run.wait_images(int(saved.removeprefix("images-")) + 40)
    run.tool("cancel", str(run.folder))
    run.wait_end("CANCELLED")
    run.resume("--nodes", "4")
    run.wait_end()
    assert [begin["ranks"] for begin in run.attempts("begin")] == [4, 2, 4]
    assert run.steps_lost() == 0
    run.assert_equals(whole, tolerance=1e-5)
