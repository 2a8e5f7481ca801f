"""The end of a job's batch script: look at how the training ended, and queue the job again or not.

    python3 after.py --run RUN --status STATUS [--log FILE]

| the training ended with | the job |
|---|---|
| 0, finished | is done |
| 75, stopped by a signal with a checkpoint saved (time limit, preemption, `scancel --signal=USR2`) | is queued again |
| anything, but by Slurm's books the job does not run any more (`scancel`, `scontrol requeue`), or a later attempt does, \
or `submit.py cancel` is about to end it | is Slurm's business |
| any other status | is queued again, unless it failed the same way three times in a row without a new checkpoint |

Deciding here, and not in a rank, keeps it apart from whatever has happened to the ranks; asking Slurm for the job's
state first keeps a job that its user has cancelled from coming back to life. Python's own library only.
"""

from __future__ import annotations

import argparse
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
"""Failures of one kind in a row, without a new checkpoint, after which a job is not queued again."""
FRUITLESS = 20
"""Attempts of any kind in a row without a new checkpoint, after which it is not either."""
_BEFORE_HANDLERS = {128 + number for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
"""Statuses of a rank that a stop signal met before it could save: it had nothing to save yet."""
_SLURM_SECONDS = 300.0
"""How long Slurm's controller may be away."""


def main() -> int:
    """Returns the batch script's exit status: 0 when the run is finished, goes on, or was ended by Slurm."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `scontrol requeue` sends it before it has returned
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--log", type=Path)
    chosen = parser.parse_args()
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    verdict, reason, kind = decide(chosen.run, chosen.status, chosen.log, job, restart)
    entry = {"event": "end", "job": job, "restart": restart, "status": chosen.status, "kind": kind}
    entry["images"] = attempts.newest_checkpoint(chosen.run)
    attempts.note(chosen.run, **entry, verdict=verdict, reason=reason)
    print(f"job {job}, attempt {restart + 1}: {verdict}{': ' if reason else ''}{reason}", flush=True)
    if verdict == "requeued" and not requeue(known_as(job)):
        verdict, reason = "given up", f"Slurm did not queue it again (scontrol requeue {known_as(job)}); {reason}"
        attempts.note(chosen.run, **entry, verdict=verdict, reason=reason)
        print(reason, flush=True)
    elif verdict == "requeued" and attempts.is_cancelled(chosen.run, known_as(job)):
        # It came between the look above and the requeue, which has undone it.
        attempts.note(chosen.run, **entry, verdict="ended by Slurm", reason="CANCELLED")
        _ask("scancel", known_as(job))
    return chosen.status if verdict == "given up" else 0


def decide(run: Path, status: int, log: Path | None, job: str, restart: int) -> tuple[str, str, str]:
    """What to do (`finished`, `requeued`, `given up`, `ended by Slurm`, `superseded`), why, and the kind of failure, which compares."""
    state, current = job_state(known_as(job))
    if status == ExitStatus.SUPERSEDED or current not in (restart, None):
        return "superseded", "a later attempt has the run", ""  # we are on a node that Slurm has given up
    if status == ExitStatus.FINISHED:
        return "finished", "", ""
    if state not in ("RUNNING", ""):
        return "ended by Slurm", state, ""
    if attempts.is_cancelled(run, known_as(job)):
        return "ended by Slurm", "CANCELLED", ""
    if status == ExitStatus.STOPPED:
        reason, kind = "stopped by a signal, checkpoint saved", ""
    elif status in _BEFORE_HANDLERS:
        reason, kind = "stopped by a signal before it had begun", ""
    else:
        reason, kind = cause(run, status, log, job, restart)
    before, images = fruitless(run), attempts.newest_checkpoint(run)
    if kind and [entry.get("kind") for entry in before[-SAME_FAILURES + 1 :]] == [kind] * (SAME_FAILURES - 1):
        return "given up", f"{SAME_FAILURES} times in a row, without a new checkpoint: {reason}", kind
    if len(before) + 1 >= FRUITLESS:
        return (
            "given up",
            f"{FRUITLESS} attempts in a row without a new checkpoint (at {images:,} images): {reason}",
            kind,
        )
    return "requeued", reason, kind


def fruitless(run: Path) -> list[dict]:
    """The latest attempts that ended at the newest checkpoint of now, oldest first: since then nothing was won."""
    images = attempts.newest_checkpoint(run)
    found: list[dict] = []
    for entry in reversed([entry for entry in attempts.read(run) if entry["event"] == "end"]):
        if entry.get("images") != images or entry.get("verdict") != "requeued":
            break
        found.insert(0, entry)
    return found


def cause(run: Path, status: int, log: Path | None, job: str, restart: int) -> tuple[str, str]:
    """Why the training failed, for people, and in a form that compares."""
    begun = [entry["time"] for entry in attempts.read(run) if entry["event"] == "begin"]
    reason, kind = attempts.hang(run, since=begun[-1] if begun else 0.0)
    if not kind:
        reason, kind = attempts.cause_of_failure(run, job, restart)
    if not kind:
        name = f"killed by {signal.Signals(status - 128).name}" if 128 < status < 128 + 65 else f"exit status {status}"
        reason, kind = f"{name}{said_by_srun(log)}", f"status {status}"
    return reason, kind


def said_by_srun(log: Path | None) -> str:
    """srun's word on which task of this attempt has ended how, such as ` (n2: task 1: Killed)`.

    A killed task takes the others with it, which exit of a lost connection and may be named first or last.
    """
    try:
        with open(log or "", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    attempt = re.split(r"^job \S+, attempt \d+: ", text, flags=re.MULTILINE)[-1]
    found = re.findall(r"srun: error: (\S+: tasks? \S+: .+)", attempt)
    killed = [line for line in found if "Exited with exit code" not in line]
    return f" ({(killed or found)[0].strip()})" if found else ""


def known_as(job: str) -> str:
    """What Slurm's commands call this job: one task of an array has the array's own number, which means all of them there."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else job


def job_state(job: str) -> tuple[str, int | None]:
    """Such as RUNNING, COMPLETING, CANCELLED, and how often it was started again; "" and None when Slurm does not say."""
    said = _ask("scontrol", "-o", "show", "job", job) or ""
    state, restarts = re.search(r"JobState=(\S+)", said), re.search(r"Restarts=(\d+)", said)
    return state[1] if state else "", int(restarts[1]) if restarts else None


def requeue(job: str) -> bool:
    """Queue the job again; Slurm then ends this script. False when it would not."""
    return _ask("scontrol", "requeue", job) is not None


def _ask(*command: str) -> str | None:
    """What a command of Slurm's prints; tried again while the controller is away."""
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
