"""How fast the training stream is: beside webdataset, litdata, mosaicml-streaming and energon, in one run.

    python -m venv bench-venv && bench-venv/bin/pip install torch==2.13.0
    bench-venv/bin/pip install -c tools/bench/constraints.txt -e ".[bench]"
    bench-venv/bin/pip uninstall -y torchvision      unless torch is a CUDA build: it would not load
    bench-venv/bin/python tools/bench/stream.py [--data FOLDER] [--images 4000] [--rounds 5] [--loaders NAME ...]
    bench-venv/bin/python tools/bench/stream.py --resume     first batch after 0, 10% and 90% of 1,000,000 samples
    bench-venv/bin/python tools/bench/stream.py --scale      400 million samples in 40,000 shards

Every loader reads the same 640x480 JPEGs in batches of 64 at 256 px, shuffled, in a process of its own; the loaders take
turns within each round, so that what else the machine does strikes all alike. Table 1 gives all the same fast decoder,
table 2 each peer the decoding of its documentation: with Pillow, as where torchvision does not load (energon then decodes
before its shuffle buffer, as is its default); ours stays as it is. Printed, as medians over the rounds: images/s after the
first batch, the same relative to the fastest peer and to the decoder alone on as many processes (medians of the ratios
within a round), seconds to the first batch (imports done; nothing cached by the loader), CPU seconds per 1,000 images of
the whole process tree (without the S3 server), and peak memory: the sum of PSS over the tree, from one more run. S3 is a
SeaweedFS server on the same cores, started and stopped here. Files come from the page cache. Ours tokenizes as well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))  # for storage.py, the S3 server of the tests

from storage import S3Server, StorageError  # noqa: E402

from dist_t2i.utils.processes import usable_cores  # noqa: E402
from tools.bench import deep, peers, probe  # noqa: E402
from tools.bench.sets import Sets  # noqa: E402

PLACES = ("disk:1", "disk:2", "s3:2")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="keeps the pictures for the next time")
    parser.add_argument("--images", type=int, default=4000, help="pictures, at least 256 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each loader, in turn (default: %(default)s)")
    parser.add_argument(
        "--loaders", nargs="+", default=list(peers.LOADERS), choices=list(peers.LOADERS), metavar="NAME"
    )
    parser.add_argument(
        "--places", nargs="+", default=list(PLACES), metavar="disk:1", help="where, and worker processes"
    )
    parser.add_argument("--tables", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--resume", action="store_true", help="only: time to the first batch, deep in an epoch")
    parser.add_argument("--scale", action="store_true", help="only: a set of 400 million samples")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    if options.images < 256:
        parser.error("--images must be at least 256: two workers need two batches each")
    return options


def main() -> int:
    options = parse()
    missing = [name for name in options.loaders if name in peers.MODULES and not found(peers.MODULES[name])]
    if missing and not (options.resume or options.scale):
        print(f"error: not installed: {', '.join(missing)}; see --help, or choose with --loaders", file=sys.stderr)
        return 2
    try:
        return bench(options)
    except (probe.ProbeError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def found(module: str) -> bool:
    """Whether a module is installed; without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def bench(options: argparse.Namespace) -> int:
    """What the options ask for."""
    with contextlib.ExitStack() as stack:
        data = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        data = data.resolve()
        if options.resume or options.scale:
            numbers: Any = deep.run(data, options.rounds, resume=options.resume, scale=options.scale)
        else:
            numbers = compare(options, data, stack)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def compare(options: argparse.Namespace, data: Path, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
    """All tables; returns their numbers."""
    sets = Sets(data, options.images, usable_cores())
    sets.make(options.loaders)
    server = None
    if any(place.startswith("s3") for place in options.places):
        server = stack.enter_context(uploaded(sets, options.loaders))
    tables = []
    for number in options.tables:
        for place in options.places:
            rows, failed = measured(options, sets, server, number == 1, place)
            table = {"table": number, "place": place, "rows": rows, "failed": failed}
            tables.append(table)
            print_table(table, options)
    return tables


@contextlib.contextmanager
def uploaded(sets: Sets, loaders: list[str]) -> Iterator[Any]:
    """An S3 server that holds the sets, from `data/N/s3`."""
    with S3Server(sets.folder / "s3") as server:
        for name in ["set", *(loader for loader in loaders if loader in ("energon", "litdata", "mds"))]:
            stamp = sets.folder / "s3" / f"has-{name}"
            if not stamp.exists():
                print(f"uploading {name}", file=sys.stderr, flush=True)
                server.put_folder(sets.folder / name, f"bench/{name}/")
                stamp.touch()
        yield server


Rows = dict[str, list[dict[str, float]]]


def measured(
    options: argparse.Namespace, sets: Sets, server: Any, fast: bool, place: str
) -> tuple[Rows, dict[str, str]]:
    """Loader -> list of what each round measured, the memory run last; and peer -> why it failed."""
    rows: Rows = {name: [] for name in [*options.loaders, "decoder"]}
    failed: dict[str, str] = {}
    for number in range(options.rounds + 1):
        memory = number == options.rounds
        names = list(rows)[number % len(rows) :] + list(rows)[: number % len(rows)]  # no loader always follows another
        for name in names:
            if name == "decoder" and memory:
                continue
            try:
                with tempfile.TemporaryDirectory(prefix="bench-cache-", dir=sets.folder) as cache:
                    order = order_of(name, sets, server, fast, place, cache)
                    rows[name].append(probe.run(order, server.environment if server else {}, memory=memory))
            except probe.ProbeError as error:
                if name in ("dist_t2i", "decoder"):
                    raise
                failed[name] = f"failed in round {number + 1}: {str(error).strip().splitlines()[-1]}"
                del rows[name]
                print(f"{place}: {name} {failed[name]}", file=sys.stderr, flush=True)
                continue
            print(f"{place} round {number + 1}: {name} {rows[name][-1]['rate']:.0f}", file=sys.stderr, flush=True)
    return rows, failed


def order_of(name: str, sets: Sets, server: Any, fast: bool, place: str, cache: str) -> dict[str, Any]:
    """What a probe is told."""
    kind, _, workers = place.partition(":")
    remote = f"s3://{server.bucket}/bench" if kind == "s3" else ""
    where = {
        "folder": str(sets.folder),
        "images": sets.images,
        "workers": int(workers),
        "remote": remote,
        "cache": cache,
    }
    batches = max(1, int(sets.images * 0.9) // peers.BATCH - 1)  # within one epoch, before the first worker is done
    return {"loader": name, "place": where, "fast": fast or name == "dist_t2i", "batches": batches}


def summary(table: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, ratios within them."""
    rows = table["rows"]
    rates = {name: [run["rate"] for run in runs[:rounds]] for name, runs in rows.items()}
    others = [name for name in rates if name not in ("dist_t2i", "decoder")]
    best = max(others, key=lambda name: statistics.median(rates[name])) if others else "decoder"
    found = {}
    for name, runs in rows.items():
        found[name] = {key: statistics.median(run[key] for run in runs[:rounds]) for key in ("rate", "first", "cpu")}
        for key, other in (("peer", best), ("decoder", "decoder")):
            ratios = [mine / its for mine, its in zip(rates[name], rates[other], strict=True)]
            found[name][key] = statistics.median(ratios)
        found[name]["memory"] = runs[-1].get("memory", 0.0) / 1e6
    return found


def print_table(table: dict[str, Any], options: argparse.Namespace) -> None:
    kind, _, workers = table["place"].partition(":")
    decoding = "all with the fast decoder" if table["table"] == 1 else "each peer with its own documentation's decoding"
    print(
        f"\nTable {table['table']}: {decoding}; {'from S3' if kind == 's3' else 'from disk'}, {workers} worker(s), "
        f"{options.images} pictures, median of {options.rounds} rounds"
    )
    print(
        f"{'loader':28}{'images/s':>9}{'x fastest peer':>16}{'x decoder':>11}{'first batch s':>15}{'CPU s/1000':>12}"
        f"{'peak MB (PSS)':>15}"
    )
    for name, row in summary(table, options.rounds).items():
        label = f"{name} {version(name)}" if name != "decoder" else "the decoder alone"
        rest = f"{row['first']:15.2f}{row['cpu']:12.2f}{row['memory']:15.0f}" if name != "decoder" else ""
        print(f"{label:28}{row['rate']:9.0f}{row['peer']:16.3f}{row['decoder']:11.3f}{rest}", flush=True)
    for name, why in table["failed"].items():
        print(f"{name} {version(name)}: {why}", flush=True)


def version(name: str) -> str:
    from importlib import metadata

    return metadata.version(peers.PACKAGES[name]) if name in peers.PACKAGES else ""


if __name__ == "__main__":
    sys.exit(main())
