"""Write captioned pictures as a set of WebDataset shards for training; inspect or verify a set.

python tools/shard.py openmoji --size 64 --out DIR
python tools/shard.py scenes --count 20000 --size 32 --out DIR
python tools/shard.py folder --images DIR --captions FILE.jsonl --out DIR
python tools/shard.py coco DIR --karpathy dataset_coco.json --out s3://bucket/coco
python tools/shard.py parquet part-{000..063}.parquet --image-column URL --caption-column TEXT --size 256 --out DIR
python tools/shard.py webdataset "s3://bucket/old/{00000..00331}.tar" --min-side 256 --out DIR
python tools/shard.py index "s3://bucket/coco/train-{000000..000591}.tar"
python tools/shard.py inspect DIR
python tools/shard.py verify DIR

Every command has its own --help.
"""

from __future__ import annotations

import argparse
import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_t2i.cli import run
from dist_t2i.sharding.sources.class_folders import CUB, FLOWERS
from dist_t2i.sharding.sources.coco import LAYOUT as COCO_LAYOUT
from dist_t2i.utils.processes import usable_cores

if TYPE_CHECKING:
    from dist_t2i.sharding.items import Gathered

RENDERED = ("openmoji", "scenes")
"""The commands that render pictures at `--size` and have their own rule for held-out splits."""
_RESUME = """OUT/report.html and OUT/bad_samples.jsonl count and list the pictures and captions that cannot be used.
After an interruption, run the same command again: every shard whose checksums match is kept. With --retry-failed, the
command also retries pictures that could not be downloaded or read."""
_FOLDER = """The captions are in a .jsonl file of lines {"image": "images/a.png", "captions": ["...", "..."]} (or
"caption": "..."), or in a .csv or .tsv file with the columns image and caption. Paths are relative to --images or the
caption file's folder. Several lines may name one picture. Without --captions, each line of a.txt is a caption of a.png.
Captions are truncated after 1,000 characters."""
_TABLE = """A row contains a picture and a caption (in JSONL and Parquet, also a list of captions). A picture is a URL
(http(s)://, s3://, gs://, az://), or a path relative to --images or to the folder of the table. After a temporary
error, a download is retried up to twice. Failures are listed, and --retry-failed retries them. The default columns are
url, image, file_name, path ... for pictures, and captions, caption, text, description for captions."""
_TARS = """The input is tars that webdataset, img2dataset or this tool wrote: local paths, folders, globs or URLs, with
braces as in train-{00000..00591}.tar. A sample contains a picture (jpg, jpeg, png, webp) and captions in json
("captions" or "caption") or txt. A tar named test-00000.tar or val-00000.tar keeps its split; --holdout applies only if
no tar has such a name. Pickled members are skipped, because unpickling can run code. The samples before the cut of a
truncated tar are used. A tar at a URL is read once to locate the pictures; each picture is read a second time when its
shard is written."""
_INDEX = """Reads WebDataset tars once and writes an index of each tar, a manifest and a tokenizer. The tars are not
copied or changed. Training on these tars (data.train=URL...) then starts at once; without this command, the first
training run builds the index. A rerun reads only new and changed tars. URLs have the form of data.train:
s3://bucket/coco/train-{000000..000591}.tar, /data/coco/*.tar."""


