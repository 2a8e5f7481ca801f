"""A training run as a child process under the `deepspeed` launcher: started, watched, and stopped so that it saves.

Its output, the live line included, passes through to the terminal. It is a session of its own, so that a Ctrl-C does not
tear its launcher down before the ranks have saved: the parent gets the Ctrl-C, and asks rank 0 to stop. Who that is and
where the run stands is read from RUN/progress.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dist_t2i.distributed.launch import free_ports, has_gpu
from dist_t2i.errors import ExitStatus, TrainingError, UserError
from dist_t2i.utils.processes import is_alive

ENTRY = Path(__file__).resolve().parents[1] / "train.py"
SAVE_SECONDS = 60.0
"""How long a run that was asked to stop may take to save before nobody waits for it any more."""
_LOOK = 0.25
"""Seconds between two looks at the child."""


class Interrupted(UserError):
    """The run was asked to stop by Ctrl-C or SIGTERM, and has saved if it had begun to train."""

    status = ExitStatus.INTERRUPTED


def train(
    config: Path,
    overrides: Sequence[str],
    run: Path,
    *,
    enough: Callable[[], bool] | None = None,
    log: Path | None = None,
    entry: Path = ENTRY,
    launcher: Sequence[str] = (),
) -> None:
    """`deepspeed dist_t2i/train.py --config ... run.folder=RUN ...` until it ends, or until `enough()` says so.

    What it prints goes to the terminal, or to the file `log`, whose end is shown if the training fails. `launcher` are
    further options of `deepspeed`; `entry` is the script, when it is not this package's own.

    Ctrl-C and SIGTERM stop the run so that it saves, then raise Interrupted; a second Ctrl-C raises KeyboardInterrupt
    at once. Raises TrainingError when the training fails; it has then said why itself. Main thread only.
    """
    child = _Child([*launcher, str(entry), "--config", str(config), f"run.folder={run}", *overrides], run, log)
    with child.signals():
        while (status := child.wait()) is None:
            if enough is not None and not child.stopping and enough():
                child.stop()
        child.wait_until_gone()
    if child.asked or (status == ExitStatus.STOPPED and enough is None):
        where = progress(run) if enough is None else {}
        seen = f" at {where['images']:,} of {where['total_images']:,} images" if "images" in where else ""
        raise Interrupted(f"stopped{seen}; the same command goes on from there")
    if status not in (ExitStatus.FINISHED, ExitStatus.STOPPED):
        if log is not None:
            print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
        raise TrainingError(f"training failed (exit status {status}); what went wrong is said above")


def progress(run: Path) -> dict[str, Any]:
    """RUN/progress.json; empty when there is none yet."""
    try:
        found = json.loads((run / "progress.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


class _Child:
    """The `deepspeed` process, and through RUN/progress.json its rank 0."""

    def __init__(self, arguments: Sequence[str], run: Path, log: Path | None) -> None:
        self.run, self.started = run, time.time()
        self.stopping = self.asked = False
        binaries = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
        if not has_gpu():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        # The launcher's own talk is switched off: what matters is said by the run itself.
        launcher = [str(binaries / "deepspeed"), "--log_level=critical", f"--master_port={free_ports(1)[0]}"]
        command = [*launcher, *arguments]
        try:
            with open(log, "wb") if log else contextlib.nullcontext() as output:
                self.process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(f"cannot start {command[0]}: {error.strerror}; install DeepSpeed (make install)") from None

    def wait(self) -> int | None:
        """The launcher's exit status, or None after a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=_LOOK)
        return None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and the end of the terminal stop the child; the previous handlers come back."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        except BaseException:
            self._send(signal.SIGKILL)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\nstopping: what was learned is saved first (Ctrl-C again stops at once)", flush=True)
            self.asked = True
            self.stop()

    def stop(self) -> None:
        """Ask rank 0 to save and stop; before it trains there is nothing to save, and all of them are ended."""
        self.stopping = True
        rank = self._rank()
        if rank is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR2)
        else:
            self._send(signal.SIGTERM)

    def wait_until_gone(self) -> None:
        """Until the last process of the run has ended: a launcher may end before its ranks have saved."""
        deadline = time.monotonic() + SAVE_SECONDS
        while self._members() and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def _members(self) -> list[int]:
        """The processes of the child's session."""
        import psutil

        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) == self.process.pid and is_alive(pid):
                    found.append(pid)
        return found

    def _send(self, number: int) -> None:
        for pid in self._members():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def _rank(self) -> int | None:
        """The pid of rank 0 if it runs, and is this child's: progress.json may come from an earlier run."""
        state = progress(self.run)
        try:
            ours = state["host"] == socket.gethostname() and state["updated"] >= self.started
            return state["pid"] if ours and is_alive(state["pid"], earliest=self.started - 1) else None
        except (KeyError, TypeError, ValueError):
            return None
