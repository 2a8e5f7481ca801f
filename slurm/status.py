"""How a submitted run is doing: from Slurm where it can be asked, and from the run folder's own files always."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_t2i.errors import UserError
from dist_t2i.utils.progress import duration
from slurm import attempts
from slurm.submission import FOLDER, JOB

_LIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
}


class _Silent(Exception):
    """Slurm's controller does not answer."""


@dataclass(frozen=True)
class State:
    """A submitted run at this moment. `queue` is Slurm's word for the job, "" when it does not know it (any more)."""

    run: Path
    job: str
    queue: str = ""
    where: str = ""
    """Nodes, or why it waits."""
    progress: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: int = -1
    """Images seen at the last committed checkpoint; -1 without one."""
    submitted: float = 0.0
    """Unix time of the latest submission."""
    silent: bool = False
    """Whether Slurm is here and does not answer: the job may be in any state."""

    @property
    def live(self) -> bool:
        """Whether the job is in the queue or runs."""
        return self.queue in _LIVE

    @property
    def ends(self) -> list[dict[str, Any]]:
        return [entry for entry in self.attempts if entry["event"] == "end"]

    @property
    def begun(self) -> int:
        """Attempts that have begun."""
        return sum(entry["event"] == "begin" for entry in self.attempts)

    @property
    def interruptions(self) -> tuple[int, int]:
        """Attempts that were followed by another, or wait for it: ended by a stop or by Slurm, and by a failure."""
        ended = {(entry["job"], entry["restart"]): entry for entry in self.ends}
        begins = [entry for entry in self.attempts if entry["event"] == "begin"]
        over = begins if self.word in ("queued", "failed") else begins[:-1]
        failed = sum(bool(ended.get((one["job"], one["restart"]), {}).get("kind")) for one in over)
        return len(over) - failed, failed

    @property
    def _just_finished(self) -> bool:
        """Whether the progress file says so, and was written by the latest attempt: one that goes on begins with an older one's."""
        begins = [entry["time"] for entry in self.attempts if entry["event"] == "begin"]
        newest = max([self.submitted, *begins])
        return self.progress.get("state") == "finished" and self.progress.get("updated", 0.0) >= newest

    @property
    def word(self) -> str:
        """One of queued, running, finished, failed, cancelled, stopped, gone, unknown."""
        last = self.ends[-1] if self.ends else {}
        if self.live and self.queue not in ("RUNNING", "COMPLETING"):
            return "queued"
        if self._just_finished:
            return "finished"
        if self.live:
            return "running"
        if self.queue == "CANCELLED" or (last.get("verdict") == "ended by Slurm" and last.get("reason") == "CANCELLED"):
            return "cancelled"
        if last.get("verdict") == "given up" or self.queue in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
            return "failed"
        if self.progress.get("state") in ("finished", "stopped"):
            return str(self.progress["state"])
        return "unknown" if self.silent else "gone"

    @property
    def why(self) -> str:
        """Why it failed; "" when it did not."""
        if self.word != "failed":
            return ""
        last = self.ends[-1] if self.ends else {}
        if last.get("verdict") == "given up":
            return str(last.get("reason", ""))
        if self.queue == "TIMEOUT":
            return "the time limit came before the checkpoint was saved: raise signal_seconds in the profile"
        return f"Slurm ended it: {self.queue}"


def submitted(run: Path) -> dict[str, Any]:
    """RUN/slurm/job.json. Raises UserError when the run was not submitted."""
    try:
        found = json.loads((run / FOLDER / JOB).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        seeds = _seeds(run)
        hint = f"; it is an array: name one of its runs, such as {seeds[0]}" if seeds else ""
        raise UserError(f"{run} is not a submitted run: there is no {FOLDER}/{JOB} in it{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{run / FOLDER / JOB} cannot be read: {error}") from None
    needed = ("job", "logs", "nodes", "ranks", "profile")
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(f"{run / FOLDER / JOB} lacks {', '.join(missing)}: submit the run again with --config")
    return found


def runs_under(folder: Path, *, missing_ok: bool = False) -> list[Path]:
    """The submitted runs of a folder: itself, or the seeds of an array. Raises UserError when there is none, unless that
    is `missing_ok`."""
    try:
        seeds = [folder] if (folder / FOLDER / JOB).exists() else _seeds(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    if not seeds and not missing_ok:
        submitted(folder)
    return seeds


def _seeds(folder: Path) -> list[Path]:
    """The submitted runs of an array of seeds, by seed."""
    named = {path: re.fullmatch(r"seed-(-?\d+)", path.name) for path in folder.glob("seed-*")}
    seeds = {path: int(match[1]) for path, match in named.items() if match and (path / FOLDER / JOB).exists()}
    return sorted(seeds, key=lambda path: seeds[path])


def look(run: Path) -> State:
    """The state of a submitted run now. Raises UserError when it was not submitted."""
    about = submitted(run)
    queue, where, silent = "", "", False
    try:
        queue, where = ask_slurm(about["job"])
    except _Silent:
        silent = True
    try:
        progress = json.loads((run / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        progress = {}
    return State(
        *(run, about["job"], queue, where, progress, attempts.read(run), attempts.newest_checkpoint(run)),
        submitted=about.get("submitted", 0.0),
        silent=silent,
    )


def ask_slurm(job: str) -> tuple[str, str]:
    """A job's state and where it runs or why it waits, from squeue, else scontrol, else sacct; empty when none knows it.

    Raises _Silent when the controller is away.
    """
    said = _output("squeue", "-h", "-j", job, "-o", "%T|%R")
    if said:
        state, _, where = said.splitlines()[0].partition("|")
        return state, where.strip("()")
    shown = _output("scontrol", "-o", "show", "job", job)
    found = re.search(r"JobState=(\S+)", shown)
    if found:
        return found[1], ""
    counted = _output("sacct", "-n", "-X", "-P", "-j", job, "-o", "State")
    return (counted.split()[0], "") if counted.strip() else ("", "")


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
    """The state in a few lines for people."""
    head = f"{state.run}: {state.word}, job {state.job}"
    if state.word == "running":
        head += f", attempt {max(1, state.begun)}" + (f" on {state.where}" if state.where else "")
    elif state.word == "queued":
        head += f" ({state.where or state.queue})"
    lines = [head + (f" because {state.why}" if state.why else "")]
    if state.silent:
        lines.append("  Slurm does not answer: this is what the run folder says, and the job may be in any state")
    seen = state.progress
    if seen:
        lines.append(f"  {_progress(seen, running=state.word == 'running')}")
    lines.append(
        f"  last committed checkpoint: {f'{state.checkpoint:,} images' if state.checkpoint >= 0 else 'none yet'}"
    )
    stopped, failed = state.interruptions
    if stopped or failed:
        parts = [f"preempted or stopped {_times(stopped)}"] * bool(stopped) + [f"failed {_times(failed)}"] * bool(
            failed
        )
        lines.append(f"  {' and '.join(parts)}, {state.begun} attempts so far")
    if state.ends and state.ends[-1].get("kind") and state.word != "failed":
        lines.append(f"  last failure: {state.ends[-1]['reason']}")
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _progress(seen: dict[str, Any], *, running: bool) -> str:
    images, total, rate = seen.get("images", 0), seen.get("total_images", 0), seen.get("images_per_second") or 0.0
    text = f"{images:,} of {total:,} images" + (f" ({100 * images / total:.1f}%)" if total else "")
    if running and rate:
        text += f", {rate:,.3g} images/s, eta {duration((total - images) / rate)}"
    return f"{text}; as of {duration(max(0.0, time.time() - seen.get('updated', 0)))} ago"
