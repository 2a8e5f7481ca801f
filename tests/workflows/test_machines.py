"""Several machines without Slurm: the commands of docs/machines.md, on two network namespaces joined by a cable."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ranks import ROOT, free_port
from runs import RATES, Run, assert_same_state, environment, make_set, wait_for_run

pytestmark = pytest.mark.slow

RECIPES = {
    shlex.split(block)[0]: block.strip()
    for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "machines.md").read_text(), re.DOTALL | re.MULTILINE)
}
HOSTS = re.search(r"^```\n(node1.*?)^```", (ROOT / "docs" / "machines.md").read_text(), re.DOTALL | re.MULTILINE)


class Machines:
    """Two machines that share a disk. `networks` are the namespaces; without any, both are this machine on loopback."""

    def __init__(self, folder: Path, networks: list[str], first: str):
        self.folder, self._networks, self.first = folder, networks, first
        assert HOSTS is not None
        (folder / "hosts").write_text(HOSTS[1])

    def start(self, launcher: str, run: Run, **more: str) -> list[subprocess.Popen]:
        """The commands of `launcher` on both machines, exactly as in docs/machines.md up to the program's name."""
        recipe, separator, _ = RECIPES[launcher].partition("dist_t2i/train.py")
        assert separator
        if not self._networks:
            recipe = recipe.replace("29500", str(free_port()))
        command = recipe + shlex.join(run.command())
        started = []
        with run.folder.with_suffix(".out").open("ab") as out:
            for number in range(2):
                env = environment(FIRST=self.first, R=str(number), DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT), **more)
                words = [*self._on(number), "bash", "-c", f"exec {command}"]
                started.append(subprocess.Popen(words, env=env, cwd=self.folder, stdout=out, stderr=out))
        return started

    def _on(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self._networks[number]] if self._networks else []


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    networks = [f"t2i-{os.getpid()}-{number}" for number in range(2)]
    try:
        join(networks)
        yield Machines(folder, networks, "10.77.0.1")
    except (OSError, subprocess.CalledProcessError):  # not root, or no `ip`
        yield Machines(folder, [], "127.0.0.1")
    finally:
        with contextlib.suppress(OSError):
            for name in networks:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def join(networks: list[str]) -> None:
    """A cable between two new namespaces: 10.77.0.1 and 10.77.0.2."""
    for name in networks:
        ip("netns add", name)
        ip(f"-n {name} link set lo up")
    ip(f"link add cable0 netns {networks[0]} type veth peer name cable1 netns {networks[1]}")
    for number, name in enumerate(networks):
        ip(f"-n {name} address add 10.77.0.{number + 1}/24 dev cable{number}")
        ip(f"-n {name} link set cable{number} up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *" ".join(words).split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def together(tmp_path_factory, data) -> Run:
    """Two ranks on one machine."""
    run = Run(tmp_path_factory.mktemp("together") / "run", data, *RATES)
    assert run.train(ranks=2) == 0, run.output()
    return run


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    found = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in found if "RANK" in process.environ() and "--config" in process.cmdline()]


def end(launchers: list[subprocess.Popen]) -> None:
    for launcher in launchers:
        if launcher.poll() is None:
            left = psutil.Process(launcher.pid).children(recursive=True)
            launcher.kill()
            for process in left:
                process.kill()
        launcher.wait()


def test_torchrun_and_deepspeed_on_two_machines(machines, together, data, tmp_path):
    """A run that is stopped under one launcher and resumed under the other equals two ranks on one machine."""
    run = Run(tmp_path / "run", data, *RATES)
    launchers = machines.start("torchrun", run)
    try:
        wait_for_run(lambda: (run.folder / "metrics.jsonl").exists() and len(run.metrics()) >= 3, launchers[0], run)
        ranks_of(launchers[1])[0].send_signal(signal.SIGUSR2)
        assert [launcher.wait(240) for launcher in launchers] == [1, 1], run.output()
    finally:
        end(launchers)
    assert 0 < int(run.checkpoints()[-1][7:]) < 80
    assert "dist_t2i/training/trainer.py" not in run.output(), "torchrun shows a traceback of its own, and no other"
    launchers = machines.start("deepspeed", run)
    try:
        assert [launcher.wait(240) for launcher in launchers] == [0, 0], run.output()
    finally:
        end(launchers)
    assert "2 ranks on cpu" in run.output()
    assert_same_state(run, together)
    assert run.losses() == together.losses()


def test_a_machine_is_lost_and_the_other_goes_on_alone(machines, together, data, tmp_path):
    run = Run(tmp_path / "run", data, "checkpoint.every_images=8", *RATES)
    launchers = machines.start("deepspeed", run)
    try:
        wait_for_run(lambda: len(run.checkpoints()) >= 2, launchers[0], run)
        end(launchers[1:])
        assert launchers[0].wait(240) not in (0, 75), run.output()
    finally:
        end(launchers)
    assert run.checkpoints()[-1] < "images-000000080"
    assert run.train() == 0, run.output()
    assert_same_state(run, together, tolerance=1e-5)
