"""The training loop, and what happens around a step: report, samples, checkpoint, stop?, step.

Everything that is due is due at some number of images seen, which is all the state that the loop has.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dist_t2i import checkpoint, runfolder
from dist_t2i.assemble import assemble
from dist_t2i.checkpoint import Checkpoint, Retention
from dist_t2i.collective import max_over_ranks, mean_over_ranks, on_main
from dist_t2i.config import Config
from dist_t2i.data.lists import open_data
from dist_t2i.data.stream import open_stream
from dist_t2i.engine import init_distributed, resolve_precision
from dist_t2i.errors import CheckpointError, UserError
from dist_t2i.frozentext import load_frozen
from dist_t2i.launch import Rank, has_gpu
from dist_t2i.meter import Meter
from dist_t2i.mirroring import Mirroring
from dist_t2i.monitor import Health, check_finite
from dist_t2i.preempt import FINISHED, STOPPED, StopFlag, signals_blocked
from dist_t2i.report import Reporter
from dist_t2i.samples import SampleSheet
from dist_t2i.schedule import learning_rate_scale


def train(config: Config, rank: Rank, *, allow_changes: bool = False) -> int:
    """Train until `train.total_images` are seen or a signal asks to stop; returns the exit status (see preempt.py).

    The run folder may hold a checkpoint of the same run, which is then gone on from. Raises UserError.
    """
    device = torch.device("cuda", rank.local_rank) if has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stop = StopFlag(announce=rank.rank == 0).install()  # to the very end: a late signal must not spoil the exit status
    init_distributed(device)
    try:
        trainer = Trainer(config, device, allow_changes)
        with trainer.closing():
            status = trainer.run(stop)
    finally:
        with contextlib.suppress(Exception):  # the peers may be gone, and another error is on its way
            dist.destroy_process_group()
    trainer.mirroring.finish(status, stop)  # the other ranks need not wait
    return status


class Trainer:
    """A run in its folder: `run` goes on from the newest checkpoint there."""

    def __init__(self, config: Config, device: torch.device, allow_changes: bool):
        config = replace(
            config, engine=replace(config.engine, precision=resolve_precision(config.engine.precision, device))
        )
        self.config, self.folder, self.main = config, Path(config.run.folder), dist.get_rank() == 0
        self.batch = config.train.global_batch
        self.reporter = Reporter(self.folder, config, main=self.main)
        self.data = open_data(config.data)
        warn = self.reporter.warn
        self.mirroring = Mirroring(config, self.reporter, main=self.main, allow_changes=allow_changes)
        on_main(lambda: self.mirroring.look(self.data.fingerprint, self._warn_early), slow=True)
        on_main(
            lambda: runfolder.prepare(
                self.folder, config, self.data, allow_changes=allow_changes, warn=self._warn_early
            )
        )
        on_main(self.mirroring.restore, slow=True)
        frozen = None
        if config.text.mode == "frozen":
            frozen = load_frozen(config.text, self.data.tokenizer, config.data.max_tokens)
        self.gan, self.average = assemble(config, self.data.tokenizer.vocab_size, device, frozen)
        self.last = checkpoint.load_latest(self.folder, warn=warn if self.main else lambda message: None)
        self.images = self._restore(self.last) if self.last else 0
        self.sheet = SampleSheet(config, self.data, device) if self.main else None
        self.meter, self.health = Meter(), Health()
        bad_file = self.folder / "bad_samples.jsonl"
        on_main(lambda: runfolder.cut_bad_samples(bad_file, self.images))
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

    @staticmethod
    def _warn_early(message: str) -> None:
        print(f"warning: {message}", flush=True)

    @contextlib.contextmanager
    def closing(self):
        """Ends the loader's workers; a failure inside is the run's last word."""
        try:
            yield
        except BaseException as error:
            self.reporter.close("failed", "" if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            self.mirroring.close()
            raise
        finally:
            self.stream.close()

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
            reason = stop.agreed(max_over_ranks)
            ending = bool(reason) or self.images >= total
            saving = ending or self._due(c.checkpoint.every_images)
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
        with self.meter.waiting():
            batches = [next(self.stream) for _ in range(self.config.engine.accumulation)]
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
        with self.meter.paused():
            if self.sheet is not None:
                self.reporter.samples(self.images, self.sheet.rows(self.average))

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
        if self.images >= self.config.train.total_images:
            self.reporter.close("finished", f"finished: {self.images:,} images seen; the run is in {self.folder}")
            return FINISHED
        self.reporter.close(
            "stopped",
            f"stopped by {reason} at {self.images:,} images, checkpoint saved; the same command goes on from there",
        )
        return STOPPED

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, *, must: bool) -> None:
        """Collective. A checkpoint that cannot be written is a warning, unless it is the run's last (`must`)."""
        if self.last and self.last.images == self.images:
            return
        with self.meter.paused():
            files = self._files()
            state = {
                "counters": {engine.name: engine.counters() for engine in self.gan.engines},
                "seed": self.config.train.seed,
                "world_size": dist.get_world_size(),
            }
            keep = Retention(self.config.checkpoint.keep_last, self.config.checkpoint.keep_every_images)

            def write() -> tuple[Path | None, str]:
                try:
                    return checkpoint.save(self.folder, self.images, files, state, keep=keep), ""
                except CheckpointError as error:
                    if must:
                        raise
                    return None, str(error)

            folder, problem = on_main(write)
        if folder is None:
            if self.main:
                self.reporter.warn(f"{problem} Training goes on; the next try is at the next checkpoint.")
            return
        self.last = Checkpoint(folder, {"images": self.images})
        self.reporter.saved(self.images, folder)
        self.mirroring.offer(self.images)

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
        return last.images
