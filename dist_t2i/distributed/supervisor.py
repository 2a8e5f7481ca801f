"""Starts a training run with the `deepspeed` launcher, watches the run, and lets it save before it stops.

The run's output passes through to the terminal. The run has its own session, so that Ctrl-C does not end the launcher
before the ranks have saved. The supervisor receives Ctrl-C and signals rank 0, whose pid is in RUN/progress.json.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from dist_t2i.distributed.launch import free_ports, has_gpu
from dist_t2i.errors import DivergedError, ExitStatus, TrainingError, UserError
from dist_t2i.utils.files import read_json
from dist_t2i.utils.processes import is_alive, send

ENTRY = Path(__file__).resolve().parents[1] / "train.py"
SAVE_SECONDS = 60.0
"""Seconds that a run has to save after a request to stop."""
_POLL_SECONDS = 0.25


class Interrupted(UserError):
    """Ctrl-C or SIGTERM has stopped the run. If training had begun, the run has saved a checkpoint."""

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
    """Runs `deepspeed dist_t2i/train.py --config ... run.folder=RUN ...` until the run ends or `enough()` is true.

    The output goes to the terminal, or to the file `log`; if the training fails, the end of `log` is printed.
    `launcher` holds further options of `deepspeed`. `entry` is the training script (default: the train.py of the
    running package). After Ctrl-C or SIGTERM, lets the run save and raises Interrupted. A second Ctrl-C raises
    KeyboardInterrupt at once. If the training fails, prints the reason and raises TrainingError. Main thread only.
    """
    child = _Child([*launcher, str(entry), "--config", str(config), f"run.folder={run}", *overrides], run, log)
    with child.signals():
        while (status := child.wait()) is None:
            if enough is not None and not child.stopping and enough():
                child.stop()
        deadline = time.monotonic() + SAVE_SECONDS
        while child.members() and time.monotonic() < deadline:  # a launcher may end before its ranks have saved
            time.sleep(_POLL_SECONDS)
    if child.interrupted or (status == ExitStatus.STOPPED and enough is None):
        state = read_json(run / "progress.json") if enough is None else {}
        seen = f" at {state['images']:,} of {state['total_images']:,} images" if "images" in state else ""
        raise Interrupted(f"stopped{seen}; the same command resumes")
    if status not in (ExitStatus.FINISHED, ExitStatus.STOPPED):
        if log is not None:
            print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
        if status == ExitStatus.DIVERGED:
            raise DivergedError("training diverged; what to do is printed above")
        raise TrainingError(f"training failed (exit status {status}); the reason is printed above")


class _Child:
    """The `deepspeed` process and its rank 0, whose pid is in RUN/progress.json."""

    def __init__(self, arguments: Sequence[str], run: Path, log: Path | None) -> None:
        self.run, self.started = run, time.time()
        self.stopping = self.interrupted = False
        binaries = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}
        if not has_gpu():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        # The launcher's own messages are switched off, because the run logs everything that a user needs.
        command = [str(binaries / "deepspeed"), "--log_level=critical", f"--master_port={free_ports(1)[0]}", *arguments]
        try:
            with open(log, "wb") if log else contextlib.nullcontext() as out:
                self.process = subprocess.Popen(
                    command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
        except OSError as error:
            raise UserError(f"cannot start {command[0]}: {error.strerror}; install DeepSpeed (make install)") from None

    def wait(self) -> int | None:
        """Waits at most `_POLL_SECONDS`. Returns the launcher's exit status, or None while the launcher runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=_POLL_SECONDS)
        return None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """A context in which Ctrl-C, SIGTERM and the end of the terminal stop the child. Restores handlers."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        except BaseException:
            send(self.members(), signal.SIGKILL)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.interrupted:
            with contextlib.suppress(OSError):  # the terminal may be closed
                print("\nstopping: the run saves a checkpoint first (a second Ctrl-C stops at once)", flush=True)
            self.interrupted = True
            self.stop()

    def stop(self) -> None:
        """Asks rank 0 to save and stop. Before rank 0 trains, nothing can be saved, so all processes end."""
        self.stopping = True
        if (rank := self._rank()) is None:
            return send(self.members(), signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR2)

    def members(self) -> list[int]:
        import psutil

        members = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if os.getsid(pid) == self.process.pid and is_alive(pid):
                    members.append(pid)
        return members

    def _rank(self) -> int | None:
        """The pid of this child's rank 0, or None if rank 0 does not run. Ignores earlier runs."""
        state = read_json(self.run / "progress.json")
        with contextlib.suppress(KeyError, TypeError, ValueError):
            current = state["host"] == socket.gethostname() and state["updated"] >= self.started
            return state["pid"] if current and is_alive(state["pid"], earliest=self.started - 1) else None
        return None
