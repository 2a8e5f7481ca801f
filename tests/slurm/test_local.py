"""Slurm on one machine, as the README shows it, and what it says when something is wrong."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranks import ROOT
from runs import CONFIG

pytestmark = pytest.mark.slurm


def run(words: list[str], env: dict, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


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
    submit += [f"run.folder={tmp_path / 'run'}", "train.total_images=160"]
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
        assert "160 of 160 images" in run(look, home, slow).stdout
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
    ):
        done = run([*words, *more], home)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_where_slurm_is_missing_it_says_what_to_install(home, tmp_path):
    script = (
        "import slurm.local as l, sys; l._search_path = lambda: '/nowhere'; from dist_t2i.errors import run_command; "
    )
    script += "sys.exit(run_command(lambda: l.main(['up'])))"
    done = run([sys.executable, "-c", script], home)
    assert done.returncode == 2 and "Slurm is not installed here" in done.stderr and "apt-get install" in done.stderr
