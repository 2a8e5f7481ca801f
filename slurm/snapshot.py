"""A copy of the code in the run folder, so that a job that starts again next week runs what was submitted today.

RUN/code/            the project's files as git knows them, changes and new files included
RUN/code.json        git revision, whether anything differed from it, and when the copy was made
RUN/code.diff        what differed
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from dist_t2i.errors import UserError
from dist_t2i.utils.environment import git_state

ROOT = Path(__file__).resolve().parent.parent
CODE = "code"
MARKS = ("slurm/rank.py", "slurm/after.py", "dist_t2i/train.py")
"""What a job starts of a copy: one without them is none."""
_PARTS = ("dist_t2i", "slurm", "tools", "configs", "pyproject.toml")


def take(run: Path) -> Path:
    """Copy the code that runs here into `run`, in place of an older copy; the copy's folder. Raises UserError."""
    target, aside = run / CODE, run / f".{CODE}.new"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        for source in _files():
            place = aside / source.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        about = {**git_state(ROOT), "copied": time.strftime("%Y-%m-%d %H:%M:%S"), "from": str(ROOT)}
        (run / "code.json").write_text(json.dumps(about, indent=1) + "\n")
        (run / "code.diff").write_bytes(os.fsencode(_git("diff", "HEAD") or ""))
    except OSError as error:
        raise UserError(f"the code cannot be copied to {target}: {error.strerror or error}") from error
    return target


def keep(run: Path) -> bool:
    """Whether `run` has a copy from before: its own, or that of the array of seeds that it was submitted in. Raises OSError."""
    mine, arrays = run / CODE, run.parent / CODE
    if not _is_copy(mine) and run.name.startswith("seed-") and _is_copy(arrays):
        shutil.copytree(arrays, mine, dirs_exist_ok=True)
    return _is_copy(mine)


def _is_copy(folder: Path) -> bool:
    """Whether it is the code: `code` is the name of many folders, and a copy may have been swept in part."""
    return all((folder / part).is_file() for part in MARKS)


def _files() -> list[Path]:
    """The project's files: those that git tracks or would add; without git, those of the known folders."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *_PARTS)
    if listed:
        found = [ROOT / name for name in listed.split("\0") if name]
    else:
        parts = [ROOT / name for name in _PARTS if (ROOT / name).exists()]
        found = [path for part in parts for path in ([part] if part.is_file() else part.rglob("*"))]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def _git(*arguments: str) -> str | None:
    """What git prints, whatever its encoding (`os.fsencode` gives the bytes); None outside of a checkout."""

    def said(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True)
        return os.fsdecode(done.stdout)

    try:
        if Path(said("rev-parse", "--show-toplevel").removesuffix("\n")).resolve() != ROOT:
            return None  # a checkout around us, not ours
        return said(*arguments)
    except (OSError, subprocess.SubprocessError):
        return None
