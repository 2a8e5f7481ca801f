"""Compares the speed of the training stream with webdataset, litdata, mosaicml-streaming and energon in one run.

    python -m venv bench-venv && bench-venv/bin/pip install torch==2.13.0
    bench-venv/bin/pip install -c tools/bench/constraints.txt -e ".[bench]"
    bench-venv/bin/pip uninstall -y torchvision      only for torch's CPU build, with which torchvision does not load
    bench-venv/bin/python tools/bench/stream.py [--data FOLDER] [--images 4000] [--rounds 5] [--loaders NAME ...]
    bench-venv/bin/python tools/bench/stream.py --resume     first batch after 0, 10% and 90% of 1,000,000 samples
    bench-venv/bin/python tools/bench/stream.py --scale      400 million samples in 40,000 shards

Every loader runs in a separate process and reads the same 640x480 JPEGs, shuffled, in batches of 64 at 256 px. The
loaders take turns within each round, so that other programs disturb all loaders equally. In table 1, all loaders use
the same fast decoder. In table 2, each peer decodes as its documentation shows, but with Pillow instead of torchvision,
which does not load everywhere. In table 2, energon decodes before its shuffle buffer, which is its default. This
project's stream has only one decoder, and also tokenizes.

The columns are medians over the rounds. They show images/s after the first batch; this speed relative to the fastest
peer and to the decoder alone on the same number of processes (medians of the ratios within a round); seconds to the
first batch, without imports and with an empty cache; and CPU seconds of the process tree per 1,000 images, without the
S3 server. Peak memory is the sum of PSS over the process tree, from a separate run. S3 is a SeaweedFS server that runs
on the same cores. Files come from the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests" / "support"))  # object_store.py, the S3 server of the tests

from tools.bench import deep, peers, probe  # noqa: E402
from tools.bench.common import median_of, print_table  # noqa: E402

if TYPE_CHECKING:
    from tools.bench.sets import Sets

PLACES = ("disk:1", "disk:2", "s3:2")
OWN = "dist_t2i"
DECODER = "decoder"
Rows = dict[str, list[dict[str, float]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder that keeps the pictures for the next run")
    parser.add_argument("--images", type=int, default=4000, help="number of pictures, >= 256 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="number of runs of each loader (default: %(default)s)")
    names = list(peers.LOADERS)
    parser.add_argument("--loaders", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    places = f"disk or s3, and the number of worker processes (default: {' '.join(PLACES)})"
    parser.add_argument("--places", nargs="+", default=list(PLACES), metavar="disk:1", help=places)
    parser.add_argument("--tables", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--resume", action="store_true", help="only measure how long it takes to resume in an epoch")
    parser.add_argument("--scale", action="store_true", help="only measure a set of 400 million samples")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.images < 256:
        parser.error("--images must be at least 256: each of two workers needs two batches")
    missing = [name for name in options.loaders if version(name) is None]
    if missing and not (options.resume or options.scale):
        print(f"error: not installed: {', '.join(missing)}; see --help, or select others: --loaders", file=sys.stderr)
        return 2
    from object_store import StorageError

    try:
        with contextlib.ExitStack() as stack:
            data = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            if options.resume or options.scale:
                numbers: Any = deep.run(data.resolve(), options.rounds, resume=options.resume, scale=options.scale)
            else:
                numbers = compare(options, data.resolve(), stack)
    except (probe.ProbeError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def version(name: str) -> str | None:
    """Version of a loader's package, "" for this project; None when the package is not installed."""
    package = peers.LOADERS[name].package
    try:
        return metadata.version(package) if package else ""
    except metadata.PackageNotFoundError:
        return None


