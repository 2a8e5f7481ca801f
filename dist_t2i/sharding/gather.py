"""From the arguments of tools/shard.py to the items of the chosen source, filtered, without duplicates."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_t2i.sharding.captions import Columns
from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.sources import coco, openmoji, tables, webdataset_tars
from dist_t2i.sharding.sources.class_folders import CUB, FLOWERS
from dist_t2i.sharding.sources.folder import find_items
from dist_t2i.sharding.writing import duplicates
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.processes import Spread, in_processes
from dist_t2i.utils.progress import Progress

Gathered = tuple[list[Item], list[Problem], dict[str, Any]]
"""Items, what was wrong with others, and what the manifest says about the set."""


def gather(chosen: argparse.Namespace) -> Gathered:
    """Raises DataError when the source is not as it should be."""
    items, problems, about = _of_source(chosen)
    if chosen.caption_matches or chosen.caption_excludes:
        items = webdataset_tars.filtered(items, problems, chosen.caption_matches, chosen.caption_excludes)
    if chosen.deduplicate:
        count = len(items)
        print(f"looking for duplicates among {count:,} pictures", file=sys.stderr)
        spread = spreader(chosen.processes, count)
        items = duplicates.without_duplicates(items, chosen.deduplicate, problems, spread)
        print(f"{count - len(items):,} repeat another", file=sys.stderr)
    return items, problems, about


def spreader(processes: int, total: int, unit: str = "pictures") -> Spread:
    """`in_processes` with a line of progress."""

    def spread(work: Callable, arguments: Sequence[tuple]) -> list[Any]:
        progress = Progress(total, unit)
        return in_processes(work, arguments, processes, progress.show)

    return spread


def _of_source(chosen: argparse.Namespace) -> Gathered:
    if chosen.source == "openmoji":
        about = {"name": "OpenMoji", "licence": openmoji.LICENCE, "credit": openmoji.CREDIT}
        return openmoji.openmoji_items(chosen.size), [], about
    if chosen.source == "folder":
        return *find_items(chosen.images, chosen.captions, chosen.holdout), {"name": chosen.images.resolve().name}
    if chosen.source == "coco":
        year = coco.year_of(chosen.root, 2014 if chosen.karpathy else chosen.year)
        return *coco.coco_items(chosen.root, year, chosen.karpathy), coco.about(year, bool(chosen.karpathy))
    if chosen.source in ("cub", "flowers"):
        found = CUB if chosen.source == "cub" else FLOWERS
        items, problems, source = found.items(chosen.root, chosen.texts, chosen.train_classes, chosen.test_classes)
        print(f"classes are split by {source}", file=sys.stderr)
        return items, problems, found.about
    if chosen.source == "webdataset":
        return _tars(chosen)
    return _tables(chosen)


def _tables(chosen: argparse.Namespace) -> Gathered:
    import braceexpand

    names = [name for pattern in chosen.tables for name in braceexpand.braceexpand(pattern)]
    default = tables.DEFAULT
    columns = Columns(
        (chosen.image_column,) if chosen.image_column else default.image,
        (chosen.caption_column,) if chosen.caption_column else default.caption,
    )
    items, problems = tables.table_items(chosen.source, names, chosen.images, columns, chosen.holdout)
    return items, problems, {"name": names[0].rpartition("/")[2]}


def _tars(chosen: argparse.Namespace) -> Gathered:
    urls = webdataset_tars.tar_urls(chosen.tars)
    found = in_processes(webdataset_tars.look_into, [(url,) for url in urls], chosen.processes)
    items, problems = webdataset_tars.webdataset_items(found, chosen.holdout)
    return items, problems, {"name": chosen.name or urls[0].rpartition("/")[2]}


def options_of(chosen: argparse.Namespace, about: dict[str, Any]) -> Options:
    """How the set is written, as the arguments say."""
    return Options(
        size=chosen.size,
        format=chosen.format,
        quality=chosen.quality,
        check=chosen.check,
        min_side=chosen.min_side,
        max_aspect=chosen.max_aspect,
        shard_samples=chosen.shard_samples,
        shard_mb=chosen.shard_mb,
        vocabulary=chosen.vocabulary,
        processes=chosen.processes,
        threads=getattr(chosen, "threads", 1),
        retry_failed=chosen.retry_failed,
        about=about,
    )
