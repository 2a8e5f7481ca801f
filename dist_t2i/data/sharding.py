"""The whole way from items to a set: shards in several processes, then tokenizer, manifest and report."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_t2i.data.folder import Item, Problem
from dist_t2i.data.report import caption_statistics, write_report
from dist_t2i.data.shards import FORMAT, VERSION, open_set
from dist_t2i.data.tokenizer import Tokenizer, train_tokenizer
from dist_t2i.data.writer import (
    WORK,
    Options,
    Planned,
    accepted,
    count_reasons,
    finished,
    forget,
    plan_hash,
    plan_shards,
    prepare,
    write_aside,
    write_shard,
)
from dist_t2i.errors import DataError

_counter: Any = None


class Progress:
    """One line: pictures done, rate, time left. In place on a terminal; every ten seconds elsewhere."""

    def __init__(self, total: int, unit: str = "pictures") -> None:
        self.total, self.unit = total, unit
        self._start = self._last = time.monotonic()
        self._done_before: int | None = None
        self._live = sys.stderr.isatty()

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._last < (0.2 if self._live else 10.0):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-3)
        left = (self.total - done) / rate if rate else 0.0
        text = f"{done:,} of {self.total:,} {self.unit}, {rate:,.0f}/s, {_clock(left)} left"
        print(f"\r{text}\x1b[K" if self._live else text, end="\n" if last or not self._live else "", file=sys.stderr)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def write_set(folder: Path, items: Sequence[Item], problems: Sequence[Problem], options: Options) -> dict[str, Any]:
    """Write the set into `folder` and return its manifest; a second call with the same input keeps whole shards.

    Raises: DataError when there is nothing to train on, the folder holds something else, or cannot be written.
    """
    listed = [dataclasses.asdict(problem) for problem in problems]
    _need_training_samples(sum(item.split == "train" for item in items), listed)
    try:
        planned = plan_shards(items, options)
        prepare(folder, plan_hash(planned, options))
        results = _write_shards(folder, planned, options)
        for result in results:
            listed.extend(result["problems"])
        if not any(result["samples"] for result in results if result["split"] == "train"):
            forget(folder, planned)
            _need_training_samples(0, listed)
        return _finish(folder, planned, results, listed, options)
    except OSError as error:
        raise DataError(f"cannot write to --out {folder}: {error}; the same command goes on from here") from error


def _need_training_samples(count: int, problems: Sequence[dict[str, Any]]) -> None:
    if count:
        return
    reasons = "".join(f"\n  {number} x {reason}" for reason, number in count_reasons(problems).most_common(10))
    examples = "".join(f"\n  {p['where']} {p['picture']}: {p['reason']}" for p in problems[:3])
    raise DataError(
        f"no picture with a caption is left to train on{':' if reasons else ' (none was found)'}{reasons}"
        f"{f'{chr(10)}for example{examples}' if examples else ''}"
    )


def _write_shards(folder: Path, planned: Sequence[Planned], options: Options) -> list[dict[str, Any]]:
    """The results of all shards in order; those that are whole already are kept."""
    results = {shard.name: kept for shard in planned if (kept := finished(folder, shard))}
    missing = [shard for shard in planned if shard.name not in results]
    if missing:
        (folder / "manifest.json").unlink(missing_ok=True)
    if results:
        print(f"{len(results)} of {len(planned)} shards are there already", file=sys.stderr)
    progress = Progress(sum(len(shard.items) for shard in missing))
    if options.processes <= 1 or len(missing) <= 1:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress.show(done)

        results.update({shard.name: write_shard(folder, shard, options.size, advance) for shard in missing})
    else:
        results.update(_in_processes(folder, missing, options, progress))
    if missing:
        progress.show(progress.total, last=True)
    return [results[shard.name] for shard in planned]


def _in_processes(
    folder: Path, missing: Sequence[Planned], options: Options, progress: Progress
) -> dict[str, dict[str, Any]]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(options.processes, context, _start_process, (counter,))
    waiting = {pool.submit(_write_one, folder, shard, options.size): shard.name for shard in missing}
    results = {}
    try:
        while waiting:
            done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
            progress.show(counter.value)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            "a process that writes shards was killed (out of memory? Try a smaller --processes); "
            "the same command goes on from here"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return results


def _start_process(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_one(folder: Path, shard: Planned, size: int) -> dict[str, Any]:
    def advance() -> None:
        with _counter.get_lock():
            _counter.value += 1

    return write_shard(folder, shard, size, advance)


def _finish(
    folder: Path,
    planned: Sequence[Planned],
    results: Sequence[dict[str, Any]],
    problems: list[dict[str, Any]],
    options: Options,
) -> dict[str, Any]:
    """Number the shards without gaps, then write everything that is not a shard; the manifest last."""
    (folder / "manifest.json").unlink(missing_ok=True)
    kept = {split: accepted(planned, results, split) for split in dict.fromkeys(shard.split for shard in planned)}
    counts = Counter(caption for item in kept["train"] for caption in item.captions)
    tokenizer = train_tokenizer(counts, options.vocabulary)
    write_aside(folder / "tokenizer.json", tokenizer.text.encode())
    shards = _number(folder, results)
    splits = {
        split: {
            "samples": sum(shard["samples"] for shard in shards[split]),
            "bytes": sum(shard["bytes"] for shard in shards[split]),
            "captions": caption_statistics([item.captions for item in kept[split]], tokenizer),
            "short_side": [
                min(r["sides"][0] for r in results if r["split"] == split and r["samples"]),
                max(r["sides"][1] for r in results if r["split"] == split and r["samples"]),
            ],
            "shards": shards[split],
        }
        for split in kept
        if shards[split]
    }
    manifest = _manifest(splits, tokenizer, problems, options)
    lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    write_aside(folder / "bad_samples.jsonl", lines.encode("utf-8", "backslashreplace"))
    if options.about.get("credit"):
        about = options.about
        text = f"# {about['name']}\n\n{about['credit']}\n\nLicence: {about.get('licence', 'unknown')}\n"
        write_aside(folder / "README.md", text.encode())
    manifest_bytes = json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"
    aside = folder / WORK / "manifest.json"
    write_aside(aside, manifest_bytes)
    write_report(folder, open_set(aside).at(folder), problems)
    os.replace(aside, folder / "manifest.json")
    return manifest


def _number(folder: Path, results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Drop empty shards and rename the rest so that numbers have no gap; returns the shards of each split."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        listed = shards.setdefault(result["split"], [])
        old = folder / result["name"]
        if not result["samples"]:
            old.unlink()
            old.with_suffix(".index").unlink()
            continue
        new = folder / f"{result['split']}-{len(listed):05d}.tar"
        if new != old:
            os.replace(old.with_suffix(".index"), new.with_suffix(".index"))
            os.replace(old, new)
        listed.append(
            {"name": new.name} | {name: result[name] for name in ("samples", "bytes", "sha256", "index_sha256")}
        )
    return shards


def _manifest(
    splits: dict[str, Any], tokenizer: Tokenizer, problems: Sequence[dict[str, Any]], options: Options
) -> dict[str, Any]:
    token_sha = hashlib.sha256(tokenizer.text.encode()).hexdigest()
    sums = [f"{shard['name']} {shard['sha256']}" for split in splits.values() for shard in split["shards"]]
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": hashlib.sha256("\n".join([*sums, token_sha]).encode()).hexdigest(),
        **options.about,
        "image_size": options.size or None,
        "splits": splits,
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": token_sha,
            "vocabulary": tokenizer.vocab_size,
            "known_words": len(tokenizer.known_words),
        },
        "bad_samples": dict(sorted(count_reasons(problems).items())),
    }
