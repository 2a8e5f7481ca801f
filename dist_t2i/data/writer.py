"""Writes a set: pictures and captions in, shards, indexes, tokenizer, manifest and report out.

What is planned before the first picture is read: which item goes into which shard. So several processes may write at
once, a shard is the same whoever wrote it, and a rerun keeps every shard that is whole. Every file is written aside
and renamed; the manifest comes last, and a folder without one is not a set.

    OUT/.shard/plan.json        what is being written (a hash of options, captions, and the pictures' sizes and dates)
              /train-00000.json what came of a shard: samples, checksums, rejected pictures
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from dist_t2i.data.folder import Item, Problem
from dist_t2i.data.shards import FORMAT, PICTURES, VERSION, Member, ShardIndex
from dist_t2i.errors import DataError

WORK = ".shard"
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Options:
    """How a set is written. `size`: pixels of the short side, 0 keeps pictures as they are, byte by byte."""

    size: int = 0
    shard_samples: int = 10_000
    shard_mb: float = 512.0
    vocabulary: int = 4096
    processes: int = 1
    about: dict[str, Any] = field(default_factory=dict)
    """Goes into the manifest: name, licence, credit."""


@dataclass
class Planned:
    """One shard to be: its name without extension, and its items."""

    name: str
    split: str
    items: list[Item]


def plan_shards(items: Sequence[Item], options: Options) -> list[Planned]:
    """Items -> shards, by split; in an order that a hash of the keys gives, so that neighbours have little in common."""
    planned: list[Planned] = []
    for split in dict.fromkeys(["train", *sorted({item.split for item in items})]):
        chosen = [item for item in items if item.split == split]
        chosen.sort(key=lambda item: hashlib.sha256(item.key.encode()).digest())
        number, size = 0, 0.0
        for item in chosen:
            current = planned[-1] if planned and planned[-1].split == split else None
            item_size = 0 if options.size else item.path.stat().st_size / 1e6
            full = current and (len(current.items) >= options.shard_samples or size + item_size > options.shard_mb)
            if current is None or full:
                current = Planned(f"{split}-{number:05d}", split, [])
                planned.append(current)
                number, size = number + 1, 0.0
            current.items.append(item)
            size += item_size
    return planned


def plan_hash(planned: Sequence[Planned], options: Options) -> str:
    """Names the input and the options that shape the output; the number of processes does not."""
    digest = hashlib.sha256(json.dumps([VERSION, options.size, options.vocabulary, options.about]).encode())
    for shard in planned:
        for item in shard.items:
            status = item.path.stat()
            line = [shard.name, item.key, item.captions, item.attributes, status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def write_aside(path: Path, data: bytes) -> None:
    """Write a file so that it exists whole or not at all. Raises OSError."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def picture_bytes(path: Path, size: int) -> tuple[str, bytes, tuple[int, int]]:
    """Extension, bytes, and (width, height) of the picture as it is stored. Raises PictureError, OSError.

    A JPEG, PNG or WebP that is not resized passes through untouched, once it has been seen to decode; all else
    becomes a PNG, or a JPEG if it was one.
    """
    from dist_t2i.data.decode import decode, open_picture

    if path.suffix == ".svg":
        from dist_t2i.data.openmoji import render

        return "png", render(path, size), (size, size)
    data = path.read_bytes()
    kind = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}.get(data[:2], "")
    if kind == "jpg" and not size:
        height, width = decode(data, at_least=64).shape[:2]
        return kind, data, _jpeg_size(data) or (width, height)
    picture = open_picture(data)
    if kind in PICTURES and (not size or min(picture.size) == size):
        return kind, data, picture.size
    if size and min(picture.size) > size:
        scale = size / min(picture.size)
        shape = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
        picture = picture.resize(shape, reducing_gap=3.0)
    elif kind in PICTURES:
        return kind, data, picture.size
    out = BytesIO()
    if kind == "jpg":
        picture.save(out, "JPEG", quality=_JPEG_QUALITY)
    else:
        picture.save(out, "PNG")
    return ("jpg" if kind == "jpg" else "png"), out.getvalue(), picture.size


