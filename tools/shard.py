"""Write captioned pictures as WebDataset shards that dist_t2i trains on; look at such a set; check it.

python tools/shard.py openmoji --size 64 --out DIR
python tools/shard.py folder --images DIR --captions FILE.jsonl --out DIR
python tools/shard.py coco DIR --karpathy dataset_coco.json --out s3://bucket/coco
python tools/shard.py parquet part-{000..063}.parquet --image-column URL --caption-column TEXT --size 256 --out DIR
python tools/shard.py webdataset "s3://bucket/old/{00000..00331}.tar" --min-side 256 --out DIR
python tools/shard.py index "s3://bucket/coco/train-{000000..000591}.tar"
python tools/shard.py inspect DIR
python tools/shard.py verify DIR

Every source has its own --help.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dist_t2i.errors import ExitStatus, run_command
from dist_t2i.sharding.cli import parse


def main() -> int:
    chosen = parse(None, __doc__ or "")
    try:
        return {"index": index, "inspect": look, "verify": check}.get(chosen.source, write)(chosen)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return ExitStatus.INTERRUPTED


def write(chosen: argparse.Namespace) -> int:
    """Write a set of the chosen source, and say what came of it."""
    from dist_t2i.sharding.gather import gather, options_of
    from dist_t2i.sharding.write_set import write_set

    elsewhere = on_cluster(chosen) if chosen.slurm else None
    items, problems, about = gather(chosen)
    manifest = write_set(chosen.out, items, problems, options_of(chosen, about), elsewhere)
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['samples']:,} pictures, {part['captions']['count']:,} captions")
    for reason, count in manifest["bad_samples"].items():
        print(f"left out or changed: {count:,} x {reason}")
    print(f"set: {chosen.out}\nreport: {chosen.out.rstrip('/')}/report.html")
    return 0


def on_cluster(chosen: argparse.Namespace) -> Any:
    """What writes shards by a Slurm array; see `write_set`."""
    from dist_t2i.sharding.slurm_array import Cluster

    return Cluster(
        cluster=chosen.slurm_cluster,
        tasks=chosen.slurm_tasks,
        folder=chosen.slurm_folder,
        partition=chosen.slurm_partition,
        account=chosen.slurm_account,
        minutes=chosen.slurm_minutes,
        memory_gb=chosen.slurm_memory,
        at_once=chosen.slurm_parallel,
        extra=dict(chosen.slurm_set),
    ).write


def index(chosen: argparse.Namespace) -> int:
    """Make a set of tars that stay where they are."""
    from dist_t2i.config.sections import DataConfig
    from dist_t2i.data.indexing import indexed_set
    from dist_t2i.data.open_data import storage_options
    from dist_t2i.storage.urls import expand

    found = indexed_set(
        expand(chosen.urls),
        storage_options(DataConfig()),
        chosen.out,
        processes=chosen.processes,
        checksums=not chosen.quick,
        vocabulary=chosen.vocabulary,
    )
    part = found.manifest["splits"]["train"]
    print(f"train: {part['samples']:,} pictures in {len(part['shards']):,} tars, {part['bytes'] / 1e6:,.1f} MB")
    for reason, count in found.manifest["bad_samples"].items():
        print(f"left out: {count:,} x {reason}")
    print(f"set: {found.folder}")
    return 0


def look(chosen: argparse.Namespace) -> int:
    """Describe a set."""
    from dist_t2i.sharding.inspect_set import describe

    print(describe(chosen.url, chosen.sheet, chosen.split))
    return 0


def check(chosen: argparse.Namespace) -> int:
    """Verify a set; 1 when something differs."""
    from dist_t2i.sharding.gather import spreader
    from dist_t2i.sharding.inspect_set import read_set, table, verify

    _, manifest = read_set(chosen.url)
    count = sum(len(part["shards"]) for part in manifest["splits"].values())
    shards, differs = verify(chosen.url, spreader(chosen.processes, count, "shards"))
    if differs:
        print(table(("file", "what", "expected", "found"), differs))
        print(f"{chosen.url}: {len(differs)} differences in {shards} shards; the command that wrote it mends it")
        return 1
    print(f"{chosen.url}: all {shards} shards, their indexes and every member are as the manifest says")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
