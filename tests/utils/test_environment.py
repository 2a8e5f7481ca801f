"""environment.json: where a run was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from dist_t2i.utils import environment


def test_the_environment_says_what_a_result_depends_on():
    found = json.loads(json.dumps(environment.describe()))
    assert found["packages"]["torch"] == torch.__version__
    assert found["processor"]["cores"] >= 1
    assert found["processor"]["memory_bytes"] > 1e8
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_git_state_tells_a_dirty_tree(tmp_path: Path):
    assert environment.git_state(tmp_path) == {}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = environment.git_state(tmp_path)
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert environment.git_state(tmp_path)["dirty"] is True
