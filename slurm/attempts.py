"""What became of a run's attempts, one line each in RUN/attempts.jsonl, and why one failed.

An attempt is one start of a Slurm job: the first, and one more each time the job is requeued.

    {"event": "begin", "job": "12", "restart": 0, "time": ..., "nodes": 4, "ranks": 4, "images": 0}
    {"event": "end", "job": "12", "restart": 0, "time": ..., "status": 75, "verdict": "requeued", "images": 640, ...}
    {"event": "cancel", "job": "12", "time": ...}

`begin` comes from rank 0, `end` from the end of the batch script (after.py), `cancel` from whoever is about to cancel the
job, and `cancel failed` when Slurm would not; a begin without an end was cut off by Slurm,
or with its node. A rank that fails leaves RUN/failures/JOB.RESTART.rank-RANK.json.

Python's own library only: the end of the batch script runs outside of containers and virtual environments.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

ATTEMPTS = "attempts.jsonl"
FAILURES = "failures"
_CONSEQUENCE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|timed? ?out|TCPStore|DistBackendError", re.I
)
"""Messages of ranks that have only lost another one."""
AWAY = re.compile(r"contact|connect|timed out|communication|authentication|munge", re.IGNORECASE)
"""What Slurm's commands say when their controller is away, or refuses a credential that took too long or came twice, as on a
busy machine: nothing was done."""


def note(run: Path, **entry: object) -> None:
    """Add a line, with the time. Errors of the file system are swallowed: a note is no reason to lose a run."""
    try:
        with open(run / ATTEMPTS, "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")
    except OSError:
        pass


def read(run: Path) -> list[dict]:
    """The lines, oldest first; one that was cut is left out."""
    try:
        lines = (run / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry:
            found.append(entry)
    return found


def is_cancelled(run: Path, job: str) -> bool:
    """Whether someone has set out to cancel the job, by the name that Slurm's commands have for it."""
    said = [
        entry["event"] for entry in read(run) if str(entry["event"]).startswith("cancel") and entry.get("job") == job
    ]
    return said[-1:] == ["cancel"]


def newest_checkpoint(run: Path) -> int:
    """Images seen at the newest committed checkpoint; -1 without any."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(name[7:]) for name in names if re.fullmatch(r"images-\d+", name)), default=-1)


def note_failure(run: Path, job: str, restart: int, rank: int, kind: str, message: str, *, own: bool = False) -> None:
    """Leave word of what a rank has failed of; of its `own` where that is known, whatever words it uses."""
    said = {"rank": rank, "kind": kind, "message": message[:4000], "own": own, "time": time.time()}
    try:
        (run / FAILURES).mkdir(exist_ok=True)
        (run / FAILURES / f"{job}.{restart}.rank-{rank:05d}.json").write_text(json.dumps(said) + "\n")
    except OSError:
        pass


def cause_of_failure(run: Path, job: str, restart: int) -> tuple[str, str]:
    """Why an attempt failed, for people, and in a form that compares: the first rank that failed of something else
    than of losing another rank. Two empty texts when no rank has left word."""
    found = []
    for file in sorted((run / FAILURES).glob(f"{job}.{restart}.rank-*.json")):
        try:
            found.append(json.loads(file.read_text()))
        except (OSError, ValueError):
            continue
    own = [one for one in found if one.get("own") or not _CONSEQUENCE.search(one["kind"] + " " + one["message"])]
    if not own:
        return "", ""  # a rank that only lost another one: what became of that one says more
    first = min(own, key=lambda one: one["time"])
    line = first["message"].strip().splitlines()[0] if first["message"].strip() else ""
    comparable = f"{first['kind']}: {re.sub(r'[0-9]+', '#', line)}"
    return f"rank {first['rank']}: {first['kind']}: {line}", comparable


def hang(run: Path, since: float) -> tuple[str, str]:
    """The watchdog's verdict if it gave one after the time `since`, as in `cause_of_failure`."""
    try:
        verdict = json.loads((run / "ranks" / "hang.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", ""
    if verdict.get("time", 0) < since:
        return "", ""
    ranks = ", ".join(
        f"rank {one['rank']}" + (f" on {one['node']}" if one.get("node") else "") for one in verdict["guilty"]
    )
    return f"hung: {ranks or 'every rank waits for the others'}; stacks in {run / 'ranks' / 'hang.json'}", "hung"
