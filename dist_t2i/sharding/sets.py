"""The whole way from items to a set: shards in several processes or on a cluster, then everything that is not a shard."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_t2i.data.destination import Place, open_place
from dist_t2i.data.progress import Progress
from dist_t2i.errors import DataError
from dist_t2i.sharding.finishing import finish, put_back
from dist_t2i.sharding.folder import Item, Problem
from dist_t2i.sharding.writer import (
    Options,
    Planned,
    count_reasons,
    finished,
    forget,
    plan_hash,
    plan_shards,
    reserve,
    write_shard,
)

Elsewhere = Callable[[Place, Sequence[Planned], Options, Progress], dict[str, dict[str, Any]]]
"""Writes shards on other machines and returns their results by name."""
_counter: Any = None


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
    place = open_place(out)
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
    place: Place, planned: Sequence[Planned], options: Options, elsewhere: Elsewhere | None
) -> list[dict[str, Any]]:
    """The results of all shards in order; those that are whole already are kept."""
    kept = in_processes(finished, [(place, shard) for shard in planned], options.processes)
    results = {shard.name: result for shard, result in zip(planned, kept, strict=True) if result}
    missing = [shard for shard in planned if shard.name not in results]
    if missing:
        place.remove("manifest.json")
        put_back(place, results)
    if results:
        print(f"{len(results)} of {len(planned)} shards are there already", file=sys.stderr)
    if missing:
        progress = Progress(sum(len(shard.items) for shard in missing))
        results.update((elsewhere or write_here)(place, missing, options, progress))
        progress.show(progress.total, last=True)
    return [results[shard.name] for shard in planned]


def write_here(
    place: Place, shards: Sequence[Planned], options: Options, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Write shards with `options.processes` processes of this machine; their results by name."""
    show = progress.show if progress else lambda done: None
    written = in_processes(_write_one, [(place, shard, options) for shard in shards], options.processes, show)
    return {shard.name: result for shard, result in zip(shards, written, strict=True)}


def in_processes(
    work: Callable, arguments: Sequence[tuple], processes: int, show: Callable[[int], None] = lambda done: None
) -> list[Any]:
    """`[work(*a) for a in arguments]`, in several processes; `show` hears how often `advance` was called in them.

    Raises DataError when a process is killed.
    """
    global _counter
    if processes <= 1 or len(arguments) <= 1:
        _counter = _Count(show)
        return [work(*one) for one in arguments]
    # A client of an object store has threads, and a fork of a process that has them hangs (see apart.py).
    forks = sys.platform == "linux" and not {"obstore", "fsspec"} & sys.modules.keys()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(arguments)), context, _start_process, (counter,))
    waiting = {pool.submit(work, *one): number for number, one in enumerate(arguments)}
    results: list[Any] = [None] * len(arguments)
    try:
        while waiting:
            done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
            show(counter.value)
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise DataError(
                "a process was killed (out of memory? Try a smaller --processes); the same command goes on from here"
            ) from error
        raise
    pool.shutdown()  # a process that comes too late for any work must still find what it was started with
    return results


class _Count:
    """Counts in one process what `multiprocessing.Value` counts in several."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.value, self._show = 0, show

    def add(self) -> None:
        self.value += 1
        if not self.value & 15:
            self._show(self.value)


def _start_process(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def advance() -> None:
    """One more picture is done; called by the work that `in_processes` runs."""
    if isinstance(_counter, _Count):
        _counter.add()
    elif _counter is not None:
        with _counter.get_lock():
            _counter.value += 1


def _write_one(place: Place, shard: Planned, options: Options) -> dict[str, Any]:
    collects = gc.isenabled()
    gc.disable()  # a tenth of the time: it would look through all items again and again, which hold no cycles
    try:
        return write_shard(place, shard, options, advance)
    finally:
        if collects:
            gc.enable()
