"""Shows the progress of a long task on stderr, and formats durations as text."""

from __future__ import annotations

import math
import sys
import time


class Progress:
    """A line on stderr with the count, the rate and the remaining time. On a terminal, the line is updated in place;
    elsewhere, a new line is printed every ten seconds."""

    def __init__(self, total: int, unit: str = "pictures") -> None:
        self.total, self.unit = total, unit
        self._start = self._last = time.monotonic()
        self._live = sys.stderr.isatty()

    def show(self, done: int, last: bool = False) -> None:
        """Prints the line if enough time has passed since the previous line, or if `last` is True."""
        now = time.monotonic()
        if not last and now - self._last < (0.2 if self._live else 10.0):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-3)
        remaining = duration((self.total - done) / rate if rate else math.inf)
        text = f"{done:,} of {self.total:,} {self.unit}, {rate:,.0f}/s, {remaining} left"
        print(f"\r{text}\x1b[K" if self._live else text, end="\n" if last or not self._live else "", file=sys.stderr)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Formats a duration, as in `0:42`, `12:05`, `1:02:03` or `3d 04h`; returns `?` if `seconds` is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
