"""Measures how fast pictures are written as shards if their bytes are unchanged, compared with `tar` on the same files.

python tools/bench/shard.py                     4,000 JPEGs of about 115 KB, written to a temporary folder
python tools/bench/shard.py --pictures DIR      your own JPEGs

The rows are measured in turn, several times. Each run uses one process, and its files are in the page cache. The table
shows medians. "per core" compares CPU seconds (user and system, with child processes), which other programs disturb
least. "clock" compares elapsed seconds. `shards` is the time from the plan to the last shard, with all CRC-32 and
SHA-256. `whole set` is the full command, which also starts Python, reads captions and writes all other files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
BAR = 0.7
"""Lowest accepted speed of `shards` per core, relative to tar. If the speed is lower, the exit status is 1."""
DISTINCT = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder of .jpg files, without sub-folders")
    parser.add_argument("--count", type=int, default=4000, help="pictures to write (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="parent of the temporary folder")
    options = parser.parse_args()
    from tools.bench.sets import picture, write_captions

    with tempfile.TemporaryDirectory(prefix="shard-bench-", dir=options.work) as folder:
        work = Path(folder)
        pictures = options.pictures or work / "pictures"
        if not options.pictures:
            kinds = [picture(number) for number in range(min(options.count, DISTINCT))]
            pictures.mkdir()
            for number in range(options.count):
                (pictures / f"{number:08d}.jpg").write_bytes(kinds[number % DISTINCT])
        write_captions(work / "captions.jsonl", sorted(path.name for path in pictures.glob("*.jpg")))
        return compare(pictures.resolve(), work, options.runs)


def compare(pictures: Path, work: Path, runs: int) -> int:
    """Prints the table; returns the exit status."""
    from dist_t2i.sharding.sources.folder import find_items
    from dist_t2i.sharding.write_set import write_here
    from dist_t2i.sharding.writing.prepare import Options
    from dist_t2i.sharding.writing.shard_writer import plan_shards, reserve
    from dist_t2i.storage.folders import open_folder
    from tools.bench.common import print_table

    items, _ = find_items(pictures, work / "captions.jsonl", 0.0)
    folder = open_folder(work / "shards")

    def tar() -> None:
        subprocess.run(["tar", "-cf", work / "plain.tar", "-C", pictures.parent, pictures.name], check=True)

    def shards() -> None:
        plans = plan_shards(items, Options())
        reserve(folder, plans, Options())
        write_here(folder, plans, Options())

    def whole_set() -> None:
        command = [sys.executable, ROOT / "tools" / "shard.py", "folder", "--images", pictures, "--out", work / "set"]
        command += ["--captions", work / "captions.jsonl", "--processes", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)

    rows: dict[str, list[tuple[float, float]]] = {"tar": [], "shards": [], "whole set": []}
    for run in range(runs + 1):  # the first run only fills the page cache
        for name, work_of_row in zip(rows, (tar, shards, whole_set), strict=True):
            seconds = measure(work_of_row)
            (work / "plain.tar").unlink(missing_ok=True)
            rmtree(work / "shards", ignore_errors=True)
            rmtree(work / "set", ignore_errors=True)
            if run:
                rows[name].append(seconds)
    size = sum(entry.stat().st_size for entry in os.scandir(pictures)) / 1e6
    medians = {name: [statistics.median(column) for column in zip(*row, strict=True)] for name, row in rows.items()}
    tar_cpu, tar_clock = medians["tar"]
    print_table(
        f"{len(items):,} pictures, {size:,.0f} MB, median of {runs}, one process each",
        ["", "CPU s", "MB/CPU s", "per core", "clock s", "clock"],
        [
            [
                name,
                f"{cpu:.2f}",
                f"{size / cpu:,.0f}",
                f"{tar_cpu / cpu:.2f}",
                f"{clock:.2f}",
                f"{tar_clock / clock:.2f}",
            ]
            for name, (cpu, clock) in medians.items()
        ],
    )
    ratio = tar_cpu / medians["shards"][0]
    print(f"shards are written at {ratio:.2f} times the speed of tar per core; at least {BAR} is required")
    return 0 if ratio >= BAR else 1


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """(CPU, clock) seconds of `work` and its child processes."""
    from tools.bench.probe import cpu_seconds

    cpu, clock = cpu_seconds(), time.perf_counter()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - clock


if __name__ == "__main__":
    sys.exit(main())
