"""Processor cores, signals and lifetimes of processes."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def usable_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_alive(pid: int, earliest: float = 0.0, latest: float = math.inf) -> bool:
    """Whether the process runs, is no zombie, and started in this span (Unix times): pids are used again."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and earliest <= process.create_time() <= latest
    except psutil.Error:
        return False


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to processes; those that have ended are skipped."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Children created inside start with the stop signals blocked, so that no signal kills them during their start.

    Signals that arrive meanwhile are not lost: another thread handles them, or this one at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """For worker processes: the parent decides when to stop, and needs data until its next step boundary."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with(parent: int) -> None:
    """Has the kernel kill this process when the process `parent` ends. Linux only."""
    if sys.platform == "linux":
        # The signal comes when the thread that forked ends: the main thread, which ends with the process.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
