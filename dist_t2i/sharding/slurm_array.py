"""Shards written by a Slurm array through submitit: each task writes its share, this process waits and finishes the set.

The plan is made here and its parts travel with the tasks, so a shard is the same whoever wrote it. What a task did is
known by the notes that it leaves beside the shards, not by the job's state, which clusters without accounting cannot
tell. Pictures, OUT and the log folder must be where all machines see them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.write_set import write_here
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.shard_writer import Planned
from dist_t2i.storage.folders import WORK, Folder
from dist_t2i.utils.progress import Progress

_POLL = 1.0
_LINGER = 20.0
"""Seconds that notes may take to be seen on a shared disk after their job has ended."""


@dataclass(frozen=True)
class Cluster:
    """How to submit. `cluster`: `slurm`, or `local` for plain processes of this machine."""

    cluster: str = "slurm"
    tasks: int = 16
    folder: Path = Path("slurm-logs")
    partition: str = ""
    account: str = ""
    minutes: int = 24 * 60
    memory_gb: int = 8
    at_once: int = 256
    extra: dict[str, Any] = field(default_factory=dict)
    """Further parameters of sbatch."""

    def write(
        self, place: Folder, shards: Sequence[Planned], options: Options, progress: Progress
    ) -> dict[str, dict[str, Any]]:
        """Write the shards in tasks; their results by name. Raises DataError when a task leaves shards unwritten."""
        for shard in shards:
            place.remove(f"{WORK}/{shard.name}.json")
        parts = [part for number in range(self.tasks) if (part := list(shards[number :: self.tasks]))]
        executor = self._executor(options)
        jobs = executor.map_array(write_here, [place] * len(parts), parts, [options] * len(parts))
        print(f"submitted {len(jobs)} tasks: {', '.join(str(job.job_id) for job in jobs[:3])} ...", flush=True)
        try:
            return _wait(place, shards, jobs, progress, self)
        except KeyboardInterrupt:
            for job in jobs:
                with contextlib.suppress(Exception):
                    job.cancel()
            raise

    def _executor(self, options: Options) -> Any:
        import submitit

        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise DataError("--slurm: there is no sbatch on this machine; submit from a login node of the cluster")
        try:
            executor = submitit.AutoExecutor(folder=str(self.folder), cluster=self.cluster)
        except RuntimeError as error:
            raise DataError(f"--slurm-cluster {self.cluster}: {error}") from error
        executor.update_parameters(name="dist_t2i-shard", timeout_min=self.minutes)
        if self.cluster == "slurm":
            chosen = {"partition": self.partition, "account": self.account}
            executor.update_parameters(
                cpus_per_task=options.processes,
                mem_gb=self.memory_gb,
                slurm_array_parallelism=self.at_once,
                slurm_additional_parameters={name: value for name, value in chosen.items() if value} | self.extra,
            )
        return executor


def _wait(
    place: Folder, shards: Sequence[Planned], jobs: Sequence[Any], progress: Progress, cluster: Cluster
) -> dict[str, dict[str, Any]]:
    waiting = {shard.name: shard for shard in shards}
    results: dict[str, dict[str, Any]] = {}
    done, over_since = 0, 0.0
    while True:
        for name in list(waiting):
            with contextlib.suppress(FileNotFoundError):
                results[name] = json.loads(place.read(f"{WORK}/{name}.json"))
                done += len(waiting.pop(name).items)
        progress.show(done)
        if not waiting:
            return results
        if not all(_over(job, cluster.cluster) for job in jobs):
            over_since = 0.0
        elif not over_since:
            over_since = time.monotonic()
        elif time.monotonic() - over_since > (_LINGER if cluster.cluster == "slurm" else _POLL):
            raise DataError(_complaint(waiting, jobs, cluster))
        time.sleep(_POLL)


def _over(job: Any, cluster: str) -> bool:
    """Whether a task of a `slurm` or `local` cluster has ended, well or not."""
    with contextlib.suppress(Exception):
        if job.done(force_check=True):
            return True
    if cluster != "slurm" or not shutil.which("squeue"):
        return False
    asked = subprocess.run(["squeue", "-h", "-j", str(job.job_id), "-o", "%i"], capture_output=True, text=True)
    return not asked.stdout.strip()


def _complaint(waiting: dict[str, Planned], jobs: Sequence[Any], cluster: Cluster) -> str:
    reasons = []
    for job in jobs:
        with contextlib.suppress(Exception):
            error = job.exception()
            if error is not None:
                lines = [line for line in str(error).splitlines() if line.strip()]
                reasons.append(f"\n  {job.job_id}: {lines[-1].strip() if lines else type(error).__name__}")
    return (
        f"{len(waiting)} shards were not written ({', '.join(sorted(waiting)[:5])}); logs: {cluster.folder}"
        f"{''.join(reasons[:5])}\nthe same command goes on from here"
    )
