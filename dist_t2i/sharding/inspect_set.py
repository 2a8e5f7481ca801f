"""Describes a set in a folder or at a URL (`describe`), and checks all of its checksums (`verify`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_t2i.data.manifest import parse_manifest
from dist_t2i.data.shard_index import ShardIndex
from dist_t2i.errors import DataError
from dist_t2i.sharding.writing.finish import fingerprint
from dist_t2i.sharding.writing.processes import advance, in_processes
from dist_t2i.sharding.writing.report import contact_sheet, index_name, some_samples, split_table
from dist_t2i.sharding.writing.tar_writer import crc32
from dist_t2i.storage.folders import Folder, locate, open_folder
from dist_t2i.utils.progress import Progress

_MAX_LISTED = 20


def read_set(url: str) -> tuple[Folder, dict[str, Any]]:
    """The folder of a set and its manifest. Raises DataError if the manifest does not exist or cannot be read."""
    folder = open_folder(url.removesuffix("/manifest.json"))
    try:
        return folder, parse_manifest(folder.read("manifest.json"), folder.file_url("manifest.json"))
    except FileNotFoundError as error:
        raise DataError(f"{url}: there is no set (manifest.json is missing); see tools/shard.py") from error
    except OSError as error:
        raise DataError(f"cannot read the manifest of {url}: {error}") from error


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a table as text. Columns of numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    columns = []
    for column in zip(*cells, strict=True):
        align = str.rjust if all(cell[:1].isdigit() for cell in column[1:]) else str.ljust
        columns.append([align(cell, max(map(len, column))) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def describe(url: str, sheet: Path | None, split: str = "train") -> str:
    """Returns a description of a set; writes a contact sheet of `split` to `sheet` if given. Raises DataError."""
    folder, manifest = read_set(url)
    if split not in manifest["splits"]:
        raise DataError(f"{url} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    tokenizer = manifest["tokenizer"]
    lines = [
        f"{manifest.get('name', 'a set')}, {folder}",
        f"fingerprint {manifest['fingerprint']}, image size {manifest.get('image_size') or 'unchanged'}",
        f"tokenizer of {tokenizer['vocabulary']:,} tokens, {tokenizer['known_words']:,} words",
        "",
        table(*split_table(manifest["splits"])),
        "",
        f"frequent words of {split}: {' '.join(manifest['splits'][split]['captions'].get('frequent_words', ()))}",
        "",
        _bad_samples(folder, manifest),
    ]
    if sheet:
        try:
            samples = some_samples(folder, manifest, split)
            sheet.parent.mkdir(parents=True, exist_ok=True)
            sheet.write_bytes(contact_sheet(samples))
        except OSError as error:
            raise DataError(f"cannot make the contact sheet {sheet}: {error}") from error
        lines += ["", f"contact sheet: {sheet}"]
        lines += [f"  {sample.key}: {' | '.join(sample.captions)}" for sample in samples[:12]]
    return "\n".join(lines)


def _bad_samples(folder: Folder, manifest: dict[str, Any]) -> str:
    counts = manifest.get("bad_samples", {})
    if not counts:
        return "left out or changed: nothing"
    text = f"left out or changed:\n{table(('reason', 'count'), list(counts.items()))}\n"
    try:
        listed = [json.loads(line) for line in folder.read("bad_samples.jsonl").decode().splitlines()]
    except (OSError, ValueError):
        return f"{text}(bad_samples.jsonl cannot be read)"
    rows = [(entry["where"] or "-", entry["picture"] or "-", entry["reason"]) for entry in listed[:_MAX_LISTED]]
    more = f"\nand {len(listed) - _MAX_LISTED:,} more" if len(listed) > _MAX_LISTED else ""
    return f"{text}\n{table(('where', 'picture', 'reason'), rows)}{more}"


Difference = tuple[str, str, str, str]
"""A file, what was compared, the value in the manifest or index, and the actual value."""


def verify(url: str, processes: int) -> tuple[int, list[Difference]]:
    """The number of shards, and all differences between the set and its manifest or indexes. Reads each byte once."""
    folder, manifest = read_set(url)
    differences: list[Difference] = []
    tokenizer = manifest["tokenizer"]
    try:
        actual = hashlib.sha256(folder.read(tokenizer["file"])).hexdigest()
    except OSError as error:
        actual = f"unreadable: {error.strerror or error}"
    if actual != tokenizer["sha256"]:
        differences.append((tokenizer["file"], "sha256", tokenizer["sha256"][:16], actual[:64]))
    shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
    if all("sha256" in shard for shard in shards):
        expected = fingerprint(manifest["splits"], tokenizer["sha256"])
        if expected != manifest["fingerprint"]:
            differences.append(("manifest.json", "fingerprint", manifest["fingerprint"][:16], expected[:16]))
    for name, part in manifest["splits"].items():
        total = sum(shard["samples"] for shard in part["shards"])
        if total != part["samples"]:
            differences.append(("manifest.json", f"samples of {name}", str(part["samples"]), str(total)))
    calls = [(folder, shard) for shard in shards]
    of_shards = in_processes(_verify_shard, calls, processes, Progress(len(shards), "shards"))
    return len(shards), sum(of_shards, differences)


def _verify_shard(folder: Folder, shard: dict[str, Any]) -> list[Difference]:
    advance()
    name, index_file = shard["name"], index_name(shard)
    differences: list[Difference] = []
    index = ShardIndex([], [])
    try:
        data = folder.read(index_file)
        if (digest := hashlib.sha256(data).hexdigest()) != shard["index_sha256"]:
            differences.append((index_file, "sha256", shard["index_sha256"][:16], digest[:16]))
        index = ShardIndex.from_bytes(data, name)
        if len(index) != shard["samples"]:
            differences.append((index_file, "samples", str(shard["samples"]), str(len(index))))
    except (OSError, DataError) as error:
        differences.append((index_file, "", "an index", f"{getattr(error, 'strerror', None) or error}"[:200]))
    try:
        size, digest, wrong = _read_through(*locate(folder, name), index)
    except OSError as error:
        return [*differences, (name, "", "a shard", f"{error.strerror or error}"[:200])]
    if size != shard["bytes"]:
        differences.append((name, "bytes", str(shard["bytes"]), str(size)))
    if digest != shard.get("sha256", digest):
        differences.append((name, "sha256", shard["sha256"][:16], digest[:16]))
    for member, expected, actual in wrong:
        differences.append((name, f"crc32 of {member}", f"{expected:08x}", f"{actual:08x}"))
    return differences


def _read_through(folder: Folder, name: str, index: ShardIndex) -> tuple[int, str, list[tuple[str, int, int]]]:
    """Reads a tar once. Returns size, SHA-256, and (member, expected CRC-32, actual CRC-32) of damaged members."""
    spans = sorted(
        (member.offset, member.size, member.crc32, f"{key}.{member.extension}")
        for row, key in enumerate(index.keys)
        for member in index.members(row)
    )
    digest, start, number, crc = hashlib.sha256(), 0, 0, 0
    wrong = []
    for chunk in folder.chunks(name):
        digest.update(chunk)
        view, end = memoryview(chunk), start + len(chunk)
        while number < len(spans) and spans[number][0] < end:
            offset, size, expected, member = spans[number]
            crc = crc32(view[max(0, offset - start) : max(0, offset + size - start)], crc)
            if offset + size > end:
                break
            if expected >= 0 and crc != expected:
                wrong.append((member, expected, crc))
            number, crc = number + 1, 0
        start = end
    wrong.extend((member, expected, crc) for _, _, expected, member in spans[number:])
    return start, digest.hexdigest(), wrong