def compare(options: argparse.Namespace, data: Path, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
    """Print all tables; returns the numbers in them."""
    from tools.bench.sets import Sets

    sets = Sets(data, options.images)
    sets.make(options.loaders)
    server = None
    if any(place.startswith("s3") for place in options.places):
        server = stack.enter_context(uploaded(sets, options.loaders))
    tables = []
    for number in options.tables:
        for place in options.places:
            rows, failures = measure(options, sets, server, number == 1, place)
            tables.append({"table": number, "place": place, "rows": rows, "failed": failures})
            print_rates(tables[-1], options)
    return tables


@contextlib.contextmanager
def uploaded(sets: Sets, loaders: list[str]) -> Iterator[Any]:
    """Runs an S3 server with the sets. The server stores its files in `data/N/s3`."""
    from object_store import S3Server

    with S3Server(sets.folder / "s3") as server:
        for name in ["set", *(loader for loader in loaders if loader in ("energon", "litdata", "mds"))]:
            stamp = sets.folder / "s3" / f"has-{name}"
            if not stamp.exists():
                print(f"uploading {name}", file=sys.stderr, flush=True)
                server.put_folder(sets.folder / name, f"bench/{name}/")
                stamp.touch()
        yield server


def measure(
    options: argparse.Namespace, sets: Sets, server: Any, fast: bool, place: str
) -> tuple[Rows, dict[str, str]]:
    """Loader -> measurements of each round and of a last run that measures memory; peer -> reason of its failure."""
    kind, _, workers = place.partition(":")
    location = {"folder": str(sets.folder), "workers": int(workers)}
    if kind == "s3":
        location["remote"] = f"s3://{server.bucket}/bench"
    batches = max(1, int(sets.images * 0.9) // peers.BATCH - 1)  # in one epoch, before the first worker has finished
    rows: Rows = {name: [] for name in [*options.loaders, DECODER]}
    failures: dict[str, str] = {}
    for number in range(options.rounds + 1):
        memory = number == options.rounds
        names = list(rows)[number % len(rows) :] + list(rows)[: number % len(rows)]  # the order rotates by round
        for name in names:
            if name == DECODER and memory:
                continue
            order = {"loader": name, "location": location, "fast": fast or name == OWN, "batches": batches}
            try:
                with tempfile.TemporaryDirectory(prefix="bench-cache-", dir=sets.folder) as cache:
                    order["location"] = location | {"cache": cache}
                    rows[name].append(probe.run(order, server.environment if server else {}, memory=memory))
                result = f"{rows[name][-1]['rate']:.0f} images/s"
            except probe.ProbeError as error:
                if name in (OWN, DECODER):
                    raise
                result = f"failed in round {number + 1}: {str(error).strip().splitlines()[-1]}"
                failures[name] = result
                del rows[name]
            print(f"{place} round {number + 1}: {name} {result}", file=sys.stderr, flush=True)
    return rows, failures


def print_rates(table: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a table of medians over the rounds. Ratios are computed within each round."""
    kind, _, workers = table["place"].partition(":")
    decoding = "all with the fast decoder" if table["table"] == 1 else "each peer decodes as in its documentation"
    caption = (
        f"Table {table['table']}: {decoding}; {'from S3' if kind == 's3' else 'from disk'}, {workers} worker(s), "
        f"{options.images} pictures, median of {options.rounds} rounds"
    )
    timed = {name: runs[: options.rounds] for name, runs in table["rows"].items()}
    others = [name for name in timed if name not in (OWN, DECODER)]
    fastest = max(others, key=lambda name: median_of(timed[name], "rate")) if others else DECODER
    rows = []
    for name, runs in timed.items():
        label = f"{name} {version(name)}" if name != DECODER else "the decoder alone"
        row = [label, f"{median_of(runs, 'rate'):.0f}"]
        for other in (fastest, DECODER):
            ratios = [run["rate"] / peer["rate"] for run, peer in zip(runs, timed[other], strict=True)]
            row.append(f"{statistics.median(ratios):.3f}")
        if name != DECODER:
            memory = table["rows"][name][-1]["memory"] / 1e6
            row += [f"{median_of(runs, 'first'):.2f}", f"{median_of(runs, 'cpu'):.2f}", f"{memory:.0f}"]
        rows.append(row)
    heads = ["images/s", "x fastest peer", "x decoder", "first batch s", "CPU s/1000", "peak MB (PSS)"]
    print_table(caption, ["loader", *heads], [row + [""] * (7 - len(row)) for row in rows])
    for name, reason in table["failed"].items():
        print(f"{name} {version(name)}: {reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
