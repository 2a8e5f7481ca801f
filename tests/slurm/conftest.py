"""A real Slurm of four virtual nodes for the tests of this folder, and training jobs in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from scenarios import LANES, Background

from jobs import STEP, Job
from ranks import ROOT
from slurm.local import INSTALL, LocalSlurm, missing_programs

SETTINGS = {"KillWait": "6"}

SMOOTH = "\n\nF.leaky_relu = lambda x, slope, inplace=False: slope * x + (1 - slope) * F.softplus(x)\n"

NEEDED = "DIST_T2I_NEEDS_SLURM"
"""Set where a missing Slurm is a failure (in CI), not a reason to skip."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, request):
    missing = missing_programs()
    if missing:
        message = f"the tests of jobs need Slurm ({', '.join(missing)} missing); {INSTALL}"
        if os.environ.get(NEEDED):
            pytest.fail(message)
        pytest.skip(message)
    slurm = LocalSlurm(tmp_path_factory.mktemp("cluster"), settings=SETTINGS)
    slurm.up()
    request.getfixturevalue("background")  # starts in the background
    yield slurm
    slurm.down()
    assert slurm.leftovers() == [], "processes outlived the cluster"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    from runs import make_set

    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="session")
def projects(tmp_path_factory):
    """Makes copies of the project with a bug at the end of a step: `projects(lines)` returns the copy's folder.

    In a `smooth` copy the leaky ReLUs have no kink. Sometimes round-off moves an activation across the kink; a
    gradient's norm then jumps by 1e-4, which no bound on round-off allows.
    """

    def make(*lines: str, smooth: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("project")
        for name in ("dist_t2i", "slurm", "tools", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", folder)
        trainer = folder / "dist_t2i" / "training" / "trainer.py"
        text = trainer.read_text()
        assert text.count(STEP) == 1
        bug = "".join(f"        {line}\n" for line in ("import time", "from pathlib import Path", *lines))
        trainer.write_text(text.replace(STEP, STEP + bug))
        if smooth:
            with (folder / "dist_t2i" / "models" / "layers.py").open("a") as layers:
                layers.write(SMOOTH)
        return folder

    return make


@pytest.fixture(scope="session")
def slow(projects) -> Path:
    """A copy of the project with slow steps on any machine, so that tests have time to disturb a run."""
    return projects("time.sleep(0.15)")


@pytest.fixture
def job(cluster, data, slow, tmp_path):
    """Makes a job of this test: `job(*overrides, nodes=2, images=200, project=slow)`."""

    def make(*overrides: str, nodes: int = 2, images: int = 200, project: Path = slow) -> Job:
        total = f"train.total_images={images}"
        return Job(cluster, tmp_path / "run", data, total, *overrides, nodes=nodes, project=project)

    return make


@pytest.fixture(scope="session")
def background(request, tmp_path_factory, data, projects, slow) -> Iterator[Background]:
    """Runs the scenarios that the selected tests need; each lane of scenarios has a Slurm of its own."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    running = Background(tmp_path_factory.mktemp, data, projects, slow)
    clusters = []
    try:
        for lane in LANES:
            scenarios = [scenario for scenario in lane if scenario.__name__ in wanted]
            if scenarios:
                clusters.append(LocalSlurm(tmp_path_factory.mktemp("background"), settings=SETTINGS))
                clusters[-1].up()
                running.begin(clusters[-1], scenarios)
        yield running
    finally:
        running.stop()
        for slurm in clusters:
            slurm.down()


def _of(name: str):
    @pytest.fixture(scope="session", name=name)
    def result(cluster, background):
        """The result of the scenario of this name. `cluster` checks that Slurm is installed."""
        return background.ended(name)

    return result


for _scenario in chain(*LANES):
    globals()[f"_{_scenario.__name__}"] = _of(_scenario.__name__)
