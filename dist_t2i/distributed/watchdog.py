"""Ends a run in which a rank hangs, and names this rank, because a launcher notices only ranks that end.

Every rank has a thread that regularly writes the rank's state:

    RUN/ranks/rank-00003.json    a count that grows while the process runs, images seen, the current activity and its
                                 duration, the stacks of the threads
    RUN/ranks/hang.json          the verdict after a hang

When one rank hangs, the other ranks wait in a collective, where Python runs no signal handlers. The threads therefore
compare the files of all ranks. A rank is silent if its file no longer changes, because its process is stopped or its
machine is gone. Silent ranks are guilty. If no rank is silent, all ranks outside a collective are guilty. With NCCL,
ranks also wait for each other in any call that waits for the device. If every rank waits in a collective or for the
device, no rank is named, and only the stacks show the cause. A process that reaches a verdict exits with
`ExitStatus.HUNG`, so that the launcher ends the other ranks and the job can resume from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_t2i.errors import ExitStatus
from dist_t2i.utils.files import read_json, write_atomic

FOLDER = "ranks"
VERDICT = "hang.json"
_FRAMES = 14  # number of innermost frames of a stack that are kept


@dataclass
class _State:
    """The state of the run, which the main thread writes and the watching thread reads."""

    doing: str = "starting"
    images: int = 0
    moved: float = field(default_factory=time.monotonic)
    allowed: float = float("inf")


class Watchdog:
    """Watches the main thread of its process. `seconds`: time limit of a step; 0 disables the watchdog.

    Call `doing` whenever the run makes progress. No time limit applies before the first call of `doing`, because the
    rendezvous of the ranks has its own time limit. `run` is the run folder; `end` is called with the exit status.
    """

    def __init__(self, run: Path, rank: int, world_size: int, seconds: float, end: Callable[[int], Any] = os._exit):
        self.folder, self.rank, self.world_size, self.seconds = run / FOLDER, rank, world_size, seconds
        self.interval = min(60.0, max(1.0, seconds / 10))
        self._state, self._end, self._count = _State(), end, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Starts the thread, except under a debugger, where a pause may have any length."""
        if self.seconds > 0 and sys.gettrace() is None:
            self._thread.start()
        return self

    def doing(self, what: str, images: int, extra: float = 0.0) -> None:
        """Say that the run begins the activity `what` at `images` images seen.

        The activity may take `extra` seconds longer than a step, except on a silent rank.
        """
        self._state = _State(what, images, allowed=self.seconds + extra)

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            state = self._state
            self._write(state)
            if state.allowed < float("inf") and time.monotonic() - state.moved > self.seconds:
                self._diagnose(state)

    def _write(self, state: _State) -> None:
        self._count += 1
        report = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "node": os.environ.get("SLURMD_NODENAME", ""),
            "pid": os.getpid(),
            "count": self._count,
            "images": state.images,
            "doing": state.doing,
            "seconds": round(time.monotonic() - state.moved, 1),
            "time": time.time(),
            "stacks": self._stacks(),
        }
        with contextlib.suppress(OSError):  # for example a full disk, which `_diagnose` recognizes
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(self.rank), json.dumps(report, indent=1) + "\n")

    def _stacks(self) -> dict[str, list[str]]:
        """Thread name -> its innermost frames, the innermost last; the main thread is `MainThread`."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = {}
        for ident, frame in sys._current_frames().items():
            if ident != self._thread.ident:
                frames = traceback.extract_stack(frame)[-_FRAMES:]
                stacks[names.get(ident, str(ident))] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
        return stacks

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _read(self) -> dict[int, dict[str, Any]]:
        reports = {rank: read_json(self._file(rank)) for rank in range(self.world_size)}
        return {rank: report for rank, report in reports.items() if report}

    def _diagnose(self, state: _State) -> None:
        """Reads the files of all ranks twice. The pause in between gives each rank time to write. Ends the run unless
        this rank makes progress."""
        before = self._read()
        for _ in range(3):
            if self._stopped.wait(self.interval):
                return
            self._write(state)
        if self._state is not state:
            return
        verdict = diagnose(before, self._read(), self.world_size)
        if verdict["silent"] and any(report["rank"] == self.rank for report in verdict["guilty"]):
            verdict = {"guilty": [], "silent": False, "waiting": []}  # this rank lives, so no rank can write files
        if not verdict["silent"] and time.monotonic() - state.moved <= state.allowed:
            return  # every rank is alive, and the activity may take longer
        verdict |= {"images": state.images, "seconds": round(time.monotonic() - state.moved, 1), "time": time.time()}
        with contextlib.suppress(OSError):
            # Report only if no other rank has reported this hang already.
            if time.time() - read_json(self.folder / VERDICT).get("time", 0.0) >= self.seconds:
                write_atomic(self.folder / VERDICT, json.dumps(verdict, indent=1) + "\n")
                os.write(2, f"\n{describe(verdict)}\n".encode())
        self._end(ExitStatus.HUNG)


def diagnose(before: dict[int, dict], after: dict[int, dict], world_size: int) -> dict[str, Any]:
    """Find the ranks that hang, from the files of all ranks (rank -> file) at two moments. Live ranks write in between.

    Returns the files of `guilty` ranks with `how` each rank hangs, whether they are `silent`, and the `waiting` ranks.
    """
    alive = [rank for rank, report in after.items() if report["count"] != before.get(rank, {}).get("count")]
    silent = [rank for rank in range(world_size) if rank not in alive]
    waiting = [rank for rank in alive if in_collective(after[rank]["stacks"])]
    guilty = silent or [rank for rank in alive if rank not in waiting]
    how = "gives no sign of life" if silent else "is not in the collective in which the other ranks wait"
    reports = [{"rank": rank, **after.get(rank, {}), "how": how} for rank in guilty]
    return {"guilty": reports, "silent": bool(silent), "waiting": waiting}


def in_collective(stacks: dict[str, list[str]]) -> bool:
    """Whether any thread waits for other ranks, because backward hooks may run outside the main thread."""
    paths = ("torch/distributed/", "deepspeed/comm/")
    return any(path in frame for frames in stacks.values() for frame in frames[-6:] for path in paths)


def describe(verdict: dict[str, Any]) -> str:
    """The verdict for people: rank, process, activity, and the main thread's stack."""
    lines = [f"hung: no progress for {verdict['seconds']:.0f} s, at {verdict['images']:,} images"]
    for report in verdict["guilty"]:
        process = f" (process {report['pid']} on {report.get('node') or report['host']})" if "pid" in report else ""
        doing = f"; last seen in: {report['doing']}" if "doing" in report else ""
        lines.append(f"rank {report['rank']}{process} {report['how']}{doing}")
        lines += [f"    {frame}" for frame in report.get("stacks", {}).get("MainThread", [])]
    if not verdict["guilty"]:
        lines.append(f"every rank waits for other ranks or for the device; the stacks are in RUN/{FOLDER}/rank-*.json")
    lines.append("the watchdog ends the run, which can resume from its last checkpoint")
    return "\n".join(lines)
