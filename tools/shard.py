"""Write captioned pictures as WebDataset shards that dist_t2i trains on.

python tools/shard.py openmoji --size 64 --out DIR
python tools/shard.py folder --images DIR --captions FILE.jsonl --out DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dist_t2i.errors import run_command

_FOLDER = """Captions: a .jsonl file of lines {"image": "images/a.png", "captions": ["...", "..."]} (or "caption": "..."),
or a .csv or .tsv file with the columns image and caption; paths are relative to --images, or to the file's own
folder. A picture may come in many lines, a caption with many pictures. Without --captions, the captions of a.png are
the lines of a.txt beside it.

Captions beyond 1,000 characters are cut. What cannot be used is counted and listed in OUT/report.html and
OUT/bad_samples.jsonl; the rest goes on. Interrupted, the same command goes on where it stopped."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shard.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    openmoji = sources.add_parser("openmoji", help="3,953 drawings with names (CC BY-SA 4.0), from installed packages")
    openmoji.add_argument("--size", type=_positive, default=64, help="pixels, square (default: %(default)s)")
    folder = sources.add_parser(
        "folder",
        help="a folder of your own pictures with captions",
        description=_FOLDER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures, searched deeply")
    folder.add_argument("--captions", type=Path, metavar="FILE", help=".jsonl, .csv or .tsv (default: a.txt by a.png)")
    folder.add_argument(
        "--size", type=_positive, default=0, help="shrink to this short side (default: bytes untouched)"
    )
    folder.add_argument(
        "--holdout",
        type=_share,
        default=0.02,
        metavar="SHARE",
        help="share of the pictures kept out of training, as the split `test` (default: %(default)s)",
    )
    for source in (openmoji, folder):
        source.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the set")
        samples = 1_000 if source is openmoji else 10_000
        source.add_argument("--shard-samples", type=_positive, default=samples, help="at most (default: %(default)s)")
        source.add_argument("--shard-mb", type=float, default=512.0, help="at most, in MB (default: %(default)s)")
        source.add_argument("--vocabulary", type=_positive, default=4096, help="tokens at most (default: %(default)s)")
        source.add_argument("--processes", type=_positive, default=_cores(), help="(default: %(default)s)")
    return parser.parse_args(arguments)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def main() -> int:
    chosen = parse()
    from dist_t2i.data import folder, openmoji
    from dist_t2i.data.sharding import write_set
    from dist_t2i.data.writer import Options

    if chosen.source == "openmoji":
        about = {"name": "OpenMoji", "licence": openmoji.LICENCE, "credit": openmoji.CREDIT}
        items, problems = openmoji.openmoji_items(), list[folder.Problem]()
    else:
        about = {"name": chosen.images.resolve().name}
        items, problems = folder.find_items(chosen.images, chosen.captions, chosen.holdout)
    options = Options(
        size=chosen.size,
        shard_samples=chosen.shard_samples,
        shard_mb=chosen.shard_mb,
        vocabulary=chosen.vocabulary,
        processes=chosen.processes,
        about=about,
    )
    try:
        manifest = write_set(chosen.out, items, problems, options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['samples']:,} pictures, {part['captions']['count']:,} captions")
    for reason, count in manifest["bad_samples"].items():
        print(f"left out or changed: {count:,} x {reason}")
    print(f"set: {chosen.out}\nreport: {chosen.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
