"""The arguments of tools/shard.py; imports nothing that takes time, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dist_t2i.sharding.sources import coco
from dist_t2i.sharding.sources.class_folders import CUB, FLOWERS
from dist_t2i.utils.processes import usable_cores

Parser = argparse.ArgumentParser
FORMS = ("jsonl", "csv", "tsv", "parquet")
SHARED = """What cannot be used is counted and listed in OUT/report.html and OUT/bad_samples.jsonl; the rest goes on.
Interrupted, the same command goes on where it stopped: shards whose checksums hold are kept. With --retry-failed,
pictures that could not be downloaded or read are tried again."""
_FOLDER = """Captions: a .jsonl file of lines {"image": "images/a.png", "captions": ["...", "..."]} (or "caption": "..."),
or a .csv or .tsv file with the columns image and caption; paths are relative to --images, or to the file's own
folder. A picture may come in many lines, a caption with many pictures. Without --captions, the captions of a.png are
the lines of a.txt beside it. Captions beyond 1,000 characters are cut."""
_TABLE = """Tables with a picture and a caption (or, in JSONL and Parquet, a list of captions) a row. A picture is a path,
relative to --images or else to its table, or a URL: http(s)://, s3://, gs://, az://. Downloads are tried three times
when that may help; what does not come is listed, and --retry-failed asks for it later. Columns: url, image, file_name, path ... and captions, caption, text,
description, or those named."""
_TARS = """Tars that webdataset, img2dataset or this tool wrote: pictures (jpg, jpeg, png, webp) with captions in json
("captions" or "caption") or txt beside them, local paths, folders, globs, URLs; braces count: train-{00000..00591}.tar.
A tar called test-00000.tar or val-00000.tar keeps its split; --holdout applies when there is none of these. Members whose
decoders run code (pickles) are not read. A tar that is cut short gives what came before the cut. Tars behind URLs are
read once to find the pictures, and each picture again when its shard is written."""

_INDEX = """Reads WebDataset tars once and writes an index of each, a manifest and a tokenizer. Training on the same list then
begins at once (data.train=URL...); without this, it does the same at its first start. Run again, it reads only tars that are
new or changed. URLs as in data.train: s3://bucket/coco/train-{000000..000591}.tar, /data/coco/*.tar."""


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """The chosen `source` (or inspect, verify) with its arguments."""
    parser = argparse.ArgumentParser(
        prog="shard.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def source(name: str, short: str, text: str = "") -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        return sources.add_parser(name, help=short, description=text or short, formatter_class=form)

    writing = [
        _openmoji(source("openmoji", "3,953 drawings with names (CC BY-SA 4.0), from installed packages")),
        _folder(source("folder", "a folder of your own pictures with captions", f"{_FOLDER}\n\n{SHARED}")),
        _coco(source("coco", "MS-COCO 2014 or 2017", f"What is expected:\n{coco.LAYOUT}\n\n{SHARED}")),
        _classes(
            source("cub", "CUB-200-2011 with ten captions a bird", f"What is expected:\n{CUB.layout}\n\n{SHARED}")
        ),
        _classes(source("flowers", "Oxford-102 flowers", f"What is expected:\n{FLOWERS.layout}\n\n{SHARED}")),
        *(_table(source(form, f"{form} tables of paths or URLs", f"{_TABLE}\n\n{SHARED}")) for form in FORMS),
        _tars(source("webdataset", "existing tars: re-shard, filter, shrink", f"{_TARS}\n\n{SHARED}")),
    ]
    for one in writing:
        _pictures(one)
        _output(one, 1_000 if one.prog.endswith("openmoji") else 10_000)
    _indexing(source("index", "make a set of tars that others wrote, which stay where and as they are", _INDEX))
    _looking(source("inspect", "what is in a set: counts, sizes, captions, bad samples, a contact sheet"))
    _checking(source("verify", "read a whole set and check every checksum; status 1 when something differs"))
    return parser.parse_args(arguments)


def _openmoji(source: Parser) -> Parser:
    source.add_argument("--size", type=positive, default=64, help="pixels, square (default: %(default)s)")
    return source


def _folder(source: Parser) -> Parser:
    source.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of pictures, searched deeply")
    source.add_argument("--captions", type=Path, metavar="FILE", help=".jsonl, .csv or .tsv (default: a.txt by a.png)")
    _holdout(source)
    return source


def _coco(source: Parser) -> Parser:
    source.add_argument("root", type=Path, metavar="DIR", help="the folder shown above")
    source.add_argument("--year", type=int, choices=(2014, 2017), help="(default: the one that is there)")
    source.add_argument(
        "--karpathy",
        type=Path,
        metavar="FILE",
        help="dataset_coco.json: splits train (with restval), val and test (default: train, and val as `test`)",
    )
    return source


def _classes(source: Parser) -> Parser:
    source.add_argument("root", type=Path, metavar="DIR", help="the folder shown above")
    source.add_argument("--texts", type=Path, metavar="DIR", help="folder of the captions, if it is not inside DIR")
    source.add_argument("--train-classes", type=Path, metavar="FILE", help="a class a line (default: as said above)")
    source.add_argument("--test-classes", type=Path, metavar="FILE", help="a class a line (default: as said above)")
    return source


def _table(source: Parser) -> Parser:
    source.add_argument(
        "tables", nargs="+", metavar="FILE", help="paths or URLs; braces count: part-{000..063}.parquet"
    )
    source.add_argument(
        "--images", default="", metavar="DIR", help="folder or URL of the pictures (default: the table's)"
    )
    source.add_argument("--image-column", "--url-col", default="", metavar="NAME", help="column of paths or URLs")
    source.add_argument("--caption-column", "--caption-col", default="", metavar="NAME", help="column of captions")
    source.add_argument(
        "--threads", type=positive, default=16, help="downloads at once in each process (default: %(default)s)"
    )
    _holdout(source)
    return source


def _tars(source: Parser) -> Parser:
    source.add_argument("tars", nargs="+", metavar="URL", help="tars or folders of tars")
    source.add_argument("--name", default="", help="what the set is called")
    source.add_argument(
        "--threads", type=positive, default=16, help="reads at once from URLs in each process (default: %(default)s)"
    )
    _holdout(source, 0.0)
    return source


def _holdout(source: Parser, default: float = 0.02) -> None:
    source.add_argument(
        "--holdout",
        type=share,
        default=default,
        metavar="SHARE",
        help="share of the pictures kept out of training, as the split `test` (default: %(default)s)",
    )


def _pictures(source: Parser) -> None:
    group = source.add_argument_group("pictures")
    if not source.prog.endswith("openmoji"):
        group.add_argument(
            "--size", type=positive, default=0, help="shrink to this short side, in pixels (default: bytes untouched)"
        )
    group.add_argument("--format", choices=("jpg", "webp", "png"), default="", help="encode all as (default: as is)")
    group.add_argument(
        "--quality", type=percent, default=95, help="of what is encoded, 1 to 100 (default: %(default)s)"
    )
    group.add_argument(
        "--check",
        choices=("header", "decode"),
        default="header",
        help="how a picture is seen to be whole: its header and end, or every pixel (default: %(default)s)",
    )
    group.add_argument("--min-side", type=positive, default=0, metavar="PIXELS", help="leave smaller pictures out")
    group.add_argument("--max-aspect", type=float, default=0.0, metavar="RATIO", help="leave longer pictures out")
    group.add_argument(
        "--caption-matches", default="", metavar="REGEX", help="keep only captions in which this is found"
    )
    group.add_argument("--caption-excludes", default="", metavar="REGEX", help="drop captions in which this is found")
    group.add_argument(
        "--deduplicate",
        choices=("exact", "perceptual"),
        default="",
        help="drop pictures that repeat another: to the byte, or to the eye (a 64-bit difference hash)",
    )


def _output(source: Parser, samples: int) -> None:
    group = source.add_argument_group("output")
    group.add_argument(
        "--out",
        required=True,
        metavar="URL",
        help="new folder for the set: a path, s3://, gs://, az://, any fsspec URL",
    )
    group.add_argument(
        "--retry-failed",
        action="store_true",
        help="of an earlier run's shards, write those again in which a picture could not be downloaded or read",
    )
    group.add_argument("--shard-samples", type=positive, default=samples, help="at most (default: %(default)s)")
    group.add_argument("--shard-mb", type=float, default=512.0, help="at most, in MB (default: %(default)s)")
    group.add_argument("--vocabulary", type=positive, default=4096, help="tokens at most (default: %(default)s)")
    group.add_argument("--processes", type=positive, default=usable_cores(), help="(default: %(default)s)")
    group = source.add_argument_group(
        "on a cluster: the shards are written by a Slurm array, whose tasks see all paths"
    )
    group.add_argument("--slurm", action="store_true", help="submit (with submitit), wait, and finish the set here")
    group.add_argument("--slurm-cluster", default="slurm", help="`local` runs the tasks on this machine")
    group.add_argument("--slurm-tasks", type=positive, default=16, help="tasks in the array (default: %(default)s)")
    group.add_argument("--slurm-partition", default="", metavar="NAME")
    group.add_argument("--slurm-account", default="", metavar="NAME")
    group.add_argument("--slurm-minutes", type=positive, default=1440, help="time limit (default: %(default)s)")
    group.add_argument("--slurm-memory", type=positive, default=8, metavar="GB", help="a task (default: %(default)s)")
    group.add_argument("--slurm-parallel", type=positive, default=256, help="tasks at once (default: %(default)s)")
    group.add_argument(
        "--slurm-folder", type=Path, default=Path("slurm-logs"), metavar="DIR", help="(default: %(default)s)"
    )
    group.add_argument(
        "--slurm-set", type=pair, action="append", default=[], metavar="NAME=VALUE", help="more for sbatch: qos=long"
    )


def _indexing(source: Parser) -> None:
    source.add_argument("urls", nargs="+", metavar="URL", help="tars: paths, globs, URLs with braces")
    source.add_argument("--out", type=Path, metavar="DIR", help="for data.train=DIR (default: where training looks)")
    source.add_argument("--quick", action="store_true", help="pass over the pictures: faster, but without checksums")
    source.add_argument("--vocabulary", type=positive, default=4096, help="tokens at most (default: %(default)s)")
    source.add_argument("--processes", type=positive, default=usable_cores(), help="(default: %(default)s)")


def _looking(source: Parser) -> None:
    source.add_argument("url", metavar="URL", help="folder or URL of a set")
    source.add_argument("--split", default="train", help="for the contact sheet (default: %(default)s)")
    source.add_argument(
        "--sheet", type=Path, default=Path("contact_sheet.png"), metavar="FILE", help="(default: %(default)s)"
    )


def _checking(source: Parser) -> None:
    source.add_argument("url", metavar="URL", help="folder or URL of a set")
    source.add_argument("--processes", type=positive, default=usable_cores(), help="(default: %(default)s)")


def positive(text: str) -> int:
    """An integer above 0. Raises ValueError, or argparse's error with a message, as all of these do."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def percent(text: str) -> int:
    """An integer from 1 to 100."""
    number = int(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return number


def share(text: str) -> float:
    """A number in [0, 1)."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def pair(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`; digits become an int, as sbatch's parameters in submitit are."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, int(value) if value.isdigit() else value
