"""Plans shards and writes one: pictures and captions in, a tar, its index and a note of what came of it out.

What is planned before the first picture is read: which item goes into which shard. So several processes or machines
may write at once, a shard is the same whoever wrote it, and a rerun keeps every shard that is whole.

    OUT/.shard/plan.json        what is being written (a hash of options, captions, and the pictures' sizes and dates)
              /train-00000.json what came of a shard: samples, checksums, rejected pictures
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_t2i.data.manifest import FORMAT, VERSION
from dist_t2i.data.shard_index import Member, ShardIndex
from dist_t2i.errors import DataError
from dist_t2i.sharding.items import Item, Problem
from dist_t2i.sharding.pictures import DownloadError
from dist_t2i.sharding.writing.prepare import Options, prepare
from dist_t2i.sharding.writing.tar_writer import TarWriter
from dist_t2i.storage.folders import WORK, Folder

_ROOM = 3 * 1024
"""Bytes that a sample takes in a tar beside those of its picture, roughly."""
_quoted = json.encoder.encode_basestring  # type: ignore[attr-defined]


@dataclass
class Planned:
    """One shard to be: its name without extension, and its items."""

    name: str
    split: str
    items: list[Item]
    stamps: list[str]
    """What changes when a picture does, one an item."""
    megabytes: float = 0.0
    """Of its pictures, as far as they are known."""


def plan_shards(items: Sequence[Item], options: Options) -> list[Planned]:
    """Items -> shards, by split; in an order that a hash of the keys gives, so that neighbours have little in common.

    Megabytes are those of the pictures before they are prepared, as far as they are known: when pictures shrink, change
    their format or come from URLs, only the number of samples bounds a shard.
    """
    planned: list[Planned] = []
    chosen: dict[str, list[Item]] = {"train": []}
    for item in items:
        chosen.setdefault(item.split, []).append(item)
    for split in ("train", *sorted(set(chosen) - {"train"})):
        number = 0
        for item in sorted(chosen[split], key=lambda item: hashlib.sha256(item.key.encode()).digest()):
            current = planned[-1] if planned and planned[-1].split == split else None
            item_size, stamp = _known(item)
            if options.size or options.format:
                item_size = 0.0
            full = current and (
                len(current.items) >= options.shard_samples or current.megabytes + item_size > options.shard_mb
            )
            if current is None or full:
                current = Planned(f"{split}-{number:05d}", split, [], [])
                planned.append(current)
                number += 1
            current.items.append(item)
            current.stamps.append(stamp)
            current.megabytes += item_size
    return planned


def _known(item: Item) -> tuple[float, str]:
    """Megabytes and stamp of the picture of an item."""
    try:
        size, stamp = item.picture.known()
    except OSError:  # whoever writes the shard will say why
        return 0.0, ""
    return size / 1e6, stamp


def plan_hash(planned: Sequence[Planned], options: Options) -> str:
    """Names the input and the options that shape the output; the number of processes does not."""
    shaping = [VERSION, options.shaping(), options.vocabulary, options.about]
    digest = hashlib.sha256(json.dumps(shaping).encode())
    for shard in planned:
        lines = [shard.name]
        for item, stamp in zip(shard.items, shard.stamps, strict=True):  # no caption has a line end or a control sign
            lines += (item.key, stamp, *item.captions, repr(item.attributes) if item.attributes else "", "\0")
        digest.update("\n".join(lines).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def write_shard(
    place: Folder, shard: Planned, options: Options, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write one shard and its index; returns (and keeps in WORK) what came of it. Raises OSError when it cannot write."""
    aside = place.staging / f"{shard.name}.tar.part"
    keys, members, problems, rejected, sides = [], [], [], [], []
    captions = unread = 0
    with TarWriter(aside, round(shard.megabytes * 1e6) + len(shard.items) * _ROOM if shard.megabytes else 0) as tar:
        for number, (item, data) in enumerate(_readings(shard.items, options.threads)):
            advance()
            try:
                if isinstance(data, OSError):
                    raise data
                extension, data, shape = prepare(data, options)
            except (OSError, ValueError) as error:
                problems.append(asdict(Problem("", item.key, _reason(item, error))))
                rejected.append(number)
                unread += isinstance(error, OSError)
                continue
            text = _json(item)
            keys.append(item.key)
            placed = tar.add(f"{item.key}.{extension}", data)
            members.append([Member(extension, *placed), Member("json", *tar.add(f"{item.key}.json", text))])
            sides.append(min(shape))
            captions += len(item.captions)
        tar.finish()
    index = ShardIndex(keys, members).to_bytes()
    result = {
        "name": f"{shard.name}.tar",
        "file": f"{shard.name}.tar",
        "split": shard.split,
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
    place.upload(aside, f"{shard.name}.tar")
    place.write(f"{shard.name}.index", index)
    place.write(f"{WORK}/{shard.name}.json", json.dumps(result).encode())
    return result


def _json(item: Item) -> bytes:
    """What `json.dumps` makes of captions and attributes; captions alone, the usual case, five times faster."""
    if item.attributes:
        text = json.dumps({"captions": item.captions, **item.attributes}, ensure_ascii=False)
    else:
        text = f'{{"captions": [{", ".join(map(_quoted, item.captions))}]}}'
    return text.encode("utf-8", "backslashreplace")


def _reason(item: Item, error: Exception) -> str:
    if isinstance(error, DownloadError):
        return f"picture cannot be downloaded: {error}"
    if isinstance(error, OSError):
        missing = isinstance(error, FileNotFoundError) and error.strerror is None
        return f"picture is unreadable: {'it is not there' if missing else error.strerror or error}"
    return f"picture {error}"


def _read(item: Item) -> bytes | OSError:
    try:
        return item.picture.read()
    except OSError as error:
        return error
    except DataError as error:
        return OSError(str(error))


def _readings(items: Sequence[Item], threads: int) -> Iterator[tuple[Item, Any]]:
    """Each item with its picture's bytes, or the OSError that came instead; from far away, several at once."""
    if threads <= 1 or not any(item.picture.remote for item in items):
        for item in items:
            yield item, _read(item)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append((item, pool.submit(_read, item)))
            if len(ahead) >= 2 * threads:
                done, future = ahead.popleft()
                yield done, future.result()
        for done, future in ahead:
            yield done, future.result()


def finished(place: Folder, shard: Planned) -> dict[str, Any] | None:
    """What came of a shard, if it is there and whole: its checksums are verified."""
    try:
        result = json.loads(place.read(f"{WORK}/{shard.name}.json"))
        tar = result["file"]
        if not tar:  # nothing was left of it, so that no file was kept
            return result
        whole = place.checksum(tar) == result["sha256"]
        return result if whole and place.checksum(f"{tar[:-4]}.index") == result["index_sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def reserve(place: Folder, name: str) -> None:
    """Make the folder for the plan called `name`, or accept it as the unfinished or finished work on the same plan.

    Raises DataError when it holds anything else, or cannot be written.
    """
    plan = f"{WORK}/plan.json"
    try:
        if place.path is not None:
            place.path.mkdir(parents=True, exist_ok=True)
        try:
            held = place.read(plan)
        except FileNotFoundError:
            if place.names():
                raise DataError(f"--out {place} is not empty: name a new folder, or delete what is in it") from None
            if place.path is not None:
                (place.path / WORK).mkdir()
            place.write(plan, json.dumps({"plan": name, "format": FORMAT, "version": VERSION}).encode())
            return
        if json.loads(held).get("plan") != name:
            raise DataError(
                f"--out {place} holds a set of other pictures, captions or options: delete it or name another"
            )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write to --out {place}: {error}") from error


def forget(place: Folder, planned: Sequence[Planned]) -> None:
    """Take back what was written, so that the folder can be used again. Raises OSError."""
    for shard in planned:
        for name in (f"{shard.name}.tar", f"{shard.name}.index", f"{WORK}/{shard.name}.json"):
            place.remove(name)
    place.remove(f"{WORK}/plan.json")
    if place.path is not None:
        place.clear_staging()
        (place.path / WORK).rmdir()


def accepted(planned: Sequence[Planned], results: Sequence[dict[str, Any]], split: str) -> list[Item]:
    """The items of a split that were written; results come in the order of the plan."""
    found: list[Item] = []
    for shard, result in zip(planned, results, strict=True):
        if shard.split == split:
            refused = set(result["rejected"])
            found.extend(item for number, item in enumerate(shard.items) if number not in refused)
    return found


def count_reasons(problems: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many lines of bad_samples.jsonl give each reason."""
    return Counter(problem["reason"] for problem in problems)
