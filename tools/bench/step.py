"""What a training step costs: plain PyTorch beside DeepSpeed, in one run.

    python tools/bench/step.py --config configs/bench-peer64.yaml [--ranks 1 2] [--stages 0 1 2] [--rounds 5] [a.b=c ...]

For every number of ranks, the same step (dist_t2i/training/gan.py) runs under plain PyTorch (DistributedDataParallel where there
are several ranks) and under ZeRO at each stage, in turn, on the same made-up batches. Printed: images/s (median over the
rounds), the cost relative to plain PyTorch (median of the ratios within a round), milliseconds per phase, and the share
of a measured matmul peak that the convolutions and matrix products reach. With --peer, on one rank, DF-GAN's networks and
step (dfgan.py) take their turn as well, at the same picture size and batch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
VOCABULARY = 2000
PEER_STEPS = 3
"""In a measurement; each takes as long as several of ours."""
PHASES = ("prepare", "discriminator", "generator", "average")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes; the cores are shared out")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2], help="ZeRO stages, of both networks")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turn")
    parser.add_argument("--steps", type=int, default=8, help="steps in a measurement; a multiple of the lazy penalty's")
    parser.add_argument("--peer", action="store_true", help="DF-GAN's step as well, where there is one rank")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> int:
    """Start the ranks of each table, print the tables."""
    options = parse()
    if "RANK" in os.environ:
        measure(options)
        return 0
    tables = []
    for ranks in options.ranks:
        tables.append(run_ranks(ranks))
        print_table(tables[-1])
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")
    return 0


def run_ranks(ranks: int) -> dict:
    """This command again on each of `ranks` processes; what rank 0 measured."""
    from dist_t2i.distributed.launch import free_ports

    port = str(free_ports(1)[0])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *sys.argv],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"a rank of {ranks} failed; see above")
    return json.loads(outputs[0].splitlines()[-1])


def print_table(table: dict) -> None:
    """One number of ranks."""
    print(
        f"\n{table['ranks']} rank(s) x {table['threads']} thread(s), {table['device']}, {table['precision']}, batch "
        f"{table['batch']} at {table['size']} px; generator {table['generator'] / 1e6:.2f}M, discriminator "
        f"{table['discriminator'] / 1e6:.2f}M parameters (text encoders apart: {table['text'] / 1e6:.2f}M)\n"
        f"{table['gflop_per_image']:.2f} GFLOP an image and step (without penalty); matmul peak of all ranks "
        f"{table['peak_gflops']:.0f} GFLOP/s"
    )
    columns = "  ".join(f"{phase:>13}" for phase in PHASES)
    print(f"{'':14}{'images/s':>9}  {'x plain':>7}  {'of peak':>7}  {columns}   (ms a step)")
    for name, row in table["rows"].items():
        phases = "  ".join(f"{row['phases'][phase]:13.1f}" for phase in PHASES)
        print(f"{name:14}{row['rate']:9.1f}  {row['cost']:7.3f}  {row['share']:7.1%}  {phases}", flush=True)
    if peer := table["peer"]:
        print(
            f"DF-GAN (generator {peer['generator'] / 1e6:.2f}M, discriminator {peer['discriminator'] / 1e6:.2f}M parameters, "
            f"fp32): {peer['rate']:.1f} images/s; plain above makes {peer['ratio']:.2f} times that",
            flush=True,
        )


def measure(options: argparse.Namespace) -> None:
    """One rank of one table; rank 0 prints it as JSON."""
    from dist_t2i.config import files as config_files
    from dist_t2i.distributed import launch

    rank = launch.prepare()
    import torch
    import torch.distributed as dist

    from dist_t2i.distributed.engine import init_distributed, resolve_precision

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda", rank.local_rank) if launch.has_gpu() else torch.device("cpu")
    init_distributed(device)
    config = config_files.load(options.config, options.overrides)
    precision = resolve_precision(config.engine.precision, device)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision, accumulation=1))
    peak = matmul_peak(device, precision)
    kinds = ["plain", *(f"stage {stage}" for stage in options.stages)]
    subjects = {kind: Subject(kind, config, device) for kind in kinds}
    for subject in subjects.values():
        subject.run(2)
    flops = count_flops(subjects["plain"])
    peer = peer_of(config, device) if options.peer and rank.world_size == 1 else None
    rounds, peer_seconds = [], []
    for _ in range(options.rounds):
        rounds.append({kind: subject.run(options.steps) for kind, subject in subjects.items()})
        if peer:
            peer_seconds.append(peer.run(PEER_STEPS))
    if rank.rank == 0:
        batch, nets = config.train.global_batch, subjects["plain"].gan
        sizes = {
            name: sum(p.numel() for p in child.parameters())
            for engine in nets.engines
            for name, child in engine.bare.named_children()
        }
        rows = {}
        for kind in kinds:
            seconds = statistics.median(r[kind][0] for r in rounds)
            rows[kind] = {
                "rate": batch / seconds,
                "cost": statistics.median(r[kind][0] / r["plain"][0] for r in rounds),
                "share": flops * dist.get_world_size() / seconds / peak,
                "phases": {p: statistics.median(r[kind][1][p] for r in rounds) * 1000 for p in PHASES},
            }
        table = {
            "ranks": rank.world_size,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "precision": precision,
            "batch": batch,
            "size": config.data.image_size,
            "generator": sizes["generator"],
            "discriminator": sizes["discriminator"],
            "text": sum(count for name, count in sizes.items() if name.startswith("text")),
            "gflop_per_image": flops * dist.get_world_size() / batch / 1e9,
            "peak_gflops": peak / 1e9,
            "rows": rows,
            "peer": None,
        }
        if peer:
            ratios = [seconds / r["plain"][0] for seconds, r in zip(peer_seconds, rounds, strict=True)]
            generator, discriminator = peer.parameters
            table["peer"] = {
                "rate": batch / statistics.median(peer_seconds),
                "ratio": statistics.median(ratios),
                "generator": generator,
                "discriminator": discriminator,
            }
        print(json.dumps(table))
    dist.barrier()
    dist.destroy_process_group()


def peer_of(config, device):
    """DF-GAN at this configuration's picture size and batch, warm."""
    from tools.bench.dfgan import Peer

    peer = Peer(config.data.image_size, config.train.global_batch, device)
    peer.run(1)
    return peer


