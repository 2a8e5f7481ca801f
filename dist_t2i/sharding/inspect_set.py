"""Looking at a set, wherever it lies: what is in it (`describe`), and whether every checksum holds (`verify`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_t2i.data.manifest import parse_manifest
from dist_t2i.data.shard_index import ShardIndex
from dist_t2i.errors import DataError
from dist_t2i.sharding.writing.finish import fingerprint
from dist_t2i.sharding.writing.processes import Spread, advance
from dist_t2i.sharding.writing.report import contact_sheet, index_name, some_samples
from dist_t2i.sharding.writing.tar_writer import crc32
from dist_t2i.storage.folders import Folder, locate, open_folder

_MAX_LISTED = 20


def read_set(url: str) -> tuple[Folder, dict[str, Any]]:
    """The folder of a set and its manifest. Raises DataError when there is none that can be read."""
    place = open_folder(url.removesuffix("/manifest.json"))
    try:
        return place, parse_manifest(place.read("manifest.json"), place.file_url("manifest.json"))
    except FileNotFoundError as error:
        raise DataError(f"{url}: there is no set (no manifest.json); write one with tools/shard.py") from error
    except OSError as error:
        raise DataError(f"cannot read the manifest of {url}: {error}") from error


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    numeric = [all(row[column][:1].isdigit() for row in cells[1:]) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def describe(url: str, sheet: Path | None, split: str = "train") -> str:
    """The set in words and numbers; a contact sheet of one split goes to `sheet`. Raises DataError."""
    place, manifest = read_set(url)
    if split not in manifest["splits"]:
        raise DataError(f"{url} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    tokenizer = manifest["tokenizer"]
    said = manifest["splits"][split]["captions"].get("frequent_words", ())
    lines = [
        f"{manifest.get('name', 'a set')}, {place}",
        f"fingerprint {manifest['fingerprint']}, image size {manifest.get('image_size') or 'as they were'}",
        f"tokenizer of {tokenizer['vocabulary']:,} tokens, {tokenizer['known_words']:,} words",
        "",
        _split_table(manifest["splits"]),
        "",
        f"frequent words of {split}: {' '.join(said)}",
        "",
        _bad_samples(place, manifest),
    ]
    if sheet:
        try:
            samples = some_samples(place, manifest, split)
            sheet.parent.mkdir(parents=True, exist_ok=True)
            sheet.write_bytes(contact_sheet(samples))
        except OSError as error:
            raise DataError(f"cannot make the contact sheet {sheet}: {error}") from error
        lines += ["", f"contact sheet: {sheet}"]
        lines += [f"  {sample.key}: {' | '.join(sample.captions)}" for sample in samples[:12]]
    return "\n".join(lines)


def _split_table(splits: Mapping[str, Any]) -> str:
    head = ["split", "pictures", "shards", "MB", "KB each", "short side", "captions"]
    head += ["words, mean / max", "tokens, mean / 99% / max"]
    rows = []
    for name, part in splits.items():
        captions = part["captions"]
        words, tokens = captions["words"], captions["tokens"]
        rows.append(
            (
                name,
                f"{part['samples']:,}",
                len(part["shards"]),
                f"{part['bytes'] / 1e6:,.1f}",
                f"{part['bytes'] / max(1, part['samples']) / 1e3:,.1f}",
                " to ".join(map(str, part.get("short_side") or ["not looked at"])),
                f"{captions['count']:,}",
                f"{words['mean']} / {words['max']}",
                f"{tokens['mean']} / {tokens['p99']} / {tokens['max']}",
            )
        )
    return table(head, rows)


def _bad_samples(place: Folder, manifest: dict[str, Any]) -> str:
    counts = manifest.get("bad_samples", {})
    if not counts:
        return "left out or changed: nothing"
    lines = ["left out or changed:", table(("reason", "count"), list(counts.items()))]
    try:
        listed = [json.loads(line) for line in place.read("bad_samples.jsonl").decode().splitlines()]
    except (OSError, ValueError):
        return "\n".join([*lines, "(bad_samples.jsonl cannot be read)"])
    rows = [(one["where"] or "-", one["picture"] or "-", one["reason"]) for one in listed[:_MAX_LISTED]]
    lines += ["", table(("where", "picture", "reason"), rows)]
    return "\n".join([*lines, f"and {len(listed) - _MAX_LISTED:,} more"] if len(listed) > _MAX_LISTED else lines)


Difference = tuple[str, str, str, str]
"""File, what was compared, what the set says, what was found."""


def verify(url: str, spread: Spread) -> tuple[int, list[Difference]]:
    """The number of shards, and everything in the set that is not what its checksums say: each byte is read once."""
    place, manifest = read_set(url)
    differs: list[Difference] = []
    token_sha = manifest["tokenizer"]["sha256"]
    try:
        found = hashlib.sha256(place.read(manifest["tokenizer"]["file"])).hexdigest()
    except OSError as error:
        found = f"unreadable: {error.strerror or error}"
    if found != token_sha:
        differs.append((manifest["tokenizer"]["file"], "sha256", token_sha[:16], found[:64]))
    shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
    expected = fingerprint(manifest["splits"], token_sha) if all("sha256" in shard for shard in shards) else ""
    if expected and expected != manifest["fingerprint"]:
        differs.append(("manifest.json", "fingerprint", manifest["fingerprint"][:16], expected[:16]))
    for name, part in manifest["splits"].items():
        total = sum(shard["samples"] for shard in part["shards"])
        if total != part["samples"]:
            differs.append(("manifest.json", f"samples of {name}", str(part["samples"]), str(total)))
    for some in spread(verify_shard, [(place, shard) for shard in shards]):
        differs.extend(some)
    return len(shards), differs


def verify_shard(place: Folder, shard: dict[str, Any]) -> list[Difference]:
    """What differs in one shard and its index."""
    advance()
    name = shard["name"]
    differs: list[Difference] = []
    index: ShardIndex | None = None
    try:
        data = place.read(index_name(shard))
        found = hashlib.sha256(data).hexdigest()
        if found != shard["index_sha256"]:
            differs.append((index_name(shard), "sha256", shard["index_sha256"][:16], found[:16]))
        index = ShardIndex.from_bytes(data, name)
        if len(index) != shard["samples"]:
            differs.append((index_name(shard), "samples", str(shard["samples"]), str(len(index))))
    except (OSError, DataError) as error:
        differs.append((index_name(shard), "", "an index", f"{getattr(error, 'strerror', None) or error}"[:200]))
    try:
        size, digest, crcs = _read_through(*locate(place, name), index)
    except OSError as error:
        return [*differs, (name, "", "a shard", f"{error.strerror or error}"[:200])]
    if size != shard["bytes"]:
        differs.append((name, "bytes", str(shard["bytes"]), str(size)))
    if digest != shard.get("sha256", digest):
        differs.append((name, "sha256", shard["sha256"][:16], digest[:16]))
    for key, expected, got in crcs:
        differs.append((name, f"crc32 of {key}", f"{expected:08x}", f"{got:08x}"))
    return differs


def _read_through(place: Folder, name: str, index: ShardIndex | None) -> tuple[int, str, list[tuple[str, int, int]]]:
    """Size, sha256, and (member, crc32 expected, crc32 found) where they differ; the tar is read once."""
    spans = [
        (member.offset, member.size, member.crc32, f"{key}.{member.extension}")
        for row, key in enumerate(index.keys if index else ())
        for member in index.members(row)  # type: ignore[union-attr]
    ]
    spans.sort()
    digest, at, number, crc = hashlib.sha256(), 0, 0, 0
    wrong = []
    for chunk in place.chunks(name):
        digest.update(chunk)
        view, end = memoryview(chunk), at + len(chunk)
        while number < len(spans) and spans[number][0] < end:
            offset, size, expected, key = spans[number]
            crc = crc32(view[max(0, offset - at) : max(0, offset + size - at)], crc)
            if offset + size > end:
                break
            if expected >= 0 and crc != expected:
                wrong.append((key, expected, crc))
            number, crc = number + 1, 0
        at = end
    wrong.extend((key, expected, crc) for _, _, expected, key in spans[number:])
    return at, digest.hexdigest(), wrong
