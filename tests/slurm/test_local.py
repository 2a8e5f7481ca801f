"""Slurm on one machine: options, permissions, and error messages."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import new_user, node_processes, until
from ranks import ROOT
from slurm.local import LocalSlurm

pytestmark = pytest.mark.slurm


def run(words: list[str], env: dict, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def home(tmp_path) -> dict[str, str]:

    return new_user(tmp_path)


def test_what_is_wrong_is_said(cluster, home):
    words = [sys.executable, "-m", "slurm.local"]
    for more, said in (
        (["run", "squeue"], "Slurm is not up; start it: python -m slurm.local up"),
        (["run"], "`run` needs a command"),
        (["up", "--nodes", "0"], "at least one"),
        (["up", "--folder", "/proc/nowhere"], "/proc/nowhere"),
    ):
        done = run([*words, *more], home)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_in_a_folder_with_a_space_under_another_name(cluster, home, tmp_path):
    """Options may follow the command. The user is the one who runs the command, not the one that the environment names.
    Job numbers are never reused, because `cancel` of an older run would then end another job."""
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
    """All users can reach the daemons' ports, but commands need a secret of the user who started the daemons."""
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
    until(lambda: "RUNNING" in one.command("squeue", "-h", "-o", "%T"))
    os.kill(node_processes(one, "n1")["slurmd"][0], signal.SIGSTOP)
    one.down()
    assert not one.running() and one.leftovers() == []


def test_where_slurm_is_missing_it_says_what_to_install(home, tmp_path):
    script = (
        "import slurm.local as l, sys; l._search_path = lambda: '/nowhere'; from dist_t2i.errors import run_command; "
    )
    script += "sys.exit(run_command(lambda: l.main(['up'])))"
    done = run([sys.executable, "-c", script], home)
    assert done.returncode == 2 and "Slurm is not installed here" in done.stderr and "apt-get install" in done.stderr
