"""Plans shards and writes each shard: a tar, its index and a file with the result.

The plan assigns each item to a shard before the first picture is read. Therefore several processes or machines can
write shards at the same time, and the content of a shard does not depend on the process that writes it. A rerun keeps
intact shards.

    OUT/.shard/plan.json        a hash of the options, the captions, and the sizes and dates of the pictures
              /train-00000.json result of a shard: samples, checksums, rejected pictures
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_t2i.data.manifest import FORMAT, VERSION
from dist_t2i.data.shard_index import Member, ShardIndex
from dist_t2i.errors import DataError
from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.pictures import DownloadError
from dist_t2i.sharding.writing.prepare import Options, prepare
from dist_t2i.sharding.writing.processes import advance
from dist_t2i.sharding.writing.tar_writer import TarWriter
from dist_t2i.storage.folders import WORK, Folder

_OVERHEAD = 3 * 1024
"""The approximate number of bytes that a sample takes in a tar, not counting its picture."""
Results = dict[str, dict[str, Any]]
"""Name of a shard's plan -> the result of `write_shard` for this plan."""
_quoted = json.encoder.encode_basestring  # type: ignore[attr-defined]


@dataclass
class ShardPlan:
    """A shard to write: its name without extension, and its items."""

    name: str
    split: str
    items: list[Item]
    stamps: list[str]
    """For each item, a text that changes when its picture changes."""
    megabytes: float = 0.0
    """The total size of the pictures whose sizes are known, in megabytes."""


def plan_shards(items: Sequence[Item], options: Options) -> list[ShardPlan]:
    """Assigns the items of each split to shards, in the order of a hash of the keys, so that neighbors are unrelated.

    The limit in megabytes applies to the sizes of pictures before they are prepared. Pictures from URLs, and pictures
    that are shrunk or converted, count as 0 MB, so that only the number of samples limits their shards.
    """
    plans: list[ShardPlan] = []
    splits: dict[str, list[Item]] = {"train": []}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    for split in ("train", *sorted(set(splits) - {"train"})):
        numbers = itertools.count()
        plan: ShardPlan | None = None
        for item in sorted(splits[split], key=lambda item: hashlib.sha256(item.key.encode()).digest()):
            try:
                size, stamp = item.picture.stat()
            except OSError:  # `write_shard` will list the picture as a problem
                size, stamp = 0, ""
            megabytes = 0.0 if options.size or options.format else size / 1e6
            full = plan and (len(plan.items) >= options.shard_samples or plan.megabytes + megabytes > options.shard_mb)
            if plan is None or full:
                plan = ShardPlan(f"{split}-{next(numbers):05d}", split, [], [])
                plans.append(plan)
            plan.items.append(item)
            plan.stamps.append(stamp)
            plan.megabytes += megabytes
    return plans


