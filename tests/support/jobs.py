"""Training jobs in a real Slurm, which tests submit, disturb and inspect as users do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from prefork import Program
from ranks import ROOT
from runs import Run, whole_lines
from slurm.local import LocalSlurm

STAGES = ("engine.generator_stage=2", "engine.discriminator_stage=2", "optimizer.decay=constant")
STEP = "        self.images += self.batch\n"
"""Where bugs are put into copies of trainer.py: in a step."""
CALM = ("optimizer.generator_lr=1e-4", "optimizer.discriminator_lr=1e-4")
"""Steps that leave a difference as small as it is; the usual ones multiply it, up to six times each."""
LOCAL = ROOT / "slurm" / "profiles" / "local.yaml"


_SUBMIT = Program(ROOT / "tools" / "submit.py", "slurm.submission", "slurm.status", "dist_t2i.data.open_data")


def submit(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python tools/submit.py ...` of this checkout, and its result."""
    with _SUBMIT.start(*words, environment=env, cwd=ROOT) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode is not None
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def new_user(folder: Path) -> dict[str, str]:
    """The environment of a user with an empty cache and no SLURM_CONF."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "XDG_CACHE_HOME": str(folder / "cache"), "PATH": path}


def node_processes(cluster: LocalSlurm, node: str) -> dict[str, list[int]]:
    """Pids of a node's `slurmd`, of its `slurmstepd`s, and of the `tasks` below these."""
    spool = str((cluster.folder / "keys").resolve() / "spool" / node)
    pids: dict[str, list[int]] = {"slurmd": [], "slurmstepd": [], "tasks": []}
    with contextlib.suppress(OSError, ValueError):
        pids["slurmd"] = [int((cluster.folder / "run" / f"slurmd-{node}").read_text())]
    for process in psutil.process_iter(["pid", "name"]):
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_CONF") == str(cluster.conf) and environment.get("SLURMD_NODENAME") == node:
                pids["tasks"].append(process.pid)
            elif process.name().startswith("slurmstepd"):
                paths = [*process.cmdline(), *(file.path for file in process.open_files())]
                if any(spool in path for path in paths):
                    pids["slurmstepd"].append(process.pid)
    return pids


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Waits until the condition holds. Checking the condition may start a program."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(1.0)


def all_nodes_up(cluster: LocalSlurm) -> bool:
    """Whether every node accepts jobs. Returns nodes to service that Slurm took out of it on a busy machine, because a
    daemon answered too late or a step could not start in time."""
    states = dict(line.split() for line in cluster.command("sinfo", "-N", "-h", "-o", "%N %t").splitlines())
    out = sorted({node for node, state in states.items() if state.startswith(("down", "drain", "drng", "fail"))})
    if out:
        cluster.command("scontrol", "update", f"NodeName={','.join(out)}", "State=RESUME")
    return not out


