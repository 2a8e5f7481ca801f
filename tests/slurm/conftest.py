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


@pytest.fixture(scope="session")
def slow(projects) -> Path:
    """A copy of the project whose steps take a while on any machine, so that there is time to disturb it."""
    return projects(
        "dist_t2i/trainer.py",
        "        self.images += self.batch\n",
        "        self.images += self.batch; time.sleep(0.15)\n",
    )


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