def _plan_hash(plans: Sequence[ShardPlan], options: Options) -> str:
    """A hash of the input and of all options that change the output, which excludes the number of processes."""
    pictures = [options.size, options.format, options.quality, options.check, options.min_side, options.max_aspect]
    digest = hashlib.sha256(json.dumps([VERSION, pictures, options.vocabulary, options.about]).encode())
    for plan in plans:
        lines = [plan.name]
        # Captions contain no control characters, so "\n" and "\0" separate the parts without ambiguity.
        for item, stamp in zip(plan.items, plan.stamps, strict=True):
            lines += (item.key, stamp, *item.captions, repr(item.attributes) if item.attributes else "", "\0")
        digest.update("\n".join(lines).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def write_shard(folder: Folder, plan: ShardPlan, options: Options) -> dict[str, Any]:
    """Writes one shard and its index. Returns the result, which is also written to WORK. Raises OSError."""
    path = folder.staging / f"{plan.name}.tar.part"
    keys, members, problems, rejected, sides = [], [], [], [], []
    captions = unread = 0
    with TarWriter(path, round(plan.megabytes * 1e6) + len(plan.items) * _OVERHEAD if plan.megabytes else 0) as tar:
        for number, (item, data) in enumerate(_read_all(plan.items, options.threads)):
            advance()
            try:
                if isinstance(data, OSError):
                    raise data
                extension, data, shape = prepare(data, options)
            except (OSError, ValueError) as error:
                problems.append(asdict(Problem("", item.key, _reason(error))))
                rejected.append(number)
                unread += isinstance(error, OSError)
                continue
            span = tar.add(f"{item.key}.{extension}", data)
            keys.append(item.key)
            members.append([Member(extension, *span), Member("json", *tar.add(f"{item.key}.json", _json(item)))])
            sides.append(min(shape))
            captions += len(item.captions)
        tar.finish()
    index = ShardIndex(keys, members).to_bytes()
    result = {
        "name": f"{plan.name}.tar",
        "file": f"{plan.name}.tar",
        "split": plan.split,
        "samples": len(keys),
        "bytes": tar.size,
        "sha256": tar.sha256,
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "captions": captions,
        "problems": problems,
        "rejected": rejected,
        "unread": unread,
        "sides": [min(sides, default=0), max(sides, default=0)],
    }
    folder.upload(path, f"{plan.name}.tar")
    folder.write(f"{plan.name}.index", index)
    folder.write(f"{WORK}/{plan.name}.json", json.dumps(result).encode())
    return result


def _json(item: Item) -> bytes:
    """The captions and attributes of an item as `json.dumps` writes them. For items without attributes (the usual
    case), faster code than `json.dumps` builds the text in a fifth of the time."""
    if item.attributes:
        text = json.dumps({"captions": item.captions, **item.attributes}, ensure_ascii=False)
    else:
        text = f'{{"captions": [{", ".join(map(_quoted, item.captions))}]}}'
    return text.encode("utf-8", "backslashreplace")


def _reason(error: Exception) -> str:
    if isinstance(error, DownloadError):
        return f"picture cannot be downloaded: {error}"
    if isinstance(error, OSError):
        missing = isinstance(error, FileNotFoundError) and error.strerror is None
        return f"picture is unreadable: {'it does not exist' if missing else error.strerror or error}"
    return f"picture {error}"


def _read(item: Item) -> bytes | OSError:
    try:
        return item.picture.read()
    except OSError as error:
        return error
    except DataError as error:
        return OSError(str(error))


def _read_all(items: Sequence[Item], threads: int) -> Iterator[tuple[Item, Any]]:
    """Yields each item with the bytes of its picture or an OSError. Remote pictures are read in parallel."""
    if threads <= 1 or not any(item.picture.remote for item in items):
        yield from ((item, _read(item)) for item in items)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: deque = deque()
        for item in items:
            pending.append((item, pool.submit(_read, item)))
            if len(pending) >= 2 * threads:
                first, future = pending.popleft()
                yield first, future.result()
        for item, future in pending:
            yield item, future.result()


def finished_result(folder: Folder, plan: ShardPlan) -> dict[str, Any] | None:
    """The result of a shard if its files exist and match their checksums; otherwise None."""
    try:
        result = json.loads(folder.read(f"{WORK}/{plan.name}.json"))
        tar = result["file"]  # "" if the shard has no samples and therefore no files
        sums = {tar: result["sha256"], f"{tar[:-4]}.index": result["index_sha256"]} if tar else {}
        return result if all(folder.checksum(name) == expected for name, expected in sums.items()) else None
    except (OSError, ValueError, KeyError):
        return None


def reserve(folder: Folder, plans: Sequence[ShardPlan], options: Options) -> None:
    """Creates the folder for these plans, or accepts a folder that was created for the same plans. Raises DataError if
    the folder contains other files or cannot be written."""
    file, plan = f"{WORK}/plan.json", _plan_hash(plans, options)
    try:
        with contextlib.suppress(FileNotFoundError):
            if json.loads(folder.read(file)).get("plan") == plan:
                return
            others = "a set from other pictures, captions or options"
            raise DataError(f"--out {folder} contains {others}: delete the folder or name another folder")
        if folder.names():
            raise DataError(f"--out {folder} is not empty: name a new folder, or delete its contents")
        if folder.path is not None:
            (folder.path / WORK).mkdir(parents=True)
        folder.write(file, json.dumps({"plan": plan, "format": FORMAT, "version": VERSION}).encode())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write to --out {folder}: {error}") from error
