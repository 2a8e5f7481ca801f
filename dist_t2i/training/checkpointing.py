"""Saves and restores the training state of a run: engines, moving average, scores of validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_t2i.checkpoint import store
from dist_t2i.checkpoint.lease import Lease, Superseded
from dist_t2i.checkpoint.mirror import Mirror
from dist_t2i.checkpoint.store import Checkpoint, Retention
from dist_t2i.config.sections import CheckpointConfig
from dist_t2i.distributed.collectives import on_main
from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.distributed.watchdog import Watchdog
from dist_t2i.errors import CheckpointError
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.training.ema import Average
from dist_t2i.training.schedule import passes
from dist_t2i.training.validation import Validation

LAST_SAVE_SECONDS = 300.0
"""The last checkpoint of a run is retried for this many seconds while the disk is full or away."""
_WRITING_SECONDS = LAST_SAVE_SECONDS + 600.0
"""Writing may take this many seconds longer than a step before the watchdog counts it as a hang."""


class Checkpointer:
    """Decides when to save, saves, and restores. Every rank has one, and all ranks make the same calls in the same order.

    Only rank 0 reads `lease` and writes files. `latest` is the newest intact checkpoint, None for a new run. `batch` is the
    global batch in images, `report_images` the images between two reports.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        lease: Lease | None,
        latest: Checkpoint | None,
        *,
        engines: Sequence[NetworkEngine],
        average: Average,
        validation: Validation | None,
        reporter: Reporter,
        mirror: Mirror,
        watchdog: Watchdog,
        seed: int,
        batch: int,
        report_images: int,
    ) -> None:
        self.latest, self.mirror = latest, mirror
        self._config, self._lease = config, lease
        self._engines, self._average, self._validation = engines, average, validation
        self._reporter, self._watchdog = reporter, watchdog
        self._seed, self._batch, self._report_images = seed, batch, report_images
        self._main = dist.get_rank() == 0
        self._scores: dict[str, Any] | None = None
        """State of the validation; passed on unchanged while a run does not validate, so that retention keeps the best."""
        self._failures, self._retry_at = 0, -1  # the same on every rank

    # ---- restore -----------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Load the latest checkpoint on every rank; returns its images seen, 0 without one. Collective."""
        if self.latest is None:
            return 0
        tensors, state = self.latest.tensors, self.latest.state
        for engine in self._engines:
            weights, moments = tensors(engine.name), tensors(f"optimizer-{engine.name}")
            engine.load_state(weights, moments, state["counters"][engine.name])
        self._average.load(tensors("ema"))
        self._scores = state.get("evaluation")
        if self._validation is not None:
            self._validation.load(self._scores)
        return self.latest.images

    # ---- save --------------------------------------------------------------------------------------------------------

    def due(self, images: int) -> bool:
        """Whether a checkpoint, or the retry of a failed one, is due at `images` seen."""
        return passes(self._config.every_images, images, self._batch) or images == self._retry_at

    def save(self, images: int, *, last: bool) -> None:
        """Save at `images` seen. Collective.

        A failure is a warning and is retried after some more training. The `last` checkpoint of a process has no later
        chance: it is retried here, and raises CheckpointError in the end.
        """
        if self.latest and self.latest.images == images:
            return

        # Gather: fp32 CPU tensors by name. ZeRO spreads a network over the ranks, so all of them take part.
        self._watchdog.doing("gathering a checkpoint", images)
        files = self._files()
        state = self._state()

        # Write: rank 0, while the other ranks wait for its result.
        self._watchdog.doing("writing a checkpoint", images, extra=_WRITING_SECONDS)
        patience = LAST_SAVE_SECONDS if last else 0.0
        folder, problem = on_main(lambda: self._write(images, files, state, patience))

        # All ranks know the result, so they agree on when to try again.
        if folder is None:
            self._failed(images, problem)
        else:
            self._saved(images, folder)

    def _files(self) -> dict[str, dict[str, Tensor]]:
        files = {"ema": self._average.state()}
        for engine in self._engines:
            files[engine.name] = engine.weights()
            files[f"optimizer-{engine.name}"] = engine.optimizer_state()
        return files

    def _state(self) -> dict[str, Any]:
        if self._validation is not None:
            self._scores = self._validation.state()
        state = {
            "counters": {engine.name: engine.counters() for engine in self._engines},
            "seed": self._seed,
            "world_size": dist.get_world_size(),
        }
        return {**state, "evaluation": self._scores} if self._scores else state

    def _write(
        self, images: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any], patience: float
    ) -> tuple[Path | None, str]:
        """Rank 0: commit a checkpoint; returns its folder, or None and the problem.

        With `patience` it retries for this many seconds and then raises CheckpointError.
        """
        assert self._lease is not None
        keep = Retention(self._config.keep_last, self._config.keep_every_images)
        deadline, warned = time.monotonic() + patience, False
        while True:
            try:
                return store.save(self._lease, images, files, state, keep=keep), ""
            except CheckpointError as error:
                if not patience:
                    return None, str(error)
                if time.monotonic() > deadline:
                    raise
                if not warned:
                    self._reporter.warn(f"{error} It is the last checkpoint: retrying for {patience / 60:g} minutes.")
                    warned = True
            time.sleep(2.0)

    def _failed(self, images: int, problem: str) -> None:
        # The pause doubles with each failure: from one report's images up to the usual distance of checkpoints.
        pause = self._report_images * 2 ** min(self._failures, 20)
        if self._config.every_images > 0:
            pause = min(pause, -(-self._config.every_images // self._batch) * self._batch)
        self._failures += 1
        self._retry_at = images + pause
        if self._validation is not None:
            self._validation.unsaved(images)
        if self._main:
            self._reporter.warn(f"{problem} Training goes on; the next try is at {self._retry_at:,} images.")

    def _saved(self, images: int, folder: Path) -> None:
        if self._failures and self._main:
            self._reporter.say(f"checkpoint at {images:,} images saved, after {self._failures} failed attempts")
        self._failures, self._retry_at = 0, -1
        self.latest = Checkpoint(folder, {"images": images})
        self._reporter.saved(images, folder)
        self.mirror.offer(images)

    # ---- the lease on the run ----------------------------------------------------------------------------------------

    def lease_lost(self) -> bool:
        """Whether this process is rank 0 and another process has taken the run over."""
        return self._lease is not None and self._lease.lost()

    def superseded(self) -> Superseded:
        """The error that ends every rank after a takeover; only rank 0 prints it."""
        error = self._lease.error() if self._lease else Superseded("another process has taken the run over")
        error.reported_by_main = not self._main
        return error

    def release(self) -> None:
        """Give the lease back."""
        if self._lease is not None:
            self._lease.release()
