"""Calls one function with many arguments in several processes, and shows the progress of all processes on one line."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.utils.progress import Progress

_advance: Callable[[], None] | None = None


def advance() -> None:
    """Counts one more finished picture. The function that `in_processes` runs must call `advance`."""
    if _advance:
        _advance()


def in_processes(
    work: Callable[..., Any], arguments: Sequence[tuple], processes: int, progress: Progress | None = None
) -> list[Any]:
    """Returns `[work(*a) for a in arguments]`, computed in up to `processes` processes. `progress` shows the number of
    calls of `advance`. Raises DataError if a process was killed."""
    global _advance
    show = progress.show if progress else lambda done: None
    if processes <= 1 or len(arguments) <= 1:
        numbers = itertools.count(1)
        _advance = lambda: show(next(numbers))  # noqa: E731
        return [work(*call) for call in arguments]
    # Clients of object stores start threads, and a fork of a process with threads can hang (storage/reader_process.py
    # explains why). So processes are spawned if a client may exist.
    forks = sys.platform == "linux" and not {"obstore", "fsspec"} & sys.modules.keys()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(arguments)), context, _start_process, (counter,))
    waiting = {pool.submit(work, *call): number for number, call in enumerate(arguments)}
    results: list[Any] = [None] * len(arguments)
    try:
        while waiting:
            done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
            show(counter.value)
    except concurrent.futures.process.BrokenProcessPool as error:
        remedy = "perhaps memory ran out: try a smaller --processes"
        raise DataError(f"a process was killed ({remedy}); run the same command again to resume") from error
    finally:  # after a success, wait: a process that is still starting needs the counter
        pool.shutdown(wait=not waiting, cancel_futures=True)
    return results


def _start_process(counter: Any) -> None:
    def add() -> None:
        with counter.get_lock():
            counter.value += 1

    global _advance
    _advance = add
    gc.disable()  # for the reason in `write_here`; spawned processes do not inherit this setting
    signal.signal(signal.SIGINT, signal.SIG_IGN)
