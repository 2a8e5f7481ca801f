"""Messages and the progress line: percent, images, ETA, images/s, data wait, losses, logits, gradients, memory."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from dist_t2i.utils.progress import duration


def format_line(images: int, total: int, values: Mapping[str, float], width: int | None = None) -> str:
    """The progress line in ASCII. To fit into `width`, the line is abbreviated, and then its last parts are dropped."""
    line = "  ".join(_parts(images, total, values, tight=False))
    if width is None or len(line) <= width:
        return line
    parts = _parts(images, total, values, tight=True)
    while len(parts) > 1 and len(" ".join(parts)) > width:
        parts.pop()
    return " ".join(parts)[:width]


def _parts(images: int, total: int, values: Mapping[str, float], *, tight: bool) -> list[str]:
    space = "" if tight else " "
    parts = [f"{100 * images / total:5.1f}%", f"{images:,}" if tight else f"{images:,} images"]
    if rate := values.get("images_per_second"):
        parts.append(f"eta {duration((total - images) / rate)}")
        parts.append(f"{rate:.3g}/s" if rate < 100 else f"{rate:,.0f}/s")
    if "data_wait" in values:
        parts.append(f"data{space}{100 * values['data_wait']:.0f}%")
    parts += _group(values, "", {"D": "loss/d", "G": "loss/g"}, "{:.2f}", tight)
    real, fake, grad = ("r", "f", "|g|") if tight else ("real", "fake", "|grad|")
    parts += _group(values, "", {real: "logit/real", fake: "logit/fake"}, "{:+.2f}", tight)
    parts += _group(values, grad, {"D": "grad/discriminator", "G": "grad/generator"}, "{:.2g}", tight)
    if "memory_bytes" in values:
        parts.append(f"{values['memory_bytes'] / 1e9:.1f}{space}GB")
    return parts


def _group(values: Mapping[str, float], title: str, names: Mapping[str, str], form: str, tight: bool) -> list[str]:
    space = "" if tight else " "
    parts = [f"{short}{space}{form.format(values[name])}" for short, name in names.items() if name in values]
    return [" ".join([title, *parts] if title else parts)] if parts else []


def line_interval(elapsed: float) -> float:
    """Seconds between two printed lines: 10 in the first ten minutes, 60 after an hour."""
    return min(60.0, max(10.0, elapsed / 60))


class Console:
    """Prints messages and progress. On a terminal, progress is a live line below the messages; elsewhere, each update
    is a new line."""

    REFRESH = 0.2
    """Seconds between two rewrites of the live line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._begin = time.monotonic()
        self._next = 0.0
        self._live_line = ""

    def line(self, images: int, total: int, values: Mapping[str, float], *, now: bool = False) -> None:
        """Print or rewrite the progress line if its interval has passed, or if `now` is true."""
        time_now = time.monotonic()
        if time_now < self._next and not now:
            return
        self._next = time_now + (self.REFRESH if self.live else line_interval(time_now - self._begin))
        if self.live:
            width = 80
            with contextlib.suppress(OSError, ValueError):
                width = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._live_line = format_line(images, total, values, width - 1)
            self._write(f"\r{self._live_line}\x1b[K")
        else:
            self._write(format_line(images, total, values) + "\n")

    def say(self, message: str) -> None:
        """Print a message, above the live line if there is one."""
        if self._live_line:
            self._write(f"\r\x1b[K{message}\n{self._live_line}")
        else:
            self._write(message + "\n")

    def close(self) -> None:
        """End the live line; it stays on the terminal."""
        if self._live_line:
            self._write("\n")
            self._live_line = ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone (a closed ssh session): training continues
            self.live = False
