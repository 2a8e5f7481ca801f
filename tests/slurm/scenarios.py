"""Jobs that need no test code while they run: undisturbed runs, defects, and ten random events in a row.

They take minutes, in which the machine mostly waits. Therefore they run in the background of the tests, in lanes, and
each lane has a Slurm of its own (`Background`). The fixture with a scenario's name gives the scenario's result. A
scenario is called with that Slurm, a folder of its own, the set, the maker of copies of the project (`projects`) and
the copy with slow steps.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_t2i.distributed.launch import job_port
from dist_t2i.utils.processes import is_alive
from jobs import CALM, LOCAL, Job, new_user, node_processes, until
from models_on_disk import write_tone_set
from ranks import ROOT
from runs import CONFIG
from slurm.local import LocalSlurm

OFTEN = "checkpoint.every_images=40"


class Background:
    """Runs lanes of scenarios. The scenarios of a lane run one after the other. `tools` are their arguments after Slurm
    and folder."""

    def __init__(self, make_folder: Callable[[str], Path], *tools: object) -> None:
        self._make_folder, self._tools = make_folder, tools
        self._pools: list[ThreadPoolExecutor] = []
        self._begun: dict[str, Future] = {}

    def begin(self, slurm: LocalSlurm, lane: Iterable[Callable]) -> None:
        self._pools.append(ThreadPoolExecutor(1))
        for scenario in lane:
            folder = self._make_folder(scenario.__name__)
            self._begun[scenario.__name__] = self._pools[-1].submit(scenario, slurm, folder, *self._tools)

    def ended(self, name: str):
        """The result of the scenario of this name; raises the scenario's error."""
        return self._begun[name].result(timeout=1000)

    def stop(self) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True, wait=False)


# ---- undisturbed runs, for comparison --------------------------------------------------------------------------------


def _undisturbed(
    slurm: LocalSlurm, folder: Path, data: Path, *overrides: str, nodes: int, images: int, project: Path = ROOT
) -> Job:
    overrides = (f"train.total_images={images}", OFTEN, *overrides)
    run = Job(slurm, folder / "run", data, *overrides, nodes=nodes, project=project).submit()
    run.wait_end()
    return run


def whole1(slurm, folder, data, projects, slow) -> Job:
    """One node."""
    return _undisturbed(slurm, folder, data, nodes=1, images=200)


def whole2(slurm, folder, data, projects, slow) -> Job:
    """Two nodes."""
    return _undisturbed(slurm, folder, data, nodes=2, images=640)


def whole4(slurm, folder, data, projects, slow) -> Job:
    """Four nodes. Also compared with two nodes: the difference must stay within round-off."""
    return _undisturbed(slurm, folder, data, *CALM, nodes=4, images=480, project=projects(smooth=True))


# ---- failures after which a job gives up or recovers -----------------------------------------------------------------


def _job(slurm: LocalSlurm, folder: Path, data: Path, project: Path, *overrides: str, nodes: int, images: int) -> Job:
    total = f"train.total_images={images}"
    return Job(slurm, folder / "run", data, total, *overrides, nodes=nodes, project=project)


def crash(slurm, folder, data, projects, slow) -> Job:
    """A defect that occurs at the same step in every attempt."""
    bug = projects("if self.images == 56: raise ValueError('the 7th step cannot be')")
    run = _job(slurm, folder, data, bug, OFTEN, nodes=1, images=200).submit()
    run.wait_end("FAILED")
    return run


def diverged(slurm, folder, data, projects, slow) -> Job:
    """Learning rates at which training explodes, on two nodes."""
    sick = ("optimizer.generator_lr=0.08", "optimizer.discriminator_lr=0.08", "loss.penalty=none")
    soon = "train.divergence_images=1"
    run = _job(slurm, folder, data, ROOT, OFTEN, *sick, soon, nodes=2, images=8000).submit()
    run.wait_end("FAILED")
    return run


def bad_data(slurm, folder, data, projects, slow) -> Job:
    """A set that is damaged after the check, beyond data.max_bad_fraction."""
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
    """A defect that occurs once: rank 1 never enters the collective."""
    mark = folder / "stuck"
    bug = projects(
        f"if self.images == 80 and dist.get_rank() == 1 and not Path({str(mark)!r}).exists():",
        f"    Path({str(mark)!r}).touch()",
        "    time.sleep(1000)",
    )
    run = _job(slurm, folder, data, bug, OFTEN, "train.hang_seconds=10", nodes=2, images=200).submit()
    run.wait_end()
    return run


def taken_port(slurm, folder, data, projects, slow) -> Job:
    """Another program uses the port at which the ranks of the first attempt meet."""
    number = int(re.search(r"NEXT_JOB_ID\s*= (\d+)", slurm.command("scontrol", "show", "config"))[1])
    number += 1  # submit.py first runs `sbatch --test-only`, which takes one job number
    with socket.create_server(("0.0.0.0", job_port({"SLURM_JOB_ID": str(number)}))):
        run = Job(slurm, folder / "run", data, "train.total_images=40", OFTEN, nodes=2).submit()
        assert run.id == str(number)
        run.wait_end()
    return run


