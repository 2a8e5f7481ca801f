"""The whole way from items to a set: shards in several processes or on a cluster, then everything that is not a shard."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.writing.finish import finish, put_back
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.processes import advance, in_processes
from dist_t2i.sharding.writing.shard_writer import (
    Planned,
    count_reasons,
    finished,
    forget,
    plan_hash,
    plan_shards,
    reserve,
    write_shard,
)
from dist_t2i.storage.folders import Folder, open_folder
from dist_t2i.utils.progress import Progress

Elsewhere = Callable[[Folder, Sequence[Planned], Options, Progress], dict[str, dict[str, Any]]]
"""Writes shards on other machines and returns their results by name."""


def write_set(
    out: Path | str,
    items: Sequence[Item],
    problems: Sequence[Problem],
    options: Options,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any]:
    """Write the set to a folder or URL and return its manifest; a second call with the same input keeps whole shards.

    Raises: DataError when there is nothing to train on, the folder holds something else, or cannot be written.
    """
    place = open_folder(out)
    listed = [dataclasses.asdict(problem) for problem in problems]
    _need_training_samples(sum(item.split == "train" for item in items), listed)
    try:
        planned = plan_shards(items, options)
        reserve(place, plan_hash(planned, options))
        results = _write_shards(place, planned, options, elsewhere)
        for result in results:
            listed.extend(result["problems"])
        if not any(result["samples"] for result in results if result["split"] == "train"):
            forget(place, planned)
            _need_training_samples(0, listed)
        manifest = finish(place, planned, results, listed, options)
        place.clear_staging()
        return manifest
    except OSError as error:
        raise DataError(f"cannot write to --out {out}: {error}; the same command goes on from here") from error


def _need_training_samples(count: int, problems: Sequence[dict[str, Any]]) -> None:
    if count:
        return
    reasons = "".join(f"\n  {number} x {reason}" for reason, number in count_reasons(problems).most_common(10))
    examples = "".join(f"\n  {p['where']} {p['picture']}: {p['reason']}" for p in problems[:3])
    raise DataError(
        f"no picture with a caption is left to train on{':' if reasons else ' (none was found)'}{reasons}"
        f"{f'{chr(10)}for example{examples}' if examples else ''}"
    )


def _write_shards(
    place: Folder, planned: Sequence[Planned], options: Options, elsewhere: Elsewhere | None
) -> list[dict[str, Any]]:
    """The results of all shards in order; those that are whole already are kept."""
    kept = in_processes(finished, [(place, shard) for shard in planned], options.processes)
    whole = {shard.name: result for shard, result in zip(planned, kept, strict=True) if result}
    failed = {name for name, result in whole.items() if result.get("unread")}
    results = {name: result for name, result in whole.items() if not (options.retry_failed and name in failed)}
    missing = [shard for shard in planned if shard.name not in results]
    if missing:
        place.remove("manifest.json")
        put_back(place, whole)
    if results:
        print(f"{len(results)} of {len(planned)} shards are there already", file=sys.stderr)
    if failed and not options.retry_failed:
        unread = sum(results[name]["unread"] for name in failed)
        print(f"{unread:,} pictures could not be read before; --retry-failed tries them again", file=sys.stderr)
    if missing:
        progress = Progress(sum(len(shard.items) for shard in missing))
        results.update((elsewhere or write_here)(place, missing, options, progress))
        progress.show(progress.total, last=True)
    return [results[shard.name] for shard in planned]


def write_here(
    place: Folder, shards: Sequence[Planned], options: Options, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Write shards with `options.processes` processes of this machine; their results by name."""
    show = progress.show if progress else lambda done: None
    written = in_processes(_write_one, [(place, shard, options) for shard in shards], options.processes, show)
    return {shard.name: result for shard, result in zip(shards, written, strict=True)}


def _write_one(place: Folder, shard: Planned, options: Options) -> dict[str, Any]:
    collects = gc.isenabled()
    gc.disable()  # a tenth of the time: it would look through all items again and again, which hold no cycles
    try:
        return write_shard(place, shard, options, advance)
    finally:
        if collects:
            gc.enable()
