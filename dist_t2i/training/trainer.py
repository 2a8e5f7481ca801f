"""The training loop. Its only state is the number of images seen, which determines when reports, saves, ... are due."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dist_t2i.checkpoint.divergence import rate_scale, rates, rewinds, settle
from dist_t2i.checkpoint.lease import Lease, Superseded
from dist_t2i.checkpoint.mirror import Mirror
from dist_t2i.checkpoint.store import folder_name
from dist_t2i.config.sections import DataConfig, EngineConfig, OptimizerConfig, ReportConfig, TrainConfig
from dist_t2i.data.stream.stream import Stream
from dist_t2i.distributed.collectives import max_over_ranks, mean_over_ranks, on_main
from dist_t2i.distributed.preemption import StopFlag, StopReason
from dist_t2i.distributed.watchdog import Watchdog
from dist_t2i.errors import ExitStatus, TrainingError, UserError
from dist_t2i.reporting.meter import Meter
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.training.checkpointing import Checkpointer
from dist_t2i.training.ema import Average
from dist_t2i.training.gan import Gan
from dist_t2i.training.health import Diverged, Health, check_finite
from dist_t2i.training.sample_grid import SampleGrid
from dist_t2i.training.schedule import learning_rate_scale, passes
from dist_t2i.training.validation import Validation

_EVALUATION_SECONDS, _SAMPLE_SECONDS = 3600.0, 600.0
"""Extra seconds, beyond those of a step, before the watchdog counts an evaluation or a sample grid as a hang."""


@dataclass
class Trainer:
    """Trains a run to its end. Every rank has a `Trainer`, and all ranks make the same calls in the same order."""

    folder: Path
    images: int  # seen so far
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    engine: EngineConfig  # its precision is never `auto`
    report: ReportConfig
    open_stream: Callable[[int], Stream]  # the stream from a number of images seen; collective
    checkpointer: Checkpointer
    gan: Gan
    average: Average
    validation: Validation | None  # None if `eval.every_images` is 0
    sample_grid: SampleGrid | None  # only on rank 0
    reporter: Reporter
    mirror: Mirror
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self.batch, self.total = self.train.global_batch, self.train.total_images
        self.health = self.checkpointer.health
        self.meter, self.stream = Meter(), self.open_stream(self.images)

    def run(self, stop: StopFlag) -> ExitStatus:
        """Train until `train.total_images` are seen or `stop` asks to end; returns the exit status."""
        with self._closing():
            self._begin()
            while True:
                try:
                    status = self._advance(stop)
                except Diverged as found:
                    status = self._go_back(found)
                if status is not None:
                    return status

    def _advance(self, stop: StopFlag) -> ExitStatus | None:
        """Do what is due at the images seen, then train for a step. If the run ends instead, returns its exit status.

        Collective. Raises Diverged on all ranks.
        """
        reason, finished = agree(stop, self.checkpointer.lease), self.images >= self.total
        ending = bool(reason) or finished
        # A run that is asked to stop saves at once. If an evaluation is due, it follows after the run is resumed.
        improved = not reason and self._evaluate()
        saving = ending or improved or self.checkpointer.due(self.images)
        sampling = finished or passes(self.report.sample_every_images, self.images, self.batch)
        # Report before saving: the report raises an error if a number is not finite, so broken weights are never saved.
        if saving or passes(self.report.every_steps * self.batch, self.images, self.batch):
            self._report()
        if sampling:
            self._sample()
        if saving:
            with self.meter.paused():
                self.checkpointer.save(self.images, last=ending)
        if ending:
            return self._end(reason)
        self._step()
        for warning in self.health.check(self.images, mean_over_ranks):
            if dist.get_rank() == 0:
                self.reporter.warn(warning)
        return None

    def _go_back(self, found: Diverged) -> ExitStatus | None:
        """Continue from the last healthy checkpoint, or end the run there and return the exit status. Collective."""
        if not self.checkpointer.rewind(found):
            message, latest = self.checkpointer.stop(found), self.checkpointer.latest
            self.mirror.offer(latest.images if latest else None)
            self.watchdog.stop()
            self.reporter.close("diverged", message)
            return ExitStatus.DIVERGED
        self.stream.close()
        self.images = self.checkpointer.restore()
        self.meter, self.stream = Meter(), self.open_stream(self.images)
        self._start_reports()
        return None

    def _step(self) -> None:
        self.watchdog.doing("waiting for data", self.images, extra=self.data.retry_seconds)
        with self.meter.waiting():
            batches = [next(self.stream) for _ in range(self.engine.accumulation)]
        self.watchdog.doing("training step", self.images)
        scale = learning_rate_scale(self.images, self.optimizer, self.total) * rate_scale(self.checkpointer.divergences)
        metrics = self.gan.step(batches, self.images, scale)
        self.images += self.batch
        self.average.update(self.gan.engines, self.images)
        self.meter.add(self.batch, {**metrics, "lr": scale * self.optimizer.generator_lr})
        self.health.add(metrics)
        self.reporter.tick(self.images)

    def _evaluate(self) -> bool:
        """Score the moving average if an evaluation is due; returns whether its score is the best. Collective."""
        validation = self.validation
        if validation is None or not validation.due(self.images):
            return False
        self.watchdog.doing("evaluating", self.images, extra=_EVALUATION_SECONDS)
        with self.meter.paused():
            others = [engine for engine in self.gan.engines if engine is not self.gan.generator]
            weights = {name: value for engine in others for name, value in engine.weights().items()}
            slow = dist.get_world_size() > 1
            scores = on_main(lambda: validation.scores(self.average.state(), weights, self.images), slow=slow)
        best = validation.take(self.images, scores)
        self.reporter.evaluated(self.images, self.images // self.batch, scores, best=best)
        return best

    def _report(self) -> None:
        """Report the averages since the last report. Collective.

        When an average is not finite, raises TrainingError; instead raises Diverged if signs of divergence came before,
        or with train.on_divergence=rewind.
        """
        self.mirror.poll()
        values = self.meter.take(mean_over_ranks)
        if not values:
            return
        step, latest = self.images // self.batch, self.checkpointer.latest
        checkpoint = str(latest.folder) if latest else ""
        broken = not all(map(math.isfinite, values.values()))
        groups = [group for engine in self.gan.engines for group in engine.non_finite_groups()] if broken else ()
        try:
            check_finite(values, self.images, step, checkpoint, groups, fp16=self.engine.precision == "fp16")
        except TrainingError as error:
            if self.train.on_divergence != "rewind" and self.health.since is None:
                raise
            raise self.health.broken(self.images, str(error).splitlines()[0]) from error
        if count := rewinds(self.checkpointer.divergences):
            values["rewinds"] = float(count)
        self.reporter.metrics(self.images, step, values)

    def _sample(self) -> None:
        self.watchdog.doing("sample grid", self.images, extra=_SAMPLE_SECONDS)
        with self.meter.paused():
            if self.sample_grid is not None:
                rows = self.sample_grid.rows(self.average)
                self.reporter.samples(self.images, rows, name=folder_name(self.images))

    def _begin(self) -> None:
        if self.images == 0 and self.train.on_divergence == "rewind":
            self.checkpointer.save(0, last=False)  # where a run rewinds to that diverges before its first checkpoint
        if self.checkpointer.lease is not None:
            settle(self.folder)
        self._start_reports()
        self.reporter.say(greeting(self))
        if self.images == 0:
            self._sample()

    def _start_reports(self) -> None:
        latest = self.checkpointer.latest
        self.reporter.start(self.images, latest.folder if latest else None)
        self.mirror.offer(self.images if latest else None)

    def _end(self, reason: StopReason) -> ExitStatus:
        self.watchdog.stop()  # from here on, ranks end at different times; to the watchdog, an ended rank looks hung
        if self.images >= self.total:
            warn_of_a_sign(self.health, self.reporter)
            self.reporter.close("finished", f"finished: {self.images:,} images seen; the run is in {self.folder}")
            return ExitStatus.FINISHED
        # After a scheduler's signal, do not plot the curves: the scheduler is waiting for this process to end. After
        # Ctrl-C, plot the curves: a person may want to see them.
        saved = f"stopped by {reason.text} at {self.images:,} images, checkpoint saved"
        hurry = reason is not StopReason.SIGINT
        self.reporter.close("stopped", f"{saved}; run the same command again to resume", hurry=hurry)
        return ExitStatus.STOPPED

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """At the end, stops the loader's workers and releases the lease. After an error, the reporter shows it last."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Superseded):  # a superseded process must not write into the run's folder
                message = "" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self.reporter.close("failed", message)
            self.mirror.close()
            raise
        finally:
            self.stream.close()
            if self.checkpointer.lease is not None:
                self.checkpointer.lease.release()


