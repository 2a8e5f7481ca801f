"""A copy of the code in the run folder, so that every attempt of a job runs the code that was submitted.

RUN/code/            the project's files: those that git tracks or would add, with their uncommitted changes
RUN/code.json        git revision, whether files differed from it, and when the copy was made
RUN/code.diff        the differences from the revision
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
"""The files of the copy that a job starts. A folder that lacks one of these files is not a copy."""
_PARTS = ("dist_t2i", "slurm", "tools", "configs", "pyproject.toml")


def take(run: Path) -> Path:
    """Copies the running code into `run`, replaces an older copy, and returns the copy's folder. Raises UserError."""
    target, new = run / CODE, run / f".{CODE}.new"
    try:
        shutil.rmtree(new, ignore_errors=True)
        for file in _files():
            copy = new / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
        about = {**git_state(ROOT), "copied": time.strftime("%Y-%m-%d %H:%M:%S"), "from": str(ROOT)}
        (run / "code.json").write_text(json.dumps(about, indent=1) + "\n")
        (run / "code.diff").write_bytes(os.fsencode(_git("diff", "HEAD") or ""))
    except OSError as error:
        raise UserError(f"the code cannot be copied to {target}: {error.strerror or error}") from error
    return target


def keep(run: Path) -> bool:
    """Whether `run` has an earlier copy. A run in an array of seeds first gets the array's copy. Raises OSError."""
    copy, of_array = run / CODE, run.parent / CODE
    if not _is_copy(copy) and run.name.startswith("seed-") and _is_copy(of_array):
        shutil.copytree(of_array, copy, dirs_exist_ok=True)
    return _is_copy(copy)


def _is_copy(folder: Path) -> bool:
    """Whether `folder` is a complete copy of the code. False for an incomplete copy and for any other folder."""
    return all((folder / part).is_file() for part in MARKS)


def _files() -> list[Path]:
    """The files of `_PARTS` that git tracks or would add; without git, all files of `_PARTS`."""
    if listing := _git("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *_PARTS):
        files = [ROOT / name for name in listing.split("\0") if name]
    else:
        files = [path for part in _PARTS for path in (ROOT / part, *(ROOT / part).rglob("*"))]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def _git(*arguments: str) -> str | None:
    """git's output, in any encoding (`os.fsencode` gives the bytes); None if ROOT is not the root of a checkout."""

    def output(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True)
        return os.fsdecode(done.stdout)

    try:
        top = Path(output("rev-parse", "--show-toplevel").removesuffix("\n")).resolve()
        return output(*arguments) if top == ROOT else None
    except (OSError, subprocess.SubprocessError):
        return None
