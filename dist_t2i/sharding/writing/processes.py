"""One function over many arguments in several processes, which say how far they are."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_t2i.errors import DataError

Spread = Callable[[Callable, Sequence[tuple]], list[Any]]
"""`spread(work, arguments)` is `[work(*a) for a in arguments]`, perhaps in several processes."""

_counter: Any = None


def in_processes(
    work: Callable, arguments: Sequence[tuple], processes: int, show: Callable[[int], None] = lambda done: None
) -> list[Any]:
    """`[work(*a) for a in arguments]`, in several processes; `show` hears how often `advance` was called in them.

    Raises DataError when a process is killed.
    """
    global _counter
    if processes <= 1 or len(arguments) <= 1:
        _counter = _Count(show)
        return [work(*one) for one in arguments]
    # A client of an object store has threads, and a fork of a process that has them hangs (see apart.py).
    forks = sys.platform == "linux" and not {"obstore", "fsspec"} & sys.modules.keys()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(arguments)), context, _start_process, (counter,))
    waiting = {pool.submit(work, *one): number for number, one in enumerate(arguments)}
    results: list[Any] = [None] * len(arguments)
    try:
        while waiting:
            done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
            show(counter.value)
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise DataError(
                "a process was killed (out of memory? Try a smaller --processes); the same command goes on from here"
            ) from error
        raise
    pool.shutdown()  # a process that comes too late for any work must still find what it was started with
    return results


class _Count:
    """Counts in one process what `multiprocessing.Value` counts in several."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.value, self._show = 0, show

    def add(self) -> None:
        self.value += 1
        if not self.value & 15:
            self._show(self.value)


def _start_process(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def advance() -> None:
    """One more picture is done; called by the work that `in_processes` runs."""
    if isinstance(_counter, _Count):
        _counter.add()
    elif _counter is not None:
        with _counter.get_lock():
            _counter.value += 1
