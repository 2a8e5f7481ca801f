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
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_alive(pid: int, earliest: float = 0.0, latest: float = math.inf) -> bool:
    """Whether the process is running, is not a zombie, and started between `earliest` and `latest` (Unix times). The
    times matter, because a new process can get the pid of an ended process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and earliest <= process.create_time() <= latest
    except psutil.Error:
        return False


def send(pids: Iterable[int], number: int) -> None:
    """Sends a signal to processes. Processes that have ended are skipped."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, number)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks the stop signals inside the `with` block. Child processes that start in the block inherit the blocked
    signals, so no signal kills a child that is not ready.

    A blocked signal is not lost: another thread handles it, or this thread handles it when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Makes this process ignore the stop signals. The parent process decides when its workers stop, and needs their
    data until the current step ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with(parent: int) -> None:
    """Makes the kernel kill this process when the process `parent` ends. Works on Linux only."""
    if sys.platform == "linux":
        # The kernel sends the signal when the thread that forked this process ends: here the parent's main thread,
        # which ends together with the parent.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
