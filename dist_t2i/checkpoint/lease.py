"""Which process may commit to a run: the one that acquired the run's lease last.

A requeued job may find a process of its earlier attempt alive on a node that Slurm has given up. A check before each
commit is not enough: another process may acquire the lease in between. So a lease is a folder, and every change that
counts is a rename into this folder or out of it:

    RUN/checkpoints/.claim-JOB.RESTART.PID.BEGUN.XXXX.HOST/    the lease of the process that may commit
      staging-XXXX/                a checkpoint being written; committed by a rename out of the folder
      removed-images-.../          a checkpoint being deleted; deletion begins with a rename into the folder

A process that acquires the lease first renames the folders of all earlier leases, then looks for the newest checkpoint.
So a commit under an earlier lease either comes before and is seen, or fails because its staging folder no longer exists:
fencing (Kleppmann 2016, "How to do distributed locking") with the rename as the fence. An earlier attempt of a Slurm job
(by its restart count) cannot take the lease from a later one. Otherwise the last process wins, except over a live
process on this machine, which is somebody's running training.
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
    """The process that holds a lease, and its attempt of a Slurm job (`job` is "" without Slurm)."""

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
        """The owner that the name of a lease's folder states; None for any other folder."""
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
        """Whether this is a later attempt of the same Slurm job."""
        return bool(self.job) and self.job == other.job and self.restart > other.restart

    def is_alive_here(self) -> bool:
        """Whether this is another live process on this machine; False where that cannot be seen."""
        other = self.host == socket.gethostname() and self.pid != os.getpid()
        return other and is_alive(self.pid, self.begun - 3, self.begun + 3)


@dataclass
class Lease:
    """The right to commit under `root` (RUN/checkpoints) until it is `lost`. `acquire` returns one."""

    root: Path
    folder: Path
    _next_check: float = 0.0

    def lost(self) -> bool:
        """Whether another process has acquired the lease, or the folder was deleted; checks at most once a second."""
        if time.monotonic() < self._next_check:
            return False
        self._next_check = time.monotonic() + 1.0
        return self.broken()

    def broken(self) -> bool:
        """The same as `lost`, checked now."""
        try:
            os.stat(self.folder)
        except OSError as error:
            return isinstance(error, FileNotFoundError)  # a file system that does not answer proves nothing
        return False

    def error(self) -> Superseded:
        """The exception to raise once the lease is lost."""
        owners = [str(owner) for _, owner in _leases(self.root)]
        by = f"by {owners[0]}" if owners else f"(or {self.root} was deleted)"
        return Superseded(f"this run was taken over {by}: this process, {Owner.this()}, leaves it unchanged and ends")

    def staging(self) -> Path:
        """A new folder for a checkpoint; one rename out of it commits, and fails once the lease is lost. Raises OSError."""
        folder = self.folder / f"staging-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o755)
        return folder

    def remove(self, folder: Path) -> None:
        """Delete a folder: one rename makes it invisible, then its files are deleted. Raises OSError."""
        removed = self.folder / f"removed-{folder.name}"
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def release(self) -> None:
        """Give up the lease."""
        shutil.rmtree(self.folder, ignore_errors=True)


def acquire(root: Path, *, say: Callable[[str], None] = lambda message: None) -> Lease:
    """Acquire the lease of the run whose checkpoints are in `root`, a folder that is created if missing.

    Waits up to 30 seconds for an earlier process on this machine to end, and announces that with `say`. Raises UserError if
    that process is still alive then, Superseded if a later attempt of the same Slurm job holds the lease, and OSError.
    """
    owner = Owner.this()
    root.mkdir(parents=True, exist_ok=True)
    _await_end(root, owner, say)
    lease = Lease(root, root / owner.folder_name())
    lease.folder.mkdir()
    for folder, holder in _leases(root):
        if holder.is_newer(owner):
            lease.release()
            raise Superseded(f"{holder} is a later attempt of this job: this attempt, {owner}, ends")
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
                f"Stop that process first (kill -USR2 {alive[0].pid} saves and stops it), or choose another run.folder=..."
            )
        if not announced:
            say(f"waiting for {alive[0]} to end: it holds this run's lease")
        announced = True
        time.sleep(0.2)


def _leases(root: Path) -> list[tuple[Path, Owner]]:
    return [(folder, owner) for folder in sorted(root.glob(f"{_PREFIX}*")) if (owner := Owner.of(folder))]
