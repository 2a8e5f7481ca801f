"""A real Slurm of four virtual nodes for the tests of this folder, and training jobs in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import STEP, Job
from ranks import ROOT
from slurm.local import INSTALL, LocalSlurm, missing_programs

SETTINGS = {"SlurmdTimeout": "10", "KillWait": "6"}

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
    if any("test_unattended" in item.nodeid for item in request.session.items):
        request.getfixturevalue("unattended")  # begins beside the tests that come before
    yield slurm
    slurm.down()
    assert slurm.leftovers() == [], "processes outlived the cluster"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    from runs import make_set

    return make_set(tmp_path_factory.mktemp("set"))


def _undisturbed(cluster, data, folder: Path, nodes: int, images: int) -> Job:
    overrides = (f"train.total_images={images}", "checkpoint.every_images=40")
    run = Job(cluster, folder / "run", data, *overrides, nodes=nodes).submit()
    run.wait_end()
    return run


@pytest.fixture(scope="session")
def whole4(cluster, data, tmp_path_factory) -> Job:
    """The run on four nodes that nothing disturbs."""
    return _undisturbed(cluster, data, tmp_path_factory.mktemp("whole4"), 4, 640)


@pytest.fixture(scope="session")
def whole2(cluster, data, tmp_path_factory) -> Job:
    """The run on two nodes that nothing disturbs."""
    return _undisturbed(cluster, data, tmp_path_factory.mktemp("whole2"), 2, 960)


@pytest.fixture(scope="session")
def whole1(cluster, data, tmp_path_factory) -> Job:
    """The run on one node that nothing disturbs."""
    return _undisturbed(cluster, data, tmp_path_factory.mktemp("whole1"), 1, 200)


@pytest.fixture(scope="session")
def projects(tmp_path_factory):
    """Makes copies of the project with a bug at the end of a step: `projects(lines)` is the copy's folder."""

    def make(*lines: str) -> Path:
        folder = tmp_path_factory.mktemp("project")
        for name in ("dist_t2i", "slurm", "tools", "configs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "pyproject.toml", folder)
        trainer = folder / "dist_t2i" / "trainer.py"
        text = trainer.read_text()
        assert text.count(STEP) == 1
        trainer.write_text(text.replace(STEP, STEP + "".join(f"        {line}\n" for line in lines)))
        return folder

    return make


@pytest.fixture(scope="session")
def slow(projects) -> Path:
    """A copy of the project whose steps take a while on any machine, so that there is time to disturb it."""
    return projects("time.sleep(0.15)")


@pytest.fixture
def job(cluster, data, slow, tmp_path):
    """Makes a job of this test: `job(*overrides, nodes=2, images=200, project=slow)`."""

    def make(*overrides: str, nodes: int = 2, images: int = 200, project: Path = slow) -> Job:
        total = f"train.total_images={images}"
        return Job(cluster, tmp_path / "run", data, total, *overrides, nodes=nodes, project=project)

    return make


@pytest.fixture(scope="session")
def unattended(tmp_path_factory, data, projects, slow) -> Iterator[dict[str, Future[Job]]]:
    """Jobs that need no hand, one after the other on a Slurm of their own while other tests run, see test_unattended."""
    from test_unattended import SCENARIOS

    slurm = LocalSlurm(tmp_path_factory.mktemp("beside"), settings=SETTINGS)
    slurm.up()
    pool = ThreadPoolExecutor(1)
    try:
        yield {
            scenario.__name__: pool.submit(
                scenario, slurm, tmp_path_factory.mktemp(scenario.__name__), data, projects, slow
            )
            for scenario in SCENARIOS
        }
    finally:
        pool.shutdown(cancel_futures=True, wait=False)
        slurm.down()