def agree(stop: StopFlag, lease: Lease | None) -> StopReason:
    """The reason why all ranks stop now, or NONE. Collective. Raises Superseded if another process took over."""
    if lease is not None and lease.lost():
        stop.supersede()
    reason = stop.agreed(max_over_ranks)
    if reason is StopReason.TAKEN_OVER:
        error = lease.error() if lease is not None else Superseded("another process has taken over the run")
        error.reported_by_main = lease is None
        raise error
    return reason


def warn_of_a_sign(health: Health, reporter: Reporter) -> None:
    """Warns on rank 0 if a run finishes while a sign of divergence holds, before its patience is over."""
    if health.since is not None and dist.get_rank() == 0:
        sign = f"a sign of divergence has held since {health.since:,} images"
        reporter.warn(f"{sign}: look at the pictures, and at the last healthy checkpoint")


def greeting(trainer: Trainer) -> str:
    """The first message of a run: where training starts, on how many ranks, and the sizes of the networks."""
    world, images, engines = dist.get_world_size(), trainer.images, trainer.gan.engines
    parts = [part for engine in engines for part in engine.module.named_children()]
    counts = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f}M" for name, part in parts)
    halved = f", {text}" if (text := rates(trainer.checkpointer.divergences)) else ""
    start = f"from the checkpoint at {images:,} images" if images else "from the start"
    return (
        f"{trainer.folder}: training {start} to {trainer.total:,} images; {world} rank{'s' if world > 1 else ''} on "
        f"{engines[0].device.type}, {trainer.engine.precision}, batch {trainer.batch}{halved}; parameters: {counts}"
    )
