"""What each rank of the step benchmark runs: the training step, in plain PyTorch and in DeepSpeed, on synthetic
batches."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_t2i.config import files as config_files
from dist_t2i.config.sections import Config, OptimizerConfig
from dist_t2i.data.stream.batch import Batch
from dist_t2i.distributed import launch
from dist_t2i.distributed.engine import DTYPES, EngineSpec, init_distributed, resolve_precision
from dist_t2i.distributed.optimizer import build_optimizer
from dist_t2i.training import setup
from tools.bench.common import median_of, now
from tools.bench.dfgan import TimedPeer

VOCABULARY = 2000
PEER, PEER_STEPS = "DF-GAN", 3
"""A measurement of DF-GAN has fewer steps, because its step takes the time of several steps of this project."""
METHODS = {"prepare": "_prepare", "discriminator": "_discriminator_step", "generator": "_generator_step"}
"""Phase -> method of Gan. A further phase, `average`, is the update of the moving average."""


def measure(options: argparse.Namespace) -> None:
    """Measure as one rank; rank 0 prints the table as JSON."""
    rank = launch.prepare()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda", rank.local_rank) if launch.has_gpu() else torch.device("cpu")
    init_distributed(device)
    config = config_files.load(options.config, options.overrides)
    precision: Any = resolve_precision(config.engine.precision, device)
    config = replace(config, engine=replace(config.engine, precision=precision, accumulation=1))
    peak = matmul_peak(device, DTYPES[precision])
    batch = config.train.global_batch
    plain = Subject(config, None, device)
    subjects: dict[str, Subject | TimedPeer] = {"plain": plain}
    subjects |= {f"stage {stage}": Subject(config, stage, device) for stage in options.stages}
    if options.peer and rank.world_size == 1:
        subjects[PEER] = TimedPeer(config.data.image_size, batch, device)
    for name, subject in subjects.items():
        subject.run(1 if name == PEER else 2)  # warms up
    flops = count_flops(plain) * rank.world_size
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for _ in range(options.rounds):
        for name, subject in subjects.items():
            runs[name].append(subject.run(PEER_STEPS if name == PEER else options.steps))
    ratios = {
        name: statistics.median(a["step"] / b["step"] for a, b in zip(rounds, runs["plain"], strict=True))
        for name, rounds in runs.items()
    }
    rates = {name: batch / median_of(rounds, "step") for name, rounds in runs.items()}
    table = {
        "ranks": rank.world_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": precision,
        "batch": batch,
        "size": config.data.image_size,
        **plain.parameters,
        "gflop_per_image": flops / batch / 1e9,
        "peak_gflops": peak / 1e9,
        "rows": {
            name: {
                "rate": rates[name],
                "cost": ratios[name],
                "share": rates[name] * flops / batch / peak,
                "phases": {phase: median_of(rounds, phase) * 1000 for phase in (*METHODS, "average")},
            }
            for name, rounds in runs.items()
            if name != PEER
        },
        "peer": None,
    }
    if isinstance(timed := subjects.get(PEER), TimedPeer):
        table["peer"] = {"rate": rates[PEER], "ratio": ratios[PEER], **timed.peer.parameters}
    if rank.rank == 0:
        print(json.dumps(table))
    dist.barrier()
    dist.destroy_process_group()


class PlainEngine:
    """The baseline: `NetworkEngine`'s interface in plain PyTorch, with DistributedDataParallel on several ranks."""

    loss_scale = 1.0
    gradient_norm = 0.0

    def __init__(self, module: nn.Module, spec: EngineSpec, options: OptimizerConfig, device: torch.device):
        self.name, self.device, self.dtype, self.accumulation = spec.name, device, DTYPES[spec.precision], 1
        self._bare = self._wrapped = module.to(device, self.dtype)
        if dist.get_world_size() > 1:
            self._wrapped = nn.parallel.DistributedDataParallel(self._bare)
        self._optimizer = build_optimizer(self._bare, options, spec.learning_rate, spec.scales)
        self.module = self._wrapped

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self._bare.requires_grad_(False)
        self.module = self._bare
        yield
        self.module = self._wrapped
        self._bare.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate_scale: float) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        yield dict(self._bare.named_parameters())


class Subject:
    """A training step with its own weights, in plain PyTorch (`stage` is None) or in ZeRO. All steps use the same
    batch."""

    def __init__(self, config: Config, stage: Literal[0, 1, 2, 3] | None, device: torch.device):
        self.config, self.device, self.images = config, device, 0
        if stage is None:
            with mock.patch.object(setup, "NetworkEngine", PlainEngine):
                self.gan, self.average = setup.assemble(config, VOCABULARY, device)
        else:
            engine = replace(config.engine, generator_stage=stage, discriminator_stage=stage)
            self.gan, self.average = setup.assemble(replace(config, engine=engine), VOCABULARY, device)
        self.batch = synthetic_batch(config)
        self._seconds: dict[str, float] = {}
        for phase, method in METHODS.items():
            setattr(self.gan, method, self._timed(phase, getattr(self.gan, method)))

    @property
    def parameters(self) -> dict[str, int]:
        """Number of weights in `generator`, `discriminator` and `text` (all text encoders). Only for plain PyTorch."""
        counts: dict[str, int] = {"text": 0}
        for engine in self.gan.engines:
            with engine.gathered() as weights:
                for name, weight in weights.items():
                    part = name.partition(".")[0].partition("_")[0]
                    counts[part] = counts.get(part, 0) + weight.numel()
        return counts

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begin = now(self.device)
            result = function(*arguments)
            self._seconds[phase] += now(self.device) - begin
            return result

        return run

    def run(self, steps: int) -> dict[str, float]:
        """Runs `steps` steps; returns seconds per step for each phase, and for the whole step as `step`."""
        dist.barrier()
        self._seconds = dict.fromkeys((*METHODS, "average"), 0.0)
        begin = now(self.device)
        for _ in range(steps):
            self.gan.step([self.batch], self.images, 1.0)
            self.images += self.config.train.global_batch
            self._timed("average", self.average.update)(self.gan.engines, self.images)
        seconds = self._seconds | {"step": now(self.device) - begin}
        return {phase: total / steps for phase, total in seconds.items()}


def synthetic_batch(config: Config) -> Batch:
    """This rank's share of a batch: noise as pictures, and captions of four to twelve random tokens."""
    rows = config.train.global_batch // dist.get_world_size()
    first = dist.get_rank() * rows
    generator = torch.Generator().manual_seed(first)
    size, width = config.data.image_size, config.data.max_tokens
    lengths = torch.randint(4, 13, (rows,), generator=generator).clamp(max=width)
    tokens = torch.randint(3, VOCABULARY, (rows, width), generator=generator)
    ids = torch.arange(first, first + rows)
    return Batch(
        images=torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8),
        tokens=tokens * (torch.arange(width) < lengths[:, None]),
        lengths=lengths,
        image_ids=ids,
        caption_ids=ids,
        positions=ids,
        captions=[""] * rows,
        keys=[""] * rows,
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the best of 12 measurements on each rank, summed over the ranks."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    dist.barrier()
    for _ in range(12):
        begin = now(device)
        for _ in range(4):
            a @ b
        seconds.append(now(device) - begin)
    total = torch.tensor(4 * 2 * size**3 / min(seconds), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def count_flops(subject: Subject) -> float:
    """FLOPs of convolutions and matrix products of this rank in one step, forward and backward, without penalty."""
    with FlopCounterMode(display=False) as counter:
        subject.gan.step([subject.batch], subject.images, 1.0)
    return float(counter.get_total_flops())
