"""The last step of a job's batch script: decides, from how the training ended, whether the job is queued again.

    python3 after.py --run RUN --status STATUS [--log FILE]

| the training ended with | the job |
|---|---|
| 0, finished | is done |
| 75, stopped by a signal with a checkpoint saved (time limit, preemption, `scancel --signal=USR2`) | is queued again |
| any status, if Slurm or `submit.py cancel` has ended the job, or a later attempt or process owns the run (76) | is left to Slurm |
| 78, training diverged | is not queued again: it would diverge again |
| any other status | is queued again, unless it failed the same way three times in a row without a new checkpoint |

Before the decision, after.py asks Slurm for the job's state, so that a job that its user has cancelled is not queued
again. This file may run under the system's Python. This module therefore imports only the standard library of Python
3.7, dist_t2i.errors and attempts.py. After 20 attempts in a row without a new checkpoint, the job is not queued again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_t2i.errors import ExitStatus
from slurm import attempts

SAME_FAILURES = 3
"""A job is not queued again after this many equal failures in a row without a new checkpoint."""
FRUITLESS = 20
"""A job is not queued again after this many attempts of any kind in a row without a new checkpoint."""
_BEFORE_HANDLERS = {128 + number for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
"""Exit statuses of a rank that was stopped before it had installed its signal handlers, and so had nothing to save."""
_SLURM_SECONDS = 300.0  # how long to wait for Slurm's controller


def main() -> int:
    """Returns the exit status of the batch script: 0 if the job finished, is queued again, or was ended by Slurm."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `scontrol requeue` sends SIGTERM to this script
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    name = slurm_name(job)
    verdict, reason, kind = decide(options.run, options.status, options.log, job, restart)
    entry = {"event": "end", "job": job, "restart": restart, "status": options.status, "kind": kind}
    entry["images"] = attempts.newest_checkpoint(options.run)
    attempts.note(options.run, **entry, verdict=verdict, reason=reason)
    print(f"job {job}, attempt {restart + 1}: {verdict}{': ' if reason else ''}{reason}", flush=True)
    if verdict == "requeued" and _ask("scontrol", "requeue", name) is None:  # on success Slurm ends this script
        verdict, reason = "given up", f"Slurm did not queue the job again (scontrol requeue {name}); {reason}"
        attempts.note(options.run, **entry, verdict=verdict, reason=reason)
        print(reason, flush=True)
    elif verdict == "requeued" and attempts.is_cancelled(options.run, name):
        # The user cancelled the job between `decide` and the requeue. The requeue has undone the cancellation, so
        # cancel again.
        attempts.note(options.run, **entry, verdict="ended by Slurm", reason="CANCELLED")
        _ask("scancel", name)
    return options.status if verdict in ("given up", "diverged") else 0


def decide(run: Path, status: int, log: Path | None, job: str, restart: int) -> tuple[str, str, str]:
    """The verdict (finished, requeued, given up, diverged, ended by Slurm, superseded), its reason, the failure's kind or
    ""."""
    state, current = job_state(slurm_name(job))
    if status == ExitStatus.SUPERSEDED or current not in (restart, None):
        return "superseded", "a later attempt owns the run", ""  # another attempt or process took over the run
    if status == ExitStatus.FINISHED:
        return "finished", "", ""
    if state not in ("RUNNING", ""):
        return "ended by Slurm", state, ""
    if attempts.is_cancelled(run, slurm_name(job)):
        return "ended by Slurm", "CANCELLED", ""
    if status == ExitStatus.DIVERGED:
        return "diverged", attempts.divergence(run), "diverged"
    if status == ExitStatus.STOPPED:
        reason, kind = "stopped by a signal, checkpoint saved", ""
    elif status in _BEFORE_HANDLERS:
        reason, kind = "stopped by a signal before training began", ""
    else:
        reason, kind = cause(run, status, log, job, restart)
    before, images = fruitless(run), attempts.newest_checkpoint(run)
    if kind and [entry.get("kind") for entry in before[-SAME_FAILURES + 1 :]] == [kind] * (SAME_FAILURES - 1):
        return "given up", f"it failed {SAME_FAILURES} times in a row without a new checkpoint: {reason}", kind
    if len(before) + 1 >= FRUITLESS:
        checkpoint = f"made no new checkpoint (the newest is at {images:,} images)"
        return "given up", f"{FRUITLESS} attempts in a row {checkpoint}: {reason}", kind
    return "requeued", reason, kind


def fruitless(run: Path) -> list[dict]:
    """The latest consecutive attempts that ended at the newest checkpoint and were queued again, oldest first."""
    sought = (attempts.newest_checkpoint(run), "requeued")
    ends = [entry for entry in reversed(attempts.read(run)) if entry["event"] == "end"]
    same = itertools.takewhile(lambda entry: (entry.get("images"), entry.get("verdict")) == sought, ends)
    return list(same)[::-1]


def cause(run: Path, status: int, log: Path | None, job: str, restart: int) -> tuple[str, str]:
    """Why the training failed: a text for people, and a second text by which equal failures are recognized."""
    begins = [entry["time"] for entry in attempts.read(run) if entry["event"] == "begin"]
    reason, kind = attempts.hang(run, since=begins[-1] if begins else 0.0)
    if not kind:
        reason, kind = attempts.cause_of_failure(run, job, restart)
    if not kind:
        name = f"killed by {signal.Signals(status - 128).name}" if 128 < status < 128 + 65 else f"exit status {status}"
        reason, kind = f"{name}{srun_error(log)}", f"status {status}"
    return reason, kind


def srun_error(log: Path | None) -> str:
    """srun's message about the first task that failed in this attempt, such as ` (n2: task 1: Killed)`, or "".

    A killed task is preferred to tasks that exited. The latter lost their connection to the killed task, but srun may
    list them first.
    """
    try:
        with open(log or "", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    attempt = re.split(r"^job \S+, attempt \d+: ", text, flags=re.MULTILINE)[-1]
    lines = re.findall(r"srun: error: (\S+: tasks? \S+: .+)", attempt)
    killed = [line for line in lines if "Exited with exit code" not in line]
    return f" ({(killed or lines)[0].strip()})" if lines else ""


def slurm_name(job: str) -> str:
    """The job's name for Slurm's commands. A task of an array is named ARRAY_TASK: ARRAY alone means all tasks."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else job


def job_state(job: str) -> tuple[str, int | None]:
    """The job's state, such as RUNNING, and its number of restarts; "" and None if Slurm does not answer."""
    text = _ask("scontrol", "-o", "show", "job", job) or ""
    state, restarts = re.search(r"JobState=(\S+)", text), re.search(r"Restarts=(\d+)", text)
    return state[1] if state else "", int(restarts[1]) if restarts else None


def _ask(*command: str) -> str | None:
    """The output of a Slurm command, or None if it fails; repeats the command while the controller does not answer."""
    end = time.monotonic() + _SLURM_SECONDS
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        if not attempts.AWAY.search(done.stderr) or time.monotonic() > end:
            print(done.stderr.strip(), file=sys.stderr, flush=True)
            return None
        time.sleep(2.0)


if __name__ == "__main__":
    sys.exit(main())
