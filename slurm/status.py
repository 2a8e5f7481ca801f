"""The state of a submitted run, from the files of the run folder and, if Slurm answers, from Slurm."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_t2i.errors import UserError
from dist_t2i.utils.files import read_json
from dist_t2i.utils.progress import duration
from slurm import attempts
from slurm.submission import FOLDER, JOB

_LIVE = set("PENDING CONFIGURING RUNNING COMPLETING REQUEUED REQUEUE_HOLD SUSPENDED STOPPED SIGNALING".split())
_NEEDED = ("job", "logs", "nodes", "ranks", "profile")  # keys of RUN/slurm/job.json that the commands read


class _Silent(Exception):
    """Slurm's controller does not answer."""


@dataclass(frozen=True)
class State:
    """A submitted run at one moment."""

    run: Path
    job: str
    queue: str = ""
    """Slurm's name of the job's state; "" when Slurm does not know the job (any more)."""
    where: str = ""
    """The nodes of the job, or the reason why the job waits."""
    progress: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: int = -1
    """Images seen at the last committed checkpoint; -1 without one."""
    submitted: float = 0.0
    """Unix time of the latest submission."""
    silent: bool = False
    """Whether Slurm is installed but does not answer, so that the job may be in any state."""

    @property
    def live(self) -> bool:
        """Whether the job is in the queue or runs."""
        return self.queue in _LIVE

    @property
    def begins(self) -> list[dict[str, Any]]:
        return [entry for entry in self.attempts if entry["event"] == "begin"]

    @property
    def ends(self) -> list[dict[str, Any]]:
        return [entry for entry in self.attempts if entry["event"] == "end"]

    @property
    def interruptions(self) -> tuple[int, int]:
        """Number of past attempts that a signal or Slurm ended, and number of those that failed."""
        ended = {(entry["job"], entry["restart"]): entry for entry in self.ends}
        over = self.begins if self.word in ("queued", "failed", "diverged") else self.begins[:-1]
        failed = sum(bool(ended.get((begin["job"], begin["restart"]), {}).get("kind")) for begin in over)
        return len(over) - failed, failed

    @property
    def word(self) -> str:
        """One of queued, running, finished, failed, diverged, cancelled, stopped, gone, unknown."""
        last = (self.ends or [{}])[-1]
        if self.live and self.queue not in ("RUNNING", "COMPLETING"):
            return "queued"
        # A progress file that is older than the latest attempt comes from an earlier attempt.
        newest = max([self.submitted, *(begin["time"] for begin in self.begins)])
        if self.progress.get("state") == "finished" and self.progress.get("updated", 0.0) >= newest:
            return "finished"
        if self.live:
            return "running"
        if self.queue == "CANCELLED" or (last.get("verdict") == "ended by Slurm" and last.get("reason") == "CANCELLED"):
            return "cancelled"
        if last.get("verdict") == "diverged":
            return "diverged"
        if last.get("verdict") == "given up" or self.queue in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
            return "failed"
        if self.progress.get("state") in ("finished", "stopped", "diverged"):
            return str(self.progress["state"])
        return "unknown" if self.silent else "gone"

    @property
    def why(self) -> str:
        """Why the run failed or diverged; "" when it did neither."""
        if self.word not in ("failed", "diverged"):
            return ""
        last = (self.ends or [{}])[-1]
        if self.word == "diverged":
            return attempts.divergence(self.run)
        if last.get("verdict") == "given up":
            return str(last.get("reason", ""))
        if self.queue == "TIMEOUT":
            return "the time limit came before the checkpoint was saved: raise signal_seconds in the profile"
        return f"Slurm ended the job: {self.queue}"