def main() -> int:
    args = parse()
    return {"index": _index, "inspect": _inspect, "verify": _verify}.get(args.command, _write)(args)


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parses the command line: `command` and its arguments."""
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="shard.py", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, short: str, text: str = "") -> ArgumentParser:
        return commands.add_parser(name, help=short, description=text or short, formatter_class=form)

    add = command("openmoji", "3,953 emojis with names (CC BY-SA 4.0), from installed packages").add_argument
    text = "render every picture in each given style: color, or black (black lines only) (default: color)"
    add("--styles", nargs="+", choices=("color", "black"), default=["color"], metavar="STYLE", help=text)

    add = command("scenes", "one or two shapes in known colors and positions, rendered by the project").add_argument
    add("--count", type=positive, default=20_000, help="number of pictures (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed gives other pictures (default: %(default)s)")

    add = command("folder", "your own folder of pictures with captions", f"{_FOLDER}\n\n{_RESUME}").add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of pictures, searched recursively")
    add("--captions", type=Path, metavar="FILE", help=".jsonl, .csv or .tsv file (default: a.txt for a.png)")

    coco_help = f"Expected files:\n{COCO_LAYOUT}\n\n{_RESUME}"
    add = command("coco", "MS-COCO 2014 or 2017", coco_help).add_argument
    add("root", type=Path, metavar="DIR", help="the folder shown above")
    add("--year", type=int, choices=(2014, 2017), help="needed only if DIR contains both years")
    karpathy_help = "dataset_coco.json, for train (with restval), val and test (default: train, and val as `test`)"
    add("--karpathy", type=Path, metavar="FILE", help=karpathy_help)

    for name, short, layout in (
        ("cub", "CUB-200-2011 with ten captions per picture", CUB.layout),
        ("flowers", "Oxford-102 flowers", FLOWERS.layout),
    ):
        add = command(name, short, f"Expected files:\n{layout}\n\n{_RESUME}").add_argument
        add("root", type=Path, metavar="DIR", help="the folder shown above")
        add("--texts", type=Path, metavar="DIR", help="folder of the captions, if outside of DIR")
        add("--train-classes", type=Path, metavar="FILE", help="list with one class per line (default: see above)")
        add("--test-classes", type=Path, metavar="FILE", help="list with one class per line (default: see above)")

    for name in ("jsonl", "csv", "tsv", "parquet"):
        add = command(name, f"{name} tables of paths or URLs", f"{_TABLE}\n\n{_RESUME}").add_argument
        add("tables", nargs="+", metavar="FILE", help="paths or URLs; braces expand: part-{000..063}.parquet")
        add("--images", default="", metavar="DIR", help="folder or URL of the pictures (default: folder of the table)")
        add("--image-column", "--url-col", default="", metavar="NAME", help="column of paths or URLs")
        add("--caption-column", "--caption-col", default="", metavar="NAME", help="column of captions")

    add = command("webdataset", "re-shard, filter or shrink existing tars", f"{_TARS}\n\n{_RESUME}").add_argument
    add("tars", nargs="+", metavar="URL", help="tars or folders of tars")
    add("--name", default="", help="name of the set in its manifest (default: name of the first tar)")

    for name, added in commands.choices.items():  # the commands so far write a set
        _add_writing_options(added, name)

    add = command("index", "index existing tars, which are neither copied nor changed", _INDEX).add_argument
    add("urls", nargs="+", metavar="URL", help="paths of tars, globs, or URLs with braces")
    add("--out", type=Path, metavar="DIR", help="folder for data.train=DIR (default: the cache of training)")
    add("--quick", action="store_true", help="omit the checksums, so that pictures are not read")
    add("--vocabulary", type=positive, default=4096, help="maximum number of tokens (default: %(default)s)")
    add("--processes", type=positive, default=usable_cores(), help="(default: %(default)s)")

    add = command("inspect", "describe a set by counts, sizes, captions, bad samples and a contact sheet").add_argument
    add("url", metavar="URL", help="folder or URL of a set")
    add("--split", default="train", help="split of the contact sheet (default: %(default)s)")
    add("--sheet", type=Path, default=Path("contact_sheet.png"), metavar="FILE", help="(default: %(default)s)")

    add = command("verify", "read a full set and check its checksums (status 1 if one differs)").add_argument
    add("url", metavar="URL", help="folder or URL of a set")
    add("--processes", type=positive, default=usable_cores(), help="(default: %(default)s)")
    return parser.parse_args(arguments)


def _add_writing_options(parser: ArgumentParser, name: str) -> None:
    """Adds the options of all commands that write a set."""
    if name in ("jsonl", "csv", "tsv", "parquet", "webdataset"):
        text = "parallel reads of URLs in each process (default: %(default)s)"
        parser.add_argument("--threads", type=positive, default=16, help=text)
    if name not in (*RENDERED, "coco", "cub", "flowers"):
        text = "share of the pictures to hold out of training, as the split `test` (default: %(default)s)"
        holdout = 0.0 if name == "webdataset" else 0.02
        parser.add_argument("--holdout", type=share, default=holdout, metavar="SHARE", help=text)

    add = parser.add_argument_group("pictures").add_argument
    if name in RENDERED:
        add("--size", type=positive, default=64, help="side in pixels (default: %(default)s)")
    else:
        add("--size", type=positive, default=0, help="pixels of the short side after shrinking (default: keep bytes)")
    add("--format", choices=("jpg", "webp", "png"), default="", help="format of all pictures (default: keep bytes)")
    add("--quality", type=percent, default=95, help="quality of encoded JPEGs and WebPs (default: %(default)s)")
    text = "check of each picture: read header and end, or decode the picture (default: %(default)s)"
    add("--check", choices=("header", "decode"), default="header", help=text)
    add("--min-side", type=positive, default=0, metavar="PIXELS", help="leave out pictures with a side below PIXELS")
    add("--max-aspect", type=float, default=0.0, metavar="RATIO", help="leave out pictures above this aspect ratio")
    add("--caption-matches", default="", metavar="REGEX", help="keep only captions that match REGEX")
    add("--caption-excludes", default="", metavar="REGEX", help="drop captions that match REGEX")
    text = "leave out repeated pictures, by their bytes or by their appearance (64-bit difference hash)"
    add("--deduplicate", choices=("exact", "perceptual"), default="", help=text)

    add = parser.add_argument_group("output").add_argument
    text = "new folder for the set: a path, an s3://, gs:// or az:// URL, or any other fsspec URL"
    add("--out", required=True, metavar="URL", help=text)
    text = "rewrite each shard with a picture that an earlier run could not download or read"
    add("--retry-failed", action="store_true", help=text)
    samples = 1_000 if name in RENDERED else 10_000
    add("--shard-samples", type=positive, default=samples, help="maximum samples per shard (default: %(default)s)")
    add("--shard-mb", type=float, default=512.0, help="maximum MB per shard (default: %(default)s)")
    add("--vocabulary", type=positive, default=4096, help="maximum number of tokens (default: %(default)s)")
    add("--processes", type=positive, default=usable_cores(), help="(default: %(default)s)")

    text = "on a cluster, where a Slurm array writes the shards (all paths must exist on the nodes)"
    add = parser.add_argument_group(text).add_argument
    add("--slurm", action="store_true", help="submit the array (with submitit), wait for it, and finish the set")
    add("--slurm-cluster", default="slurm", help="`local` runs the tasks on this machine")
    add("--slurm-tasks", type=positive, default=16, help="tasks in the array (default: %(default)s)")
    add("--slurm-partition", default="", metavar="NAME")
    add("--slurm-account", default="", metavar="NAME")
    add("--slurm-minutes", type=positive, default=1440, help="time limit of a task (default: %(default)s)")
    add("--slurm-memory", type=positive, default=8, metavar="GB", help="memory of a task (default: %(default)s)")
    add("--slurm-parallel", type=positive, default=256, help="maximum of concurrent tasks (default: %(default)s)")
    add("--slurm-folder", type=Path, default=Path("slurm-logs"), metavar="DIR", help="(default: %(default)s)")
    text = "another parameter of sbatch, such as qos=long"
    add("--slurm-set", type=pair, action="append", default=[], dest="slurm_extra", metavar="NAME=VALUE", help=text)


def number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], needs: str) -> Callable[[str], Any]:
    """An argument type for the numbers that `accepts` accepts; for others, the error is "... is not NEEDS"."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} is not {needs}")
        return value

    parse_number.__name__ = kind.__name__  # for argparse's message "invalid int value"
    return parse_number


