"""The lease decides which process may commit to a run: the process that acquired the lease last.

When Slurm requeues a job, a process of the job's earlier attempt may still be alive on a node that Slurm no longer
reaches. Checking the lease before each commit is not enough, because another process may acquire the lease between the
check and the commit. Therefore a lease is a folder: a checkpoint is committed by a rename out of the lease's folder,
and deleted by a rename into this folder:

    RUN/checkpoints/.claim-JOB.RESTART.PID.BEGUN.XXXX.HOST/    the lease of the process that may commit
      staging-XXXX/                a checkpoint being written; a rename out of the folder commits it
      removed-images-.../          a checkpoint being deleted, after a rename into the folder

A process that acquires the lease first renames the folders of all earlier leases and then looks for the newest
checkpoint. A commit under an earlier lease that happens before this rename is found by the new process. A later commit
fails, because the staging folder no longer exists under the old path. The rename is therefore a fence in the sense of
Kleppmann (2016, "How to do distributed locking").

An earlier attempt of a Slurm job cannot take the lease from a later attempt; Slurm's restart count orders the attempts.
Otherwise the process that started last gets the lease, with one exception: if an earlier process is alive on the same
machine, that process keeps the lease, and the new process raises UserError.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_t2i.errors import ExitStatus, UserError
from dist_t2i.utils.processes import is_alive

_PREFIX = ".claim-"
_PATIENCE = 30.0  # seconds to wait for an earlier process on this machine to end


class Superseded(UserError):
    """Another process holds the run's lease; this process may no longer change the run."""

    status = ExitStatus.SUPERSEDED


@dataclass(frozen=True)
class Owner:
    """A process that holds a lease, with the Slurm job and attempt of the process (`job` is "" without Slurm)."""

    host: str
    pid: int
    begun: int
    """Unix time at which the process began."""
    job: str = ""
    restart: int = 0

    @classmethod
    def this(cls) -> Owner:
        """The owner that describes this process."""
        import psutil

        job = os.environ.get("SLURM_JOB_ID", "") if os.environ.get("SLURM_PROCID") else ""
        restart = os.environ.get("SLURM_RESTART_COUNT", "") if job else ""
        begun = int(psutil.Process().create_time())
        return cls(socket.gethostname(), os.getpid(), begun, job, int(restart) if restart.isdigit() else 0)

    @classmethod
    def of(cls, folder: Path) -> Owner | None:
        """The owner that the name of a lease's folder encodes, or None if the folder is not a lease."""
        fields = folder.name.removeprefix(_PREFIX).split(".", 5)
        with contextlib.suppress(ValueError):
            job, restart, pid, begun, _, host = fields
            return cls(host, int(pid), int(begun), "" if job == "0" else job, int(restart))
        return None

    def folder_name(self) -> str:
        """A unique name for the folder of this owner's lease."""
        return f"{_PREFIX}{self.job or 0}.{self.restart}.{self.pid}.{self.begun}.{secrets.token_hex(4)}.{self.host}"

    def __str__(self) -> str:
        job = f" (Slurm job {self.job}, attempt {self.restart + 1})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_newer(self, other: Owner) -> bool:
        """Whether this owner is a later attempt of the Slurm job that `other` belongs to."""
        return bool(self.job) and self.job == other.job and self.restart > other.restart

    def is_alive_here(self) -> bool:
        """Whether this owner is another process that is known to be alive on this machine."""
        other = self.host == socket.gethostname() and self.pid != os.getpid()
        return other and is_alive(self.pid, self.begun - 3, self.begun + 3)


@dataclass
class Lease:
    """The right to commit under `root` (RUN/checkpoints). The lease is `lost` when another process acquires it."""

    root: Path
    folder: Path
    _next_check: float = 0.0

    def lost(self) -> bool:
        """Whether another process has acquired the lease or deleted its folder; looks at most once a second."""
        if time.monotonic() < self._next_check:
            return False
        self._next_check = time.monotonic() + 1.0
        return self.broken()

    def broken(self) -> bool:
        """Like `lost`, but looks at the folder in every call."""
        try:
            os.stat(self.folder)
        except OSError as error:
            return isinstance(error, FileNotFoundError)  # the lease may be valid despite another error
        return False

    def error(self) -> Superseded:
        """The exception that a process raises after the lease is lost."""
        owners = [str(owner) for _, owner in _leases(self.root)]
        by = f"by {owners[0]}" if owners else f"(or {self.root} was deleted)"
        return Superseded(f"this run was taken over {by}: this process, {Owner.this()}, ends and changes nothing")

    def staging(self) -> Path:
        """A new folder for a checkpoint.

        A rename of this folder commits the checkpoint, and fails if the lease is lost. Raises OSError.
        """
        folder = self.folder / f"staging-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o755)
        return folder

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint: a rename moves its folder out of `root` before the files are deleted. Raises OSError."""
        removed = self.folder / f"removed-{folder.name}"
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def release(self) -> None:
        """Give up the lease."""
        shutil.rmtree(self.folder, ignore_errors=True)


def acquire(root: Path, *, say: Callable[[str], None] = lambda message: None) -> Lease:
    """Acquire the lease of the run that has its checkpoints in `root`, a folder that is created if it is missing.

    If an earlier process of the run is alive on this machine, waits up to 30 seconds for its end, and announces the
    wait with `say`. Raises UserError if the earlier process is still alive after the wait, Superseded if a later
    attempt of this Slurm job holds the lease, and OSError if the folder cannot be written.
    """
    owner = Owner.this()
    root.mkdir(parents=True, exist_ok=True)
    _await_end(root, owner, say)
    lease = Lease(root, root / owner.folder_name())
    lease.folder.mkdir()
    for folder, holder in _leases(root):
        if holder.is_newer(owner):
            lease.release()
            raise Superseded(f"{holder} is a later attempt of this job, so this attempt, {owner}, ends")
        if folder != lease.folder:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, folder.with_name(folder.name.replace(_PREFIX, ".fenced-")))
    for fenced in root.glob(".fenced-*"):
        shutil.rmtree(fenced, ignore_errors=True)
    return lease


def _await_end(root: Path, owner: Owner, say: Callable[[str], None]) -> None:
    deadline, announced = time.monotonic() + _PATIENCE, False
    while alive := [other for _, other in _leases(root) if other.is_alive_here() and not owner.is_newer(other)]:
        if time.monotonic() > deadline:
            raise UserError(
                f"the run in {root.parent} is being trained by {alive[0]}.\n"
                f"Stop that process (`kill -USR2 {alive[0].pid}` saves a checkpoint), or choose another run.folder=..."
            )
        if not announced:
            say(f"waiting for {alive[0]}, which holds this run's lease, to end")
        announced = True
        time.sleep(0.2)


def _leases(root: Path) -> list[tuple[Path, Owner]]:
    return [(folder, owner) for folder in sorted(root.glob(f"{_PREFIX}*")) if (owner := Owner.of(folder))]
