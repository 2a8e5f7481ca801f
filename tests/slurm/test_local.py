"""Slurm on one machine, as the README shows it, and what it says when something is wrong."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranks import ROOT
from runs import CONFIG
from slurm.local import LocalSlurm

pytestmark = pytest.mark.slurm


def run(words: list[str], env: dict, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def home(tmp_path) -> dict[str, str]:
    """A new user: nothing in the cache, no SLURM_CONF."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": path}


@pytest.mark.slow
def test_the_readmes_four_lines(cluster, home, slow, data, tmp_path):
    """Up, submit, push it out and see it come back, down. `cluster` only for its check that Slurm is there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(python -m slurm\.local up\n.*?)^```", readme, re.DOTALL | re.MULTILINE)
    up, submit, push, down = (shlex.split(line.split("#")[0]) for line in block.splitlines())
    (slow / "configs" / "pictures64.yaml").write_text(CONFIG)
    submit = [word for word in submit if not word.startswith("data.train=")] + [f"data.train={data}"]
    submit += [f"run.folder={tmp_path / 'run'}", "train.total_images=320"]
    look = [*down[:-1], "run", *shlex.split(f"python tools/submit.py status {tmp_path / 'run'}")]
    try:
        begun = run(up, home, slow)
        assert begun.returncode == 0 and "export SLURM_CONF=" in begun.stdout, begun.stderr
        assert "it is up already" in run(up, home, slow).stderr
        queued = run(submit, home, slow)
        assert queued.returncode == 0 and "queued as job 1" not in queued.stderr, queued.stderr
        wait_for(lambda: " images/s" in run(look, home, slow).stdout, 90)
        assert run(push, home, slow).returncode == 0
        wait_for(lambda: "preempted or stopped once" in run(look, home, slow).stdout, 120)
        wait_for(lambda: "finished" in run(look, home, slow).stdout, 120)
        assert "320 of 320 images" in run(look, home, slow).stdout
    finally:
        ended = run(down, home, slow)
    assert ended.stdout == "Slurm is down\n"
    assert "Slurm was not up" in run(down, home, slow).stdout


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(1.0)


def test_what_is_wrong_is_said(cluster, home):
    words = [sys.executable, "-m", "slurm.local"]
    for more, said in (
        (["run", "squeue"], "Slurm is not up: python -m slurm.local up"),
        (["run"], "run what?"),
        (["up", "--nodes", "0"], "at least one"),
        (["up", "--folder", "/proc/nowhere"], "/proc/nowhere"),
    ):
        done = run([*words, *more], home)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_in_a_folder_with_a_space_under_another_name(cluster, home, tmp_path):
    """Options may stand after the word; the user is who runs it, not who the environment names; job numbers do not come
    again, or `cancel` of an older run would end a job of this cluster."""
    words, where = [sys.executable, "-m", "slurm.local"], ["--folder", str(tmp_path / "my cluster" / ("long" * 10))]
    env = home | {"USER": "nobody", "LOGNAME": "nobody"}
    assert run([*words, "up", "--nodes", "1", *where], env).returncode == 0
    try:
        assert not (tmp_path / "cache").exists()
        said = run([*words, *where, "run", "sbatch", "-W", "--parsable", "--wrap", "true", "-o", "/dev/null"], env)
        assert said.returncode == 0 and int(said.stdout) > 1000, said.stderr
        assert run([*words, *where, "run", "bash", "-c", "exit 7"], env).returncode == 7
        nothing = run([*words, *where, "run", "no-such-program"], env)
        assert nothing.returncode == 2 and "there is no program no-such-program" in nothing.stderr
    finally:
        assert run([*words, "down", *where], env).stdout == "Slurm is down\n"


def test_nobody_else_is_heard(cluster, tmp_path):
    """The daemons' ports can be reached from everywhere; what they take orders by is a secret of who started them."""
    assert cluster.command("sbatch", "--test-only", "-o", "/dev/null", "--wrap", "true") == ""
    folder = (cluster.folder / "keys").resolve()
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "key").stat().st_mode & 0o777 == 0o600
    conf = cluster.conf.read_text().replace("auth/munge", "auth/none").replace("cred/munge", "cred/none")
    (tmp_path / "cgroup.conf").touch()
    (tmp_path / "slurm.conf").write_text(re.sub(r"socket=[^,]*,", "", conf))
    env = cluster.environment | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    done = run(["sbatch", "--test-only", "-o", "/dev/null", "--wrap", "true"], env)
    assert done.returncode != 0 and "to start at" not in done.stderr, done.stderr


def test_what_does_not_answer_is_ended_all_the_same(cluster, tmp_path, monkeypatch):
    """A job on a node that hangs never leaves the queue."""
    monkeypatch.setattr("slurm.local._DOWN_SECONDS", 2.0)
    one = LocalSlurm(tmp_path / "one", nodes=1)
    one.up()
    one.command("sbatch", "-o", "/dev/null", "--wrap", "sleep 100")
    wait_for(lambda: "RUNNING" in one.command("squeue", "-h", "-o", "%T"), 20)
    os.kill(one.node_processes("n1")["slurmd"][0], signal.SIGSTOP)
    one.down()
    assert not one.running() and one.leftovers() == []


def test_where_slurm_is_missing_it_says_what_to_install(home, tmp_path):
    script = (
        "import slurm.local as l, sys; l._search_path = lambda: '/nowhere'; from dist_t2i.errors import run_command; "
    )
    script += "sys.exit(run_command(lambda: l.main(['up'])))"
    done = run([sys.executable, "-c", script], home)
    assert done.returncode == 2 and "Slurm is not installed here" in done.stderr and "apt-get install" in done.stderr