def random_events(slurm, folder, data, projects, slow) -> Job:
    """Ten random events, each after a few steps of training."""
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


def orphan(slurm, folder, data, projects, slow) -> Job:
    """slurmd is killed, but its rank survives. Slurm starts the job on another node; the orphaned rank ends later."""
    run = _job(slurm, folder, data, slow, OFTEN, nodes=1, images=200).submit()
    run.wait_images(48)
    node, rank = run.node_list(), run.rank_pid(0)
    os.kill(node_processes(slurm, node)["slurmd"][0], signal.SIGKILL)
    os.kill(rank, signal.SIGSTOP)  # the old rank is blocked until the new attempt has begun
    try:
        run.wait_restart(1)
        run.wait_for(lambda: len(claims(run)) == 1 and claims(run)[0].split(".")[3] != str(rank), "the new claim")
        os.kill(rank, signal.SIGCONT)
        run.wait_for(lambda: gone(rank), "the orphan's end")
        assert f"this process, process {rank}" in run.log() and "was taken over by" in run.log()
        run.wait_end()
        run.wait_for(lambda: len(run.attempts("end")) == 2, "the last word of the orphan's attempt")
    finally:
        slurm.start_node(node)
    return run


def claims(run: Job) -> list[str]:
    return [folder.name for folder in (run.folder / "checkpoints").glob(".claim-*")]


def gone(pid: int) -> bool:
    return not is_alive(pid)


# ---- more than one job -----------------------------------------------------------------------------------------------


def the_readmes_four_lines(slurm, folder, data, projects, slow) -> str:
    """A new user (empty cache, no SLURM_CONF): up, submit, preempt the run, see it resume, down."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(python -m slurm\.local up\n.*?)^```", readme, re.DOTALL | re.MULTILINE)
    up, submit, push, down = (shlex.split(line.split("#")[0]) for line in block.splitlines())
    (slow / "configs" / "pictures64.yaml").write_text(CONFIG)
    submit = [word for word in submit if not word.startswith("data.train=")] + [f"data.train={data}"]
    submit += [f"run.folder={folder / 'run'}", "train.total_images=320"]
    look = [*down[:-1], "run", *shlex.split(f"python tools/submit.py status {folder / 'run'}")]
    user = new_user(folder)

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=user, cwd=slow, capture_output=True, text=True, timeout=300)

    try:
        begun = run(up)
        assert begun.returncode == 0 and "export SLURM_CONF=" in begun.stdout, begun.stderr
        assert "Slurm is up already" in run(up).stderr
        queued = run(submit)
        assert queued.returncode == 0 and "queued as job 1" not in queued.stderr, queued.stderr
        until(lambda: " images/s" in run(look).stdout)
        assert run(push).returncode == 0
        until(lambda: "preempted or stopped once" in run(look).stdout)
        until(lambda: "finished" in run(look).stdout)
        status = run(look).stdout
    finally:
        ended = run(down)
    assert ended.stdout == "Slurm is down\n"
    assert "Slurm was not up" in run(down).stdout
    return status


PLAN = """
name: tiny
base: BASE
data: DATA
images: 16
seeds: 2
protocol: quick
arms: {dual: , shared: {overrides: [text.mode=shared]}}
"""


def ablation(slurm, folder, data, projects, slow) -> Path:
    """Two arms with two seeds each, as arrays: submitted, watched, and scored after they finish."""
    pytest.importorskip("efficientnet_lite_pytorch")
    (folder / "base.yaml").write_text(CONFIG)
    tones = write_tone_set(folder / "set", roles=8)
    plan, out = folder / "ablation-tiny.yaml", folder / "out"
    plan.write_text(PLAN.replace("BASE", str(folder / "base.yaml")).replace("DATA", str(tones)))

    def ablate() -> str:
        command = [sys.executable, str(ROOT / "tools" / "ablate.py"), "--config", str(plan), "--out", str(out)]
        command += ["--slurm-profile", str(LOCAL)]
        done = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout

    def finished() -> int:
        states = [json.loads(path.read_text())["state"] for path in out.glob("*/seed-*/progress.json")]
        return states.count("finished")

    said = ablate()
    assert "dual: 2 seeds queued as " in said and "shared: 2 seeds queued as " in said
    assert "seed-1" in ablate()  # the state of the arrays, or the scores of finished arms
    until(lambda: finished() == 4)
    assert str(out / "table.md") in ablate()
    return out


LANES = (
    (whole2, whole4, whole1, crash, diverged, bad_data, the_readmes_four_lines, ablation, stuck, taken_port),
    (random_events, orphan),
)
"""Each on a Slurm of its own, in the order in which tests ask for them. Random events push others out, so they are alone."""