positive = number(int, lambda value: value > 0, "positive")
percent = number(int, lambda value: 1 <= value <= 100, "from 1 to 100")
share = number(float, lambda value: 0 <= value < 1, "from 0 to 1")


def pair(text: str) -> tuple[str, Any]:
    """Parses `NAME=VALUE`. A VALUE of digits becomes an int, which submitit expects for numeric parameters."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, int(value) if value.isdigit() else value


def _gather(args: Namespace) -> Gathered:
    """The captioned pictures of the input that the command names."""
    if args.command == "openmoji":
        from dist_t2i.sharding.sources.openmoji import ABOUT, openmoji_items

        return openmoji_items(args.size, args.styles), [], ABOUT
    if args.command == "scenes":
        from dist_t2i.sharding.sources import scenes

        return scenes.scene_items(args.count, args.size, args.seed), [], scenes.ABOUT
    if args.command == "folder":
        from dist_t2i.sharding.sources.folder import find_items

        return *find_items(args.images, args.captions, args.holdout), {"name": args.images.resolve().name}
    if args.command == "coco":
        from dist_t2i.sharding.sources.coco import coco_items

        return coco_items(args.root, args.year, args.karpathy)
    if args.command in ("cub", "flowers"):
        class_set = CUB if args.command == "cub" else FLOWERS
        return class_set.items(args.root, args.texts, args.train_classes, args.test_classes)
    if args.command == "webdataset":
        from dist_t2i.sharding.sources.webdataset_tars import webdataset_items

        return webdataset_items(args.tars, args.name, args.holdout, args.processes)
    from dist_t2i.sharding.sources.tables import table_items

    return table_items(args.command, args.tables, args.images, args.image_column, args.caption_column, args.holdout)


def _write(args: Namespace) -> int:
    """Write the pictures of the input as a set, and print the counts of the set."""
    from dist_t2i.sharding.items import filter_captions
    from dist_t2i.sharding.slurm_array import SlurmArray
    from dist_t2i.sharding.write_set import write_set
    from dist_t2i.sharding.writing.duplicates import without_duplicates
    from dist_t2i.sharding.writing.prepare import Options

    items, problems, about = _gather(args)
    if args.caption_matches or args.caption_excludes:
        items = filter_captions(items, problems, args.caption_matches, args.caption_excludes)
    if args.deduplicate:
        items = without_duplicates(items, args.deduplicate, problems, args.processes)
    named = vars(args) | {"about": about}
    options = Options(**{field.name: named[field.name] for field in dataclasses.fields(Options) if field.name in named})
    array = SlurmArray(**{field.name: named[f"slurm_{field.name}"] for field in dataclasses.fields(SlurmArray)})
    manifest = write_set(args.out, items, problems, options, array.write if args.slurm else None)
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['samples']:,} pictures, {part['captions']['count']:,} captions")
    for reason, count in manifest["bad_samples"].items():
        print(f"left out or changed: {count:,} x {reason}")
    print(f"set: {args.out}\nreport: {args.out.rstrip('/')}/report.html")
    return 0


def _index(args: Namespace) -> int:
    """Index existing tars in place, and print the counts of the tars."""
    from dist_t2i.data.open_data import index_tars

    indexed = index_tars(
        args.urls, args.out, processes=args.processes, checksums=not args.quick, vocabulary=args.vocabulary
    )
    part = indexed.manifest["splits"]["train"]
    print(f"train: {part['samples']:,} pictures in {len(part['shards']):,} tars, {part['bytes'] / 1e6:,.1f} MB")
    for reason, count in indexed.manifest["bad_samples"].items():
        print(f"left out: {count:,} x {reason}")
    print(f"set: {indexed.folder}")
    return 0


def _inspect(args: Namespace) -> int:
    from dist_t2i.sharding.inspect_set import describe

    print(describe(args.url, args.sheet, args.split))
    return 0


def _verify(args: Namespace) -> int:
    from dist_t2i.sharding.inspect_set import table, verify

    shards, differences = verify(args.url, args.processes)
    if differences:
        print(table(("file", "what", "expected", "actual"), differences))
        print(f"{args.url}: {len(differences)} differences in {shards} shards; to repair the set, write the set again")
        return 1
    print(f"{args.url}: all {shards} shards, their indexes and their members match the manifest")
    return 0


if __name__ == "__main__":
    run("shard")
