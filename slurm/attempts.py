"""The record of a run's attempts, RUN/attempts.jsonl, and why an attempt failed.

An attempt is one start of a Slurm job: the first, and one more each time the job is requeued.

    {"event": "begin", "job": "12", "restart": 0, "time": ..., "nodes": 4, "ranks": 4, "images": 0}
    {"event": "end", "job": "12", "restart": 0, "time": ..., "status": 75, "verdict": "requeued", "images": 640, ...}
    {"event": "cancel", "job": "12", "time": ...}

Rank 0 writes `begin`, and the end of the batch script (after.py) `end`; `submit.py cancel` writes `cancel` before it
calls scancel, and `cancel failed` when scancel fails. A begin without an end was cut off by Slurm or the loss of a node.
A rank that fails writes RUN/failures/JOB.RESTART.rank-RANK.json. Standard library only, Python 3.7 (see after.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

ATTEMPTS = "attempts.jsonl"
FAILURES = "failures"
AWAY = re.compile(r"contact|connect|timed out|communication|authentication|munge", re.IGNORECASE)
"""Errors of Slurm's commands that changed nothing: the controller is away, or refuses a credential that is late or
repeated, as on a busy machine."""
_CONSEQUENCE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|timed? ?out|TCPStore|DistBackendError", re.I
)
"""Messages of ranks that failed only because another rank did."""


def note(run: Path, **entry: object) -> None:
    """Append a line, with the time. Ignores errors of the file system: a note is no reason to lose a run."""
    with contextlib.suppress(OSError), open(run / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")


def read(run: Path) -> list[dict]:
    """The entries, oldest first, without lines that were cut off."""
    entries = []
    with contextlib.suppress(OSError):
        for line in (run / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "event" in entry]


def is_cancelled(run: Path, job: str) -> bool:
    """Whether the user has cancelled the job, which has the name that Slurm's commands take."""
    events = [entry["event"] for entry in read(run) if entry.get("job") == job]
    return [event for event in events if str(event).startswith("cancel")][-1:] == ["cancel"]


def newest_checkpoint(run: Path) -> int:
    """Images seen at the newest committed checkpoint; -1 without any."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(name[7:]) for name in names if re.fullmatch(r"images-\d+", name)), default=-1)


def note_failure(run: Path, job: str, restart: int, rank: int, kind: str, message: str, *, own: bool = False) -> None:
    """Records why a rank failed. `own`: the cause is not the loss of another rank, whatever the message says."""
    failure = {"rank": rank, "kind": kind, "message": message[:4000], "own": own, "time": time.time()}
    with contextlib.suppress(OSError):
        (run / FAILURES).mkdir(exist_ok=True)
        (run / FAILURES / f"{job}.{restart}.rank-{rank:05d}.json").write_text(json.dumps(failure) + "\n")


def cause_of_failure(run: Path, job: str, restart: int) -> tuple[str, str]:
    """Why an attempt failed: a text for people, and one that is equal for equal failures.

    The cause is the first failure that is not the loss of another rank. Two empty texts when no rank recorded one.
    """
    failures = []
    for file in (run / FAILURES).glob(f"{job}.{restart}.rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            failures.append(json.loads(file.read_text()))
    causes = [
        each for each in failures if each.get("own") or not _CONSEQUENCE.search(f"{each['kind']} {each['message']}")
    ]
    if not causes:
        return "", ""
    first = min(causes, key=lambda failure: (failure["time"], failure["rank"]))
    line = (first["message"].strip().splitlines() or [""])[0]
    return f"rank {first['rank']}: {first['kind']}: {line}", f"{first['kind']}: {re.sub(r'[0-9]+', '#', line)}"


def hang(run: Path, since: float) -> tuple[str, str]:
    """The watchdog's verdict after the Unix time `since`, as the two texts of `cause_of_failure`."""
    file = run / "ranks" / "hang.json"
    verdict = {}
    with contextlib.suppress(OSError, ValueError):
        verdict = json.loads(file.read_text(encoding="utf-8"))
    if not verdict or verdict.get("time", 0) < since:
        return "", ""
    nodes = ((rank["rank"], rank.get("node")) for rank in verdict["guilty"])
    ranks = ", ".join(f"rank {rank}" + (f" on {node}" if node else "") for rank, node in nodes)
    return f"hung: {ranks or 'every rank waits for the others'}; stacks in {file}", "hung"
