"""Trying again after a failed request: exponential backoff with jitter (Brooker 2015, "Exponential Backoff And Jitter")."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def pauses(first: float, longest: float, factor: float = 2.0) -> Iterator[float]:
    """Seconds between attempts, endlessly: they grow from `first` to `longest` and are scaled by a random 0.5 to 1, so that
    processes that failed together do not come back together."""
    pause = first
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(pause * factor, longest)


def retry(action: Callable[[], T], waits: Iterable[float], again: Callable[[OSError, float], bool]) -> T:
    """The result of `action`, attempted once more after each of `waits` seconds.

    An OSError is raised when `again(error, seconds of the coming pause)` is false, or when `waits` has ended.
    """
    for pause in waits:
        try:
            return action()
        except OSError as error:
            if not again(error, pause):
                raise
        time.sleep(pause)
    return action()
