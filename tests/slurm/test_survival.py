"""A job survives real signals, kills and lost nodes, in a real Slurm with four nodes, with ZeRO-2 on gloo.

Two runs, on four nodes and on two, go through one event after the other. After each event, all losses so far are
compared with the losses of an undisturbed run. At the end, every tensor is compared.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from jobs import CALM, LOCAL, Job, all_nodes_up, node_processes, until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
AT_STOPS_ONLY = "checkpoint.every_images=100000"
OFTEN = "checkpoint.every_images=40"


# ---- four nodes: asked to stop ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run4(cluster, data, projects, whole4, tmp_path_factory) -> Job:
    """Steps take almost a second, because Slurm checks time limits only every half minute."""
    folder = tmp_path_factory.mktemp("run4")
    profile = folder / "profile.yaml"
    profile.write_text(LOCAL.read_text().replace("signal_seconds: 60", "signal_seconds: 110"))
    overrides = ("train.total_images=480", AT_STOPS_ONLY, *CALM)
    run = Job(cluster, folder / "run", data, *overrides, nodes=4, project=projects("time.sleep(0.7)", smooth=True))
    return run.submit("--profile", str(profile))


def test_usr2_by_the_user(cluster, run4, whole4):
    run4.comes_back(lambda: cluster.command("scancel", "--signal=USR2", run4.id), whole4)
    (ended,) = run4.attempts("end")
    assert ended["status"] == 75 and ended["verdict"] == "requeued"
    assert 24 <= ended["images"] == run4.attempts("begin")[1]["images"]


def test_the_time_limit(cluster, run4, whole4):
    """The time limit is reduced to one or two minutes from now; the job gets the signal 110 s before the limit."""

    def cut_short() -> None:
        number = run4.restarts()
        hours, minutes, _ = run4.shown("RunTime").split(":")
        limit = int(hours) * 60 + int(minutes) + 2
        cluster.command("scontrol", "update", f"JobId={run4.id}", f"TimeLimit={limit}")
        run4.wait_for(lambda: run4.restarts() == number + 1, "the notice")
        cluster.command("scontrol", "update", f"JobId={run4.id}", "TimeLimit=60")

    run4.comes_back(cut_short, whole4)
    assert run4.attempts("end")[-1]["status"] == 75 and run4.log().count("stopped by SIGUSR2") == 2


def test_cancelled_stays_cancelled_and_can_be_resumed(run4, whole4):
    """Resumed with two nodes and then with four: the same losses and gradient norms within round-off."""
    run4.wait_images(run4.images() + 16)
    assert "saves a checkpoint" in run4.tool("cancel", str(run4.folder))
    run4.wait_end("CANCELLED")
    saved = run4.images()
    assert f"images-{saved:09d}" in run4.checkpoints()
    time.sleep(12)  # longer than a requeued job waits
    assert run4.slurm_state() == "CANCELLED" and run4.status()["state"] == "cancelled"
    run4.resume("--nodes", "2", f"train.total_images={saved + 16}")
    run4.wait_end()
    run4.resume("--nodes", "4", f"train.total_images={saved + 24}")
    run4.wait_end()
    assert run4.images() == saved + 24
    assert [begin["ranks"] for begin in run4.attempts("begin")][-3:] == [4, 2, 4]
    assert run4.steps_lost() == 0
    run4.assert_losses(whole4, tolerance=1e-5)


# ---- two nodes: preempted, killed, lost, stopped ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def run2(cluster, data, slow, whole2, tmp_path_factory) -> Job:
    overrides = ("train.total_images=640", OFTEN, "train.hang_seconds=10")
    return Job(cluster, tmp_path_factory.mktemp("run2") / "run", data, *overrides, nodes=2, project=slow).submit()


def test_preemption_by_term_with_grace(cluster, run2, whole2):
    run2.comes_back(lambda: push_out(cluster), whole2)
    assert "stopped by SIGTERM" in run2.log()


def test_preemption_by_the_user_signal(cluster, run2, whole2):
    reconfigure(cluster, SlurmctldParameters="preempt_send_user_signal")
    try:
        run2.comes_back(lambda: push_out(cluster), whole2)
        assert "stopped by SIGUSR2" in run2.log()
    finally:
        reconfigure(cluster, SlurmctldParameters="")


def push_out(cluster) -> None:
    """A job of a partition with higher priority, which needs all nodes for a moment."""
    until(lambda: all_nodes_up(cluster))
    cluster.command("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")


def reconfigure(cluster, **settings: str) -> None:
    for name, value in settings.items():
        if value:
            cluster.settings[name] = value
        else:
            cluster.settings.pop(name, None)
    cluster.conf.write_text(cluster.configuration())
    cluster.command("scontrol", "reconfigure")


def test_requeued_by_hand(cluster, run2, whole2):
    run2.comes_back(lambda: cluster.command("scontrol", "requeue", run2.id), whole2)


def test_a_killed_rank(run2, whole2):
    killed = run2.attempts("begin")[-1]
    run2.comes_back(lambda: os.kill(run2.rank_pid(1), signal.SIGKILL), whole2, lost=True)
    ended = run2.attempts("end")[-1]
    assert ended["verdict"] == "requeued" and "task 1: Killed" in ended["reason"], ended
    # The newest checkpoint is a regular one, or the one from which the killed attempt started.
    assert ended["images"] % 40 == 0 or ended["images"] == killed["images"], (killed, ended)
    assert run2.attempts("begin")[-1]["images"] == ended["images"]


def test_a_stopped_rank(run2, whole2):
    """After SIGSTOP the rank runs no handler, and does not exit. The other rank's watchdog names this rank."""
    stopped = run2.rank_pid(1)

    def stop() -> None:
        ends = len(run2.attempts("end"))
        os.kill(stopped, signal.SIGSTOP)
        # hang_seconds, three intervals and KillWait take 19 seconds; the rest is for a busy machine
        run2.wait_for(lambda: len(run2.attempts("end")) > ends, "the watchdog", seconds=90)

    run2.comes_back(stop, whole2, lost=True)
    ended = run2.attempts("end")[-1]
    assert ended["reason"].startswith("hung: rank 1 on n") and ended["status"] == 77, ended
    assert f"rank 1 (process {stopped}" in run2.log() and "gives no sign of life" in run2.log()


def test_a_lost_node(cluster, run2, whole2):
    """slurmd, slurmstepd and the rank are killed at once; the job continues on other nodes."""
    node = cluster.command("scontrol", "show", "hostnames", run2.node_list()).split()[1]

    def lose() -> None:
        for pids in node_processes(cluster, node).values():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # it may end because the previous process ended
                    os.kill(pid, signal.SIGKILL)

    try:
        run2.comes_back(lose, whole2, lost=True)
        assert node not in cluster.command("scontrol", "show", "hostnames", run2.node_list()).split()
    finally:
        cluster.start_node(node)


def test_after_all_that_it_is_the_run_that_nothing_disturbed(run2, whole2):
    run2.wait_end()
    run2.assert_equals(whole2)
