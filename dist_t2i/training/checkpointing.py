"""Saves and restores the training state of a run: the engines, the moving average, the validation scores, the health.

After a divergence, the checkpoint from before its first sign becomes the newest one (checkpoint/divergence.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_t2i.checkpoint import divergence, store
from dist_t2i.checkpoint.lease import Lease
from dist_t2i.checkpoint.mirror import Mirror
from dist_t2i.checkpoint.store import Checkpoint, Retention
from dist_t2i.config.sections import CheckpointConfig, ReportConfig, TrainConfig
from dist_t2i.distributed.collectives import mean_over_ranks, on_main
from dist_t2i.distributed.engine import NetworkEngine
from dist_t2i.distributed.watchdog import Watchdog
from dist_t2i.errors import CheckpointError
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.training.ema import Average
from dist_t2i.training.health import Diverged, Health
from dist_t2i.training.schedule import passes
from dist_t2i.training.validation import Validation

LAST_SAVE_SECONDS = 300.0
"""The seconds for which a failed save of a run's last checkpoint is retried, for example while the disk is full."""
_WRITING_SECONDS = LAST_SAVE_SECONDS + 600.0
"""Extra seconds, beyond those of a step, before the watchdog counts the writing of a checkpoint as a hang."""


@dataclass(eq=False)
class Checkpointer:
    """Saves checkpoints at the configured times, and restores the latest checkpoint.

    Every rank has a `Checkpointer`, and all ranks make the same calls in the same order.
    """

    config: CheckpointConfig
    train: TrainConfig
    report: ReportConfig
    lease: Lease | None  # None except on rank 0, the only rank that writes files
    latest: Checkpoint | None  # the newest intact checkpoint; None for a new run
    init: dict[str, Any] | None  # the model that the run started from, see inference/warm_start.py
    engines: Sequence[NetworkEngine]
    average: Average
    validation: Validation | None
    health: Health
    reporter: Reporter
    mirror: Mirror
    watchdog: Watchdog
    folder: Path  # of the run
    divergences: list[dict[str, Any]] = field(default_factory=list)  # so far, as in state.json
    _scores: dict[str, Any] | None = None
    """State of the validation. A run without validation copies this state from the last checkpoint."""
    _failures: int = 0  # failed saves since the last success; `_failures` and `_retry_at` are equal on all ranks
    _retry_at: int = -1

    def restore(self) -> int:
        """Load the latest checkpoint on every rank; returns its images seen, or 0 without a checkpoint. Collective."""
        if self.latest is None:
            return 0
        tensors, state = self.latest.tensors, self.latest.state
        self.divergences = state.get("divergences", [])
        self.health.load(state.get("health"), self.latest.images)
        for engine in self.engines:
            weights, moments = tensors(engine.name), tensors(f"optimizer-{engine.name}")
            engine.load_state(weights, moments, state["counters"][engine.name])
        self.average.load(tensors("ema"))
        self._scores = state.get("evaluation")
        if self.validation is not None:
            self.validation.load(self._scores)
        return self.latest.images

    def due(self, images: int) -> bool:
        """Whether a checkpoint is due at `images` seen, or the retry of a failed checkpoint."""
        return passes(self.config.every_images, images, self.train.global_batch) or images == self._retry_at

    def save(self, images: int, *, last: bool) -> None:
        """Save a checkpoint at `images` seen. Collective.

        After a failed save, the run prints a warning, continues training, and retries the save later. A failed `last`
        save is retried at once; CheckpointError is raised if all retries fail.
        """
        if self.latest and self.latest.images == images:
            return

        # Gather fp32 CPU tensors by name. ZeRO spreads a network over the ranks, so all ranks take part.
        self.watchdog.doing("gathering a checkpoint", images)
        files = {"ema": self.average.state()}
        for engine in self.engines:
            files |= {engine.name: engine.weights(), f"optimizer-{engine.name}": engine.optimizer_state()}
        counters = {engine.name: engine.counters() for engine in self.engines}
        state = {"counters": counters, "seed": self.train.seed, "world_size": dist.get_world_size()}
        if self.validation is not None:
            self._scores = self.validation.state()
        if self.init:
            state["init"] = self.init
        if self._scores:
            state["evaluation"] = self._scores
        if self.divergences:
            state["divergences"] = self.divergences
        # A rewind must not depend on the checkpoints that stop signals or evaluations add.
        if self.train.on_divergence != "rewind" or passes(self.config.every_images, images, self.train.global_batch):
            self.health.add_checkpoint(images, mean_over_ranks)
        state["health"] = self.health.state(mean_over_ranks)

        # Rank 0 writes; the other ranks wait for the result.
        self.watchdog.doing("writing a checkpoint", images, extra=_WRITING_SECONDS)
        patience = LAST_SAVE_SECONDS if last else 0.0
        folder, problem = on_main(lambda: self._write(images, files, state, patience))

        # All ranks know the result, so all ranks agree on the time of the next try.
        if folder is None:
            self._failed(images, problem)
        else:
            self._saved(images, folder)

    def _write(
        self, images: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any], patience: float
    ) -> tuple[Path | None, str]:
        """Returns (folder, "") after a success, and (None, problem) after a failure. If `patience` is not 0, a failed
        save is retried for `patience` seconds. If all retries fail, CheckpointError is raised."""
        assert self.lease is not None
        keep = Retention(self.config.keep_last, self.config.keep_every_images)
        deadline, warned = time.monotonic() + patience, False
        while True:
            try:
                return store.save(self.lease, images, files, state, keep=keep), ""
            except CheckpointError as error:
                if not patience:
                    return None, str(error)
                if time.monotonic() > deadline:
                    raise
                if not warned:
                    self.reporter.warn(f"{error} Saving this last checkpoint is retried for {patience / 60:g} minutes.")
                    warned = True
            time.sleep(2.0)

    def rewind(self, found: Diverged) -> bool:
        """Make the checkpoint before the divergence the latest; False if there is none, or after too many rewinds.

        The caller restores it. Collective. Raises CheckpointError and Superseded.
        """
        if self.train.on_divergence != "rewind" or not divergence.may_rewind(self.divergences):
            return False
        self.watchdog.doing("rewinding", found.at, extra=_WRITING_SECONDS)
        healthy = self.health.healthy(found.since)
        divergences = [*self.divergences, found.record(healthy, rewound=True)]
        limits, changes = [healthy, found.since], {"divergences": divergences}
        latest = on_main(lambda: store.rewind(self.lease, limits, changes) if self.lease else None)
        if latest is None:
            return False
        self.latest, self._failures, self._retry_at = latest, 0, -1
        if self.lease is not None:
            self.reporter.warn(f"{found}\n  Rewinding to {latest.folder}, with {divergence.rates(divergences)}.")
        return True

    def stop(self, found: Diverged) -> str:
        """Make the last healthy checkpoint the newest one; returns a message for people. Collective. Raises Superseded."""
        self.watchdog.doing("going back after a divergence", found.at, extra=_WRITING_SECONDS)
        divergences = [*self.divergences, found.record(self.health.healthy(found.since), rewound=False)]
        stop = partial(divergence.stop, run=self.folder, divergences=divergences, text=str(found))
        outcome = on_main(lambda: stop(self.lease) if self.lease else None)
        self.latest, message = outcome or (None, "")
        return message

    def _failed(self, images: int, problem: str) -> None:
        # The pause before the next try, in images, doubles with each failure. The first pause is as long as the
        # interval of reports, and the longest pause is as long as the interval of checkpoints.
        batch, every = self.train.global_batch, self.config.every_images
        pause = self.report.every_steps * batch * 2 ** min(self._failures, 20)
        self._failures += 1
        self._retry_at = images + min(pause, -(-every // batch) * batch)
        if self.validation is not None:
            self.validation.unsaved(images)
        if self.lease is not None:
            self.reporter.warn(f"{problem} Training continues; the next try is at {self._retry_at:,} images.")

    def _saved(self, images: int, folder: Path) -> None:
        if self._failures:
            self.reporter.say(f"checkpoint at {images:,} images saved, after {self._failures} failed attempts")
        self._failures, self._retry_at = 0, -1
        self.latest = Checkpoint(folder, {"images": images})
        self.reporter.saved(images, folder)
        self.mirror.offer(images)
