"""The code on every rank of a job: runs `dist_t2i/train.py` and records a failure.

submitit starts this code, one srun task per rank, from the copy in the run folder. submitit's own handling of signals
is not used, because it saves only on rank 0 and counts every preemption of a short job as a time-out. Instead, all
ranks save together and end (dist_t2i/distributed/preemption.py), and after.py decides whether the job is queued again.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from dist_t2i.distributed.preemption import StopFlag
from dist_t2i.errors import ExitStatus, UserError
from dist_t2i.utils.processes import ignore_stop_signals
from slurm import attempts


@dataclass(frozen=True)
class TrainJob:
    """Trains one run with train.py and `arguments`. Each rank calls the object; the call does not return."""

    run: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        stop = StopFlag(announce=rank == 0).install()  # before the long imports, so that no signal is lost
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit would log a line in every process
        job, restart = os.environ.get("SLURM_JOB_ID", "0"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        run = Path(self.run)
        if rank == 0:
            nodes, ranks = (int(os.environ.get(name, "1")) for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"))
            images = attempts.newest_checkpoint(run)
            attempts.note(run, event="begin", job=job, restart=restart, nodes=nodes, ranks=ranks, images=images)
        status: int = ExitStatus.FAILED
        try:
            from dist_t2i import train

            status = train.main(list(self.arguments), stop=stop)
        except UserError as error:
            status = error.status
            if not error.reported_by_main:
                print(f"error: {error}", file=sys.stderr, flush=True)
                attempts.note_failure(run, job, restart, rank, type(error).__name__, str(error), own=True)
        except Exception as error:
            traceback.print_exc()
            attempts.note_failure(run, job, restart, rank, type(error).__name__, str(error))
        ignore_stop_signals()  # srun signals the others when one rank ends, which would change their exit statuses
        sys.exit(status)  # not `return`: submitit would pickle the result