def submitted(run: Path) -> dict[str, Any]:
    """RUN/slurm/job.json. Raises UserError when the run was not submitted."""
    file = run / FOLDER / JOB
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        seeds = _seeds(run)
        hint = f"; it is an array: name one of its runs, such as {seeds[0]}" if seeds else ""
        raise UserError(f"{run} is not a submitted run: there is no {FOLDER}/{JOB} in it{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    missing = [name for name in _NEEDED if not isinstance(about, dict) or name not in about]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: submit the run again with --config")
    return about


def runs_under(folder: Path, *, missing_ok: bool = False) -> list[Path]:
    """The submitted runs in a folder: itself, or an array's seeds. Raises UserError without runs, unless
    `missing_ok`."""
    try:
        runs = [folder] if (folder / FOLDER / JOB).exists() else _seeds(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    if not runs and not missing_ok:
        submitted(folder)
    return runs


def _seeds(folder: Path) -> list[Path]:
    """The submitted runs of an array of seeds, sorted by seed."""
    named = {path: re.fullmatch(r"seed-(-?\d+)", path.name) for path in folder.glob("seed-*")}
    seeds = {path: int(match[1]) for path, match in named.items() if match and (path / FOLDER / JOB).exists()}
    return sorted(seeds, key=lambda path: seeds[path])


def look(run: Path) -> State:
    """The state of a submitted run now. Raises UserError when it was not submitted."""
    about = submitted(run)
    queue, where, silent = "", "", True
    with contextlib.suppress(_Silent):
        (queue, where), silent = ask_slurm(about["job"]), False
    state = (read_json(run / "progress.json"), attempts.read(run), attempts.newest_checkpoint(run))
    return State(run, about["job"], queue, where, *state, submitted=about.get("submitted", 0.0), silent=silent)


def ask_slurm(job: str) -> tuple[str, str]:
    """A job's state, and its nodes or why it waits; "" for an unknown job. Raises _Silent without an answer."""
    if queue := _output("squeue", "-h", "-j", job, "-o", "%T|%R"):
        state, _, where = queue.splitlines()[0].partition("|")
        return state, where.strip("()")
    if match := re.search(r"JobState=(\S+)", _output("scontrol", "-o", "show", "job", job)):
        return match[1], ""
    return (_output("sacct", "-n", "-X", "-P", "-j", job, "-o", "State").split() or [""])[0], ""


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        raise _Silent from None
    if done.returncode and attempts.AWAY.search(done.stderr):
        raise _Silent
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(state: State) -> str:
    """A description of the state in a few lines, for people."""
    head = f"{state.run}: {state.word}, job {state.job}"
    if state.word == "running":
        head += f", attempt {max(1, len(state.begins))}" + (f" on {state.where}" if state.where else "")
    elif state.word == "queued":
        head += f" ({state.where or state.queue})"
    lines = [head + (f" because {state.why}" if state.why else "")]
    if state.silent:
        lines.append("  Slurm does not answer; this state comes from the run folder and may be outdated")
    if progress := state.progress:
        images, total = progress.get("images", 0), progress.get("total_images", 0)
        rate = progress.get("images_per_second") or 0.0
        text = f"  {images:,} of {total:,} images" + (f" ({100 * images / total:.1f}%)" if total else "")
        if state.word == "running" and rate:
            text += f", {rate:,.3g} images/s, eta {duration((total - images) / rate)}"
        lines.append(f"{text}; updated {duration(max(0.0, time.time() - progress.get('updated', 0)))} ago")
    checkpoint = f"{state.checkpoint:,} images" if state.checkpoint >= 0 else "none yet"
    lines.append(f"  last committed checkpoint: {checkpoint}")
    counts = zip(("preempted or stopped", "failed"), state.interruptions, strict=True)
    if parts := [f"{what} {'once' if count == 1 else f'{count} times'}" for what, count in counts if count]:
        lines.append(f"  {' and '.join(parts)}, {len(state.begins)} attempts so far")
    if state.ends and state.ends[-1].get("kind") and state.word not in ("failed", "diverged"):
        lines.append(f"  last failure: {state.ends[-1]['reason']}")
    return "\n".join(lines)
