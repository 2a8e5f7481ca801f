"""Stopping: a signal only sets a flag, the ranks agree at a step boundary, and the training loop saves and exits.

How launchers react to signals (DeepSpeed 0.19.8, torch 2.13; checked by `tests/distributed/test_preemption.py`):

* After a signal to a rank (`kill -USR2 PID`, PID from RUN/progress.json), the rank saves without a time limit, and
  `deepspeed` exits with the rank's status 75. Scripts should use this signal to stop a run.
* Ctrl-C under `deepspeed` reaches all processes. The `deepspeed` command dies at once, so the shell's prompt returns
  while the ranks still save. DeepSpeed's launcher then sends the ranks SIGTERM, which counts as part of the same stop,
  and SIGKILL 30 seconds later.
* After SIGTERM, the launcher (`deepspeed.launcher.launch`) sends one rank SIGTERM, and SIGKILL after 30 seconds. This
  rank informs the other ranks at the step boundary. The launcher exits with 1, whatever the ranks return.
* SIGTERM to the `deepspeed` command and SIGKILL to the launcher do not reach the ranks. The ranks stop because
  `StopFlag` notices that the launcher is gone. After SIGKILL to the launcher, `deepspeed` always exits with 0, so only
  RUN/progress.json says how the run ended.
* `torchrun` forwards SIGTERM and SIGINT, so a Ctrl-C reaches the ranks twice (hence `SAME_PRESS`). `torchrun` sends
  SIGKILL after 30 seconds and exits with 1. SIGUSR1 and SIGUSR2 kill `torchrun`, so send these signals to ranks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

from dist_t2i.distributed.launch import LauncherWatch
from dist_t2i.errors import ExitStatus
from dist_t2i.utils.processes import STOP_SIGNALS

SAME_PRESS = 1.0
"""SIGINTs within this many seconds count as one Ctrl-C, because launchers repeat the terminal's signal."""


class StopReason(IntEnum):
    """Why a run stops. If ranks have different reasons, the largest number wins."""

    NONE = 0
    SIGHUP = 1
    SIGINT = 2
    SIGUSR1 = 3
    SIGUSR2 = 4
    SIGTERM = 5
    LAUNCHER_GONE = 6
    TAKEN_OVER = 7  # another process has taken over the run: nothing may be saved, so this reason wins over all others

    @property
    def text(self) -> str:
        """The reason, as a part of a sentence."""
        return "the launcher is gone" if self is StopReason.LAUNCHER_GONE else self.name


class StopFlag:
    """A flag that is set when this run should stop. Call `install` once, in the main thread of every rank.

    With `announce` (rank 0), a message on stderr says what the run does after a signal. The handlers that `install`
    sets stay until the process ends, so that a late SIGTERM from a launcher cannot change the exit status. A `with`
    block restores the previous handlers.
    """

    def __init__(self, *, announce: bool = False) -> None:
        self._announce, self._reason, self._pid = announce, StopReason.NONE, os.getpid()
        self._first_interrupt: float | None = None
        self._previous: dict[int, object] = {}
        self._launcher = LauncherWatch()

    def __enter__(self) -> StopFlag:
        return self.install()

    def install(self) -> StopFlag:
        """Makes the stop signals set the flag from now on."""
        self._watch_second_interrupt()
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup: a closed terminal is no reason to stop
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)  # ends the watching thread

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop. Ranks may have different answers until they call `agreed`."""
        if not self._reason and self._launcher.gone():
            self._reason = StopReason.LAUNCHER_GONE
        return bool(self._reason)

    def agreed(self, all_reduce_max: Callable[[int], int] = int) -> StopReason:
        """The reason why all ranks stop now, or NONE to continue. Call `agreed` on every rank at each step boundary.

        `all_reduce_max` returns the largest of the ranks' integers; the default suits a single process.
        """
        reason = StopReason(all_reduce_max(self._reason.value if self.requested else 0))
        self._reason = self._reason or reason
        return reason

    def supersede(self) -> None:
        """Stop all ranks because another process has taken over the run."""
        self._reason = StopReason.TAKEN_OVER

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked loader worker, which leaves the signal to its parent
        name = signal.Signals(number).name
        if not self._reason and self._announce:
            again = "; a second Ctrl-C stops at once" if number == signal.SIGINT else ""
            _print_to_stderr(f"{name}: saving a checkpoint after this step, then stopping{again}")
        self._reason = self._reason or StopReason[name]

    def _watch_second_interrupt(self) -> None:
        """Starts a thread that sees SIGINT even while the main thread is in a collective, which delays handlers."""
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_wakeup)
        threading.Thread(target=self._read_signals, args=(reading,), name="second Ctrl-C", daemon=True).start()

    def _read_signals(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            if signal.SIGINT not in numbers:
                continue
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > SAME_PRESS:
                _print_to_stderr("second Ctrl-C: stopped at once; the last checkpoint is intact")
                for worker in multiprocessing.active_children():
                    worker.kill()
                os._exit(ExitStatus.INTERRUPTED)
        os.close(reading)


def _forget_wakeup() -> None:
    """Called in a forked child, whose signals must not reach the parent's thread."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _print_to_stderr(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
