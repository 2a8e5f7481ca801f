"""Writes items as a set: first the shards, in several processes or on a cluster, and then all other files."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_t2i.errors import DataError
from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.writing.finish import finish, restore_names
from dist_t2i.sharding.writing.prepare import Options
from dist_t2i.sharding.writing.processes import in_processes
from dist_t2i.sharding.writing.shard_writer import (
    Results,
    ShardPlan,
    finished_result,
    plan_shards,
    reserve,
    write_shard,
)
from dist_t2i.storage.folders import WORK, Folder, open_folder
from dist_t2i.utils.progress import Progress

ShardWriter = Callable[[Folder, Sequence[ShardPlan], Options, Progress], Results]
"""Writes shards, perhaps on other machines, and returns their results by name."""


def write_set(
    out: Path | str,
    items: Sequence[Item],
    problems: Sequence[Problem],
    options: Options,
    write_shards: ShardWriter | None = None,
) -> dict[str, Any]:
    """Writes a set to a folder or URL and returns its manifest. A repeated run with the same input keeps intact shards.

    The report lists `problems`, the problems of pictures that are not in `items`. The default of `write_shards` is
    `write_here`. Raises DataError if no training picture is left, or if the folder contains other files or cannot be
    written.
    """
    folder = open_folder(out)
    listed = [dataclasses.asdict(problem) for problem in problems]
    if not any(item.split == "train" for item in items):
        raise _nothing_to_train_on(listed)
    try:
        plans = plan_shards(items, options)
        reserve(folder, plans, options)
        results = _write_missing(folder, plans, options, write_shards or write_here)
        for result in results:
            listed.extend(result["problems"])
        if not any(result["samples"] for result in results if result["split"] == "train"):
            for plan in plans:  # remove all files of this run, so that another run can use the folder
                folder.remove(f"{plan.name}.tar")
                folder.remove(f"{plan.name}.index")
            folder.remove_folder(WORK)
            raise _nothing_to_train_on(listed)
        manifest = finish(folder, plans, results, listed, options)
        folder.clear_staging()
        return manifest
    except OSError as error:
        raise DataError(f"cannot write to --out {out}: {error}; run the same command again to resume") from error


def _nothing_to_train_on(problems: Sequence[dict[str, Any]]) -> DataError:
    counts = Counter(problem["reason"] for problem in problems)
    reasons = "".join(f"\n  {number} x {reason}" for reason, number in counts.most_common(10))
    examples = "".join(f"\n  {p['where']} {p['picture']}: {p['reason']}" for p in problems[:3])
    listed = f":{reasons}\nfor example{examples}" if problems else " (no picture was found)"
    return DataError(f"no picture with a caption is left to train on{listed}")


def _write_missing(
    folder: Folder, plans: Sequence[ShardPlan], options: Options, write_shards: ShardWriter
) -> list[dict[str, Any]]:
    """Writes the shards that are missing or not intact. Returns the results of all shards in order."""
    checked = in_processes(finished_result, [(folder, plan) for plan in plans], options.processes)
    intact = {plan.name: result for plan, result in zip(plans, checked, strict=True) if result}
    failed = {name for name, result in intact.items() if result.get("unread")}
    results = {name: result for name, result in intact.items() if not (options.retry_failed and name in failed)}
    missing = [plan for plan in plans if plan.name not in results]
    if missing:
        folder.remove("manifest.json")
        restore_names(folder, intact)
    if results:
        print(f"{len(results)} of {len(plans)} shards exist already", file=sys.stderr)
    if failed and not options.retry_failed:
        unread = sum(results[name]["unread"] for name in failed)
        print(f"an earlier run could not read {unread:,} pictures; --retry-failed tries these again", file=sys.stderr)
    if missing:
        progress = Progress(sum(len(plan.items) for plan in missing))
        results.update(write_shards(folder, missing, options, progress))
        progress.show(progress.total, last=True)
    return [results[plan.name] for plan in plans]


def write_here(
    folder: Folder, plans: Sequence[ShardPlan], options: Options, progress: Progress | None = None
) -> Results:
    """Writes shards with `options.processes` processes on this machine, and returns their results by name."""
    calls = [(folder, plan, options) for plan in plans]
    enabled = gc.isenabled()
    gc.disable()  # items contain no cycles, and searching items for cycles would take 10% of the time
    try:
        results = in_processes(write_shard, calls, options.processes, progress)
    finally:
        if enabled:
            gc.enable()
    return {plan.name: result for plan, result in zip(plans, results, strict=True)}
