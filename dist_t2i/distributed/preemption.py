"""Stopping: signals only set a flag, the ranks agree at a step boundary, one place saves and stops.

Exit statuses of a training command:

    0    finished: `train.total_images` seen
    1    a defect, or numbers that are not finite (`TrainingError`); the last good checkpoint stands
    2    the user's configuration, data or environment (`UserError`)
    75   stopped by a signal with a checkpoint saved; the same command goes on from it (EX_TEMPFAIL)
    76   another process has taken the run over (claim.py); nothing saved
    77   a rank hung, and the watchdog ended the run (watchdog.py); the last checkpoint stands
    130  a second Ctrl-C: stopped at once, nothing saved

What launchers make of it (DeepSpeed 0.19.8, torch 2.13; `tests/distributed/test_preemption.py` holds them):

* A signal sent to a rank (`kill -USR2 PID`, PID from RUN/progress.json) gives any save all the time it needs, and
  `deepspeed` exits with the rank's 75. This is the way to stop a run from a script.
* Ctrl-C under `deepspeed` reaches all processes at once. `deepspeed` itself dies of it right away, so that the shell's
  prompt is back while the ranks still save; its launcher sends SIGTERM after it, and SIGKILL 30 seconds later. The
  second SIGTERM is part of the same stop.
* `kill -TERM` of the launcher (`deepspeed.launcher.launch`): SIGTERM to one rank, which tells the others at the step
  boundary; SIGKILL after 30 seconds; its own status is 1 whatever the ranks returned.
* `kill -TERM` of the `deepspeed` command, or `kill -9` of the launcher: the ranks are told nothing and would train on
  unattended. `StopFlag` notices that the launcher is gone and stops. (After a `kill -9` of its launcher, `deepspeed`
  exits with 0: look into RUN/progress.json to know what became of a run.)
* `torchrun` passes SIGTERM and SIGINT on (a Ctrl-C arrives twice, hence `SAME_PRESS`), kills after 30 seconds and
  exits with 1; it dies of SIGUSR1 and SIGUSR2, so send those to ranks.
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
from types import FrameType

from dist_t2i.distributed.launch import LauncherWatch
from dist_t2i.utils.processes import STOP_SIGNALS

FINISHED, FAILED, USER, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

SAME_PRESS = 1.0
"""Seconds within which SIGINTs count as one Ctrl-C: launchers repeat what the terminal has already sent."""
LAUNCHER_GRACE = 30.0
"""Seconds that `deepspeed` and `torchrun` wait between passing SIGTERM on and SIGKILL."""
_LAUNCHER_GONE = 1 << 16
"""Stands for a signal number when the launcher has died."""
_TAKEN_OVER = 1 << 17
"""Stands for one when the run was taken over; larger than any other, so that it wins over a signal."""
TAKEN_OVER = "another process has taken the run over"


class StopFlag:
    """Whether this run was asked to stop. Install once, in the main thread, on every rank.

    `announce` lets rank 0 tell what happens now on stderr. `install()` lasts until the process ends, so that a launcher's
    late SIGTERM cannot spoil its exit status; as a context manager, the previous handlers come back.
    """

    def __init__(self, *, announce: bool = False) -> None:
        self._announce = announce
        self._signal = 0
        self._pid = os.getpid()
        self._first_interrupt: float | None = None
        self._previous: dict[int, object] = {}
        self._launcher = LauncherWatch()

    def __enter__(self) -> StopFlag:
        return self.install()

    def install(self) -> StopFlag:
        """From now on the stop signals set the flag."""
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
    def grace(self) -> float:
        """Seconds between a stop and SIGKILL that the launcher above this rank may leave; inf without one."""
        return LAUNCHER_GRACE if self._launcher.watching else float("inf")

    @property
    def requested(self) -> bool:
        """Whether this very process was asked to stop; the ranks may differ until `agreed`."""
        if not self._signal and self._launcher.gone():
            self._signal = _LAUNCHER_GONE
        return bool(self._signal)

    def agreed(self, all_reduce_max: Callable[[int], int] = int) -> str:
        """Why all ranks stop now, such as `SIGTERM`, or "" to go on. Call on every rank at each step boundary.

        `all_reduce_max` gives the largest of the ranks' whole numbers; the default suits a single process.
        """
        number = all_reduce_max(self._signal if self.requested else 0)
        self._signal = self._signal or number
        if not number:
            return ""
        if number == _TAKEN_OVER:
            return TAKEN_OVER
        return "the launcher is gone" if number == _LAUNCHER_GONE else signal.Signals(number).name

    def supersede(self) -> None:
        """Stop all ranks because another process has taken the run over: `agreed` says `TAKEN_OVER`."""
        self._signal = _TAKEN_OVER

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked loader worker: its parent decides
        if not self._signal and self._announce:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            _tell(f"{signal.Signals(number).name}: saving a checkpoint after this step, then stopping{again}")
        self._signal = self._signal or number

    def _watch_second_interrupt(self) -> None:
        """A thread that sees SIGINT even while the main thread is stuck in a collective, where handlers do not run."""
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
                _tell("second Ctrl-C: stopped at once; the last checkpoint stands")
                for worker in multiprocessing.active_children():
                    worker.kill()
                os._exit(INTERRUPTED)
        os.close(reading)


def _forget_wakeup() -> None:
    """In a forked child: its signals are not the parent's."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