class Job(Run):
    """A run of `nodes` ranks, one on each node. It is submitted from the copy `project` of the code."""

    def __init__(self, cluster: LocalSlurm, folder: Path, data: Path, *overrides: str, nodes: int = 4, project=ROOT):
        super().__init__(folder, data, *STAGES, *overrides)
        self.cluster, self.nodes, self.project, self.id = cluster, nodes, project, ""

    # ---- commands ----------------------------------------------------------------------------------------------------

    def tool(self, *words: str, status: int | None = 0) -> str:
        """Runs `python tools/submit.py ...`; returns its output. Its exit status must be `status`, unless `status` is
        None."""
        command = [sys.executable, str(self.project / "tools" / "submit.py"), *words]
        done = subprocess.run(
            command, cwd=self.project, env=self.cluster.environment, capture_output=True, text=True, timeout=300
        )
        assert status in (None, done.returncode), done.stdout + done.stderr + self.nodes_and_queue()
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    def submit(self, *options: str) -> Job:
        until(lambda: all_nodes_up(self.cluster))
        said = self.tool(
            *("--nodes", str(self.nodes), "--config", str(self.config), "--profile", str(LOCAL)),
            *options,
            *self.overrides,
        )
        self.id = re.findall(r"queued as job (\d+)", said)[0]
        return self

    def resume(self, *options: str) -> Job:
        self.id = re.findall(r"queued as job (\d+)", self.tool("resume", str(self.folder), *options))[0]
        return self

    def status(self) -> dict:
        return json.loads(self.tool("status", str(self.folder), "--json", status=None))

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.story()}"
            time.sleep(0.3)  # each check starts a command of Slurm on the cores of the jobs

    def images(self) -> int:
        """Images seen at the last report."""
        file = self.folder / "metrics.jsonl"
        lines = self.metrics() if file.exists() else []
        return lines[-1]["images"] if lines else 0

    def wait_images(self, images: int, seconds: float = 180) -> None:
        self.wait_for(lambda: self.images() >= images and self.running(), f"{images} images", seconds)

    def running(self) -> bool:
        return self.slurm_state() == "RUNNING"

    def shown(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState; "" without one."""
        found = re.search(rf" {name}=(\S+)", self.cluster.command("scontrol", "-o", "show", "job", self.id))
        return found[1] if found else ""

    def slurm_state(self) -> str:
        return self.shown("JobState")

    def node_list(self) -> str:
        """The job's current nodes, such as n[1-2]."""
        return self.cluster.command("squeue", "-h", "-j", self.id, "-o", "%N").strip()

    def restarts(self) -> int:
        return int(self.shown("Restarts"))

    def wait_restart(self, number: int, seconds: float = 180) -> None:
        self.wait_for(lambda: self.restarts() == number and self.running(), f"restart {number}", seconds)

    def wait_end(self, state: str = "COMPLETED", seconds: float = 300) -> None:
        """Waits until the job has ended in this state."""
        live = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        self.wait_for(lambda: self.slurm_state() not in live, "the end", seconds)
        assert self.slurm_state() == state, self.story()

    # ---- state of the job --------------------------------------------------------------------------------------------

    def attempts(self, event: str) -> list[dict]:
        return [entry for entry in whole_lines(self.folder / "attempts.jsonl") if entry["event"] == event]

    def log(self, rank: int = 0) -> str:
        return "".join(
            file.read_text(errors="replace") for file in sorted((self.folder / "slurm").glob(f"*_{rank}_log.out"))
        )

    def story(self) -> str:
        """All records that may explain a failure."""
        notes = self.folder / "attempts.jsonl"
        said = "".join(f"--- rank {rank}\n{self.log(rank)[-3000:]}\n" for rank in range(self.nodes))
        return f"{self.nodes_and_queue()}\n{notes.read_text() if notes.exists() else 'no attempts'}\n{said}"

    def nodes_and_queue(self) -> str:
        """The state of every node, with the reason why it is down or drained, and the queue."""
        nodes = self.cluster.command("sinfo", "-N", "-h", "-o", "%N %T %E")
        return f"--- nodes\n{nodes}--- queue\n{self.cluster.command('squeue')}"

    def rank_pid(self, rank: int) -> int:
        """The process of a rank of the current attempt."""
        wanted = {"SLURM_JOB_ID": self.id, "SLURM_PROCID": str(rank), "SLURM_CONF": str(self.cluster.conf)}
        newest = (-1.0, 0)
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if all(environment.get(name) == value for name, value in wanted.items()) and "rank.py" in " ".join(
                    process.cmdline()
                ):
                    parent = process.parent()
                    if parent is None or "rank.py" not in " ".join(parent.cmdline()):  # not a loader worker
                        newest = max(newest, (process.create_time(), process.pid))
            except psutil.Error:
                continue
        assert newest[1], f"no process of rank {rank}\n{self.story()}"
        return newest[1]

    def steps_lost(self) -> int:
        """The number of reports (one per step) that were repeated after a resume."""
        return sum(int(count) for count in re.findall(r"metrics.jsonl: dropped (\d+) reports", self.log()))

    # ---- comparison with the undisturbed run -------------------------------------------------------------------------

    def comes_back(self, disturb: Callable[[], object], whole: Job, *, lost: bool = False) -> None:
        """Trains a little, disturbs the run, and checks that the next attempt continues with the losses of the
        undisturbed run. Unless steps may be `lost`, the next attempt continues at the exact step."""
        number, redone = self.restarts(), self.steps_lost()
        self.wait_images(self.images() + 24)
        disturb()
        self.wait_restart(number + 1)
        self.wait_for(lambda: len(self.attempts("begin")) == number + 2, "the next attempt")
        begun = self.attempts("begin")[-1]
        self.wait_for(lambda: self.metrics()[-1]["time"] > begun["time"], "its first step")
        assert lost or self.steps_lost() == redone, self.story()
        self.assert_losses(whole)

    def assert_losses(self, whole: Job, tolerance: float = 0.0) -> None:
        """Every loss so far equals that of the undisturbed run, and none is missing."""
        ours, theirs = self.losses(), whole.losses()
        assert sorted(ours) == [images for images in sorted(theirs) if images <= max(ours)], self.story()
        for images, values in ours.items():
            for name, value in values.items():
                expected = theirs[images][name]
                if tolerance == 0:
                    assert value == expected, (images, name)
                elif not name.endswith(
                    "/std"
                ):  # a spread within one micro-batch, whose rows change with the world size
                    assert abs(value - expected) <= tolerance * max(1, abs(expected)), (images, name)

    def assert_equals(self, whole: Job) -> None:
        """Every loss and every tensor of the last checkpoint equals the undisturbed run, to the bit."""
        self.assert_losses(whole)
        total = max(self.losses())
        mine, theirs = self.tensors(total), whole.tensors(total)
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name
