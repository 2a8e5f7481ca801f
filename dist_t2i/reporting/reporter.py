"""A run's reports: progress line, log.txt, metrics.jsonl, progress.json, sample grids, curves and W&B.

    RUN/log.txt         messages with their times
    RUN/metrics.jsonl   one object per report: images, step, time, losses, logits, gradient norms, rates, memory;
                        and one object per evaluation: images, step, time, eval/SPLIT/SCORE
    RUN/progress.json   the run's current position, for other programs
    RUN/samples/images-000123456.png
    RUN/curves.png

Only rank 0 writes; on other ranks the same calls do nothing. A file that cannot be written (a full disk) causes one
warning, and training continues. console.py and curves.py list the metrics that they show; all other metrics are
recorded but not shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from dist_t2i.config.sections import ReportConfig
from dist_t2i.reporting import metrics_log
from dist_t2i.reporting.console import Console, format_line, line_interval
from dist_t2i.reporting.image_grid import GridRow, render_grid, save_grid
from dist_t2i.utils.files import write_atomic

if TYPE_CHECKING:
    from dist_t2i.reporting.wandb_logger import WandbLogger


@dataclass
class Reporter:
    """Call `start`, then `tick` every step, `metrics` and `samples` from time to time, and `close` at the end.

    `title` heads the plots and names the W&B run. `wandb_config` is the configuration that W&B shows.
    """

    PROGRESS_EVERY: ClassVar = 2.0
    """Seconds between two updates of progress.json during training."""

    folder: Path
    report: ReportConfig
    _: KW_ONLY
    total_images: int
    title: str
    wandb_config: Mapping[str, Any]
    main: bool
    stream: TextIO | None = None

    def __post_init__(self) -> None:
        self._console = Console(self.stream)
        self._values: dict[str, float] = {}
        self._images, self._plotted_at, self._can_plot = 0, -1, True
        self._state, self._checkpoint = "starting", ""
        self._begin, self._next_progress, self._next_line = time.monotonic(), 0.0, 0.0
        self._warned: set[tuple[int | None, str | None]] = set()
        self._wandb: WandbLogger | None = None

    def start(self, images: int, checkpoint: Path | None = None) -> None:
        """Start the reports where `images` images have been seen. Drops the metrics beyond this position: training
        will report them again."""
        self._images, self._checkpoint = images, str(checkpoint or "")
        if not self.main:
            return
        dropped = 0
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            dropped = metrics_log.cut(self.folder / "metrics.jsonl", images)
        if dropped:
            self.say(f"metrics.jsonl: dropped {dropped} reports after the checkpoint; training reports them again")
        if self.report.wandb != "disabled" and self._wandb is None:
            from dist_t2i.reporting.wandb_logger import WandbLogger

            self._wandb = WandbLogger(self.folder, self.report, self.title, self.wandb_config, self.warn)
        self._state = "training"
        self._write_progress(force=True)

    def say(self, message: str) -> None:
        """Print a message and append it to log.txt; rank 0 only."""
        if self.main:
            self._console.say(message)
            self._log(message)

    def warn(self, message: str) -> None:
        """Print a warning, from any rank; rank 0 also appends it to log.txt."""
        if self.main:
            self.say(f"warning: {message}")
        else:
            print(f"rank {os.environ.get('RANK', '?')}: warning: {message}", file=self.stream or sys.stderr, flush=True)

    def tick(self, images: int) -> None:
        """Call after every step: updates the progress line, log.txt and progress.json, each at its own interval."""
        self._images = images
        if self.main and self._values:
            self._console.line(images, self.total_images, self._values)
            if time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + line_interval(time.monotonic() - self._begin)
                self._log(format_line(images, self.total_images, self._values))
            self._write_progress()

    def metrics(self, images: int, step: int, values: Mapping[str, float]) -> None:
        """Record the result of `Meter.take`; the progress line shows these values from now on."""
        self._images = images
        if not self.main or not values:
            return
        self._values = {**values, "memory_bytes": memory_bytes()}
        self._record(images, step, self._values)
        self.tick(images)

    def evaluated(self, images: int, step: int, values: Mapping[str, float], *, best: bool) -> None:
        """Record and print the scores of the weights at `images`."""
        if not self.main:
            return
        self._record(images, step, values)
        scores = ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
        self.say(f"evaluated at {images:,} images: {scores}{'; the best so far' if best else ''}")

    def samples(self, images: int, rows: Sequence[GridRow], *, name: str) -> Path | None:
        """Write the curves and a grid, RUN/samples/NAME.png; returns the grid's path, or None without a file."""
        if not self.main:
            return None
        path = self.folder / "samples" / f"{name}.png"
        grid = render_grid(rows, title=f"{self.title}: {images:,} images seen", tile=64)
        with self._writing():
            save_grid(grid, path)
        self.curves()
        if path.exists() and self._wandb is not None:
            self._wandb.log(images, {"samples": path})
        return path if path.exists() else None

    def curves(self) -> None:
        """Plot curves.png, at most once per position; prints one message if matplotlib is missing."""
        if not self.main or not self._can_plot or self._plotted_at == self._images:
            return
        self._plotted_at = self._images
        try:
            from dist_t2i.reporting.curves import plot_curves

            with self._writing():
                plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", title=self.title)
        except ImportError as error:
            self._can_plot = False
            self.say(f"no curves.png: {error} (install it with `pip install matplotlib`)")

    def saved(self, images: int, checkpoint: Path) -> None:
        """Record a committed checkpoint."""
        self._checkpoint = str(checkpoint)
        if self.main:
            self._log(f"checkpoint at {images:,} images: {checkpoint}")
            self._write_progress(force=True)

    def close(self, state: str, message: str = "", *, hurry: bool = False) -> None:
        """End the reports. `state`: `stopped` (can be resumed), `finished`, `diverged` or `failed`. `hurry` omits the curves."""
        if not self.main:
            return
        self._state = state
        if self._values:
            self._console.line(self._images, self.total_images, self._values, now=True)
        self._console.close()
        if state != "failed" and not hurry:
            self.curves()
        if message:
            self.say(message)
        self._write_progress(force=True)
        if self._wandb is not None:
            self._wandb.close(1 if state in ("diverged", "failed") else 0)

    def _record(self, images: int, step: int, values: Mapping[str, float]) -> None:
        line = {"images": images, "step": step, "time": round(time.time(), 3), **values}
        with self._writing():
            metrics_log.append(self.folder / "metrics.jsonl", line)
        if self._wandb is not None:
            self._wandb.log(images, {**values, "step": step})

    def _log(self, message: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._writing(), (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write("".join(f"{stamp} {line}\n" for line in message.splitlines()))

    def _write_progress(self, *, force: bool = False) -> None:
        if not force and time.monotonic() < self._next_progress:
            return
        self._next_progress = time.monotonic() + self.PROGRESS_EVERY
        rate = self._values.get("images_per_second", 0.0)
        progress = {
            "state": self._state,
            "images": self._images,
            "total_images": self.total_images,
            "images_per_second": rate,
            "eta_seconds": (self.total_images - self._images) / rate if rate else None,
            "checkpoint": self._checkpoint,
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with self._writing():
            write_atomic(self.folder / "progress.json", json.dumps(progress, indent=1) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an OSError into one warning for each file and cause."""
        try:
            yield
        except OSError as error:
            problem = (error.errno, error.filename)
            if problem not in self._warned:
                self._warned.add(problem)
                self._console.say(f"warning: {error.filename or self.folder}: {error.strerror}; training continues")


def memory_bytes() -> int:
    """Peak GPU memory that torch has allocated if it uses CUDA, else the resident memory of this process."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)
