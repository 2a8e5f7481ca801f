"""The training loop, and what happens around a step: report, samples, checkpoint, stop?, step.

Everything that is due is due at some number of images seen, which is all the state that the loop has.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from dist_t2i.checkpoint import run_folder, store
from dist_t2i.checkpoint.lease import Claim, Superseded
from dist_t2i.checkpoint.mirror import Mirroring
from dist_t2i.checkpoint.store import Checkpoint, Retention
from dist_t2i.config.sections import Config
from dist_t2i.data.open_data import open_data
from dist_t2i.data.stream.stream import open_stream
from dist_t2i.distributed.collectives import max_over_ranks, mean_over_ranks, on_main
from dist_t2i.distributed.engine import init_distributed, resolve_precision
from dist_t2i.distributed.launch import Rank, has_gpu
from dist_t2i.distributed.preemption import FINISHED, STOPPED, TAKEN_OVER, StopFlag
from dist_t2i.distributed.watchdog import Watchdog
from dist_t2i.errors import CheckpointError, UserError
from dist_t2i.inference.model_files import load_frozen
from dist_t2i.reporting.meter import Meter
from dist_t2i.reporting.reporter import Reporter
from dist_t2i.training.health import Health, check_finite
from dist_t2i.training.sample_grid import SampleSheet
from dist_t2i.training.schedule import learning_rate_scale
from dist_t2i.training.setup import assemble, read_beginning
from dist_t2i.training.validation import Periodic
from dist_t2i.utils.processes import signals_blocked

_LAST_SAVE_SECONDS = 300.0
"""How long the last checkpoint of a run is tried again when the disk is full or gone."""
_EVALUATION_SECONDS = 3600.0
"""How much longer than a step an evaluation may take before it counts as hung."""
_SLOW_SECONDS = 600.0
"""How much longer than a step a sample grid or a checkpoint may take before it counts as hung."""


def train(config: Config, rank: Rank, *, allow_changes: bool = False, stop: StopFlag | None = None) -> int:
    """Train until `train.total_images` are seen or a signal asks to stop; returns the exit status (see preempt.py).

    The run folder may hold a checkpoint of the same run, which is then gone on from. `stop` is the flag that a caller has
    installed already, to lose no signal while this package was imported. Raises UserError.
    """
    device = torch.device("cuda", rank.local_rank) if has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # To the very end: a late signal must not spoil the exit status.
    stop = stop or StopFlag(announce=rank.rank == 0).install()
    watchdog = Watchdog(Path(config.run.folder), rank.rank, rank.world_size, config.train.hang_seconds).start()
    init_distributed(device)
    try:
        trainer = Trainer(config, device, allow_changes, watchdog)
        with trainer.closing():
            status = trainer.run(stop)
    finally:
        watchdog.stop()
        with contextlib.suppress(Exception):  # the peers may be gone, and another error is on its way
            dist.destroy_process_group()
    trainer.mirroring.finish(status, stop)  # the other ranks need not wait
    return status


class Trainer:
    """A run in its folder: `run` goes on from the newest checkpoint there."""

    def __init__(self, config: Config, device: torch.device, allow_changes: bool, watchdog: Watchdog):
        config = replace(
            config, engine=replace(config.engine, precision=resolve_precision(config.engine.precision, device))
        )
        self.config, self.folder, self.main = config, Path(config.run.folder), dist.get_rank() == 0
        self.batch, self.watchdog = config.train.global_batch, watchdog
        self.reporter = Reporter(self.folder, config, main=self.main)
        self.data = open_data(config.data)
        warn = self.reporter.warn
        self.mirroring = Mirroring(config, self.reporter, main=self.main, allow_changes=allow_changes)
        self.claim: Claim | None = None
        on_main(lambda: self.mirroring.look(self.data.fingerprint), slow=True)
        on_main(lambda: self._claim(allow_changes))
        on_main(lambda: self.mirroring.restore(self.claim), slow=True)
        frozen = None
        if config.text.mode == "frozen":
            frozen = load_frozen(config.text, self.data.tokenizer, config.data.max_tokens)
        self.last = store.load_latest(self.folder, warn=warn if self.main else lambda message: None)
        beginning = None if self.last else read_beginning(config, self.data.tokenizer)
        self.gan, self.average = assemble(config, self.data.tokenizer.vocab_size, device, frozen, beginning)
        self.evaluated: dict | None = None  # which checkpoint is the best: kept on, also while nothing is evaluated
        self.periodic = self._periodic(device) if config.eval.every_images else None
        self.images = self._restore(self.last) if self.last else 0
        self.sheet = SampleSheet(config, self.data, device) if self.main else None
        self.meter, self.health = Meter(), Health()
        self.failed_saves, self.save_again_at = 0, -1  # the same on every rank
        bad_file = self.folder / "bad_samples.jsonl"
        on_main(lambda: run_folder.cut_bad_samples(bad_file, self.images))
        with signals_blocked():
            self.stream = open_stream(
                config,
                self.data.tokenizer,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                start_images=self.images,
                bad_file=bad_file,
                data_set=self.data,
            )

    def _periodic(self, device: torch.device) -> Periodic:
        def made() -> Periodic:
            return Periodic(self.config, self.data, device, self.reporter.warn)

        mine: list[Periodic] = []

        def prepare() -> None:
            mine.append(made())
            mine[0].prepare()

        on_main(prepare, slow=True)
        return mine[0] if mine else made()

    def _claim(self, allow_changes: bool) -> None:
        def warn(message: str) -> None:
            print(f"warning: {message}", flush=True)

        self.claim = run_folder.prepare(self.folder, self.config, self.data, allow_changes=allow_changes, warn=warn)

    @contextlib.contextmanager
    def closing(self):
        """Ends the loader's workers; a failure inside is the run's last word."""
        try:
            yield
        except Superseded:
            self.mirroring.close()
            raise  # nothing in the folder is this process's to change
        except BaseException as error:
            self.reporter.close("failed", "" if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            self.mirroring.close()
            raise
        finally:
            self.stream.close()
            if self.claim is not None:
                self.claim.release()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self, stop: StopFlag) -> int:
        """Steps until the end or a stop, with everything that is due between them. Returns the exit status."""
        c, total = self.config, self.config.train.total_images
        self.reporter.start(self.images, self.last.folder if self.last else None)
        self._greet()
        self.mirroring.offer(self.images if self.last else None)
        if self.images == 0:
            self._samples()
        while True:
            if self.claim is not None and self.claim.lost():
                stop.supersede()
            reason = stop.agreed(max_over_ranks)
            if reason == TAKEN_OVER:
                self._leave()
            ending = bool(reason) or self.images >= total
            best = (
                not reason and self._evaluate()
            )  # a run that must stop does so at once, and evaluates when it goes on
            saving = ending or best or self._due(c.checkpoint.every_images) or self.images == self.save_again_at
            if saving or self._due(c.report.every_steps * self.batch):
                self._report()  # before the save: it is what stops numbers that are not finite
            if (self.images > 0 and self._due(c.report.sample_every_images)) or self.images >= total:
                self._samples()
            if saving:
                self._save(must=ending)
            if ending:
                return self._end(reason)
            self._step()

    def _step(self) -> None:
        self.watchdog.doing("waiting for data", self.images, extra=self.config.data.retry_seconds)
        with self.meter.waiting():
            batches = [next(self.stream) for _ in range(self.config.engine.accumulation)]
        self.watchdog.doing("training step", self.images)
        scale = learning_rate_scale(self.images, self.config.optimizer, self.config.train.total_images)
        metrics = self.gan.step(batches, self.images, scale)
        self.images += self.batch
        self.average.update(self.gan, self.images)
        self.meter.add(self.batch, {**metrics, "lr": scale * self.config.optimizer.generator_lr})
        self.reporter.tick(self.images)

    def _due(self, every: int) -> bool:
        """Whether a multiple of `every` images was passed in the last step (never where `every` is 0, or at once)."""
        return every > 0 and self.images > 0 and self.images // every > (self.images - self.batch) // every

    def _report(self) -> None:
        """Numbers that are not finite end the run here, before a checkpoint could keep them."""
        self.mirroring.tell()
        values = self.meter.take(mean_over_ranks)
        if not values:
            return
        step = self.images // self.batch
        broken = not all(math.isfinite(value) for value in values.values())
        check_finite(
            values,
            images=self.images,
            step=step,
            checkpoint=str(self.last.folder) if self.last else "",
            groups=[g for engine in self.gan.engines for g in engine.non_finite_groups()] if broken else (),
            skips_overflows=self.config.engine.precision == "fp16",
        )
        for warning in self.health.observe(self.images, values):
            if self.main:
                self.reporter.warn(warning)
        self.reporter.metrics(self.images, step, values)

    def _samples(self) -> None:
        self.watchdog.doing("sample grid", self.images, extra=_SLOW_SECONDS)
        with self.meter.paused():
            if self.sheet is not None:
                self.reporter.samples(self.images, self.sheet.rows(self.average))

    def _evaluate(self) -> bool:
        """Collective. Scores the moving average where that is due; whether it is the best so far."""
        periodic, at_end = self.periodic, self.images >= self.config.train.total_images
        if periodic is None or periodic.done(self.images) or not (self._due(self.config.eval.every_images) or at_end):
            return False
        self.watchdog.doing("evaluating", self.images, extra=_EVALUATION_SECONDS)
        with self.meter.paused():
            others = [engine for engine in self.gan.engines if engine is not self.gan.generator]
            weights = {name: value for engine in others for name, value in engine.weights().items()}

            def scores() -> dict[str, float]:
                return periodic.scores(self.folder, self.average.state(), weights, self.images)

            found = on_main(scores, slow=dist.get_world_size() > 1)
        best = periodic.take(self.images, found)
        self.reporter.evaluated(self.images, self.images // self.batch, found, best=best)
        return best

    def _greet(self) -> None:
        world, device = dist.get_world_size(), self.gan.generator.device
        counts = ", ".join(
            f"{name} {sum(p.numel() for p in module.parameters()) / 1e6:.2f}M"
            for engine in self.gan.engines
            for name, module in engine.module.named_children()
        )
        where = f"from the checkpoint at {self.images:,} images" if self.images else "from the start"
        ranks = f"{world} rank{'s' if world > 1 else ''} on {device.type}"
        self.reporter.say(
            f"{self.folder}: training {where} to {self.config.train.total_images:,} images; {ranks}, "
            f"{self.config.engine.precision}, batch {self.batch}; parameters: {counts}"
        )

    def _end(self, reason: str) -> int:
        self.watchdog.stop()  # the ranks part here, and one that has ended gives no sign of life
        if self.images >= self.config.train.total_images:
            self.reporter.close("finished", f"finished: {self.images:,} images seen; the run is in {self.folder}")
            return FINISHED
        self.reporter.close(
            "stopped",
            f"stopped by {reason} at {self.images:,} images, checkpoint saved; the same command goes on from there",
            hurry=reason != "SIGINT",  # whoever preempts the job waits for its end; a person may want to see the curves
        )
        return STOPPED

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, *, must: bool) -> None:
        """Collective. One that cannot be written is a warning, and tried again soon; the last one (`must`) at once."""
        if self.last and self.last.images == self.images:
            return
        self.watchdog.doing("gathering a checkpoint", self.images)
        with self.meter.paused():
            files = self._files()
            self.watchdog.doing("writing a checkpoint", self.images, extra=_LAST_SAVE_SECONDS + _SLOW_SECONDS)
            state = {
                "counters": {engine.name: engine.counters() for engine in self.gan.engines},
                "seed": self.config.train.seed,
                "world_size": dist.get_world_size(),
            }
            if self.periodic is not None:
                self.evaluated = self.periodic.state()
            if self.evaluated:
                state["evaluation"] = self.evaluated
            folder, problem = on_main(lambda: self._write(files, state, patience=_LAST_SAVE_SECONDS if must else 0))
        if folder is None:
            self.failed_saves += 1
            if self.periodic is not None:
                self.periodic.unsaved(self.images)
            self.save_again_at = self.images + self._pause_before_saving_again()
            if self.main:
                self.reporter.warn(f"{problem} Training goes on; the next try is at {self.save_again_at:,} images.")
            return
        if self.failed_saves and self.main:
            self.reporter.say(
                f"checkpoint at {self.images:,} images saved, after {self.failed_saves} that could not be"
            )
        self.failed_saves, self.save_again_at = 0, -1
        self.last = Checkpoint(folder, {"images": self.images})
        self.reporter.saved(self.images, folder)
        self.mirroring.offer(self.images)

    def _write(self, files: dict, state: dict, *, patience: float) -> tuple[Path | None, str]:
        """Rank 0: commit a checkpoint. With `patience` (seconds), tries again so long, and raises CheckpointError then;
        without, returns what stood in the way."""
        keep = Retention(self.config.checkpoint.keep_last, self.config.checkpoint.keep_every_images)
        end, told = time.monotonic() + patience, False
        assert self.claim is not None
        while True:
            try:
                return store.save(self.claim, self.images, files, state, keep=keep), ""
            except CheckpointError as error:
                if not patience:
                    return None, str(error)
                if time.monotonic() > end:
                    raise
                if not told:
                    self.reporter.warn(f"{error} It is the last one, and is tried again for {patience / 60:g} minutes.")
                    told = True
            time.sleep(2.0)

    def _pause_before_saving_again(self) -> int:
        """Images to train on before the next try: a report's worth, then twice as many each time, up to the usual."""
        pause = self.config.report.every_steps * self.batch * 2 ** min(self.failed_saves - 1, 20)
        usual = self.config.checkpoint.every_images
        return pause if usual <= 0 else min(pause, -(-usual // self.batch) * self.batch)

    def _leave(self) -> NoReturn:
        """Raise Superseded on every rank, told by rank 0."""
        error = self.claim.error() if self.claim else Superseded(TAKEN_OVER)
        error.told_by_main = not self.main
        raise error

    def _files(self) -> dict[str, dict[str, torch.Tensor]]:
        files = {"ema": self.average.state()}
        for engine in self.gan.engines:
            files[engine.name] = engine.weights()
            files[f"optimizer-{engine.name}"] = engine.optimizer_state()
        return files

    def _restore(self, last: Checkpoint) -> int:
        """Collective. Every rank reads the checkpoint; returns its images seen."""
        for engine in self.gan.engines:
            engine.load_state(
                last.tensors(engine.name), last.tensors(f"optimizer-{engine.name}"), last.state["counters"][engine.name]
            )
        self.average.load(last.tensors("ema"))
        self.evaluated = last.state.get("evaluation")
        if self.periodic is not None:
            self.periodic.load(self.evaluated)
        return last.images
