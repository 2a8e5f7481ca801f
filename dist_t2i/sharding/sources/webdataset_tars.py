"""Existing WebDataset tars as items: what webdataset, img2dataset or this tool wrote, local or by URL.

A first pass finds where each picture lies and reads captions (a local tar is skipped through, one behind a URL is
streamed to its end); the pictures are read when their new shard is written. Nothing in a tar is run: members whose
usual decoders run code are passed over and listed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from dist_t2i.data.shard_index import UNSAFE, key_and_extension
from dist_t2i.data.shard_set import PICTURES
from dist_t2i.errors import DataError
from dist_t2i.sharding.captions import decode_text
from dist_t2i.sharding.items import Item, Problem, captioned, hold_out
from dist_t2i.sharding.pictures import TarPart
from dist_t2i.storage.folders import open_folder
from dist_t2i.storage.urls import is_local, unchained

_SPLIT = re.compile(r"(train|val|test[A-Za-z0-9_-]*?)-\d+\.tar")
_MAX_TEXT = 2**24
"""A json or text member of more bytes holds no captions."""


@dataclass
class Found:
    """What a tar holds."""

    url: str
    parts: dict[str, TarPart] = field(default_factory=dict)
    texts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def tar_urls(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs of tars: braces (`{000000..000591}`), globs of local files, folders and all. Raises DataError."""
    import braceexpand

    found: list[str] = []
    for pattern in patterns:
        for one in braceexpand.braceexpand(pattern):
            if not is_local(unchained(one)):
                found.append(one)
                continue
            path = one.removeprefix("file://")
            if os.path.isdir(path):
                here = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            else:
                here = sorted(glob.glob(path)) or ([path] if os.path.isfile(path) else [])
            if not here:
                raise DataError(f"{one}: there is no such tar, and no folder with tars")
            found.extend(here)
    return list(dict.fromkeys(found))


def look_into(url: str) -> Found:
    """Where the pictures of one tar lie, and its captions. A tar that is cut short gives what came before the cut."""
    found = Found(url)
    short = url.rpartition("/")[2]
    try:
        if is_local(url):
            path = url.removeprefix("file://")
            status = os.stat(path)
            with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                _members(tar, path, status.st_size, f"{status.st_size} {status.st_mtime_ns}", False, found)
        else:
            folder, _, name = url.rpartition("/")
            with tarfile.open(fileobj=_Stream(open_folder(folder).chunks(name)), mode="r|") as tar:  # type: ignore[call-overload]
                _members(tar, url, None, "", True, found)
    except tarfile.TarError as error:
        found.problems.append(Problem(short, "", f"tar ends in the middle or is damaged: {error}"))
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror or error}") from error
    return found


class _Stream:
    """Chunks of bytes as the file that `tarfile` reads from start to end."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        pieces, held = [self._rest], len(self._rest)
        while held < size and (chunk := next(self._chunks, b"")):
            pieces.append(chunk)
            held += len(chunk)
        data = b"".join(pieces)
        self._rest = data[size:]
        return data[:size]


def _members(tar: tarfile.TarFile, url: str, end: int | None, version: str, remote: bool, found: Found) -> None:
    """Take up the members of a tar that has `end` bytes, if that is known."""
    short = url.rpartition("/")[2]
    unsafe = 0
    for info in tar:
        named = key_and_extension(info.name)
        if not info.isfile() or named is None:
            continue
        key, kind = named
        if kind.rpartition(".")[2] in UNSAFE:
            unsafe += 1
        elif end is not None and info.offset_data + info.size > end:
            found.problems.append(Problem(short, key, "tar is cut short"))
        elif kind in PICTURES:
            found.parts.setdefault(key, TarPart(url, info.offset_data, info.size, remote, version))
        elif kind in ("json", "txt", "caption", "captions", "text") and info.size <= _MAX_TEXT:
            data: IO[bytes] | None = tar.extractfile(info)
            found.texts.setdefault(key, {})[kind] = data.read() if data else b""
    if unsafe:
        found.problems.append(Problem(short, "", f"{unsafe} members are pickles, which can run code: not read"))


def webdataset_items(found: Sequence[Found], holdout: float) -> tuple[list[Item], list[Problem]]:
    """The pictures of tars that have captions, sorted by key.

    A tar called `test-00000.tar` or `val-00000.tar` keeps its split, all else is `train`; from there a share `holdout`
    goes to `test` when no tar is of another split.
    """
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    for tar in found:
        problems.extend(tar.problems)
        short = tar.url.rpartition("/")[2]
        split = _SPLIT.fullmatch(short)
        for key, part in tar.parts.items():
            texts, attributes, problem = _captions(tar.texts.get(key, {}))
            if problem:
                problems.append(Problem(short, key, problem))
                continue
            item = captioned(key, part, texts, short, problems, **attributes)
            if item:
                while item.key in items:
                    item.key += f"_{hashlib.sha256(f'{short} {key}'.encode()).hexdigest()[:8]}"
                item.split = split[1] if split else "train"
                items[item.key] = item
        for key in sorted(tar.texts.keys() - tar.parts.keys()):
            problems.append(Problem(short, key, "captions without a picture"))
    kept = [items[key] for key in sorted(items)]
    if all(item.split == "train" for item in kept):
        hold_out(kept, holdout)
    return kept, problems


def _captions(members: dict[str, bytes]) -> tuple[list[str], dict[str, Any], str]:
    """Captions, other attributes, and what is wrong with them."""
    attributes: dict[str, Any] = {}
    said: Any = None
    if "json" in members:
        try:
            attributes = json.loads(members["json"])
        except (ValueError, RecursionError):
            return [], {}, "json cannot be read"
        if not isinstance(attributes, dict):
            return [], {}, "json holds no captions"
        said = attributes.pop("captions", None) or attributes.get("caption")
        attributes.pop("caption", None)
    if not said:
        text = next((members[kind] for kind in ("txt", "text", "captions", "caption") if kind in members), None)
        said = decode_text(text).splitlines() if text is not None else None
    said = [said] if isinstance(said, str) else said
    if not said:
        return [], {}, "no caption"
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        return [], {}, "captions are no text"
    return [one for one in said if one.strip()] or [""], attributes, ""


def filtered(items: Sequence[Item], problems: list[Problem], must: str, must_not: str) -> list[Item]:
    """The items with the captions that match `must` and do not match `must_not` (regular expressions, any case).

    Captions go one by one, a picture with its last one. Raises DataError for an expression that is none.
    """
    try:
        wanted, unwanted = (re.compile(text, re.IGNORECASE) if text else None for text in (must, must_not))
    except re.error as error:
        raise DataError(f"not a regular expression: {must if error.pattern == must else must_not}: {error}") from error
    kept = []
    for item in items:
        captions = [
            text
            for text in item.captions
            if (not wanted or wanted.search(text)) and (not unwanted or not unwanted.search(text))
        ]
        if captions:
            item.captions = captions
            kept.append(item)
        else:
            problems.append(Problem("", item.key, "no caption passes the filter"))
    return kept
