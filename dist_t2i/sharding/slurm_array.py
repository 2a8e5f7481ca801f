"""Writes shards in the tasks of a Slurm array, submitted with submitit. Each task writes a part of the shards, and the
submitting process waits for all tasks.

The submitting process makes the plan and sends it to the tasks, so the content of a shard does not depend on the task
that writes it. Each task writes the result of a shard to a file in OUT, and the submitting process reads these files.
It cannot use the states of the jobs, because clusters without accounting do not report them. All machines must see the
pictures, OUT and the log folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.write_set import write_here
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.shard_writer import Results, ShardPlan
from dist_t2i.storage.folders import WORK, Folder
from dist_t2i.utils.progress import Progress

_POLL = 1.0
_LINGER = 20.0
"""After a job has ended, its result files may take this many seconds to appear on a shared disk."""


@dataclass(frozen=True)
class SlurmArray:
    """How to submit: the values of the options `--slurm-...`, which --help explains. `folder` receives submitit's
    logs."""

    cluster: str
    tasks: int
    folder: Path
    partition: str
    account: str
    minutes: int
    memory: int
    parallel: int
    extra: Sequence[tuple[str, Any]]

    def write(self, folder: Folder, plans: Sequence[ShardPlan], options: Options, progress: Progress) -> Results:
        """Writes the shards in tasks; returns their results by name. Raises DataError if some were not written."""
        for plan in plans:
            folder.remove(f"{WORK}/{plan.name}.json")
        parts = [part for number in range(self.tasks) if (part := list(plans[number :: self.tasks]))]
        jobs = self._executor(options).map_array(write_here, [folder] * len(parts), parts, [options] * len(parts))
        print(f"submitted {len(jobs)} tasks: {', '.join(str(job.job_id) for job in jobs[:3])} ...", flush=True)
        try:
            return self._wait(folder, plans, jobs, progress)
        except KeyboardInterrupt:
            for job in jobs:
                with contextlib.suppress(Exception):
                    job.cancel()
            raise

    def _executor(self, options: Options) -> Any:
        import submitit

        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise DataError("--slurm: this machine has no sbatch; submit from a login node of the cluster")
        try:
            executor = submitit.AutoExecutor(folder=str(self.folder), cluster=self.cluster)
        except RuntimeError as error:
            raise DataError(f"--slurm-cluster {self.cluster}: {error}") from error
        executor.update_parameters(name="dist_t2i-shard", timeout_min=self.minutes)
        if self.cluster == "slurm":
            named = {"partition": self.partition, "account": self.account}
            extra = {name: value for name, value in named.items() if value} | dict(self.extra)
            executor.update_parameters(cpus_per_task=options.processes, mem_gb=self.memory)
            executor.update_parameters(slurm_array_parallelism=self.parallel, slurm_additional_parameters=extra)
        return executor

    def _wait(self, folder: Folder, plans: Sequence[ShardPlan], jobs: Sequence[Any], progress: Progress) -> Results:
        waiting = {plan.name: plan for plan in plans}
        results: Results = {}
        done, ended_at = 0, 0.0
        while True:
            for name in list(waiting):
                with contextlib.suppress(FileNotFoundError):
                    results[name] = json.loads(folder.read(f"{WORK}/{name}.json"))
                    done += len(waiting.pop(name).items)
            progress.show(done)
            if not waiting:
                return results
            if not all(self._ended(job) for job in jobs):
                ended_at = 0.0
            elif not ended_at:
                ended_at = time.monotonic()
            elif time.monotonic() - ended_at > (_LINGER if self.cluster == "slurm" else _POLL):
                raise DataError(self._complaint(sorted(waiting), jobs))
            time.sleep(_POLL)

    def _ended(self, job: Any) -> bool:
        """Whether a task has ended, with success or failure."""
        with contextlib.suppress(Exception):
            if job.done(force_check=True):
                return True
        if self.cluster != "slurm" or not shutil.which("squeue"):
            return False
        queue = subprocess.run(["squeue", "-h", "-j", str(job.job_id), "-o", "%i"], capture_output=True, text=True)
        return not queue.stdout.strip()

    def _complaint(self, missing: Sequence[str], jobs: Sequence[Any]) -> str:
        reasons = []
        for job in jobs:
            with contextlib.suppress(Exception):
                if (error := job.exception()) is not None:
                    last_line = str(error).strip().rpartition("\n")[2].strip()
                    reasons.append(f"\n  {job.job_id}: {last_line or type(error).__name__}")
        return (
            f"{len(missing)} shards were not written ({', '.join(missing[:5])}); logs: {self.folder}"
            f"{''.join(reasons[:5])}\nRun the same command again to resume"
        )
