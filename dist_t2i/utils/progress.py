"""How far a long piece of work has come, told to whoever waits for it."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line on stderr: how many are done, the rate, the time left. In place on a terminal; every ten seconds elsewhere."""

    def __init__(self, total: int, unit: str = "pictures") -> None:
        self.total, self.unit = total, unit
        self._start = self._last = time.monotonic()
        self._live = sys.stderr.isatty()

    def show(self, done: int, last: bool = False) -> None:
        """Tell how many are done, unless it was told just now; the `last` time in any case."""
        now = time.monotonic()
        if not last and now - self._last < (0.2 if self._live else 10.0):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-3)
        left = (self.total - done) / rate if rate else 0.0
        text = f"{done:,} of {self.total:,} {self.unit}, {rate:,.0f}/s, {_clock(left)} left"
        print(f"\r{text}\x1b[K" if self._live else text, end="\n" if last or not self._live else "", file=sys.stderr)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `1:02:03`, `3d 04h`."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
