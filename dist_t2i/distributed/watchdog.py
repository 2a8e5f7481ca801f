"""Ends a run in which a rank hangs, and names the rank: a launcher only notices those that end.

Every rank has a thread that writes, now and then, where the rank is:

    RUN/ranks/rank-00003.json    a count that goes up as long as the process runs, images seen, what it is doing and
                                 for how long, the stacks of its threads
    RUN/ranks/hang.json          the verdict, when there was a hang

When a rank has not moved on for its time, the others do not move on either: they wait for it in a collective. Python
runs no signal handlers there, so it is the threads that look at each other's files. Guilty is, first, who gives no sign
of life (stopped, or its machine is gone); else who is anywhere but in a collective. The verdict is told and the process
ends with status 77, so that the launcher ends the others and the job can go on from the last checkpoint.

With NCCL, ranks also wait for each other in any call that waits for the device. Where all of them do, nobody is named,
and the stacks are what there is to go by.
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
from dist_t2i.utils.files import write_atomic

FOLDER = "ranks"
VERDICT = "hang.json"
_FRAMES = 14
"""Innermost frames that are kept of a stack."""


@dataclass
class _State:
    """What the main thread says and the watching thread reads."""

    doing: str = "starting"
    images: int = 0
    moved: float = field(default_factory=time.monotonic)
    allowed: float = float("inf")


class Watchdog:
    """Watches the main thread of the process that makes it. `seconds`: how long a step may take; 0 watches nothing.

    Call `doing` whenever the run moves on; before the first call nothing is too long (what can hang at the start, the
    meeting of the ranks, has a time limit of its own). Files are those of `run`; `rank` of `world_size`.
    """

    def __init__(self, run: Path, rank: int, world_size: int, seconds: float, end: Callable[[int], Any] = os._exit):
        self.folder, self.rank, self.world_size, self.seconds = run / FOLDER, rank, world_size, seconds
        self.interval = min(60.0, max(1.0, seconds / 10))
        self._state, self._end, self._count = _State(), end, 0
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """Begin to watch; not under a debugger, whose user may take all the time there is."""
        if self.seconds > 0 and sys.gettrace() is None:
            self._thread.start()
        return self

    def doing(self, what: str, images: int, extra: float = 0.0) -> None:
        """The run has moved on: it does `what` now, at `images` seen, which may take `extra` seconds more than a step.

        A rank that gives no sign of life is not given the extra.
        """
        self._state = _State(what, images, allowed=self.seconds + extra)

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()

    # ---- the watching thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            state = self._state
            self._write(state)
            if state.allowed < float("inf") and time.monotonic() - state.moved > self.seconds:
                self._accuse(state)

    def _write(self, state: _State) -> None:
        self._count += 1
        said = {
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
        with contextlib.suppress(OSError):  # a full disk: `_accuse` sees that files prove nothing then
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(self.rank), json.dumps(said, indent=1) + "\n")

    def _stacks(self) -> dict[str, list[str]]:
        """Thread name -> its innermost frames, outermost of these first; the main thread is `MainThread`."""
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
        found = {}
        for rank in range(self.world_size):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = json.loads(self._file(rank).read_text(encoding="utf-8"))
        return found

    def _accuse(self, state: _State) -> None:
        """Look at all ranks twice, with time for each to be heard, and end the run unless it has moved on meanwhile."""
        before = self._read()
        for _ in range(3):
            if self._stopped.wait(self.interval):
                return
            self._write(state)
        if self._state is not state:
            return
        verdict = judge(before, self._read(), self.world_size)
        if any(one["rank"] == self.rank for one in verdict["guilty"] if verdict["silent"]):
            verdict = {"guilty": [], "silent": False, "waiting": []}  # files cannot be written now, by nobody
        if not verdict["silent"] and time.monotonic() - state.moved <= state.allowed:
            return  # something that takes long, and everybody lives
        verdict |= {"images": state.images, "seconds": round(time.monotonic() - state.moved, 1), "time": time.time()}
        with contextlib.suppress(OSError):
            if not self._told():
                write_atomic(self.folder / VERDICT, json.dumps(verdict, indent=1) + "\n")
                os.write(2, f"\n{tell(verdict)}\n".encode())
        self._end(ExitStatus.HUNG)

    def _told(self) -> bool:
        """Whether another rank has told it already: the first to end has the launcher end the others."""
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((self.folder / VERDICT).read_text(encoding="utf-8"))
            return time.time() - said["time"] < self.seconds
        return False


def judge(before: dict[int, dict], after: dict[int, dict], world_size: int) -> dict[str, Any]:
    """Who hangs, by what the ranks wrote at two moments (rank -> its file) between which each should have been heard.

    Gives `guilty` (their files, with `how` they hang), whether they are `silent`, and `waiting` (ranks in a collective).
    """
    alive = [rank for rank, said in after.items() if said["count"] != before.get(rank, {}).get("count")]
    silent = [rank for rank in range(world_size) if rank not in alive]
    waiting = [rank for rank in alive if in_collective(after[rank]["stacks"])]
    guilty = silent or [rank for rank in alive if rank not in waiting]
    how = "gives no sign of life" if silent else "is not in a collective, in which the others wait"
    named = [{"rank": rank, **after.get(rank, {}), "how": how} for rank in guilty]
    return {"guilty": named, "silent": bool(silent), "waiting": waiting}


def in_collective(stacks: dict[str, list[str]]) -> bool:
    """Whether a thread waits for the other ranks. Backward hooks may run in another thread than the main one."""
    places = ("torch/distributed/", "deepspeed/comm/")
    return any(place in frame for frames in stacks.values() for frame in frames[-6:] for place in places)


def tell(verdict: dict[str, Any]) -> str:
    """The verdict for people: who, where, doing what, with the main thread's stack."""
    lines = [f"hung: nothing has moved on for {verdict['seconds']:.0f} s, at {verdict['images']:,} images"]
    for one in verdict["guilty"]:
        where = f" (process {one['pid']} on {one.get('node') or one['host']})" if "pid" in one else ""
        doing = f"; last seen in: {one['doing']}" if "doing" in one else ""
        lines.append(f"rank {one['rank']}{where} {one['how']}{doing}")
        lines += [f"    {frame}" for frame in one.get("stacks", {}).get("MainThread", [])]
    if not verdict["guilty"]:
        lines.append(f"every rank waits for the others or for the device; their stacks: RUN/{FOLDER}/rank-*.json")
    lines.append("the run is ended, so that it can go on from its last checkpoint")
    return "\n".join(lines)
