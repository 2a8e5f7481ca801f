"""How fast pictures become shards when their bytes pass through, beside `tar` over the same files.

python tools/bench/shard.py                     4,000 JPEGs of about 115 KB, made in a temporary folder
python tools/bench/shard.py --pictures DIR      JPEGs of your own

Each row is the median of some runs taken in turns, one process each, the files in the page cache. "per core" compares the
seconds of CPU (user and system, children too), which other programs on the machine disturb least; "clock" the time that
passes. `shards` is from planning to the last shard, with crc32 and sha256 of everything; `whole set` is the command, from
the start of Python and the reading of captions to tokenizer, report and manifest on the disk.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.7
_WORDS = (
    "a man woman dog cat red green old small car on in front of the street table with two people holding bread".split()
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="a flat folder of .jpg files")
    parser.add_argument("--count", type=int, default=4000, help="pictures to make (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of which the median counts (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where to write (default: the system's temporary folder)"
    )
    return parser.parse_args()


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs as COCO has them, 640 x 480; 32 different ones, each cut to the bytes of a different picture of noise."""
    import io

    import numpy
    from PIL import Image

    kinds = []
    for number in range(32):
        draws = numpy.random.default_rng(number)
        coarse = draws.integers(0, 256, (30, 40, 3), dtype=numpy.uint8)
        picture = numpy.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)).astype(
            numpy.int16
        )
        noisy = (picture + draws.integers(-18, 19, picture.shape)).clip(0, 255).astype(numpy.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=80 + number % 12)
        kinds.append(out.getvalue())
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:08d}.jpg").write_bytes(kinds[number % len(kinds)])


def write_captions(pictures: Path, path: Path) -> None:
    import json

    draws = random.Random(0)
    with open(path, "w") as file:
        for name in sorted(entry.name for entry in os.scandir(pictures) if entry.name.endswith(".jpg")):
            captions = [" ".join(draws.choices(_WORDS, k=10)) for _ in range(5)]
            file.write(json.dumps({"image": name, "captions": captions}) + "\n")


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU, clock) seconds of `work`, its processes included."""

    def used() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in both)

    cpu, clock = used(), time.perf_counter()
    work()
    return used() - cpu, time.perf_counter() - clock


def main() -> int:
    chosen = parse()
    work = Path(tempfile.mkdtemp(prefix="shard-bench-", dir=chosen.work))
    try:
        pictures = chosen.pictures or work / "pictures"
        if not chosen.pictures:
            make_pictures(pictures, chosen.count)
        write_captions(pictures, work / "captions.jsonl")
        return compare(pictures.resolve(), work, chosen.runs)
    finally:
        shutil.rmtree(work)


def compare(pictures: Path, work: Path, runs: int) -> int:
    from dist_t2i.sharding.sources.folder import find_items
    from dist_t2i.sharding.write_set import write_here
    from dist_t2i.sharding.writing.prepare import Options
    from dist_t2i.sharding.writing.shard_writer import plan_hash, plan_shards, reserve
    from dist_t2i.storage.folders import open_folder

    items, _ = find_items(pictures, work / "captions.jsonl", 0.0)
    place = open_folder(work / "shards")

    def tar() -> None:
        subprocess.run(["tar", "-cf", work / "plain.tar", "-C", pictures.parent, pictures.name], check=True)

    def shards() -> None:
        planned = plan_shards(items, Options())
        reserve(place, plan_hash(planned, Options()))
        write_here(place, planned, Options())

    def whole() -> None:
        command = [sys.executable, ROOT / "tools" / "shard.py", "folder", "--images", pictures, "--out", work / "set"]
        command += ["--captions", work / "captions.jsonl", "--processes", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)

    taken: dict[str, list[tuple[float, float]]] = {"tar": [], "shards": [], "whole set": []}
    for run in range(runs + 1):  # the first warms the page cache up
        for name, do in (("tar", tar), ("shards", shards), ("whole set", whole)):
            found = seconds(do)
            (work / "plain.tar").unlink(missing_ok=True)
            shutil.rmtree(work / "shards", ignore_errors=True)
            shutil.rmtree(work / "set", ignore_errors=True)
            if run:
                taken[name].append(found)
    size = sum(entry.stat().st_size for entry in os.scandir(pictures)) / 1e6
    print(f"{len(items):,} pictures, {size:,.0f} MB, median of {runs}, one process each")
    print(f"{'':12}{'CPU s':>9}{'MB/CPU s':>10}{'per core':>10}{'clock s':>9}{'clock':>8}")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    for name, (cpu, clock) in medians.items():
        ratios = medians["tar"][0] / cpu, medians["tar"][1] / clock
        print(f"{name:12}{cpu:9.2f}{size / cpu:10,.0f}{ratios[0]:10.2f}{clock:9.2f}{ratios[1]:8.2f}")
    ratio = medians["tar"][0] / medians["shards"][0]
    print(f"shards at {ratio:.2f} times the speed of tar per core; the bar is {BAR}")
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
