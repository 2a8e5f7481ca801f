"""What resuming deep in an epoch and very large sets cost: sets of one shard under many names.

`--resume`: 100 names of a shard of 10,000 samples; `--scale`: 40,000 names of it, 400 million samples. The names are
hard links, so that the real stream runs over them, with two workers.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench import probe

SAMPLES = 10_000
RESUME_SHARDS, SCALE_SHARDS = 100, 40_000
WORKERS = 2


def run(data: Path, rounds: int, *, resume: bool, scale: bool) -> dict[str, Any]:
    """Print what was asked for; returns the numbers."""
    one = one_shard(data)
    found: dict[str, Any] = {}
    if resume:
        found["resume"] = measure_resume(many_shards(one, RESUME_SHARDS), rounds)
        print_resume(found["resume"])
    if scale:
        found["scale"] = measure_scale(many_shards(one, RESUME_SHARDS), many_shards(one, SCALE_SHARDS), rounds)
        print_scale(found["scale"])
    return found


def one_shard(data: Path) -> Path:
    """A set of SAMPLES small pictures in one shard, made once."""
    from dist_t2i.sharding.items import Item
    from dist_t2i.sharding.pictures import PictureFile
    from dist_t2i.sharding.write_set import write_set
    from dist_t2i.sharding.writing.prepare import Options

    folder = data / "small"
    if not (folder / "set" / "manifest.json").exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "pictures").mkdir(parents=True)
        items = []
        for number in range(SAMPLES):
            path = folder / "pictures" / f"{number:06d}.jpg"
            path.write_bytes(small_picture(number))
            items.append(Item(path.stem, PictureFile(str(path)), [f"a picture with the number {number}"]))
        write_set(folder / "set", items, [], Options(shard_samples=SAMPLES))
    return folder / "set"


def small_picture(number: int) -> bytes:
    from io import BytesIO

    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=numpy.uint8)
    out = BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(out, "JPEG")
    return out.getvalue()


def many_shards(one: Path, count: int) -> Path:
    """The set `one` with its shard under `count` names."""
    folder = one.parent / f"set-{count}"
    if (folder / "manifest.json").exists():
        return folder
    print(f"making {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    manifest = json.loads((one / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    (shard,) = train["shards"]
    stem = Path(shard["name"]).stem
    for number in range(count):
        for path in one.glob(f"{stem}.*"):
            os.link(path, folder / f"train-{number:05d}{path.suffix}")
    train["shards"] = [shard | {"name": f"train-{number:05d}.tar"} for number in range(count)]
    train["samples"] = count * shard["samples"]
    shutil.copy(one / "tokenizer.json", folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def measure_resume(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Share of the epoch -> seconds to the first batch from there, in every round."""
    found: dict[str, list[float]] = {"0%": [], "10%": [], "90%": []}
    for number in range(rounds):
        for share in list(found)[number % 3 :] + list(found)[: number % 3]:
            start = int(RESUME_SHARDS * SAMPLES * int(share[:-1]) / 100)
            found[share].append(probe.run(start_order(folder, start), {})["first"])
    return found


def measure_scale(small: Path, large: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Samples -> what each round measured, at the start and 90% into the epoch in turn."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for folder, shards in ((small, RESUME_SHARDS), (large, SCALE_SHARDS)):
            order = start_order(folder, shards * SAMPLES * 9 // 10)
            found.setdefault(f"{shards * SAMPLES:,}", []).append(probe.run(order, {}))
    return found


def start_order(folder: Path, start: int) -> dict[str, Any]:
    return {"loader": "start", "folder": str(folder), "start": start, "workers": WORKERS}


def print_resume(found: dict[str, list[float]]) -> None:
    print(
        f"\nTime to the first batch of {RESUME_SHARDS * SAMPLES:,} samples from disk, {WORKERS} workers, batch 64, 256 px"
    )
    print(f"{'start after':14}{'median s':>10}{'min':>8}{'max':>8}")
    for share, seconds in found.items():
        print(f"{share:14}{statistics.median(seconds):10.3f}{min(seconds):8.3f}{max(seconds):8.3f}", flush=True)


def print_scale(found: dict[str, list[dict[str, float]]]) -> None:
    print(
        f"\nSets by size, one shard of {SAMPLES:,} samples each under many names, {WORKERS} workers, started 90% into the epoch"
    )
    print(
        f"{'samples':>14}{'open s':>9}{'first batch s':>15}{'order s':>10}{'ms/1,000 positions':>20}"
        f"{'MB/worker (USS)':>17}{'MB parent':>11}"
    )
    for samples, runs in found.items():
        row = {key: median_of(runs, key) for key in runs[0]}
        print(
            f"{samples:>14}{row['open']:9.2f}{row['first']:15.2f}{row['position']:10.4f}{row['thousand'] * 1000:20.2f}"
            f"{row['private'] / 1e6:17.1f}{row['parent'] / 1e6:11.1f}",
            flush=True,
        )


def median_of(runs: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)