class PlainEngine:
    """What `NetworkEngine` is to the step, without DeepSpeed: the yardstick. DDP where there are several ranks."""

    accumulation = 1
    loss_scale = 1.0
    gradient_norm = 0.0

    def __init__(self, name: str, module, config, device, rate: float):
        import torch
        import torch.distributed as dist

        from dist_t2i.distributed.engine import DTYPES
        from dist_t2i.distributed.optimizer import build_optimizer

        self.name, self.device, self.dtype = name, device, DTYPES[config.engine.precision]
        self.bare = module.to(device, self.dtype)
        self._wrapped = torch.nn.parallel.DistributedDataParallel(self.bare) if dist.get_world_size() > 1 else self.bare
        self._frozen = False
        self._optimizer = build_optimizer(self.bare, config.optimizer, rate, {})

    @property
    def module(self):
        return self.bare if self._frozen else self._wrapped

    @contextlib.contextmanager
    def frozen(self):
        self.bare.requires_grad_(False)
        self._frozen = True
        yield
        self._frozen = False
        self.bare.requires_grad_(True)

    def backward(self, loss) -> None:
        loss.backward()

    def step(self, rate_scale: float) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    @contextlib.contextmanager
    def gathered(self):
        yield dict(self.bare.named_parameters())


class Subject:
    """One way to run the step, with its own weights and the same batches."""

    def __init__(self, kind: str, config, device):
        import torch

        from dist_t2i.models.networks import build_networks
        from dist_t2i.training.ema import Average
        from dist_t2i.training.gan import Gan
        from dist_t2i.training.setup import assemble

        self.config, self.device, self.images = config, device, 0
        if kind == "plain":
            torch.manual_seed(config.train.seed)
            networks = build_networks(
                config.model,
                config.text,
                image_size=config.data.image_size,
                max_tokens=config.data.max_tokens,
                vocab_size=VOCABULARY,
                edit_width=config.edit.width,
            )
            self.average = Average(networks, config.ema, device)
            sides = {"generator": networks.generator, "discriminator": networks.discriminator}
            rates = config.optimizer.generator_lr, config.optimizer.discriminator_lr
            self.gan = Gan(
                config,
                *(PlainEngine(name, m, config, device, r) for (name, m), r in zip(sides.items(), rates, strict=True)),
            )
        else:
            stage = int(kind.split()[1])
            engine = dataclasses.replace(config.engine, generator_stage=stage, discriminator_stage=stage)
            self.gan, self.average = assemble(dataclasses.replace(config, engine=engine), VOCABULARY, device)
        self.batch = made_up_batch(config)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        for phase, method in (
            ("prepare", "_prepare"),
            ("discriminator", "_discriminator_step"),
            ("generator", "_generator_step"),
        ):
            setattr(self.gan, method, self._timed(phase, getattr(self.gan, method)))

    def _timed(self, phase: str, function):
        def run(*arguments):
            begin = self._now()
            result = function(*arguments)
            self._seconds[phase] += self._now() - begin
            return result

        return run

    def _now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, steps: int) -> tuple[float, dict[str, float]]:
        """Seconds a step, and seconds a step by phase."""
        import torch.distributed as dist

        dist.barrier()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        begin = self._now()
        for _ in range(steps):
            self.gan.step([self.batch], self.images, 1.0)
            self.images += self.config.train.global_batch
            self._timed("average", self.average.update)(self.gan, self.images)
        seconds = self._now() - begin
        return seconds / steps, {phase: total / steps for phase, total in self._seconds.items()}


def made_up_batch(config):
    """This rank's rows of a step: noise for pictures, captions of four to twelve tokens."""
    import torch
    import torch.distributed as dist

    from dist_t2i.data.stream.batch import Batch

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


def matmul_peak(device, precision: str) -> float:
    """FLOP/s of a large square matrix product, all ranks at once: the best of several, added over the ranks."""
    import torch
    import torch.distributed as dist

    from dist_t2i.distributed.engine import DTYPES

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    best = 0.0
    dist.barrier()
    for _ in range(12):
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - begin))
    total = torch.tensor(best, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)


def count_flops(subject: Subject) -> float:
    """FLOPs of one step of this rank without the penalty, forward and backward, of convolutions and products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        subject.gan.step([subject.batch], subject.config.train.global_batch, 1.0)
    return float(counter.get_total_flops())


if __name__ == "__main__":
    sys.exit(main())
