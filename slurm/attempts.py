"""Records the attempts of a run in RUN/attempts.jsonl, and finds out why an attempt failed.

An attempt is one start of a Slurm job; each requeue leads to another attempt.

    {"event": "begin", "job": "12", "restart": 0, "time": ..., "nodes": 4, "ranks": 4, "images": 0}
    {"event": "end", "job": "12", "restart": 0, "time": ..., "status": 75, "verdict": "requeued", "images": 640, ...}
    {"event": "cancel", "job": "12", "time": ...}

Rank 0 writes `begin`, and after.py, at the end of the batch script, writes `end`. `submit.py cancel` writes `cancel`
before it calls scancel, and `cancel failed` if scancel fails. An attempt without `end` was killed by Slurm or lost with
its node. A rank that fails writes RUN/failures/JOB.RESTART.rank-RANK.json. This module uses only the standard library
of Python 3.7 (after.py says why).
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
"""Errors after which a Slurm command can be repeated, because the command had no effect. The controller did not answer,
or (on a busy machine) refused a late or repeated credential.
"""
_CONSEQUENCE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|timed? ?out|TCPStore|DistBackendError", re.I
)
"""Messages of ranks that failed only because another rank failed."""


def note(run: Path, **entry: object) -> None:
    """Append a line, with the time. Errors of the file system are ignored, because they must not end the run."""
    with contextlib.suppress(OSError), open(run / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")


def read(run: Path) -> list[dict]:
    """The entries, oldest first; skips incomplete lines."""
    entries = []
    with contextlib.suppress(OSError):
        for line in (run / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "event" in entry]


def is_cancelled(run: Path, job: str) -> bool:
    """Whether the user has cancelled the job. Slurm's commands know the job by the name `job` (see `slurm_name` in
    after.py)."""
    events = [entry["event"] for entry in read(run) if entry.get("job") == job]
    return [event for event in events if str(event).startswith("cancel")][-1:] == ["cancel"]


def newest_checkpoint(run: Path) -> int:
    """Images seen at the newest committed checkpoint; -1 without a checkpoint."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(name[7:]) for name in names if re.fullmatch(r"images-\d+", name)), default=-1)


def note_failure(run: Path, job: str, restart: int, rank: int, kind: str, message: str, *, own: bool = False) -> None:
    """Records why a rank failed. `own`: the rank failed by itself, even if the message looks like a lost connection."""
    failure = {"rank": rank, "kind": kind, "message": message[:4000], "own": own, "time": time.time()}
    with contextlib.suppress(OSError):
        (run / FAILURES).mkdir(exist_ok=True)
        (run / FAILURES / f"{job}.{restart}.rank-{rank:05d}.json").write_text(json.dumps(failure) + "\n")


def cause_of_failure(run: Path, job: str, restart: int) -> tuple[str, str]:
    """Why an attempt failed: a text for people, and a second text by which equal failures are recognized.

    The cause is the first failure that does not follow from the failure of another rank. Both texts are empty if no
    rank recorded such a failure.
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


def divergence(run: Path) -> str:
    """How the training of a run diverged, from RUN/diverged.json (dist_t2i/checkpoint/divergence.py)."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        last = json.loads((run / "diverged.json").read_text(encoding="utf-8"))["divergences"][-1]
        return f"training diverged at {last['at']:,} images, since {last['since']:,}: {last['reason']}"
    return "training diverged: see log.txt"


def hang(run: Path, since: float) -> tuple[str, str]:
    """The hang that the watchdog found after the Unix time `since`, as two texts like those of `cause_of_failure`."""
    file = run / "ranks" / "hang.json"
    verdict = {}
    with contextlib.suppress(OSError, ValueError):
        verdict = json.loads(file.read_text(encoding="utf-8"))
    if not verdict or verdict.get("time", 0) < since:
        return "", ""
    nodes = ((rank["rank"], rank.get("node")) for rank in verdict["guilty"])
    ranks = ", ".join(f"rank {rank}" + (f" on {node}" if node else "") for rank, node in nodes)
    return f"hung: {ranks or 'every rank waits for the others'}; stacks in {file}", "hung"
