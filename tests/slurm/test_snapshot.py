"""The copy of the code that a job runs: its files and their origin."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from slurm import snapshot


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A small project to copy, on a path with a space."""
    folder = tmp_path / "my project"
    for name in snapshot.MARKS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("pass\n")
    (folder / "dist_t2i" / "__pycache__").mkdir()
    (folder / "dist_t2i" / "__pycache__" / "train.pyc").write_bytes(b"\0")
    (folder / "data").mkdir()
    (folder / "data" / "big").write_text("no code")
    monkeypatch.setattr(snapshot, "ROOT", folder.resolve())
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_of_a_dirty_checkout(project, tmp_path):
    """The copy contains changed and new files, but no deleted ones; the difference is recorded byte by byte."""
    (project / ".gitignore").write_text("__pycache__\n")
    (project / "dist_t2i" / "old.py").write_text("pass\n")
    git(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "first")
    latin = b"# caf\xe9, and no UTF-8\n"
    (project / "dist_t2i" / "train.py").write_bytes(latin)
    (project / "dist_t2i" / "n\u00e4w.py").write_text("pass\n")
    (project / "dist_t2i" / "old.py").unlink()
    run = tmp_path / "a run"
    copy = snapshot.take(run)
    assert files(copy) == {*snapshot.MARKS, "dist_t2i/n\u00e4w.py"}
    assert (copy / "dist_t2i" / "train.py").read_bytes() == latin
    assert b"+" + latin in (run / "code.diff").read_bytes()
    about = json.loads((run / "code.json").read_text())
    assert about["dirty"] and len(about["revision"]) == 40
    (project / "dist_t2i" / "train.py").write_text("changed since\n")
    assert snapshot.keep(run) and (copy / "dist_t2i" / "train.py").read_bytes() == latin


def test_without_git(project, tmp_path):
    run = tmp_path / "run"
    assert files(snapshot.take(run)) == set(snapshot.MARKS)
    assert "revision" not in json.loads((run / "code.json").read_text())
    assert (run / "code.diff").read_bytes() == b""


def test_only_a_copy_of_the_code_is_kept(project, tmp_path):
    """Incomplete copies, and folders of the same name next to the run, are no copies. A seed uses its array's copy."""
    run = tmp_path / "run"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my.txt").write_text("other work")
    assert not snapshot.keep(run) and not (run / "code").exists()
    (snapshot.take(run) / "slurm" / "rank.py").unlink()
    assert not snapshot.keep(run)
    array = tmp_path / "array"
    snapshot.take(array)
    (array / "seed-5" / "code").mkdir(parents=True)
    assert snapshot.keep(array / "seed-5") and files(array / "seed-5" / "code") == set(snapshot.MARKS)
    shutil.rmtree(array / "code")
    assert snapshot.keep(array / "seed-5")
