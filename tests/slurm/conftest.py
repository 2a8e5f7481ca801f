"""A real Slurm of four virtual nodes for the tests of this folder, and training jobs in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from slurm.local import INSTALL, LocalSlurm, missing_programs

NEEDED = "DIST_T2I_NEEDS_SLURM"
"""Set where a missing Slurm is a failure (in CI), not a reason to skip."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    missing = missing_programs()
    if missing:
        message = f"the tests of jobs need Slurm ({', '.join(missing)} missing); {INSTALL}"
        if os.environ.get(NEEDED):
            pytest.fail(message)
        pytest.skip(message)
    slurm = LocalSlurm(tmp_path_factory.mktemp("cluster"), settings={"SlurmdTimeout": "10"})
    slurm.up()
    yield slurm
    slurm.down()
    assert slurm.leftovers() == [], "processes outlived the cluster"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    from runs import make_set

    return make_set(tmp_path_factory.mktemp("set"))


def _undisturbed(cluster, data, folder: Path, nodes: int, images: int):
    from jobs import Job

    overrides = (f"train.total_images={images}", "checkpoint.every_images=40")
    run = Job(cluster, folder / "run", data, *overrides, nodes=nodes).submit()
    run.wait_end()
    return run


@pytest.fixture(scope="session")
def whole4(cluster, data, tmp_path_factory):
    """The run on four nodes that nothing disturbs."""
    return _undisturbed(cluster, data, tmp_path_factory.mktemp("whole4"), 4, 600)


@pytest.fixture(scope="session")
def whole2(cluster, data, tmp_path_factory):
    """The run on two nodes that nothing disturbs."""
    return _undisturbed(cluster, data, tmp_path_factory.mktemp("whole2"), 2, 480)


@pytest.fixture(scope="session")
def whole1(cluster, data, tmp_path_factory):
    """The run on one node that nothing disturbs."""
    return _undisturbed(cluster, data, tmp_path_factory.mktemp("whole1"), 1, 200)


@pytest.fixture
def job(cluster, data, slow, tmp_path):
    """Makes a job of this test: `job(*overrides, nodes=2, images=200, project=slow)`."""
    from jobs import Job

    def make(*overrides: str, nodes: int = 2, images: int = 200, project: Path = slow) -> Job:
        total = f"train.total_images={images}"
        return Job(cluster, tmp_path / "run", data, total, *overrides, nodes=nodes, project=project)

    return make


@pytest.fixture(scope="session")
def slow(projects) -> Path:
    """A copy of the project whose steps take a while on any machine, so that there is time to disturb it."""
    from jobs import STEP

    return projects("dist_t2i/trainer.py", STEP, f"{STEP}        time.sleep(0.15)\n")


@pytest.fixture(scope="session")
def projects(tmp_path_factory):
    """Makes copies of the project with a bug in it: `projects(file, old, new)` is the copy's folder."""
    from ranks import ROOT

    def make(file: str, old: str, new: str) -> Path:
        folder = tmp_path_factory.mktemp("project")
        for name in ("dist_t2i", "slurm", "tools", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", folder)
        text = (folder / file).read_text()
        assert text.count(old) == 1, (file, old)
        (folder / file).write_text(text.replace(old, new))
        return folder

    return make
