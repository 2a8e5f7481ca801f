"""Who may commit to a run: the process that claimed it last, and no other.

A job that was requeued may find that some process of its earlier attempt is still alive, cut off on a node that Slurm
has given up. Asking "am I still the one?" before a commit is not enough, for it may be answered before and acted on
after the new one has begun. So a claim is a folder, and every change that counts is a rename out of it or into it:

    RUN/checkpoints/.claim-JOB.RESTART.PID.BEGUN.XXXX.HOST/    of the process that may commit
      staging-XXXX/                a checkpoint being written; committed by a rename out of the folder
      removed-images-.../          a checkpoint being deleted; retention begins with a rename into it

Whoever claims a run renames the folders of all earlier claims away first, and only then looks for the newest checkpoint.
The file system does renames one after the other, so an earlier owner's commit came before (and is seen) or fails (its
source is gone). This is fencing (Kleppmann 2016, "How to do distributed locking") with the rename as the fence.

Attempts of one Slurm job are ordered by its restart count: a late one cannot claim over a newer one. Otherwise the last
one to claim wins, except over a process that is alive on this machine: that is somebody's running training.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_t2i.errors import ExitStatus, UserError
from dist_t2i.utils.processes import is_alive

_PREFIX = ".claim-"
_PATIENCE = 30.0
"""Seconds to wait for an earlier process of this machine that is about to end."""


class Superseded(UserError):
    """Another process has claimed the run; this one may change nothing any more."""

    status = ExitStatus.SUPERSEDED


@dataclass(frozen=True)
class Owner:
    """A process that claims a run: where it is, and which attempt of which Slurm job (`job` is "" without Slurm)."""

    host: str
    pid: int
    begun: int
    """Unix time at which the process began."""
    job: str = ""
    restart: int = 0

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        import psutil

        job = os.environ.get("SLURM_JOB_ID", "") if os.environ.get("SLURM_PROCID") else ""
        restart = os.environ.get("SLURM_RESTART_COUNT", "") if job else ""
        begun = int(psutil.Process().create_time())
        return cls(socket.gethostname(), os.getpid(), begun, job, int(restart) if restart.isdigit() else 0)

    @classmethod
    def of(cls, folder: Path) -> Owner | None:
        """Whose claim a folder is, by its name; None for any other folder."""
        fields = folder.name.removeprefix(_PREFIX).split(".", 5)
        with contextlib.suppress(ValueError):
            job, restart, pid, begun, _, host = fields
            return cls(host, int(pid), int(begun), "" if job == "0" else job, int(restart))
        return None

    def folder_name(self) -> str:
        """A new name for the folder of its claim."""
        return f"{_PREFIX}{self.job or 0}.{self.restart}.{self.pid}.{self.begun}.{secrets.token_hex(4)}.{self.host}"

    def __str__(self) -> str:
        job = f" (Slurm job {self.job}, attempt {self.restart + 1})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_newer(self, other: Owner) -> bool:
        """Whether it is a later attempt of the same Slurm job."""
        return bool(self.job) and self.job == other.job and self.restart > other.restart

    def is_alive_here(self) -> bool:
        """Whether it runs on this very machine; False where that cannot be seen."""
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return False
        return is_alive(self.pid, self.begun - 3, self.begun + 3)


class Claim:
    """The right to commit under `root` (RUN/checkpoints), until `lost`. Make one with `claim`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self._next_look = 0.0

    def lost(self) -> bool:
        """Whether another process has claimed the run, or the folder was deleted; looks at most once a second."""
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + 1.0
        return self.broken()

    def broken(self) -> bool:
        """The same, looking now."""
        try:
            os.stat(self.folder)
        except FileNotFoundError:
            return True
        except OSError:
            pass  # a file system that does not answer proves nothing
        return False

    def error(self) -> Superseded:
        """What to raise once it is lost."""
        owners = [str(owner) for _, owner in _claims(self.root)]
        by = f"by {owners[0]}" if owners else f"(or {self.root} was deleted)"
        return Superseded(f"this run was taken over {by}: this process, {Owner.this()}, leaves it alone and ends")

    def staging(self) -> Path:
        """A new folder in which to write what shall be committed. Raises OSError."""
        return Path(tempfile.mkdtemp(prefix="staging-", dir=self.folder))

    def commit(self, staging: Path, target: Path) -> None:
        """Put a staged file or folder in its place by one rename. Raises OSError, FileNotFoundError when it is lost."""
        os.replace(staging, target)

    def remove(self, folder: Path) -> None:
        """Delete a folder: gone as a whole by one rename, then piece by piece. Raises OSError."""
        doomed = self.folder / f"removed-{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def release(self) -> None:
        """Give it back."""
        shutil.rmtree(self.folder, ignore_errors=True)


def claim(root: Path, *, say: Callable[[str], None] = lambda message: None) -> Claim:
    """Claim the run whose checkpoints lie in `root`, which is made when it is not there.

    Waits for half a minute for an earlier process of this machine to end, and says so. Raises UserError when that one
    goes on, Superseded when a later attempt of the same Slurm job was here before, and OSError.
    """
    owner = Owner.this()
    root.mkdir(parents=True, exist_ok=True)
    _await_end(root, owner, say)
    folder = root / owner.folder_name()
    folder.mkdir()
    mine = Claim(root, folder)
    for other, its_owner in _claims(root):
        if its_owner.is_newer(owner):
            mine.release()
            raise Superseded(f"{its_owner} is a later attempt of this job: this one, {owner}, ends")
        if other != folder:
            _fence(other)
    for leftover in root.glob(".fenced-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return mine


def _fence(other: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.rename(other, other.with_name(other.name.replace(_PREFIX, ".fenced-")))


def _await_end(root: Path, owner: Owner, say: Callable[[str], None]) -> None:
    end, said = time.monotonic() + _PATIENCE, False
    while True:
        alive = [other for _, other in _claims(root) if other.is_alive_here() and not owner.is_newer(other)]
        if not alive:
            return
        if time.monotonic() > end:
            raise UserError(
                f"the run in {root.parent} is being trained by {alive[0]}.\n"
                f"Stop that first (kill -USR2 {alive[0].pid} saves and stops it), or choose another run.folder=..."
            )
        if not said:
            say(f"waiting for {alive[0]} to end, which has this run")
            said = True
        time.sleep(0.2)


def _claims(root: Path) -> list[tuple[Path, Owner]]:
    """The folders of claims and their owners."""
    found = [(folder, Owner.of(folder)) for folder in sorted(root.glob(f"{_PREFIX}*"))]
    return [(folder, owner) for folder, owner in found if owner is not None]
