"""What a run tells: the progress line, log.txt, metrics.jsonl, progress.json, sample grids, curves and W&B.

    RUN/log.txt         what was said, with times
    RUN/metrics.jsonl   a line a report: images, step, time, losses, logits, gradient norms, rates, memory; and one an
                        evaluation: images, step, time, eval/SPLIT/SCORE
    RUN/progress.json   where the run is now, for whoever asks from outside
    RUN/samples/images-000123456.png
    RUN/curves.png

Only rank 0 writes; on the others a `Reporter` takes the same calls and does nothing, so the loop needs no ifs. A file
that cannot be written (a full disk) is told once and done without: reports are never a reason to lose a run.

Metrics that the line and the curves know: `loss/d`, `loss/g`, their terms (`loss/d_adversarial`, ...), `logit/real`,
`logit/fake`, `logit/mismatched`, `grad/<engine>`, `fake/std`, and what `Meter.take` adds. Others are kept as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dist_t2i.config.sections import Config
from dist_t2i.reporting import metrics_log
from dist_t2i.reporting.console import Console, format_line, line_interval
from dist_t2i.reporting.image_grid import GridRow, draw_grid, save_grid
from dist_t2i.utils.files import write_atomic

if TYPE_CHECKING:
    from dist_t2i.reporting.wandb_logger import WandbSink

STATES = ("starting", "training", "stopped", "finished", "failed")


class Reporter:
    """Call `start`, then `tick` every step, `metrics` and `samples` now and then, and `close` at the end."""

    PROGRESS_EVERY = 2.0
    """Seconds between two versions of progress.json while training."""

    def __init__(self, folder: Path, config: Config, *, main: bool, stream: TextIO | None = None) -> None:
        self.folder, self.config, self._main = Path(folder), config, main
        self._total = config.train.total_images
        self._console = Console(stream)
        self._stream = stream
        self._values: dict[str, float] = {}
        self._images = 0
        self._state = "starting"
        self._checkpoint = ""
        self._next_progress = 0.0
        self._begin = time.monotonic()
        self._next_line = 0.0
        self._told: set[tuple[int | None, str | None]] = set()
        self._wandb: WandbSink | None = None
        self._can_draw = True
        self._drawn_at = -1

    def start(self, images: int, checkpoint: Path | None = None) -> None:
        """Begin, or go on from a checkpoint at `images`: what was reported beyond it is dropped, it comes again."""
        self._images = images
        self._checkpoint = str(checkpoint or "")
        if not self._main:
            return
        dropped = 0
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            dropped = metrics_log.cut(self.folder / "metrics.jsonl", images)
        if dropped:
            self.say(f"metrics.jsonl: {dropped} reports beyond the checkpoint dropped; they come again")
        if self.config.report.wandb != "disabled":
            self._open_wandb()
        self._state = "training"
        self._write_progress(force=True)

    def say(self, message: str) -> None:
        """A message for the person in front of it, and for log.txt; on rank 0 only."""
        if self._main:
            self._console.say(message)
            self._log(message)

    def warn(self, message: str) -> None:
        """A warning, from any rank."""
        if self._main:
            self.say(f"warning: {message}")
        else:
            print(
                f"rank {os.environ.get('RANK', '?')}: warning: {message}", file=self._stream or sys.stderr, flush=True
            )

    def tick(self, images: int) -> None:
        """After every step: refreshes the live line, or prints one where there is no terminal, when it is due."""
        self._images = images
        if self._main and self._values:
            self._console.line(images, self._total, self._values)
            if time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + line_interval(time.monotonic() - self._begin)
                self._log(format_line(images, self._total, self._values))
            self._write_progress()

    def metrics(self, images: int, step: int, values: Mapping[str, float]) -> None:
        """A line for metrics.jsonl and W&B from what `Meter.take` gave; the progress line shows it from now on."""
        self._images = images
        if not self._main or not values:
            return
        self._values = {**values, "memory_bytes": memory_bytes()}
        line = {"images": images, "step": step, "time": round(time.time(), 3), **self._values}
        with self._writing():
            metrics_log.append(self.folder / "metrics.jsonl", line)
        if self._wandb is not None:
            self._wandb.log(images, {**self._values, "step": step})
        self.tick(images)

    def evaluated(self, images: int, step: int, values: Mapping[str, float], *, best: bool) -> None:
        """Scores of the weights at `images`: a line of their own in metrics.jsonl, and in W&B."""
        if not self._main:
            return
        with self._writing():
            line = {"images": images, "step": step, "time": round(time.time(), 3), **values}
            metrics_log.append(self.folder / "metrics.jsonl", line)
        if self._wandb is not None:
            self._wandb.log(images, {**values, "step": step})
        told = ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items())
        self.say(f"evaluated at {images:,} images: {told}{'; the best so far' if best else ''}")

    def samples(self, images: int, rows: Sequence[GridRow]) -> Path | None:
        """Draw a sample grid and the curves; the grid's path on rank 0, if it could be written."""
        if not self._main:
            return None
        path = self.folder / "samples" / f"images-{images:09d}.png"
        title = f"{self.config.run.name or self.folder.name}: {images:,} images seen"
        grid = draw_grid(rows, title=title, tile=max(64, self.config.data.image_size))
        with self._writing():
            save_grid(grid, path)
        self.curves()
        if not path.exists():
            return None
        if self._wandb is not None:
            self._wandb.log(images, {"samples": path})
        return path

    def curves(self) -> None:
        """Draw curves.png from metrics.jsonl, once for these images seen; without matplotlib, say so once."""
        if not self._main or not self._can_draw or self._drawn_at == self._images:
            return
        self._drawn_at = self._images
        try:
            from dist_t2i.reporting.curves import draw_curves

            name = self.config.run.name or self.folder.name
            with self._writing():
                draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", title=name)
        except ImportError as error:
            self._can_draw = False
            self.say(f"no curves.png: {error} (`pip install matplotlib` brings it)")

    def saved(self, images: int, checkpoint: Path) -> None:
        """A checkpoint was committed."""
        self._checkpoint = str(checkpoint)
        if self._main:
            self._log(f"checkpoint at {images:,} images: {checkpoint}")
            self._write_progress(force=True)

    def close(self, state: str, message: str = "", *, hurry: bool = False) -> None:
        """The end: `stopped` (goes on later), `finished` or `failed`, and the last words. In a `hurry`, nothing is drawn."""
        if not self._main:
            return
        self._state = state
        if self._values:
            self._console.line(self._images, self._total, self._values, now=True)
        self._console.close()
        if state != "failed" and not hurry:
            self.curves()
        if message:
            self.say(message)
        self._write_progress(force=True)
        if self._wandb is not None:
            self._wandb.close(1 if state == "failed" else 0)

    def _open_wandb(self) -> None:
        from dist_t2i.config.fields import flatten
        from dist_t2i.reporting.wandb_logger import WandbSink

        report = self.config.report
        name = self.config.run.name or self.folder.name
        values = flatten(self.config)
        self._wandb = WandbSink(self.folder, report.wandb, report.wandb_project, name, values, self.warn)

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
            "total_images": self._total,
            "images_per_second": rate,
            "eta_seconds": (self._total - self._images) / rate if rate else None,
            "checkpoint": self._checkpoint,
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with self._writing():
            write_atomic(self.folder / "progress.json", json.dumps(progress, indent=1) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = (error.errno, error.filename)
            if problem not in self._told:
                self._told.add(problem)
                self._console.say(f"warning: {error.filename or self.folder}: {error.strerror}; training goes on")


def memory_bytes() -> int:
    """The most GPU memory that torch has held where it uses CUDA, else this process's resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)