def _jpeg_size(data: bytes) -> tuple[int, int]:
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return width, height


def write_shard(folder: Path, shard: Planned, size: int, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write one shard and its index; returns (and keeps in WORK) what came of it. Raises OSError when it cannot write."""
    aside = folder / WORK / f"{shard.name}.tar.part"
    keys, members, problems, rejected, sides = [], [], [], [], []
    with open(aside, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, item in enumerate(shard.items):
            extension, data, reason = "", b"", ""
            try:
                extension, data, sides_of = picture_bytes(item.path, size)
            except OSError as error:
                reason = f"picture is unreadable: {error.strerror}"
            except ValueError as error:
                reason = f"picture {error}"
            advance()
            if reason:
                problems.append(asdict(Problem("", item.key, reason)))
                rejected.append(number)
                continue
            text = json.dumps({"captions": item.captions, **item.attributes}, ensure_ascii=False).encode()
            keys.append(item.key)
            members.append([_add(tar, item.key, extension, data), _add(tar, item.key, "json", text)])
            sides.append(min(sides_of))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    index = ShardIndex(keys, members).to_bytes()
    result = {
        "name": f"{shard.name}.tar",
        "split": shard.split,
        "samples": len(keys),
        "bytes": aside.stat().st_size,
        "sha256": sha256(aside),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "problems": problems,
        "rejected": rejected,
        "sides": [min(sides, default=0), max(sides, default=0)],
    }
    write_aside(folder / f"{shard.name}.index", index)
    os.replace(aside, folder / f"{shard.name}.tar")
    write_aside(folder / WORK / f"{shard.name}.json", json.dumps(result).encode())
    return result


def _add(tar: tarfile.TarFile, key: str, extension: str, data: bytes) -> Member:
    """Add a member that depends on its name and bytes only."""
    info = tarfile.TarInfo(f"{key}.{extension}")
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, BytesIO(data))
    offset = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return Member(extension, offset, len(data), zlib.crc32(data))


def finished(folder: Path, shard: Planned) -> dict[str, Any] | None:
    """What came of a shard, if it is there and whole: its checksums are verified."""
    tar, index = folder / f"{shard.name}.tar", folder / f"{shard.name}.index"
    try:
        result = json.loads((folder / WORK / f"{shard.name}.json").read_bytes())
        whole = sha256(tar) == result["sha256"] and sha256(index) == result["index_sha256"]
        return result if whole else None
    except (OSError, ValueError, KeyError):
        return None


def prepare(folder: Path, name: str) -> None:
    """Make the folder for the plan called `name`, or accept it as the unfinished or finished work on the same plan.

    Raises DataError when it holds anything else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / WORK / "plan.json"
        if plan.exists():
            if json.loads(plan.read_bytes()).get("plan") != name:
                raise DataError(
                    f"--out {folder} holds a set of other pictures, captions or options: delete it or name another"
                )
            return
        if any(folder.iterdir()):
            raise DataError(f"--out {folder} is not empty: name a new folder, or delete what is in it")
        (folder / WORK).mkdir()
        write_aside(plan, json.dumps({"plan": name, "format": FORMAT, "version": VERSION}).encode())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write to --out {folder}: {error}") from error


def forget(folder: Path, planned: Sequence[Planned]) -> None:
    """Take back what was written, so that the folder can be used again. Raises OSError."""
    for shard in planned:
        for suffix in ("tar", "index"):
            (folder / f"{shard.name}.{suffix}").unlink(missing_ok=True)
    shutil.rmtree(folder / WORK)


def accepted(planned: Sequence[Planned], results: Sequence[dict[str, Any]], split: str) -> list[Item]:
    """The items of a split that were written."""
    found: list[Item] = []
    for shard, result in zip(planned, results, strict=True):
        if shard.split == split:
            refused = set(result["rejected"])
            found.extend(item for number, item in enumerate(shard.items) if number not in refused)
    return found


def count_reasons(problems: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(problem["reason"] for problem in problems)
