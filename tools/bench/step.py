"""Compares the time of a training step in plain PyTorch and in DeepSpeed, in one run.

    python tools/bench/step.py --config configs/bench-peer64.yaml [--ranks 1 2] [--stages 0 1 2] [--peer] [a.b=c ...]

For every number of ranks, the same step (dist_t2i/training/gan.py) runs on the same synthetic batches in plain PyTorch
(with DistributedDataParallel on several ranks) and in ZeRO at each stage, in turn. The columns are images/s (median
over the rounds), the cost relative to plain PyTorch (median of the ratios within a round), the FLOP/s of convolutions
and matrix products as a share of a measured matmul peak, and milliseconds per phase. With --peer and one rank, the
step of DF-GAN (dfgan.py) is also measured, at the same picture size and batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)


def main() -> int:
    """Start the ranks for each table, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes; they share the cores")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 1, 2], choices=range(4), help="ZeRO stages of both networks"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each row")
    parser.add_argument("--steps", type=int, default=8, help="steps per measurement; a multiple of loss.penalty_every")
    parser.add_argument("--peer", action="store_true", help="with one rank, also measure the step of DF-GAN")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    if "RANK" in os.environ:
        from tools.bench.subjects import measure

        measure(options)
        return 0
    tables = []
    for ranks in options.ranks:
        tables.append(run_ranks(ranks))
        print_costs(tables[-1])
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")
    return 0


def run_ranks(ranks: int) -> dict[str, Any]:
    """Run this command again in `ranks` processes; returns the table of rank 0."""
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
        sys.exit(f"one of {ranks} ranks failed; see the error above")
    return json.loads(outputs[0].splitlines()[-1])


def print_costs(table: dict[str, Any]) -> None:
    """Print the table for one number of ranks."""
    from tools.bench.common import print_table

    caption = (
        f"{table['ranks']} rank(s) x {table['threads']} thread(s), {table['device']}, {table['precision']}, batch "
        f"{table['batch']} at {table['size']} px; generator {table['generator'] / 1e6:.2f}M, discriminator "
        f"{table['discriminator'] / 1e6:.2f}M parameters (without text encoders: {table['text'] / 1e6:.2f}M)\n"
        f"{table['gflop_per_image']:.2f} GFLOP per image and step (without penalty); matmul peak of all ranks "
        f"{table['peak_gflops']:.0f} GFLOP/s"
    )
    phases = list(table["rows"]["plain"]["phases"])
    rows = [
        [name, f"{row['rate']:.1f}", f"{row['cost']:.3f}", f"{row['share']:.1%}"]
        + [f"{row['phases'][phase]:.1f}" for phase in phases]
        for name, row in table["rows"].items()
    ]
    heads = ["engine", "images/s", "x plain", "of peak", *(f"{phase} ms" for phase in phases)]
    print_table(caption, heads, rows)
    if peer := table["peer"]:
        print(
            f"DF-GAN (generator {peer['generator'] / 1e6:.2f}M, discriminator {peer['discriminator'] / 1e6:.2f}M "
            f"parameters, fp32): {peer['rate']:.1f} images/s; plain (see above) is {peer['ratio']:.2f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
