"""Retries of failed requests: exponential backoff with jitter (Brooker 2015, "Exponential Backoff And Jitter")."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def pauses(first: float, longest: float, factor: float = 2.0) -> Iterator[float]:
    """Endlessly yields the pauses between attempts, in seconds. The pauses grow from `first` to `longest`. Each pause
    is multiplied by a random number from 0.5 to 1 (Brooker's "equal jitter"), so that processes that failed together do
    not retry together."""
    pause = first
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(pause * factor, longest)


def retry(action: Callable[[], T], waits: Iterable[float], again: Callable[[OSError, float], bool]) -> T:
    """Returns the result of `action`. After an OSError, sleeps for the next of the `waits` (in seconds) and calls
    `action` again.

    Raises the OSError if `waits` has no more elements, or if `again(error, seconds of the next pause)` returns False.
    """
    for pause in waits:
        try:
            return action()
        except OSError as error:
            if not again(error, pause):
                raise
        time.sleep(pause)
    return action()
