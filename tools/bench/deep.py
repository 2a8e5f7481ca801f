"""Measures the cost of resuming late in an epoch (`--resume`) and of very large sets (`--scale`).

The sets consist of hard links to one shard of 10,000 samples: 100 links for `--resume`, and 40,000 links (400 million
samples) for `--scale`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from tools.bench import probe
from tools.bench.common import median_of, print_table

SAMPLES = 10_000
RESUME_SHARDS, SCALE_SHARDS = 100, 40_000
WORKERS = 2


def run(data: Path, rounds: int, *, resume: bool, scale: bool) -> dict[str, Any]:
    """Print the requested tables; returns the numbers in them."""
    shard = one_shard(data)
    numbers: dict[str, Any] = {}
    if resume:
        numbers["resume"] = seconds = measure_resume(many_shards(shard, RESUME_SHARDS), rounds)
        statistic: dict[str, Callable[[list[float]], float]] = {"median s": statistics.median, "min": min, "max": max}
        rows = [[share, *(f"{of(values):.3f}" for of in statistic.values())] for share, values in seconds.items()]
        caption = f"Time to the first batch of {RESUME_SHARDS * SAMPLES:,} samples from disk, {WORKERS} workers"
        print_table(f"{caption}, batch 64, 256 px", ["start after", *statistic], rows)
    if scale:
        folders = [many_shards(shard, shards) for shards in (RESUME_SHARDS, SCALE_SHARDS)]
        numbers["scale"] = runs = measure_scale(folders, rounds)
        cells = {samples: {key: median_of(values, key) for key in values[0]} for samples, values in runs.items()}
        rows = [
            [
                *(samples, f"{row['open']:.2f}", f"{row['first']:.2f}", f"{row['position']:.4f}"),
                *(f"{row['thousand'] * 1000:.2f}", f"{row['private'] / 1e6:.1f}", f"{row['parent'] / 1e6:.1f}"),
            ]
            for samples, row in cells.items()
        ]
        heads = ["samples", "open s", "first batch s", "order s", "ms/1,000 positions", "MB/worker (USS)", "MB parent"]
        caption = f"Sets by size: links to one shard of {SAMPLES:,} samples, {WORKERS} workers"
        print_table(f"{caption}, started at 90% of the epoch", heads, rows)
    return numbers


def one_shard(data: Path) -> Path:
    """A set of SAMPLES small pictures in one shard. The set is kept for the next run."""
    from dist_t2i.sharding.items import Item
    from dist_t2i.sharding.pictures import PictureFile
    from dist_t2i.sharding.write_set import write_set
    from dist_t2i.sharding.writing.prepare import Options

    folder = data / "small"
    if not (folder / "set" / "manifest.json").exists():
        print(f"writing {folder}", file=sys.stderr, flush=True)
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
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=numpy.uint8)
    out = BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(out, "JPEG")
    return out.getvalue()


def many_shards(one: Path, count: int) -> Path:
    """A set with `count` links to the shard of the set `one`. The set is kept for the next run."""
    folder = one.parent / f"set-{count}"
    if (folder / "manifest.json").exists():
        return folder
    print(f"writing {folder}", file=sys.stderr, flush=True)
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
    """Skipped share of the epoch -> seconds to the first batch in each round. The order rotates with every round."""
    seconds: dict[str, list[float]] = {"0%": [], "10%": [], "90%": []}
    for number in range(rounds):
        for share in list(seconds)[number % 3 :] + list(seconds)[: number % 3]:
            start = int(RESUME_SHARDS * SAMPLES * int(share[:-1]) / 100)
            seconds[share].append(measure_start(folder, start)["first"])
    return seconds


def measure_scale(folders: list[Path], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Number of samples in a set -> measurements of each round. The stream starts at 90% of the epoch."""
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for folder, shards in zip(folders, (RESUME_SHARDS, SCALE_SHARDS), strict=True):
            runs.setdefault(f"{shards * SAMPLES:,}", []).append(measure_start(folder, shards * SAMPLES * 9 // 10))
    return runs


def measure_start(folder: Path, start: int) -> dict[str, float]:
    return probe.run({"loader": "start", "folder": str(folder), "start": start, "workers": WORKERS}, {})
